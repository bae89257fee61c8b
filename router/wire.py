"""Public protobuf <-> model types, once each way, and the checks on what clients send.

Every check says what was wrong, what was expected, and what to do.
"""

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from tidemill.core.messages import Tokens
from tidemill.core.model import Request, SloClass
from tidemill.core.settings import SloSettings
from tidemill.errors import InvalidRequest, ModelNotFound
from tidemill.proto import inference_pb2 as pb
from tidemill.types import FinishReason, Message, ModelCard, Sameness, SamplingParams, Summary, TokenLogprobs

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_ID_LENGTH = 128
MAX_SHOWN = 64
CHAT_ROLES = ("system", "user", "assistant")

_FINISH = {
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_SAMENESS = {
    Sameness.EXACT: pb.SAMENESS_EXACT,
    Sameness.ROUNDED: pb.SAMENESS_ROUNDED,
    Sameness.DISTRIBUTED: pb.SAMENESS_DISTRIBUTED,
}
_OPTIONAL = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "ignore_eos", "seed", "logprobs",
)  # fmt: skip


def check_model(asked: str, card: ModelCard) -> None:
    """Raises ModelNotFound."""
    if asked and asked != card.name:
        raise ModelNotFound(f"model {_shown(asked)} is not served here; {card.name!r} is")


def _shown(text: str) -> str:
    """What a client sent, as an error may repeat it: status messages travel in headers, which are small."""
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def sampling_from_pb(message: pb.SamplingParams, card: ModelCard, prompt_tokens: int) -> SamplingParams:
    """Checked parameters, with a seed, and no more tokens than the context has room for. Raises InvalidRequest."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}  # type: ignore[arg-type]
    sampling = SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )
    for fault in _sampling_faults(sampling, card):
        raise InvalidRequest(fault)
    seed = sampling.seed
    if seed is None:
        seed = secrets.randbits(63) if sampling.temperature > 0 else 0
    return replace(sampling, seed=seed, max_tokens=min(sampling.max_tokens, card.context_length - prompt_tokens))


def _sampling_faults(s: SamplingParams, card: ModelCard) -> Iterable[str]:
    """What cannot be, in words."""
    numbers = {
        "temperature": (s.temperature, 0.0, 100.0),
        "min_p": (s.min_p, 0.0, 1.0),
        "presence_penalty": (s.presence_penalty, -2.0, 2.0),
        "frequency_penalty": (s.frequency_penalty, -2.0, 2.0),
    }
    for name, (value, low, high) in numbers.items():
        if not low <= value <= high:  # false for NaN too
            yield f"{name} is {value}; expected a number from {low:g} to {high:g}"
    if not 0.0 < s.top_p <= 1.0:
        yield f"top_p is {s.top_p}; expected a number above 0 and up to 1"
    if not (math.isfinite(s.repetition_penalty) and s.repetition_penalty > 0):
        yield f"repetition_penalty is {s.repetition_penalty}; expected a number above 0 (1 changes nothing)"
    if s.max_tokens < 1:
        yield "max_tokens is 0; expected at least 1"
    if s.logprobs is not None and s.logprobs > MAX_LOGPROBS:
        yield f"logprobs is {s.logprobs}; at most {MAX_LOGPROBS} alternatives can be reported"
    if s.seed is not None and s.seed >= 2**63:
        yield f"seed is {s.seed}; expected one below 2**63"
    if len(s.stop) > MAX_STOPS or any(not stop or len(stop) > MAX_STOP_LENGTH for stop in s.stop):
        yield f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
    if any(token >= card.vocab_size for token in s.stop_token_ids):
        yield f"stop_token_ids must be below the vocabulary's size, {card.vocab_size}"


def check_prompt(tokens: Sequence[int], card: ModelCard) -> None:
    """Raises InvalidRequest."""
    if not tokens:
        raise InvalidRequest("the prompt is empty; send at least one token of text or token ids")
    check_tokens(tokens, card)
    if len(tokens) >= card.context_length:
        raise InvalidRequest(
            f"the prompt has {len(tokens)} tokens, which leaves no room in the context of {card.context_length}; "
            "shorten it"
        )


def check_tokens(tokens: Iterable[int], card: ModelCard) -> None:
    """Raises InvalidRequest for one that the model does not have."""
    wrong = next((token for token in tokens if not 0 <= token < card.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"token id {wrong} is outside the vocabulary of {card.name!r}, which has {card.vocab_size} tokens"
        )


def check_name(field: str, name: str) -> None:
    """Raises InvalidRequest."""
    if len(name) > MAX_ID_LENGTH or not name.isprintable():
        raise InvalidRequest(f"{field} must be at most {MAX_ID_LENGTH} printable characters")


def new_request(
    message: pb.GenerateRequest | pb.ChatRequest,
    prompt: Sequence[int],
    sampling: SamplingParams,
    classes: Mapping[str, SloSettings],
) -> Request:
    """Raises InvalidRequest for an id, a tenant, a latency goal or received tokens that cannot be."""
    check_name("request_id", message.request_id)
    check_name("tenant", message.tenant)
    slo, received = slo_from_pb(message, classes), tuple(message.received)
    if len(received) >= sampling.max_tokens:
        raise InvalidRequest(
            f"received has {len(received)} tokens, and the answer at most {sampling.max_tokens}: it is complete"
        )
    if received and not message.sampling.HasField("seed") and sampling.temperature > 0:
        raise InvalidRequest("received without a seed: the rest would belong to another answer; send the seed too")
    return Request(message.request_id or secrets.token_hex(8), tuple(prompt), sampling, received, slo, message.tenant)


def slo_from_pb(message: pb.GenerateRequest | pb.ChatRequest, classes: Mapping[str, SloSettings]) -> SloClass:
    """The goal of a class of the settings, or the request's own. Raises InvalidRequest."""
    if message.HasField("slo"):
        own = SloClass("custom", message.slo.ttft_s, message.slo.tpot_s)
        if message.slo_class:
            raise InvalidRequest("slo_class and slo are both set; send one of them")
        if not (0 < own.ttft_s < math.inf and 0 < own.tpot_s < math.inf):
            raise InvalidRequest(f"slo has ttft_s {own.ttft_s} and tpot_s {own.tpot_s}; expected seconds above 0")
        return own
    name = message.slo_class or "default"
    if name not in classes:
        raise InvalidRequest(f"slo_class {_shown(name)} is not in the settings; there are {', '.join(classes)}")
    return SloClass(name, classes[name].ttft_s, classes[name].tpot_s)


