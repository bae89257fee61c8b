"""The blocking client."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc

from tidemill import _call
from tidemill._call import CallOptions, Prompt, Tls
from tidemill.errors import TidemillError
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceStub
from tidemill.types import Chunk, Completion, Message, ModelCard, SamplingParams, Slo

Answer = TypeVar("Answer")


class Client:
    """Talks to a Tidemill router. Safe to use from several threads; close it, or use it as a context manager.

        with Client("127.0.0.1:7071") as client:
            for chunk in client.stream("def fib(n):", max_tokens=64):
                print(chunk.text, end="")

    Every method raises the errors of tidemill.errors. Calls that fail in a way that may pass (Overloaded, Unavailable)
    are tried again up to `retries` times, with growing pauses; a stream only before its first chunk.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:7071",
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 600.0,
        retries: int = 3,
    ) -> None:
        """`timeout`: seconds for one call, retries not included; it becomes the request's deadline on every worker."""
        self._options = CallOptions(address, token, tls, timeout, retries)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=self._options.channel_options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=self._options.channel_options)
        self._stub = InferenceStub(self._channel)
        self._health = self._channel.unary_unary(_call.HEALTH_METHOD, bytes, _call.is_serving)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels calls under way."""
        self._channel.close()

    def generate(
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
        return _call.completion_from_pb(self._unary(self._stub.Generate, request, timeout))

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
    ) -> Iterator[Chunk]:
        """The answer as it comes. Leaving the loop, or closing the iterator, cancels the request everywhere."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.generate_request(prompt, chosen, model, request_id, slo, tenant)
        return self._stream(self._stub.GenerateStream, request, timeout)

    def chat(
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
        return _call.completion_from_pb(self._unary(self._stub.Chat, request, timeout))

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
    ) -> Iterator[Chunk]:
        """Like `stream`, for a conversation."""
        chosen = _call.sampling_params(params, sampling)
        request = _call.chat_request(messages, chosen, model, request_id, slo, tenant)
        return self._stream(self._stub.ChatStream, request, timeout)

    def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Token ids as `generate` would use them."""
        answer = self._unary(self._stub.Tokenize, _call.tokenize_request(text, model), None)
        return list(answer.tokens)

    def models(self) -> list[ModelCard]:
        """What this router serves."""
        answer = self._unary(self._stub.ListModels, pb.ListModelsRequest(), None)
        return [_call.model_card_from_pb(each) for each in answer.models]

    def health(self) -> bool:
        """True if requests would be served now: the router is there and a verify worker is connected. Asks once."""
        try:
            serving: bool = self._health(_call.HEALTH_REQUEST, timeout=self._options.timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise _call.error_of(error) from error
        return serving

    def _timeout(self, timeout: float | None) -> float | None:
        return self._options.timeout_s if timeout is None else timeout

    def _unary(self, method: Callable[..., Answer], request: Any, timeout: float | None) -> Answer:
        def call() -> Answer:
            return method(request, timeout=self._timeout(timeout), metadata=self._options.metadata)

        return self._with_retries(call)

    def _stream(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Iterator[Chunk]:
        def begin() -> tuple[Any, Any]:
            call = method(request, timeout=self._timeout(timeout), metadata=self._options.metadata)
            return call, next(call)  # may be tried again until its first chunk is here

        call, message = self._with_retries(begin)
        try:
            yield _call.chunk_from_pb(message)
            for message in call:
                yield _call.chunk_from_pb(message)
        except grpc.RpcError as error:
            raise _call.error_of(error) from error
        finally:
            call.cancel()

    def _with_retries(self, call: Callable[[], Answer]) -> Answer:
        pauses = self._options.pauses()
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                mapped: TidemillError = _call.error_of(error)
                pause = next(pauses, None)
                if not mapped.retryable or pause is None:
                    raise mapped from error
                time.sleep(pause)
