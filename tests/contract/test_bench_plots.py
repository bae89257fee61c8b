"""What matplotlib makes of a load test's outcomes."""

from pathlib import Path

import pytest

from cluster.bench.arrivals import Arrival
from cluster.bench.plots import by_class, plot_distributions, plot_rates
from cluster.bench.summary import OK, Exchange, summarise
from tidemill import Slo

GOALS = {"tight": Slo(0.5, 0.05), "relaxed": Slo(2.0, 0.2)}


def exchange(slo_class: str, result: str = OK, ttft_s: float | None = 0.1, tpot_s: float | None = 0.01) -> Exchange:
    return Exchange(0, 2.0, Arrival(0.0, 100, 20, slo_class), result, 0.0, ttft_s, tpot_s, 1.0, output_tokens=20)


SOME = [exchange("tight"), exchange("tight", ttft_s=0.6), exchange("relaxed", tpot_s=0.06)]
FAILED = [exchange("tight", "overloaded", None, None)]


@pytest.mark.parametrize("exchanges", [[*SOME, *FAILED], [], FAILED], ids=["some", "none", "failed"])
def test_plots_of_something_and_of_nothing(exchanges: list[Exchange], tmp_path: Path) -> None:
    plot_rates(tmp_path / "rates.png", by_class(summarise(exchanges, GOALS, 2.0, 4.0)))
    plot_distributions(tmp_path / "latencies.png", exchanges, GOALS)
    for name in ("rates.png", "latencies.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
