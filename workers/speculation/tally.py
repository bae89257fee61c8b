"""What the verdicts of one step add to counters, summed up first: counting goes through a lock, adding does not."""

from collections import Counter

from tidemill.core import metrics
from tidemill.core.metrics import Metrics


class Tally:
    """Of all requests in a step; `flush` tells the metrics and begins anew."""

    def __init__(self) -> None:
        self._accepted: Counter[str] = Counter()  # by source
        self._taken: Counter[tuple[str, int]] = Counter()  # levels by source and accepted depth
        self._judged: Counter[tuple[str, int]] = Counter()  # levels by source and depth the verdict speaks of

    def verdict(self, source: str, accepted: int, judged: int) -> None:
        """So many nodes of a tree were accepted, and of so many levels it is known whether they were."""
        self._accepted[source] += accepted
        self._taken[source, accepted] += 1
        self._judged[source, judged] += 1

    def flush(self, into: Metrics) -> None:
        for source, count in self._accepted.items():
            into.add(metrics.ACCEPTED_FROM, count, source=source)
        for series, ends in ((metrics.ACCEPTED_AT_DEPTH, self._taken), (metrics.OFFERED_AT_DEPTH, self._judged)):
            for (source, depth), count in _reached(ends).items():
                into.add(series, count, depth=str(depth), source=source)
        for counts in (self._accepted, self._taken, self._judged):
            counts.clear()


def _reached(ends: Counter[tuple[str, int]]) -> Counter[tuple[str, int]]:
    """How many came as deep as each depth, from how many ended at it."""
    reached: Counter[tuple[str, int]] = Counter()
    for (source, end), count in ends.items():
        for depth in range(1, end + 1):
            reached[source, depth] += count
    return reached
