"""Who takes part in a step, and how much of the waiting prompts it computes: what latency goals have to say to that.

A goal is a mean time per output token, so a request may fall behind it and catch up, or run ahead and sit out a step.

    lost      it cannot meet its goal any more, even at the best pace it could be given for the rest of its tokens
    pressed   it can, but it is behind
    at ease   it would still be ahead after a step without it

While any request is pressed, those at ease sit the step out, and the lost ones all but one of LOST_TURNS; prompts are
computed no faster than their own goals ask for, since each one that is done is one more request to decode. So what can
wait makes room for what cannot, and what is lost takes nothing along. Whoever sits out keeps its place, its KV and its
drafts. With nobody pressed everybody takes part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

STRICTER = 0.97  # the goal that is aimed at, of the one that is asked for
RESERVE = 2.0  # rounds that a request at ease stays ahead
LOST_TURNS = 4
TTFT_SHARE = 0.85  # of the time to the first token, after which a prompt is to be done


@dataclass(frozen=True, slots=True)
class Progress:
    """A decoding request. `decoded` tokens came in the `elapsed_s` since the first; at most `remaining` more will."""

    elapsed_s: float
    decoded: int
    remaining: int
    tpot_s: float
    late: bool = False  # its first token was

    @property
    def ahead_s(self) -> float:
        """By so much earlier than its goal asks for; less than 0 if later."""
        return self.decoded * STRICTER * self.tpot_s - self.elapsed_s

    def lost(self, best_tpot_s: float) -> bool:
        """True if it misses its goal even with a token every `best_tpot_s` from here on."""
        least_s = self.elapsed_s + self.remaining * best_tpot_s
        return self.late or least_s > (self.decoded + self.remaining) * self.tpot_s


@dataclass(frozen=True, slots=True)
class Standing:
    """Of requests, by index."""

    resting: frozenset[int] = frozenset()  # they sit out the next step
    lost: frozenset[int] = frozenset()
    pressed: bool = False  # one is, or more


def standing(requests: Sequence[Progress], round_s: float, best_tpot_s: float, step: int) -> Standing:
    """Who sits out a step. `round_s` is how long one lasts; `step` counts them."""
    lost = frozenset(place for place, each in enumerate(requests) if each.lost(best_tpot_s))
    ahead = [each.ahead_s for each in requests]
    if all(ahead_s >= 0.0 or place in lost for place, ahead_s in enumerate(ahead)):
        return Standing(lost=lost)
    resting = frozenset(
        place
        for place, ahead_s in enumerate(ahead)
        if ((place + step) % LOST_TURNS if place in lost else ahead_s > (1.0 + RESERVE) * round_s)
    )
    return Standing(resting, lost, pressed=True)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt of which `tokens` are still to be computed, `waited_s` after it came."""

    tokens: int
    waited_s: float
    ttft_s: float


def prompt_tokens(waiting: Iterable[Waiting], round_s: float) -> int:
    """The fewest prompt tokens of each step with which all prompts, in their order, are done in time.

    One that is late already is given as long again, so that it gets there, if not soon.
    """
    most, before = 0.0, 0
    for each in waiting:
        before += each.tokens
        left_s = TTFT_SHARE * each.ttft_s - each.waited_s
        steps = (left_s if left_s > 0.0 else each.ttft_s) / round_s - 1.0  # the last one yields the first token
        most = max(most, before / max(steps, 1.0))
    return ceil(most)
