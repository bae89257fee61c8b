"""Which decoding requests should move to another verify worker, by how free the workers are.

Llumnix (OSDI'24): freeness = (blocks - virtual usage) / requests, so it says how far the batch may go on.
A running request's virtual usage is its blocks and some headroom, the first queued one's what it asks for, that of a
worker that is to leave infinite. The least and the most free worker are paired, as long as that brings them nearer, and
only while the least free one is short.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from enum import StrEnum

from tidemill.core.model import Decision


class LevellingReason(StrEnum):
    """Why requests move, or do not."""

    LEAVING = "leaving"  # a worker is to be emptied
    UNEVEN = "uneven"
    EVEN = "even"
    NO_ROOM = "no_room"  # nobody could take what should move


@dataclass(frozen=True, slots=True)
class Held:
    """A request that decodes on a worker. A request of higher priority is given more headroom, and moves later."""

    request_id: str
    blocks: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """A verify worker and what it holds."""

    worker: str
    blocks: int  # of its pool
    running: tuple[Held, ...] = ()
    queued_blocks: int = 0  # what the first waiting request asks for
    leaving: bool = False

    @property
    def free(self) -> int:
        return self.blocks - sum(each.blocks for each in self.running) - self.queued_blocks


@dataclass(frozen=True, slots=True)
class Migration:
    """A request's move, by workers' names."""

    request_id: str
    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class LevellingConfig:
    """When it is worth moving a request, and how many at once."""

    headroom_blocks: int = 4  # for each running request and step of priority
    low: float = 32.0  # freeness from which on a worker keeps what it has
    gap: float = 16.0  # difference in freeness that is let be
    at_once: int = 4  # migrations begun in one decision


def freeness(holder: Holder, config: LevellingConfig) -> float:
    """Blocks left for each request; negative if it has promised more than it has."""
    if holder.leaving:
        return -math.inf
    usage = sum(each.blocks + config.headroom_blocks * (1 + each.priority) for each in holder.running)
    return (holder.blocks - usage - holder.queued_blocks) / max(len(holder.running), 1)


def level(holders: Sequence[Holder], config: LevellingConfig) -> Decision[tuple[Migration, ...]]:
    """The migrations to begin now. The order of workers and of their requests does not matter."""
    now = {each.worker: each for each in sorted(holders, key=lambda each: each.worker)}
    moves: list[Migration] = []
    reasons: list[StrEnum] = []
    while len(moves) < config.at_once:
        found = _next_move(tuple(now.values()), config, {each.request_id for each in moves})
        reasons.append(found.reason)
        if found.choice is None:
            break
        source, taker, victim = found.choice
        moves.append(Migration(victim.request_id, source.worker, taker.worker))
        now[source.worker], now[taker.worker] = _moved(source, taker, victim)
    return Decision(tuple(moves), reasons[0] if reasons else LevellingReason.EVEN)


def _next_move(
    holders: Sequence[Holder], config: LevellingConfig, moved: Set[str]
) -> Decision[tuple[Holder, Holder, Held] | None]:
    source = min((each for each in holders if each.running), key=lambda each: freeness(each, config), default=None)
    if source is None:
        return Decision(None, LevellingReason.EVEN)
    refused = LevellingReason.NO_ROOM if source.leaving else LevellingReason.EVEN
    takers = [each for each in holders if each is not source and not each.leaving]
    taker = max(takers, key=lambda each: freeness(each, config), default=None)
    if taker is None:
        return Decision(None, refused)
    short = freeness(source, config)
    if not source.leaving and (short >= config.low or freeness(taker, config) - short <= config.gap):
        return Decision(None, LevellingReason.EVEN)
    victim = _victim(source, taker, config, moved)
    if victim is None:
        return Decision(None, refused)
    return Decision((source, taker, victim), LevellingReason.LEAVING if source.leaving else LevellingReason.UNEVEN)


def _victim(source: Holder, taker: Holder, config: LevellingConfig, moved: Set[str]) -> Held | None:
    """Of the least priority the shortest that does not move already.

    None if nobody fits, or the two would not be nearer to each other.
    """
    gap = freeness(taker, config) - freeness(source, config)
    for each in sorted(source.running, key=lambda held: (held.priority, held.blocks, held.request_id)):
        if each.request_id in moved or each.blocks + config.headroom_blocks > taker.free:
            continue
        if source.leaving:
            return each
        after_source, after_taker = _moved(source, taker, each)
        if abs(freeness(after_taker, config) - freeness(after_source, config)) < gap:
            return each
    return None


def _moved(source: Holder, taker: Holder, victim: Held) -> tuple[Holder, Holder]:
    left = tuple(each for each in source.running if each is not victim)
    return replace(source, running=left), replace(taker, running=(*taker.running, victim))
