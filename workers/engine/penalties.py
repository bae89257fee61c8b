"""Which tokens a sequence has, and how often: what repetition, presence and frequency penalties hang on."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tidemill.types import SamplingParams


def has_penalties(sampling: SamplingParams) -> bool:
    """True if earlier tokens change the scores of the next."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class TokenCounts:
    """Distinct tokens of prompt and output, and how often each is in the output; kept up to date token by token."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        self._places: dict[int, int] = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        room = len(self._places) + 64
        self._tokens = np.zeros(room, np.int64)
        self._tokens[: len(self._places)] = list(self._places)
        self._counts = np.zeros(room, np.float64)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """One more of `token` in the output."""
        place = self._places.setdefault(token, len(self._places))
        if place == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def penalise(self, scores: npt.NDArray[np.float64], sampling: SamplingParams, drafted: Iterable[int] = ()) -> None:
        """Change `scores` [vocabulary] in place, as if `drafted` were at the end of the output.

        In the usual order: repetition over prompt and output (CTRL, Keskar et al. 2019), then frequency and presence
        over the output.
        """
        known = len(self._places)
        added = list(drafted)
        for token in added:
            self.add(token)
        seen, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        values = scores[seen]
        values = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        values -= sampling.frequency_penalty * counts
        values -= sampling.presence_penalty * (counts > 0)
        scores[seen] = values
        for token in added:
            self._counts[self._places[token]] -= 1
        while len(self._places) > known:
            self._places.popitem()  # the last that came in
