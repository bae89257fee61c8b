"""What applications hand in and get back: plain frozen dataclasses, standard library only."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request's output ended."""

    STOP_TOKEN = (
        "stop_token"  # an end-of-text token or one of `stop_token_ids`; the token itself is the last of `tokens`
    )
    STOP_STRING = "stop_string"  # a string of `stop`; the text ends before it
    LENGTH = "length"  # `max_tokens`, or the model's context is full


class Sameness(StrEnum):
    """What the engine promises of a request's tokens if it were sent again, or had to go on elsewhere."""

    EXACT = "exact"  # the same tokens, always
    ROUNDED = "rounded"  # the same, but where two tokens are so nearly as likely that rounding decides
    DISTRIBUTED = "distributed"  # tokens drawn from the same distribution, not the same tokens


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding of up to 128 tokens.

    A request's tokens are a pure function of (model, prompt, these parameters): noise is keyed by (seed, position).
    Where an engine cannot promise that, the summary's `sameness` says so.
    With `temperature > 0` and no seed the router draws one and reports it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest
    repetition_penalty: float = 1.0  # > 1 discourages tokens of prompt and output (CTRL, Keskar et al. 2019)
    presence_penalty: float = 0.0  # subtracted once from tokens already in the output
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None  # 0 <= seed < 2**63
    logprobs: int | None = None  # report the token's log-probability and those of this many likeliest tokens (0..20)


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency goal of a request's own, in seconds; the settings may name others."""

    ttft_s: float  # time to first token
    tpot_s: float  # mean time per output token after it


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, of the model's own distribution (before temperature and filters)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), likeliest first


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as the router saw them. `queue + prefill + transfer + first_decode == ttft`."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_decode_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0  # mean time per output token after the first; 0 with fewer than two tokens
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """Which workers served a request and why; worker names carry their epoch (`verify-0@3`)."""

    prefill_worker: str = ""  # empty: prompt was computed on the verify worker
    verify_worker: str = ""
    draft_worker: str = ""  # empty: no drafts
    split_reason: str = ""
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafted and accepted tokens over the request's verify steps."""

    verify_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def accepted_per_verify(self) -> float:
        """Mean accepted draft tokens of a verify step (the token a step always yields is not counted)."""
        return self.accepted_tokens / self.verify_steps if self.verify_steps else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What the last chunk of a stream, and every unary answer, says about the request."""

    request_id: str
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    seed: int
    timing: Timing = field(default_factory=Timing)
    route: Route = field(default_factory=Route)
    speculation: Speculation = field(default_factory=Speculation)
    sameness: Sameness = Sameness.EXACT


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a stream: the tokens of one or more steps. `summary` is set on the last chunk only."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    summary: Summary


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model the router serves."""

    name: str
    context_length: int  # prompt and output tokens together
    vocab_size: int
    has_chat_template: bool
