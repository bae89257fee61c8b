"""What a verify worker verifies: drafts are gathered from their sources, and before each step chosen among.

after a step   committed tokens re-root what is at hand, and teach the estimates -> asks go to the draft workers
meanwhile      their trees come, fresh or late, and are kept as far as they fit
before a step  wait, if that is worth it -> choose nodes for all requests together -> propose them to the engine
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tidemill.core import metrics
from tidemill.core.messages import Draft, DraftReply
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request
from tidemill.core.settings import SpeculationSettings
from tidemill.core.tree import ROOT, Shape, TokenTree
from workers.engine.base import Engine, SequenceOutput, StepOutput
from workers.speculation.acceptance import Proposal, Rule, check_pairing
from workers.speculation.branch_cache import REMOTE, BranchCache
from workers.speculation.branches import Branch, Calibrate, Weights, weigh
from workers.speculation.calibration import Alpha, Calibration
from workers.speculation.goals import Flags, Goals, Waiting, prompt_tokens
from workers.speculation.local import LocalDrafts
from workers.speculation.pace import AtHand, Pace
from workers.speculation.pool import DrafterPool
from workers.speculation.remote import RoundResult, Want
from workers.speculation.selection import Candidates, Reason, Selection, select
from workers.speculation.step_time import StepTimes
from workers.speculation.tally import Tally

FIRST_ALPHA = 0.6


@dataclass(frozen=True, slots=True)
class Offer:
    """A tree that was proposed for a request, as its source gave it."""

    tree: TokenTree
    source: str


@dataclass(slots=True, eq=False)
class Speculating:
    """A request that decodes here, or soon will; `tokens` is the role's own list of them."""

    request: Request
    tokens: list[int]
    drafter: Peer | None
    opened_at: float
    prompt_left: int  # tokens whose KV is to be computed here before it decodes
    first_at: float | None = None  # when it got its first token here
    first_length: int = 0  # and how many tokens it then had
    late: bool = False  # which was later than its goal
    offer: Offer | None = None
    alpha: Alpha = field(default_factory=lambda: Alpha(FIRST_ALPHA))
    longest: int = field(init=False)  # tokens it may have in all

    def __post_init__(self) -> None:
        self.longest = len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def decoding(self) -> bool:
        return self.first_at is not None

    @property
    def room(self) -> int:
        """Levels that are of use: a step yields one token anyway, so the last one needs no draft."""
        return self.longest - len(self.tokens) - 1

    def first_came(self, now: float) -> None:
        """It got its first token."""
        self.first_at, self.first_length = now, len(self.tokens)
        self.late = now - self.opened_at > self.request.slo.ttft_s


