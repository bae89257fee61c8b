"""One request: what vLLM is asked for it, and what its answers mean."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import StrEnum

from vllm import SamplingParams as VllmSampling
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from tidemill.core.model import Request
from tidemill.core.text import TextStream
from tidemill.types import FinishReason, TokenLogprobs
from workers.engine.base import LayerSink, SequenceOutput
from workers.engine.noise import mix


class State(StrEnum):
    """See workers/engine/base.py; vLLM itself tells waiting from running."""

    COMPUTING = "computing"
    HELD = "held"
    RECEIVING = "receiving"
    PAUSED = "paused"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens so far. `inner_id` is what vLLM calls it, empty while vLLM does not know of it."""

    request: Request
    decodes: bool  # until it finishes; False: it is held once the KV of all tokens but the last is here
    tokens: list[int]
    text: TextStream | None = None  # only where stop strings are looked for
    state: State = State.COMPUTING
    inner_id: str = ""
    reserved_tokens: int = 0  # whose KV there are blocks for, while it is RECEIVING
    sink: LayerSink | None = None  # takes its KV layer by layer
    chain: list[int] = field(default_factory=list)  # the draft that the next step verifies

    @property
    def room(self) -> int:
        """Tokens that may still be decoded, by `max_tokens`."""
        return self.request.sampling.max_tokens - (len(self.tokens) - len(self.request.prompt))

    @property
    def moving(self) -> bool:
        """It decodes elsewhere meanwhile: what vLLM has in its place ends with tokens nobody knows yet."""
        return self.state is State.RECEIVING and self.reserved_tokens > self.request.kv_tokens

    def asked(self, eos: frozenset[int], transfer: dict[str, object], *, seeded: bool) -> VllmSampling:
        """What vLLM is to do. What ends an output is told as tokens and a length; stop strings are looked for here.

        vLLM's noise is a generator's, not keyed by position: a request that goes on elsewhere gets another seed, or its
        first new token would meet the noise of its first token of all. Without `seeded` the noise is the process's.
        """
        wanted = self.request.sampling
        transfer_parameters = {"kv_transfer_params": transfer} if transfer else None
        if not self.decodes:
            return VllmSampling(max_tokens=1, temperature=0.0, detokenize=False, extra_args=transfer_parameters)
        stops = {*wanted.stop_token_ids, *(() if wanted.ignore_eos else eos)}
        return VllmSampling(
            max_tokens=self.room,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            min_p=wanted.min_p,
            repetition_penalty=wanted.repetition_penalty,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            seed=_seed(wanted.seed or 0, len(self.request.output)) if seeded and wanted.temperature > 0 else None,
            stop_token_ids=sorted(stops),
            ignore_eos=True,
            logprobs=wanted.logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=transfer_parameters,
        )

    def accept(self, answer: CompletionOutput, eos: frozenset[int], context_length: int) -> SequenceOutput:
        """Take a step's tokens, up to the one that ends the output."""
        finish: FinishReason | None = None
        taken = 0
        for token in answer.token_ids:
            finish = self.append(token, eos, context_length)
            taken += 1
            if finish is not None:
                break
        tokens = tuple(answer.token_ids[:taken])
        chain, self.chain = self.chain, []
        accepted = 0
        while accepted < min(len(chain), taken) and tokens[accepted] == chain[accepted]:
            accepted += 1
        wanted = self.request.sampling.logprobs
        logprobs = () if wanted is None else _logprobs(answer, tokens, wanted)
        return SequenceOutput(self.request.id, tokens, logprobs, len(chain), accepted, finish)

    def append(self, token: int, eos: frozenset[int], context_length: int) -> FinishReason | None:
        """Take one token; what it ends the output with, if it does."""
        self.tokens.append(token)
        sampling = self.request.sampling
        if token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos):
            return FinishReason.STOP_TOKEN
        if self.text is not None:
            self.text.push((token,))
            if self.text.stopped:
                return FinishReason.STOP_STRING
        full = len(self.tokens) >= context_length
        return FinishReason.LENGTH if full or self.room <= 0 else None


def _seed(seed: int, position: int) -> int:
    """Below 2**63, which is what vLLM takes."""
    return mix(mix(seed) ^ position) >> 1 if position else seed


def _logprobs(answer: CompletionOutput, tokens: Tokens[int], wanted: int) -> tuple[TokenLogprobs, ...]:
    """vLLM reports the likeliest tokens, and the chosen one in any case."""
    found = []
    for token, by_token in zip(tokens, answer.logprobs or (), strict=False):
        ranked = sorted(((each, value.logprob) for each, value in by_token.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprobs(token, by_token[token].logprob, tuple(ranked[:wanted])))
    return tuple(found)
