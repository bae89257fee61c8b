"""What Prometheus reads is what the library that counts would have written."""

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.series import counted
from tidemill.core.metrics import CONTROLLER_SERIES, ROUTER_SERIES, WORKER_SERIES, Kind, Metrics, Series

AWKWARD = 'a "quoted"\nback\\slash'


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for f in families for each in f.samples}


def test_every_series_reads_as_the_library_writes_it() -> None:
    metrics = counted((*ROUTER_SERIES, *WORKER_SERIES, *CONTROLLER_SERIES))
    ours, theirs = samples(metrics.text()), samples(generate_latest(metrics.registry).decode())
    assert len(theirs) > 800
    assert theirs.items() <= ours.items()
    assert {name.split("_")[0] for name, _ in ours.keys() - theirs.keys()} == {"process"}
    types = [line for line in generate_latest(metrics.registry).decode().splitlines() if line.startswith("# ")]
    assert set(types) <= set(metrics.text().splitlines())


def test_awkward_label_values_come_back_as_they_were() -> None:
    series = Series("tidemill_odd_total", Kind.COUNTER, "Odd: \\ and\nnew lines.", "Nothing.", ("what",))
    metrics = Metrics((series,))
    metrics.add(series, 2.5, what=AWKWARD)
    assert samples(metrics.text())["tidemill_odd_total", (("what", AWKWARD),)] == 2.5


def test_a_series_without_labels_is_there_from_the_start_and_follows() -> None:
    series = Series("tidemill_depth", Kind.GAUGE, "Depth.", "Nothing.")
    metrics = Metrics((series,))
    assert samples(metrics.text())["tidemill_depth", ()] == 0
    for value in (3.0, 1e18, -0.25):
        metrics.set(series, value)
        assert samples(metrics.text())["tidemill_depth", ()] == value