def messages_from_pb(messages: Iterable[pb.Message]) -> list[Message]:
    """Raises InvalidRequest for an empty chat or an unknown role."""
    found = [Message(each.role, each.content) for each in messages]
    if not found:
        raise InvalidRequest("messages is empty; send at least one message")
    for message in found:
        if message.role not in CHAT_ROLES:
            raise InvalidRequest(
                f"message role {_shown(message.role)} is unknown; expected one of {', '.join(CHAT_ROLES)}"
            )
    return found


def logprobs_to_pb(logprobs: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            token=each.token,
            logprob=each.logprob,
            top=[pb.TopLogprob(token=token, logprob=logprob) for token, logprob in each.top],
        )
        for each in logprobs
    ]


def chunk_to_pb(text: str, steps: Sequence[Tokens]) -> pb.GenerateChunk:
    """The tokens of some steps, and the text that became certain with them."""
    chunk = pb.GenerateChunk(text=text)
    for step in steps:
        chunk.tokens.extend(step.tokens)
        if step.logprobs:
            chunk.logprobs.extend(logprobs_to_pb(step.logprobs))
    return chunk


def response_to_pb(chunks: Sequence[pb.GenerateChunk]) -> pb.GenerateResponse:
    """A whole answer from its stream; the last chunk has the summary."""
    answer = pb.GenerateResponse(text="".join([chunk.text for chunk in chunks]), summary=chunks[-1].summary)
    for chunk in chunks:
        answer.tokens.extend(chunk.tokens)
        answer.logprobs.extend(chunk.logprobs)
    return answer


def summary_to_pb(summary: Summary) -> pb.Summary:
    return pb.Summary(
        request_id=summary.request_id,
        model=summary.model,
        finish_reason=_FINISH[summary.finish_reason],
        prompt_tokens=summary.prompt_tokens,
        output_tokens=summary.output_tokens,
        seed=summary.seed,
        timing=pb.Timing(**asdict(summary.timing)),
        route=pb.Route(**asdict(summary.route)),
        speculation=pb.Speculation(**asdict(summary.speculation)),
        sameness=_SAMENESS[summary.sameness],
    )


def card_to_pb(card: ModelCard) -> pb.ModelCard:
    return pb.ModelCard(**asdict(card))
