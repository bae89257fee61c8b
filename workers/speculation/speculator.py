"""What a verify worker verifies: drafts are gathered from their sources, and before each step chosen among.

after a step   committed tokens re-root what is at hand, and teach the estimates -> asks go to the draft workers
meanwhile      their trees come, fresh or late, and are kept as far as they fit
before a step  wait, if that is worth it -> choose nodes for all requests together -> propose them to the engine
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tidemill.core import metrics
from tidemill.core.messages import Draft, DraftReply
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request
from tidemill.core.settings import SpeculationSettings
from tidemill.core.tree import ROOT, Shape, TokenTree
from workers.engine.base import Engine, SequenceOutput, StepOutput
from workers.speculation.acceptance import Proposal, Rule, check_pairing
from workers.speculation.branch_cache import BranchCache
from workers.speculation.calibration import Alpha, Calibration
from workers.speculation.goals import Progress, Waiting, prompt_tokens
from workers.speculation.local import LocalDrafts
from workers.speculation.pace import AtHand, Pace
from workers.speculation.pool import DrafterPool
from workers.speculation.remote import RoundResult, Want
from workers.speculation.selection import Candidate, Reason, need, select
from workers.speculation.step_time import StepTimes
from workers.speculation.tally import Tally

REMOTE = "draft"  # the source that draft workers are
FIRST_ALPHA = 0.6


@dataclass(frozen=True, slots=True)
class Offer:
    """A tree that was proposed for a request: as its source gave it, the source, and how it was come by."""

    tree: TokenTree
    source: str
    fate: str


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
    offer: Offer | None = None
    alpha: Alpha = field(default_factory=lambda: Alpha(FIRST_ALPHA))

    @property
    def decoding(self) -> bool:
        return self.first_at is not None

    @property
    def room(self) -> int:
        """Levels that are of use: a step yields one token anyway, so the last one needs no draft."""
        return self.request.sampling.max_tokens - (len(self.tokens) - len(self.request.prompt)) - 1


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
        self._local = LocalDrafts(engine, settings)
        self._cache = BranchCache()
        self._tally = Tally()
        self._requests: dict[str, Speculating] = {}

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
                known.first_at, known.first_length = now, len(known.tokens)
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
            own = Shape(min(shape.depth, each.room), shape.width, shape.nodes)
            if own.depth > 0:
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
        at_hand = [
            AtHand(sum(self._calibrated(self._cache.tree(each.request.id)[0]).path_chances()), each.alpha.value)
            for each in self._decoding()
            if each.drafter is not None and each.room > 0
        ]
        return self._pace.wait_until(at_hand, answer, now)

    def _calibrated(self, tree: TokenTree, source: str = REMOTE) -> TokenTree:
        if not self._settings.adaptive or not tree:
            return tree
        return tree.rated(self._calibration.calibrated(source, tree.chances or (1.0,) * len(tree)))

    # --- before a step ------------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Propose what is best of what is at hand."""
        started = time.perf_counter()
        decoding = self._decoding()
        if not decoding:
            return
        lost = self._regard_goals(decoding, now)
        offers = self._offers(decoding)
        candidates = [
            Candidate(
                self._calibrated(offer.tree, offer.source),
                len(known.tokens),
                1.0 if known.request.id in lost else self._need(known, now),
            )
            for known, offer in zip(decoding, offers, strict=True)
        ]
        budget = self._pace.budget(len(decoding), sum(each.context for each in candidates))
        chosen = select(candidates, self._pace.times_for_choice, budget, self._pace.overhead_s).choice
        self._pace.chosen(candidates, chosen, [offer.fate for offer in offers])
        used = Counter(
            (offer.source, offer.fate)
            for known, offer, nodes in zip(decoding, offers, chosen.nodes, strict=True)
            if nodes and self._propose(known, offer, nodes)
        )
        for (source, fate), count in used.items():
            self._metrics.add(metrics.DRAFTS_USED, count, source=source, fate=fate)
        for request_id in lost | {decoding[index].request.id for index in chosen.unmet}:
            self._metrics.add(metrics.GOALS_OUT_OF_REACH, slo_class=self._requests[request_id].request.slo.name)
        for reason in Reason:
            self._metrics.add(metrics.NODES_CHOSEN, chosen.count(reason), reason=reason)
        self._metrics.observe(metrics.SELECTION_TIME, time.perf_counter() - started)

    def _regard_goals(self, decoding: Sequence[Speculating], now: float) -> set[str]:
        """Has the engine hold prompts back if goals need that. Returns the requests whose goal is lost."""
        progress = {each.request.id: self._progress(each, now) for each in decoding}
        lost = {request_id for request_id, each in progress.items() if each.lost(self._pace.best_tpot_s)}
        pressed = any(each.behind for request_id, each in progress.items() if request_id not in lost)
        if pressed and self._settings.adaptive and (tokens := self._prompt_tokens(now)) is not None:
            self._engine.limit_prompts(tokens)
        return lost

    @staticmethod
    def _progress(known: Speculating, now: float) -> Progress:
        assert known.first_at is not None
        slo, decoded = known.request.slo, len(known.tokens) - known.first_length
        late = known.first_at - known.opened_at > slo.ttft_s
        return Progress(now - known.first_at, decoded, known.room + 1, slo.tpot_s, late)

    def _prompt_tokens(self, now: float) -> int | None:
        """How many the next step should compute; None: there is nothing to hold back."""
        waiting = [each for each in self._requests.values() if each.prompt_left]
        if not waiting or any(each.decoding for each in waiting):  # whose KV was taken, and who is late already
            return None
        return prompt_tokens(
            [Waiting(each.prompt_left, now - each.opened_at, each.request.slo.ttft_s) for each in waiting],
            self._pace.round_s,
        )

    def _offers(self, decoding: Sequence[Speculating]) -> list[Offer]:
        """For each request the source from which most tokens are expected."""
        shape = self._pace.local_shape(len(decoding))
        local = self._local.propose([(each.request, each.tokens, each.room) for each in decoding], shape)
        offers = []
        for each, others in zip(decoding, local, strict=True):
            tree, fate = self._cache.tree(each.request.id)
            found = [Offer(tree.up_to(each.room), REMOTE, fate), *(Offer(*other, "local") for other in others)]
            offers.append(max(found, key=self._expected) if others else found[0])
        return offers

    def _expected(self, offer: Offer) -> float:
        return sum(self._calibrated(offer.tree, offer.source).path_chances())

    def _need(self, known: Speculating, now: float) -> float:
        """Tokens it must gain in this round to keep its time per output token."""
        assert known.first_at is not None
        decoded = len(known.tokens) - known.first_length
        return need(now - known.first_at, self._pace.round_s, known.request.slo.tpot_s, decoded)

    def _propose(self, known: Speculating, offer: Offer, nodes: Iterable[int]) -> bool:
        """False if the engine takes no draft for it now."""
        tree = offer.tree.subset(nodes)
        if not self._engine.propose(Draft(known.request.id, len(known.tokens), tree)):
            return False
        known.offer = Offer(tree, offer.source, offer.fate)
        return True

    def close(self) -> None:
        self._pool.close()


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
