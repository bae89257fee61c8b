"""A step's verdicts are counted as if each had been by itself."""

from tidemill.core import metrics
from tidemill.core.metrics import WORKER_SERIES, Metrics
from workers.speculation.tally import Tally


def test_levels_are_counted_by_depth_and_source() -> None:
    told, tally = Metrics(WORKER_SERIES), Tally()
    tally.verdict("draft", accepted=2, judged=3)
    tally.verdict("draft", accepted=0, judged=1)
    tally.verdict("lookup", accepted=1, judged=1)
    tally.flush(told)
    tally.flush(told)  # nothing is counted twice

    def at(series: metrics.Series, source: str) -> list[float]:
        return [told.value(series, depth=str(depth), source=source) for depth in (1, 2, 3)]

    assert [told.value(metrics.ACCEPTED_FROM, source=source) for source in ("draft", "lookup")] == [2, 1]
    assert at(metrics.ACCEPTED_AT_DEPTH, "draft") == [1, 1, 0]
    assert at(metrics.OFFERED_AT_DEPTH, "draft") == [2, 1, 1]
    assert (at(metrics.ACCEPTED_AT_DEPTH, "lookup"), at(metrics.OFFERED_AT_DEPTH, "lookup")) == ([1, 0, 0], [1, 0, 0])
