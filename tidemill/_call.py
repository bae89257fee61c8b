"""What both clients share: requests out, answers in, errors mapped, pauses between retries, channel options."""

import random
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc

from tidemill.errors import KIND_METADATA_KEY, InvalidRequest, MessageTooLarge, TidemillError, error_from_wire
from tidemill.proto import inference_pb2 as pb
from tidemill.types import (
    Chunk,
    Completion,
    FinishReason,
    Message,
    ModelCard,
    Route,
    Sameness,
    SamplingParams,
    Slo,
    Speculation,
    Summary,
    Timing,
    TokenLogprobs,
)

Prompt = str | Sequence[int]
NAMES_ARE_TEXT = "model, request_id and tenant must be text, and slo a class's name or an Slo"

FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
HEALTH_METHOD, HEALTH_REQUEST = "/grpc.health.v1.Health/Check", b""  # of the server as a whole
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
RECONNECT_MS = 100

_FINISH = {
    pb.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    pb.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_SAMENESS = {
    pb.SAMENESS_EXACT: Sameness.EXACT,
    pb.SAMENESS_ROUNDED: Sameness.ROUNDED,
    pb.SAMENESS_DISTRIBUTED: Sameness.DISTRIBUTED,
}


@dataclass(frozen=True, slots=True)
class Tls:
    """How to check the router, and how to show who we are. Paths of PEM files; none: the system's authorities."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        def read(path: Path | None) -> bytes | None:
            return path.read_bytes() if path else None

        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.certificate))


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Where to call and how patiently."""

    token: str | None
    tls: Tls | None
    timeout_s: float | None
    retries: int
    stall_s: float

    @property
    def channel_options(self) -> list[tuple[str, Any]]:
        """A router that is stopped, or behind a cut cable, answers no pings: its calls end after `stall_s`."""
        half_ms = max(int(self.stall_s * 500), 1)
        return [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", half_ms),
            ("grpc.keepalive_timeout_ms", half_ms),
            ("grpc.http2.ping_timeout_ms", half_ms),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.min_reconnect_backoff_ms", 2 * half_ms),
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", 10 * RECONNECT_MS),
            ("grpc.use_local_subchannel_pool", 1),  # or clients of one process share connections and their options
        ]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def pauses(self) -> Iterator[float]:
        """Seconds before each retry: doubling, with jitter so that clients do not come back all at once."""
        pause = FIRST_PAUSE_S
        for _ in range(self.retries):
            yield pause * random.uniform(0.5, 1.5)
            pause = min(2 * pause, MAX_PAUSE_S)


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """`"a:1,b:2"` or a sequence of such. Raises InvalidRequest if there is none, or something else is in it."""
    texts = [address] if isinstance(address, str) else list(address)
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"address is {address!r}; expected host:port, several separated by commas, or a list")
    found = tuple(each.strip() for text in texts for each in text.split(",") if each.strip())
    if not found:
        raise InvalidRequest("no address is given; expected host:port of a router, or of several")
    return tuple(dict.fromkeys(found))


