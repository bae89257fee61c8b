"""What a verify worker verifies: drafts are gathered from their sources, and before each step chosen among.

after a step   committed tokens re-root what is at hand -> asks go to the draft workers
meanwhile      their trees come, fresh or late, and are kept as far as they fit
before a step  wait, if that is worth it -> choose nodes -> propose them to the engine
after it       what the target took teaches sources and estimates
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tidemill.core import metrics
from tidemill.core.messages import Draft, DraftReply
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request
from tidemill.core.settings import SpeculationSettings
from tidemill.core.tree import Shape
from workers.engine.base import Engine, SequenceOutput
from workers.speculation.branch_cache import BranchCache
from workers.speculation.frontier import likeliest
from workers.speculation.pool import DrafterPool
from workers.speculation.remote import RoundResult, Want


@dataclass(slots=True, eq=False)
class Speculating:
    """A request that decodes here, or soon will; `tokens` is the role's own list of them."""

    request: Request
    tokens: list[int]
    drafter: Peer | None
    decoding: bool = False


class Speculator:
    """Belongs to a verify role; runs on the engine's thread. Times are monotonic seconds."""

    def __init__(self, engine: Engine, settings: SpeculationSettings, metrics: Metrics, pool: DrafterPool) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._pool = pool
        self._cache = BranchCache()
        self._requests: dict[str, Speculating] = {}

    # --- requests -----------------------------------------------------------------------------------------------

    def open(self, request: Request, tokens: list[int], drafter: Peer | None, now: float) -> None:
        """Its draft worker computes its KV beside the prefill worker."""
        if self._settings.enabled:
            self._requests[request.id] = Speculating(request, tokens, drafter)
            if drafter is not None:
                self._cache.open(request.id, tokens)
                self._pool.open(drafter, request, now)

    def close_request(self, request_id: str) -> None:
        known = self._requests.pop(request_id, None)
        if known is not None and known.drafter is not None:
            self._pool.close_request(known.drafter, request_id)
            self._cache.close(request_id)

    # --- after a step -------------------------------------------------------------------------------------------

    def after_step(self, outputs: Iterable[SequenceOutput], now: float) -> None:
        """Tokens were committed, and are in the lists."""
        for each in outputs:
            known = self._requests.get(each.request_id)
            if known is not None:
                known.decoding = True
                self._cache.commit(each.request_id, each.tokens)
        self._ask(now)

    def _ask(self, now: float) -> None:
        decoding = [each for each in self._requests.values() if each.decoding]
        wants: dict[Peer, list[Want]] = {}
        for each in decoding if len(decoding) <= self._settings.max_batch else ():
            shape = self._shape(each)
            if shape.depth > 0 and each.drafter is not None:
                ahead = self._settings.ahead
                wants.setdefault(each.drafter, []).append(Want(each.request.id, each.tokens, shape, ahead))
        for request_id in self._pool.ask(wants, now):
            self._cache.told(request_id)

    def _shape(self, known: Speculating) -> Shape:
        """A step yields one token anyway, so the last one needs no draft."""
        left = known.request.sampling.max_tokens - (len(known.tokens) - len(known.request.prompt))
        settings = self._settings
        return Shape(min(settings.max_depth, left - 1), settings.width, settings.max_nodes)

    # --- drafts come --------------------------------------------------------------------------------------------

    def answered(self, peer: Peer, reply: DraftReply, now: float) -> None:
        """A draft worker's message."""
        results, drafts = self._pool.answered(peer, reply, now)
        for result in results:
            self._metrics.add(metrics.DRAFT_ROUNDS, result=result)
        for draft in drafts:
            self._metrics.add(metrics.DRAFT_TREES, fate=self._cache.put(draft))

    def drafter_lost(self, peer: Peer) -> None:
        """Its requests go on without its drafts; the next one tries it again."""
        if self._pool.lost(peer):
            self._metrics.add(metrics.DRAFT_ROUNDS, result=RoundResult.LOST)

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for drafts; None: not at all."""
        deadline = self._pool.wait_until(now)
        if deadline is None:
            return None
        have = [self._cache.tree(each.request.id)[0] for each in self._requests.values() if each.decoding]
        return None if all(have) else deadline

    def poll(self, now: float) -> None:
        self._pool.poll(now)

    # --- before a step ------------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Propose what is best of what is at hand."""
        for each in self._requests.values():
            if not each.decoding:
                continue
            tree, fate = self._cache.tree(each.request.id)
            shape = self._shape(each)
            chosen = tree.subset(likeliest(tree, shape))
            if self._engine.propose(Draft(each.request.id, len(each.tokens), chosen)):
                self._metrics.add(metrics.DRAFTS_USED, source="draft", fate=fate)

    def close(self) -> None:
        self._pool.close()
