"""Slow and obvious: sampling, and decoding of a model whose logits are a hash of all tokens so far.

What the fast code gives is compared with this.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.types import FinishReason, SamplingParams
from workers.engine.emulated import HashModel
from workers.engine.native.engine import NativeEngine
from workers.engine.noise import Bits, key_of, mix, mix_all

VOCABULARY = 61
CONTEXT = 96
EOS = 1


def gumbel(seed: int, position: int, token: int) -> float:
    bits = mix((token * 0x9E3779B97F4A7C15 ^ key_of(seed, position)) % 2**64)
    return float(-np.log(-np.log(((bits >> 12) + 0.5) * 2.0**-52)))


def choose(
    logits: npt.NDArray[np.float32], sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> int:
    """The token after prompt and output, token by token in plain Python."""
    scores = {token: float(value) for token, value in enumerate(logits)}
    for token in {*prompt, *output}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] = scores[token] - sampling.frequency_penalty * count - sampling.presence_penalty
    by_score = sorted(scores, key=lambda token: (-scores[token], token))
    if sampling.temperature < 1e-5:
        return by_score[0]
    scores = {token: score / sampling.temperature for token, score in scores.items()}
    if sampling.top_k > 0:
        by_score = by_score[: sampling.top_k]
    best = scores[by_score[0]]
    weights = {token: math.exp(scores[token] - best) for token in by_score}
    if sampling.top_p < 1:
        whole, so_far, kept = sum(weights.values()), 0.0, []
        for token in by_score:
            kept.append(token)
            so_far += weights[token]
            if so_far >= sampling.top_p * whole:
                break
        by_score = kept
    by_score = [token for token in by_score if weights[token] >= sampling.min_p]
    position, seed = len(prompt) + len(output), sampling.seed or 0
    return max(by_score, key=lambda token: (scores[token] + gumbel(seed, position, token), -token))


class DiverseHashModel(HashModel):
    """Every token has a chance: logits between 0 and 6, hashed from the prefix."""

    def __init__(self, vocabulary: int = VOCABULARY, context_length: int = CONTEXT) -> None:
        super().__init__(vocabulary, context_length)
        self.eos_token_ids = frozenset({EOS})

    def logits_of(self, hashes: Bits) -> npt.NDArray[np.float32]:
        bits = mix_all(hashes[:, None] + np.arange(self.vocab_size, dtype=np.uint64))
        return ((bits >> np.uint64(48)).astype(np.float32) * np.float32(6 / 2**16)).astype(np.float32)


class GoldDecoder:
    """One sequence, one token at a time, everything computed anew from the tokens."""

    def __init__(self, context_length: int = CONTEXT) -> None:
        self._model = DiverseHashModel()
        self._context_length = context_length

    def next_token(self, request: Request, output: Sequence[int]) -> int:
        state = 0
        for token in (*request.prompt, *output):
            state = mix(state ^ token)
        logits = self._model.logits_of(np.array([state], np.uint64))[0]
        return choose(logits, request.sampling, request.prompt, output)

    def continuation(self, request: Request, output: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` tokens after `output`, or fewer if the context is full, whatever stop conditions say."""
        tokens = list(output)
        room = self._context_length - len(request.prompt) - len(output)
        for _ in range(min(count, room)):
            tokens.append(self.next_token(request, tokens))
        return tuple(tokens[len(output) :])

    def answer(self, request: Request) -> tuple[tuple[int, ...], FinishReason]:
        """The whole output, and why it ended."""
        sampling, output = request.sampling, []
        while True:
            output.append(self.next_token(request, output))
            if output[-1] in sampling.stop_token_ids or (output[-1] == EOS and not sampling.ignore_eos):
                return tuple(output), FinishReason.STOP_TOKEN
            if len(output) >= sampling.max_tokens or len(request.prompt) + len(output) >= self._context_length:
                return tuple(output), FinishReason.LENGTH


def hash_engine(**settings: object) -> NativeEngine:
    """A native engine over DiverseHashModel."""
    return NativeEngine(DiverseHashModel(), EngineSettings(block_size=8, **settings))  # type: ignore[arg-type]
