"""How workers are divided among the roles, and which division suits the load best."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.policy.loads import PrefillLoad, VerifyLoad
from tidemill.core.model import Role

Split = Mapping[Role, int]  # workers of each role


@dataclass(frozen=True, slots=True)
class Bounds:
    """Workers of a role; `most` None: no limit."""

    least: int = 0
    most: int | None = None

    def __contains__(self, count: int) -> bool:
        return self.least <= count and (self.most is None or count <= self.most)


@dataclass(frozen=True, slots=True)
class Loads:
    """Of the roles with a goal; None as long as nothing was measured."""

    prefill: PrefillLoad | None
    verify: VerifyLoad | None
    in_place: bool = False  # prompts are computed where they are decoded: there is no prefill worker

    def ratios(self, split: Split) -> dict[Role, float]:
        """Each role's load to its goal; infinite for one that has work and no worker.

        Only who computes prompts in place now may go on so. What that adds to verify workers' steps was measured.
        """
        prompts_at = Role.VERIFY if self.in_place and not split[Role.PREFILL] else Role.PREFILL
        return {
            Role.PREFILL: self.prefill.ratio(split[prompts_at]) if self.prefill else 0.0,
            Role.VERIFY: self.verify.ratio(split[Role.VERIFY], split[Role.DRAFT]) if self.verify else 0.0,
        }

    def worst(self, split: Split) -> float:
        return max(self.ratios(split).values())


def splits(total: int, bounds: Mapping[Role, Bounds], *, drafts: bool) -> Iterator[Split]:
    """Every split of so many workers that the bounds allow; without a draft model none of them draft."""
    for prefill, draft in itertools.product(range(total + 1), range(total + 1 if drafts else 1)):
        split = {Role.PREFILL: prefill, Role.DRAFT: draft, Role.VERIFY: total - prefill - draft}
        if all(split[role] in bounds[role] for role in Role):
            yield split


def best_split(now: Split, loads: Loads, bounds: Mapping[Role, Bounds], *, drafts: bool) -> Split | None:
    """The one whose most loaded role is the least loaded; of equals the nearest. None if the bounds allow none."""
    return min(
        splits(sum(now.values()), bounds, drafts=drafts),
        key=lambda split: (round(loads.worst(split), 3), distance(split, now), *(split[role] for role in Role)),
        default=None,
    )


def nearest_split(now: Split, loads: Loads, bounds: Mapping[Role, Bounds], *, drafts: bool) -> Split | None:
    """The one that fewest workers change their role for; of equals the best. None if the bounds allow none."""
    return min(
        splits(sum(now.values()), bounds, drafts=drafts),
        key=lambda split: (distance(split, now), loads.worst(split), *(split[role] for role in Role)),
        default=None,
    )


def best_with_one_more(role: Role, now: Split, loads: Loads, bounds: Mapping[Role, Bounds]) -> Split | None:
    """The best split with one worker of another role moved to this one."""
    found = (
        dict(now) | {role: now[role] + 1, giver: now[giver] - 1} for giver in Role if giver is not role and now[giver]
    )
    allowed = [split for split in found if all(split[each] in bounds[each] for each in Role)]
    return min(allowed, key=lambda split: (loads.worst(split), *(split[each] for each in Role)), default=None)


def distance(a: Split, b: Split) -> int:
    """Workers that have another role in the other."""
    return sum(abs(a[role] - b[role]) for role in Role) // 2


def share_moved(a: Split, b: Split) -> float:
    return distance(a, b) / max(sum(b.values()), 1)


NO_LIMITS: Mapping[Role, Bounds] = {Role.PREFILL: Bounds(), Role.DRAFT: Bounds(), Role.VERIFY: Bounds(1)}

__all__ = [
    "NO_LIMITS", "Bounds", "Loads", "Split", "best_split", "best_with_one_more", "distance", "nearest_split",
    "share_moved", "splits",
]  # fmt: skip