class Speculator:
    """Belongs to a verify role; runs on the engine's thread. Times are monotonic seconds."""

    def __init__(
        self, engine: Engine, settings: SpeculationSettings, metrics: Metrics, pool: DrafterPool, times: StepTimes
    ) -> None:
        """`times` is the engine's, and outlives the role. Raises InexactPairing for a rule that would change tokens."""
        check_pairing(Rule(settings.rule), Proposal.KEYED)
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._pool = pool
        self._pace = Pace(settings, times)
        self._calibration = Calibration()
        self._calibrate: Calibrate = self._calibration.calibrated if settings.adaptive else lambda _, chances: chances
        self._local = LocalDrafts(engine, settings)
        self._cache = BranchCache()
        self._tally = Tally()
        self._requests: dict[str, Speculating] = {}
        self._decoded: list[Speculating] = []  # in the last step
        self._goals = goals_of([])  # theirs

    # --- requests -----------------------------------------------------------------------------------------------

    def open(
        self, request: Request, tokens: list[int], drafter: Peer | None, now: float, *, prompt_here: bool = False
    ) -> None:
        """Its draft worker computes its KV beside whoever computes the prompt; `prompt_here`: this worker does."""
        if self._settings.enabled:
            remote = drafter if REMOTE in self._settings.sources else None
            self._requests[request.id] = Speculating(request, tokens, remote, now, len(tokens) if prompt_here else 0)
            if remote is not None:
                self._cache.open(request.id, tokens)
                self._pool.open(remote, request, now)

    def close_request(self, request_id: str) -> None:
        known = self._requests.pop(request_id, None)
        if known is not None:
            self._local.forget(known.request)
            if known.drafter is not None:
                self._pool.close_request(known.drafter, request_id)
                self._cache.close(request_id)

    # --- after a step -------------------------------------------------------------------------------------------

    def after_step(self, output: StepOutput, now: float) -> None:
        """Tokens were committed, and are in the lists."""
        found = [(known, each) for each in output.outputs if (known := self._requests.get(each.request_id))]
        contexts = [(len(known.tokens), 1 + each.drafted) for known, each in found]
        self._pace.stepped(output, sum(n * rows for n, rows in contexts), sum(n for n, _ in contexts), now)
        for progress in output.progress:
            if progress.request_id in self._requests:
                known = self._requests[progress.request_id]
                known.prompt_left = len(known.tokens) - progress.computed_tokens
        for request_id in output.preempted:
            if request_id in self._requests:
                self._requests[request_id].prompt_left = len(self._requests[request_id].tokens)
        for known, each in found:
            self._learn(known, each)
            known.prompt_left = 0
            if known.first_at is None:
                known.first_came(now)
            self._cache.commit(each.request_id, each.tokens)
        self._tally.flush(self._metrics)
        self._ask(now)

    def _learn(self, known: Speculating, output: SequenceOutput) -> None:
        """From the verdict on what was proposed, if all of it was verified."""
        self._local.learn(known.request, known.tokens, len(output.tokens), output.successors)
        offer, known.offer = known.offer, None
        if offer is None or output.drafted != len(offer.tree) or output.finish is not None:
            return
        accepted = accepted_nodes(offer.tree, output.tokens)
        self._calibration.observe_verdict(offer.source, offer.tree, accepted)
        known.alpha.observe(offer.tree, accepted)
        self._tally.verdict(offer.source, len(accepted), judged_levels(offer.tree, accepted))
        self._metrics.observe(metrics.DRAFT_LENGTH, len(accepted), slo_class=known.request.slo.name)

    def _decoding(self) -> list[Speculating]:
        return [each for each in self._requests.values() if each.decoding]

    def _ask(self, now: float) -> None:
        """Tell the draft workers what was committed, and what is wanted next."""
        decoding = self._decoding()
        drafted_for = [each for each in decoding if each.drafter is not None]
        shape, ahead = self._pace.shape(
            [each.alpha.value for each in decoding],
            sum(len(each.tokens) for each in decoding),
            self._pool.round_trip_s(),
            self._pool.step_s(),
        )
        wants: dict[Peer, list[Want]] = {}
        for each in drafted_for if shape.depth else ():
            assert each.drafter is not None
            if each.room > 0:
                own = shape if shape.depth <= each.room else Shape(each.room, shape.width, shape.nodes)
                wants.setdefault(each.drafter, []).append(Want(each.request.id, each.tokens, own, ahead))
        for request_id in self._pool.ask(wants, now):
            self._cache.told(request_id)

    # --- drafts come --------------------------------------------------------------------------------------------

    def answered(self, peer: Peer, reply: DraftReply, came_at: float) -> None:
        """A draft worker's message."""
        results, drafts = self._pool.answered(peer, reply, came_at)
        for result in results:
            self._metrics.add(metrics.DRAFT_ROUNDS, result=result)
        for draft in drafts:
            self._metrics.add(metrics.DRAFT_TREES, fate=self._cache.put(draft))

    def drafter_lost(self, peer: Peer) -> None:
        """Its requests go on without its drafts; the next one tries it again."""
        if self._pool.lost(peer):
            self._metrics.add(metrics.DRAFT_ROUNDS, result=RoundResult.LOST)

    def poll(self, now: float) -> None:
        self._pool.poll(now)

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for drafts; None: not at all."""
        answer = self._pool.next_answer(now)
        if answer is None:
            return None
        drafted_for = [each for each in self._decoding() if each.drafter is not None and each.room > 0]
        if not drafted_for:
            return None
        branches = [self._cache.branch(each.request.id) for each in drafted_for]
        alphas = np.array([each.alpha.value for each in drafted_for])
        return self._pace.wait_until(AtHand(self._weighed(branches).expected(), alphas), answer, now)

    def _weighed(self, branches: Sequence[Branch]) -> Weights:
        return weigh(branches, self._calibrate)

    # --- before a step ------------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Propose what is best of what is at hand."""
        decoding = self._decoding()
        if decoding:
            started = time.perf_counter()
            branches, chosen = self._choose(decoding, now)
            self._metrics.observe(metrics.SELECTION_TIME, time.perf_counter() - started)
            self._propose(decoding, branches, chosen)

    def _choose(self, decoding: list[Speculating], now: float) -> tuple[list[Branch], Selection]:
        """A branch for each request, and nodes of it."""
        lengths = np.array([len(each.tokens) for each in decoding], np.float64)
        progress = self._goals_of(decoding).progress(lengths, now)
        lost = progress.lost(self._pace.best_tpot_s)
        self._hold_prompts_back(progress.behind & ~lost, now)
        needs = np.where(lost, 1.0, progress.needs(self._pace.round_s))
        branches = self._branches(decoding)
        budget = self._pace.budget(len(decoding), float(lengths.sum()))
        candidates = Candidates(self._weighed(branches), lengths, needs)
        chosen = select(candidates, self._pace.times_for_choice, budget, self._pace.overhead_s).choice
        self._pace.chosen(chosen, [branch.fate for branch in branches])
        for reason in Reason:
            self._metrics.add(metrics.NODES_CHOSEN, chosen.count(reason), reason=reason)
        missed = {*np.flatnonzero(lost).tolist(), *chosen.unmet}
        for slo_class, count in Counter([decoding[row].request.slo.name for row in missed]).items():
            self._metrics.add(metrics.GOALS_OUT_OF_REACH, count, slo_class=slo_class)
        return branches, chosen

    def _goals_of(self, decoding: list[Speculating]) -> Goals:
        """Made anew when others decode than in the last step."""
        if decoding != self._decoded:
            self._decoded, self._goals = decoding, goals_of(decoding)
        return self._goals

    def _hold_prompts_back(self, pressed: Flags, now: float) -> None:
        """If requests are behind a goal that they may yet meet."""
        if pressed.any() and self._settings.adaptive and (tokens := self._prompt_tokens(now)) is not None:
            self._engine.limit_prompts(tokens)

    def _prompt_tokens(self, now: float) -> int | None:
        """How many the next step should compute; None: there is nothing to hold back."""
        waiting = [each for each in self._requests.values() if each.prompt_left]
        if not waiting or any(each.decoding for each in waiting):  # whose KV was taken, and who is late already
            return None
        return prompt_tokens(
            [Waiting(each.prompt_left, now - each.opened_at, each.request.slo.ttft_s) for each in waiting],
            self._pace.round_s,
        )

    def _branches(self, decoding: Sequence[Speculating]) -> list[Branch]:
        """For each request that of the source from which most tokens are expected."""
        remote = [self._cache.branch(each.request.id).up_to(each.room) for each in decoding]
        if not self._local.sources:
            return remote
        asked = [(each.request, each.tokens, each.room) for each in decoding]
        by_source = [remote, *self._local.propose(asked, self._pace.local_shape(len(decoding)))]
        expected = [self._weighed(branches).expected() for branches in by_source]
        return [by_source[best][row] for row, best in enumerate(np.argmax(expected, axis=0))]

    def _propose(self, decoding: Sequence[Speculating], branches: Sequence[Branch], chosen: Selection) -> None:
        """To the engine, which may take no draft for a request now."""
        used: Counter[tuple[str, str]] = Counter()
        for known, branch, nodes in zip(decoding, branches, chosen.nodes, strict=True):
            if nodes:
                tree = branch.tree.subset(nodes, branch.root)
                if self._engine.propose(Draft(known.request.id, len(known.tokens), tree)):
                    known.offer = Offer(tree, branch.source)
                    used[branch.source, branch.fate] += 1
        for (source, fate), count in used.items():
            self._metrics.add(metrics.DRAFTS_USED, count, source=source, fate=fate)

    def close(self) -> None:
        self._pool.close()


def goals_of(decoding: Sequence[Speculating]) -> Goals:
    """Of requests that got their first token."""
    rows = [(each.first_at, each.first_length, each.longest, each.request.slo.tpot_s, each.late) for each in decoding]
    first_at, first_length, longest, tpot_s, late = np.array(rows, np.float64).reshape(-1, 5).T
    return Goals(first_at, first_length, longest, tpot_s, late > 0.0)


def judged_levels(tree: TokenTree, accepted: Sequence[int]) -> int:
    """Levels of which the verdict says something: those accepted, and the first that was not."""
    last = accepted[-1] if accepted else ROOT
    return len(accepted) + (last in tree.parents)


def accepted_nodes(tree: TokenTree, tokens: Sequence[int]) -> list[int]:
    """The nodes that carry the first of `tokens`, from below the root."""
    nodes: list[int] = []
    node = ROOT
    for token in tokens:
        child = tree.child(node, token)
        if child is None:
            break
        nodes.append(child)
        node = child
    return nodes
