"""The asyncio client: client.py with `await`. What is not about waiting is shared, in _call.py."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc

from tidemill import _call
from tidemill._call import CallOptions, Prompt, Tls
from tidemill._failover import Received, Routers, Tries
from tidemill.errors import Unavailable
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceStub
from tidemill.types import Chunk, Completion, Message, ModelCard, SamplingParams, Slo


class AsyncClient:
    """Talks to a Tidemill router from one event loop; close it, or use it as a context manager.

        async with AsyncClient("127.0.0.1:7071") as client:
            async for chunk in client.stream("def fib(n):", max_tokens=64):
                print(chunk.text, end="")

    Every method raises the errors of tidemill.errors. What fails in a way that may pass (Overloaded, Unavailable) is
    tried at once at every other router there is, and then again at all of them, up to `retries` times with growing
    pauses. A stream goes on after the tokens that have come, and then has as many tries again.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:7071",
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 600.0,
        retries: int = 3,
        stall: float = 5.0,
    ) -> None:
        """`address`: of a router, or of several that serve the same (`"a:7071,b:7071"` or a list): each is used in its
        turn, and one that fails is passed over for a while. `timeout`: seconds for one call with all its tries; it
        becomes the request's deadline on every worker. `stall`: seconds after which a router that is connected but
        answers no pings is given up.
        """
        self._options = CallOptions(token, tls, timeout, retries, stall)
        self._addresses = _call.addresses_of(address)
        self._channels = [self._open(each, tls) for each in self._addresses]
        self._stubs = [InferenceStub(each) for each in self._channels]  # their methods return awaitables
        self._health = [each.unary_unary(_call.HEALTH_METHOD, bytes, _call.is_serving) for each in self._channels]
        self._routers = Routers(len(self._addresses))
        self._closed = False

    def _open(self, address: str, tls: Tls | None) -> grpc.aio.Channel:
        if tls is None:
            return grpc.aio.insecure_channel(address, options=self._options.channel_options)
        return grpc.aio.secure_channel(address, tls.credentials(), options=self._options.channel_options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels calls under way."""
        self._closed = True
        for channel in self._channels:
            await channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        slo: str | Slo = "",
        tenant: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Completion:
        """The whole answer to a text or token ids; sampling parameters by keyword, or as `params`."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.generate_request(prompt, chosen, model, request_id, slo, tenant)
        return _call.completion_from_pb(await self._unary("Generate", request, timeout))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        slo: str | Slo = "",
        tenant: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """The answer as it comes. Leaving the loop, or closing the iterator, cancels the request everywhere."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.generate_request(prompt, chosen, model, request_id, slo, tenant)
        return self._stream("GenerateStream", request, timeout)

    async def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        slo: str | Slo = "",
        tenant: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Completion:
        """Like `generate`, for a conversation laid out by the model's chat template."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.chat_request(messages, chosen, model, request_id, slo, tenant)
        return _call.completion_from_pb(await self._unary("Chat", request, timeout))

    def stream_chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        slo: str | Slo = "",
        tenant: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """Like `stream`, for a conversation."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.chat_request(messages, chosen, model, request_id, slo, tenant)
        return self._stream("ChatStream", request, timeout)

    async def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Token ids as `generate` would use them."""
        answer = await self._unary("Tokenize", _call.tokenize_request(text, model), None)
        return list(answer.tokens)

    async def models(self) -> list[ModelCard]:
        """What this router serves."""
        answer = await self._unary("ListModels", pb.ListModelsRequest(), None)
        return [_call.model_card_from_pb(each) for each in answer.models]

    async def health(self) -> bool:
        """True if requests would be served now: a router is there and a verify worker is connected. Asks each once."""
        for index in range(len(self._addresses)):
            if await self._serves(index, self._options.timeout_s):
                return True
        return False

    async def _serves(self, index: int, timeout_s: float | None) -> bool:
        """False if it cannot be reached too."""
        try:
            serving: bool = await self._health[index](_call.HEALTH_REQUEST, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise _call.error_of(error) from error
        return serving

    async def _unary(self, name: str, request: Any, timeout: float | None) -> Any:
        tries = self._tries(timeout)
        while True:
            index = await self._next_router(tries)
            method = getattr(self._stubs[index], name)
            try:
                answer = await method(request, timeout=tries.left_s, metadata=self._options.metadata)
            except grpc.RpcError as error:
                await self._pause(tries, index, error)
                continue
            tries.progressed(index)
            return answer

    async def _stream(self, name: str, request: Any, timeout: float | None) -> AsyncIterator[Chunk]:
        tries, received = self._tries(timeout), Received(request)
        while not received.complete:
            index = await self._next_router(tries)
            method = getattr(self._stubs[index], name)
            call = method(received.request, timeout=tries.left_s, metadata=self._options.metadata)
            try:
                async for message in call:
                    tries.progressed(index)
                    yield received.take(message)
                return
            except grpc.RpcError as error:
                if not received.complete:
                    await self._pause(tries, index, error)
            finally:
                call.cancel()

    def _tries(self, timeout: float | None) -> Tries:
        return Tries(self._routers, self._options, self._options.timeout_s if timeout is None else timeout)

    async def _next_router(self, tries: Tries) -> int:
        """One that failed lately is asked for its health first. Raises Unavailable when there is none left to try."""
        while True:
            index = tries.next_router()
            if not tries.suspect(index) or await self._serves(index, tries.health_timeout_s):
                return index
            unfit = Unavailable(f"the router at {self._addresses[index]} does not serve")
            await asyncio.sleep(tries.pause_after(index, unfit))

    async def _pause(self, tries: Tries, index: int, error: grpc.RpcError) -> None:
        """Before the next try. Raises the typed error if there shall be none."""
        mapped = _call.error_of(error)
        if self._closed:
            raise mapped from error
        await asyncio.sleep(tries.pause_after(index, mapped))
