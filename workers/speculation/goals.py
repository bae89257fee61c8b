"""How fast waiting prompts are computed beside requests that decode: what latency goals have to say to that.

    lost      a request that cannot meet its goal any more, even at the best pace it could have from here on
    pressed   one that can, but is behind its goal: a mean time per output token

While any request is pressed, a step computes no more of the waiting prompts than their own goals ask for, since its
prompts make it longer, and each one that is done is one more request to decode. Bursts of arrivals are so spread over
the time that a first token may take. With nobody pressed prompts are computed as fast as they can be. It is a chunk
budget, as Sarathi-Serve's (OSDI'24), that follows from the goals on both sides.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

STRICTER = 0.97  # the goal that is aimed at, of the one that is asked for
TTFT_SHARE = 0.85  # of the time to the first token, after which a prompt is to be done


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the decoding requests, [requests]: `decoded` tokens came in the `elapsed_s` since the first, and at most
    `remaining` more will.
    """

    elapsed_s: Floats
    decoded: Floats
    remaining: Floats
    tpot_s: Floats
    late: Flags  # its first token was

    @property
    def behind(self) -> Flags:
        """Those that are later than their goal asks for."""
        return self.elapsed_s > self.decoded * STRICTER * self.tpot_s

    def lost(self, best_tpot_s: float) -> Flags:
        """Those that miss their goal even with a token every `best_tpot_s` from here on."""
        least_s = self.elapsed_s + self.remaining * best_tpot_s
        return self.late | (least_s > (self.decoded + self.remaining) * self.tpot_s)

    def needs(self, round_s: float) -> Floats:
        """Tokens that each must gain in a round of `round_s` to be on time after it; less than 1 if it is ahead."""
        return (self.elapsed_s + round_s) / self.tpot_s - self.decoded


@dataclass(frozen=True, slots=True)
class Goals:
    """Of requests, [requests], what does not change after their first tokens. Lengths and times are absolute."""

    first_at: Floats
    first_length: Floats
    longest: Floats  # lengths when they are over
    tpot_s: Floats
    late: Flags

    def progress(self, lengths: Floats, now: float) -> Progress:
        return Progress(
            now - self.first_at, lengths - self.first_length, self.longest - lengths, self.tpot_s, self.late
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt of which `tokens` are still to be computed, `waited_s` after it came."""

    tokens: int
    waited_s: float
    ttft_s: float


def prompt_tokens(waiting: Iterable[Waiting], round_s: float) -> int:
    """The fewest prompt tokens of each step, of `round_s` seconds, with which all prompts, in order, are done in time.

    One that is late already is given as long again, so that it gets there, if not soon.
    """
    most, before = 0.0, 0
    for each in waiting:
        before += each.tokens
        left_s = TTFT_SHARE * each.ttft_s - each.waited_s
        steps = (left_s if left_s > 0.0 else each.ttft_s) / round_s - 1.0  # the last one yields the first token
        most = max(most, before / max(steps, 1.0))
    return ceil(most)
