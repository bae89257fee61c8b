"""How fast the verify worker goes, and what follows from it: how large drafts are to be, and how long to wait for them.

Everything is measured on live steps, from a fit that was begun at start-up. With `adaptive` off, drafts have a fixed
shape and all of them are verified, whatever that costs: the way of systems with a fixed speculation length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from tidemill.core.model import Decision
from tidemill.core.settings import SpeculationSettings
from tidemill.core.tree import Shape
from workers.engine.base import StepOutput
from workers.speculation.branch_cache import Fate
from workers.speculation.branches import Floats
from workers.speculation.goodput import (
    NO_DRAFTS,
    Conditions,
    Damping,
    LoadControl,
    draft_shape,
    verify_budget,
)
from workers.speculation.remote import NextAnswer
from workers.speculation.selection import Budget, Selection
from workers.speculation.step_time import StepTimes

MAX_ROWS = 256  # of all drafts in a step
MEMORY = 0.1  # weight of the newest round in averages
FIRST_ROUND_S = 0.02
MAX_AHEAD = 4
TOO_FAR = 8  # rounds away, a draft worker's trees hardly ever fit any more when they come
SPARE = 1.25  # nodes that are drafted for each that is verified
OVERDUE = 0.25  # rounds that an answer which should be here is still expected to take


@dataclass(frozen=True, slots=True)
class AtHand:
    """Of requests that draft, [requests]."""

    tokens: Floats  # expected of the drafts that it has
    alphas: Floats  # its chance that one more drafted token is accepted


class Pace:
    """Belongs to a speculator. Times are monotonic seconds."""

    def __init__(self, settings: SpeculationSettings, times: StepTimes) -> None:
        self._settings = settings
        self._times = times
        self._fixed = Shape(settings.max_depth, settings.width, settings.max_nodes)
        self._control = LoadControl(
            max_depth=settings.max_depth,
            max_width=settings.width,
            max_nodes=settings.max_nodes,
            width_offset=settings.width,
        )
        self._decided: Decision[Shape] | None = None
        self._decisions = 0
        self._last_at: float | None = None
        self._nodes = float(settings.max_nodes)  # verified of a tree
        self._fresh_tokens = 1.0  # expected of a tree that was drafted from all of a request's tokens
        self._step_s = FIRST_ROUND_S  # of a round, the engine's step
        self._prompts_s = 0.0  # of it, what prompts took
        self._tokens = 1.0  # of a round
        self.round_s = FIRST_ROUND_S  # from one step to the next, all included
        self.overhead_s = 0.0  # of it, what is not the engine's

    # --- measuring ----------------------------------------------------------------------------------------------

    def stepped(self, output: StepOutput, context: int, kv: int, now: float) -> None:
        """A step ended. `context`: tokens its decoding rows attended to; `kv`: of each sequence once."""
        if self._last_at is not None and output.outputs:
            took = min(now - self._last_at, 10 * self.round_s)  # an idle worker is not a slow one
            self.round_s += MEMORY * (took - self.round_s)
            self.overhead_s += MEMORY * (max(took - output.seconds, 0.0) - self.overhead_s)
            self._step_s += MEMORY * (min(output.seconds, took) - self._step_s)
            self._tokens += MEMORY * (sum(len(each.tokens) for each in output.outputs) - self._tokens)
        self._last_at = now if output.outputs else None
        rows = sum(1 + each.drafted for each in output.outputs)
        if rows and output.seconds > 0:
            prompts = max(output.batch_tokens - rows, 0)
            self._times.observe(rows, context, output.seconds, kv, prompts)
            self._prompts_s += MEMORY * (prompts * self._times.prompt_slope - self._prompts_s)

    def chosen(self, selection: Selection, fates: Sequence[str]) -> None:
        """What was chosen for a step tells what a fresh tree is worth."""
        for nodes, expected, fate in zip(selection.nodes, selection.expected, fates, strict=True):
            if nodes:
                self._nodes += MEMORY / 4 * (len(nodes) - self._nodes)
                if fate == Fate.FRESH:
                    self._fresh_tokens += MEMORY * (expected - 1.0 - self._fresh_tokens)

    # --- deciding -----------------------------------------------------------------------------------------------

    def shape(
        self, alphas: Sequence[float], context: int, round_trip_s: float | None, draft_step_s: float | None
    ) -> tuple[Shape, int]:
        """Of the next drafts, one for each of `alphas`, and how many rounds to draft ahead. Depth 0: none wanted."""
        if not self._settings.adaptive:
            return self._fixed, self._settings.ahead
        ahead = self._ahead(round_trip_s)
        conditions = Conditions(
            alphas,
            context,
            draft_step_s or 0.0,
            # What was drafted ahead is there when it is wanted, however long it was on its way.
            0.0 if ahead else self._link_s(round_trip_s or 0.0, draft_step_s or 0.0),
            ahead > 0,
        )
        self._decisions += 1
        self._decided = draft_shape(conditions, self._times, self._control, Damping(), self._decided, self._decisions)
        return self._trimmed(self._decided.choice), ahead

    def _trimmed(self, shape: Shape) -> Shape:
        """No more nodes than are of use: drafting them takes time, and steps may be waiting."""
        return replace(shape, nodes=max(shape.depth, min(shape.nodes, ceil(SPARE * self._nodes) + 1)))

    def _link_s(self, round_trip_s: float, draft_step_s: float) -> float:
        """The part of a round trip in which nothing is drafted."""
        depth = self._decided.choice.depth if self._decided is not None else 0
        return max(round_trip_s - depth * draft_step_s, 0.0)

    def _ahead(self, round_trip_s: float | None) -> int:
        """One more for each round that passes while an ask is on its way, and its answer back; none if the draft worker
        is too far away for that to help.
        """
        if not self._settings.ahead or round_trip_s is None:
            return self._settings.ahead
        away = int(round_trip_s / self.round_s)
        return min(self._settings.ahead + away, MAX_AHEAD) if away <= TOO_FAR else 0

    def local_shape(self, requests: int) -> Shape:
        """Of drafts that cost next to nothing, so that choosing among their nodes is enough."""
        return self._fixed if not self._settings.adaptive else self._control.shape(requests, self._settings.max_depth)

    @property
    def best_tpot_s(self) -> float:
        """What a request with fresh drafts in every step can expect."""
        return self.round_s / (1.0 + self._fresh_tokens)

    @property
    def times_for_choice(self) -> StepTimes:
        """A fit that was never measured makes everything worth verifying."""
        return self._times if self._settings.adaptive else StepTimes()

    def budget(self, requests: int, context: float) -> Budget:
        """Rows of the next step. `context`: tokens, summed over the requests."""
        most = requests + MAX_ROWS
        if not (self._settings.adaptive and self._times.ready):
            return Budget(most, most, self._settings.max_nodes)
        rows = verify_budget(self._times, requests, context, self._settings.tolerance, most)
        return Budget(rows, most, self._settings.max_nodes)

    def wait_until(self, at_hand: AtHand, answer: NextAnswer, now: float) -> float | None:
        """Until when the next step should wait; None: not at all.

        A step that does not wait gives 1 + h tokens, h being expected of what is at hand, and the answer will still be
        there for the next one, less as many levels. So for the time of a step it brings those of the 1 + h tokens that
        the answer would not have brought: alpha + alpha^2 + ... of them it would. And all requests wait for what some
        lack: what the answer adds must be worth the time that it takes, to come and to be verified.
        """
        if not self._settings.adaptive:
            return answer.deadline if not at_hand.tokens.all() else None
        if self._decided is not None and self._decided.choice == NO_DRAFTS:
            return None
        lacking = at_hand.tokens < self._fresh_tokens
        given, alphas = 1.0 + at_hand.tokens[lacking], at_hand.alphas[lacking]
        brought = float((given - chain_tokens(alphas, given)).sum())
        wait_s = max(answer.expected_at - now, OVERDUE * self.round_s)
        worth_s = self._step_s - brought / self._tokens * self.round_s
        return answer.deadline if lacking.any() and wait_s < min(worth_s, self._gain_s(at_hand)) else None

    def _gain_s(self, at_hand: AtHand) -> float:
        """What fresh drafts would add to a step, as time that so many tokens take; less what verifying them takes."""
        depth = self._decided.choice.depth if self._decided is not None else self._settings.max_depth
        fresh = chain_tokens(at_hand.alphas, depth)
        added = np.maximum(fresh - at_hand.tokens, 0.0)
        # Prompts take what they take.
        gain_s = float(added.sum()) / self._tokens * max(self.round_s - self._prompts_s, 0.0)
        if not self._times.ready:
            return gain_s
        nodes = self._nodes * float(np.divide(added, fresh, out=np.zeros_like(added), where=fresh > 0.0).sum())
        return gain_s - self._times.marginal(added.size * (1.0 + self._nodes) - nodes, nodes, 0.0)


def chain_tokens(alphas: Floats, levels: Floats | float) -> Floats:
    """Expected of chains of so many levels, of each of which the target takes the token with chance `alphas` < 1."""
    return alphas * (1.0 - alphas**levels) / (1.0 - alphas)
