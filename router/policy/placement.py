"""Which worker of a pool gets a request: the least loaded that is not to be avoided, ties at random."""

import random
from collections.abc import Sequence, Set
from enum import StrEnum

from tidemill.core.model import Decision, PoolSnapshot, Role, WorkerId, WorkerSnapshot


class PlacementReason(StrEnum):
    """Why."""

    LEAST_LOADED = "least_loaded"
    ONLY_ONE = "only_one"
    LAST_RESORT = "last_resort"  # all that is left has failed this request before
    NONE_LEFT = "none_left"


def place(
    snapshot: PoolSnapshot,
    role: Role,
    avoid: Set[WorkerId],
    rng: random.Random,
    last_resort: Set[WorkerId] = frozenset(),
) -> Decision[WorkerSnapshot | None]:
    """None if the pool has no worker outside `avoid`. Those in `last_resort` are taken only if there is no other."""
    allowed = [worker for worker in snapshot.of(role) if worker.peer.id not in avoid]
    candidates = [worker for worker in allowed if worker.peer.id not in last_resort]
    if not allowed:
        return Decision(None, PlacementReason.NONE_LEFT)
    if not candidates:
        return Decision(_least_loaded(allowed, rng), PlacementReason.LAST_RESORT)
    if len(candidates) == 1:
        return Decision(candidates[0], PlacementReason.ONLY_ONE)
    return Decision(_least_loaded(candidates, rng), PlacementReason.LEAST_LOADED)


def _least_loaded(workers: Sequence[WorkerSnapshot], rng: random.Random) -> WorkerSnapshot:
    least = min(_load(worker) for worker in workers)
    return rng.choice([worker for worker in workers if _load(worker) == least])


def _load(worker: WorkerSnapshot) -> tuple[float, ...]:
    """Smaller is better. What this router sent counts at once; what a worker reports includes others' requests."""
    reported, own = worker.load, worker.inflight_requests
    requests = max(reported.queued_requests + reported.running_requests, own)
    if worker.role is Role.PREFILL:
        return (max(reported.queued_tokens, worker.inflight_tokens), requests)
    used = reported.kv_blocks_used / reported.kv_blocks_total if reported.kv_blocks_total else 0.0
    return (requests, used)