def sampling_params(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    """`params` with keyword arguments on top. Raises InvalidRequest for a name there is not."""
    known = {field.name: getattr(params or SamplingParams(), field.name) for field in fields(SamplingParams)}
    unknown = sorted(changes.keys() - known.keys())
    if unknown:
        raise InvalidRequest(f"unknown sampling parameter {unknown[0]!r}; there are {', '.join(known)}")
    if isinstance(changes.get("stop"), str):
        changes = changes | {"stop": (changes["stop"],)}
    return SamplingParams(**(known | changes))


def _sampling_to_pb(sampling: SamplingParams) -> pb.SamplingParams:
    message = pb.SamplingParams()
    for field in fields(SamplingParams):
        value = getattr(sampling, field.name)
        if value is not None:
            try:
                message.MergeFrom(pb.SamplingParams(**{field.name: value}))
            except (TypeError, ValueError) as error:
                raise InvalidRequest(
                    f"{field.name} is {value!r}, which has the wrong type or range: {error}"
                ) from error
    if message.temperature > 0 and not message.HasField("seed"):
        message.seed = secrets.randbits(63)  # here, so that every router that is tried gives the same answer
    return message


@contextmanager
def _expecting(what: str) -> Iterator[None]:
    """Turns what protobuf raises for values it cannot hold into InvalidRequest."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{what}: {error}") from error


def _set_names(
    request: pb.GenerateRequest | pb.ChatRequest, model: str, request_id: str, slo: str | Slo, tenant: str
) -> None:
    with _expecting(NAMES_ARE_TEXT):
        request.model, request.request_id, request.tenant = model, request_id, tenant
        if not isinstance(slo, Slo):
            request.slo_class = slo
    if isinstance(slo, Slo):
        with _expecting("the two goals of an Slo must be seconds"):
            request.slo.ttft_s, request.slo.tpot_s = slo.ttft_s, slo.tpot_s


def generate_request(
    prompt: Prompt, sampling: SamplingParams, model: str, request_id: str, slo: str | Slo, tenant: str
) -> pb.GenerateRequest:
    """Raises InvalidRequest for values of the wrong type."""
    request = pb.GenerateRequest(sampling=_sampling_to_pb(sampling))
    _set_names(request, model, request_id, slo, tenant)
    with _expecting("the prompt must be text, or token ids from 0 up"):
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.ids.extend(prompt)
    return request


def chat_request(
    messages: Iterable[Message], sampling: SamplingParams, model: str, request_id: str, slo: str | Slo, tenant: str
) -> pb.ChatRequest:
    """Raises InvalidRequest for values of the wrong type."""
    request = pb.ChatRequest(sampling=_sampling_to_pb(sampling))
    _set_names(request, model, request_id, slo, tenant)
    with _expecting("messages must be tidemill.Message(role, content), both text"):
        for each in messages:
            request.messages.add(role=each.role, content=each.content)
    return request


def tokenize_request(text: str, model: str) -> pb.TokenizeRequest:
    """Raises InvalidRequest for values of the wrong type."""
    with _expecting("text and model must be text"):
        return pb.TokenizeRequest(model=model, text=text)


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(each.token, each.logprob, tuple((top.token, top.logprob) for top in each.top))
        for each in messages
    )


def _all_fields(message: Any, kind: type[Any]) -> Any:
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})


def summary_from_pb(message: pb.Summary) -> Summary:
    return Summary(
        request_id=message.request_id,
        model=message.model,
        finish_reason=_FINISH[message.finish_reason],
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        seed=message.seed,
        timing=_all_fields(message.timing, Timing),
        route=_all_fields(message.route, Route),
        speculation=_all_fields(message.speculation, Speculation),
        sameness=_SAMENESS.get(message.sameness, Sameness.EXACT),
    )


def chunk_from_pb(message: pb.GenerateChunk) -> Chunk:
    summary = summary_from_pb(message.summary) if message.HasField("summary") else None
    return Chunk(message.text, tuple(message.tokens), _logprobs(message.logprobs), summary)


def completion_from_pb(message: pb.GenerateResponse) -> Completion:
    return Completion(
        message.text, tuple(message.tokens), _logprobs(message.logprobs), summary_from_pb(message.summary)
    )


def is_serving(answer: bytes) -> bool:
    """Reads a grpc.health.v1.HealthCheckResponse, whose one field is `status = 1`; SERVING is 1.

    By hand, because the health protocol's Python package is one more dependency for every application.
    """
    return answer == b"\x08\x01"


def model_card_from_pb(message: pb.ModelCard) -> ModelCard:
    card: ModelCard = _all_fields(message, ModelCard)
    return card


def error_of(error: grpc.RpcError) -> TidemillError:
    """The typed error a failed call stands for."""
    status, details = error.code().name, error.details() or "no details"
    metadata: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    kind = metadata.get(KIND_METADATA_KEY)
    if kind is None and status == "RESOURCE_EXHAUSTED" and "larger than max" in details:
        return MessageTooLarge(f"{details}; send less, or raise router.max_message_bytes")
    if kind is None and status == "INTERNAL" and "deserializ" in details.lower():
        return InvalidRequest(f"the router could not read the request: {details}")
    return error_from_wire(status, details, kind)
