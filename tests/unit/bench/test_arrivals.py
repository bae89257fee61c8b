"""Loads are what was asked for, and the same again with the same seed."""

import random
import statistics
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bench.arrivals import (
    Arrival,
    BadWorkload,
    Process,
    TraceEntry,
    Workload,
    constant,
    fitted,
    mean_rate,
    parse_lengths,
    parse_mix,
    poisson,
    read_trace,
)

ONE_CLASS = {"default": 1.0}
TRACE = tuple(TraceEntry(float(at), 100 + at, 10 + at) for at in (0, 1, 3, 4, 10))  # 0.4 requests a second


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


class TestProcesses:
    def test_poisson_gaps(self) -> None:
        times = list(islice(poisson(5.0, random.Random(1)), 20_000))
        gaps = [after - before for before, after in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
        assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)  # as the mean, in an exponential distribution

    def test_constant_gaps(self) -> None:
        assert list(islice(constant(4.0), 5)) == [0.0, 0.25, 0.5, 0.75, 1.0]

    @pytest.mark.parametrize("process", [Process.POISSON, Process.CONSTANT])
    def test_a_load_lasts_as_long_as_it_should(self, process: Process) -> None:
        arrivals = Workload(process, ONE_CLASS, lambda _: 7, lambda _: 3).arrivals(50.0, 20.0, seed=0)
        assert len(arrivals) == pytest.approx(1000, rel=0.1)
        assert 19.0 < arrivals[-1].at_s < 20.0
        assert {(each.prompt_tokens, each.output_tokens) for each in arrivals} == {(7, 3)}

    def test_a_faster_trace_has_the_same_requests_closer_together(self) -> None:
        workload = Workload(Process.TRACE, ONE_CLASS, trace=TRACE)
        arrivals = workload.arrivals(rate=0.8, duration_s=4.0, seed=0)  # twice as fast as it was
        assert [each.at_s for each in arrivals] == [0.0, 0.5, 1.5, 2.0]
        assert [each.prompt_tokens for each in arrivals] == [100, 101, 103, 104]
        assert [each.output_tokens for each in arrivals] == [10, 11, 13, 14]

    def test_a_traces_lengths_at_other_times(self) -> None:
        arrivals = Workload(Process.CONSTANT, ONE_CLASS, trace=TRACE).arrivals(100.0, 5.0, seed=0)
        assert len(arrivals) == 500
        pairs = {(each.prompt_tokens, each.output_tokens) for each in arrivals}
        assert pairs == {(entry.prompt_tokens, entry.output_tokens) for entry in TRACE}

    def test_a_traces_times_with_other_lengths(self) -> None:
        arrivals = Workload(Process.TRACE, ONE_CLASS, output=lambda _: 5, trace=TRACE).arrivals(0.4, 20.0, seed=0)
        assert [(each.at_s, each.prompt_tokens, each.output_tokens) for each in arrivals][-1] == (10.0, 110, 5)

    def test_what_is_missing_is_said(self) -> None:
        for process, lengths in ((Process.TRACE, lambda _: 1), (Process.POISSON, None)):
            with pytest.raises(BadWorkload, match="without a trace"):
                Workload(process, ONE_CLASS, prompt=lambda _: 1, output=lengths)

    @pytest.mark.parametrize("process", list(Process))
    def test_seeds(self, process: Process) -> None:
        workload = Workload(process, {"a": 0.5, "b": 0.5}, parse_lengths("uniform:1:999"), lambda _: 1, TRACE)
        assert workload.arrivals(2.0, 30.0, seed=1) == workload.arrivals(2.0, 30.0, seed=1)
        assert workload.arrivals(2.0, 30.0, seed=1) != workload.arrivals(2.0, 30.0, seed=2)

    def test_shares_of_classes(self) -> None:
        mix = {"tight": 0.6, "default": 0.3, "relaxed": 0.1}
        arrivals = Workload(Process.CONSTANT, mix, lambda _: 1, lambda _: 1).arrivals(1000.0, 10.0, seed=3)
        for name, share in mix.items():
            assert sum(each.slo_class == name for each in arrivals) / len(arrivals) == pytest.approx(share, abs=0.02)


class TestTraceFiles:
    def test_azure(self, tmp_path: Path) -> None:
        path = written(
            tmp_path,
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:15:50.0000000,396,109\n"
            "2023-11-16 18:15:46.5000000,374,44\n"
            "2023-11-16 18:15:51.5000000,91,0\n",
        )
        assert read_trace(path) == (TraceEntry(0.0, 374, 44), TraceEntry(3.5, 396, 109), TraceEntry(5.0, 91, 1))
        assert mean_rate(read_trace(path)) == pytest.approx(2 / 5)
        assert read_trace(path, skip_s=2.0) == (TraceEntry(1.5, 396, 109), TraceEntry(3.0, 91, 1))

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a,b\n1,2\n", "no column ContextTokens"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,1\n", ":2: Invalid isoformat"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,1\n", ":2: invalid literal"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,1\n", "two requests or more"),
            ("", "no column"),
        ],
    )
    def test_faults_say_where(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(BadWorkload, match=said):
            read_trace(written(tmp_path, text))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(BadWorkload, match="cannot be read"):
            read_trace(tmp_path / "nowhere.csv")

    def test_all_at_once(self) -> None:
        with pytest.raises(BadWorkload, match="at once"):
            mean_rate((TRACE[0], TRACE[0]))


class TestLengths:
    def test_distributions(self) -> None:
        rng = random.Random(1)
        assert {parse_lengths("40")(rng), parse_lengths("fixed:40")(rng)} == {40}
        uniform = [parse_lengths("uniform:10:20")(rng) for _ in range(2000)]
        assert (min(uniform), max(uniform)) == (10, 20)
        lognormal = sorted(parse_lengths("lognormal:500:0.8")(rng) for _ in range(4001))
        assert lognormal[2000] == pytest.approx(500, rel=0.06)
        assert lognormal[3366] == pytest.approx(500 * 2.2255, rel=0.1)  # one sigma above

    @pytest.mark.parametrize("text", ["", "many", "0", "uniform:5", "uniform:9:5", "lognormal:10:-1", "zipf:3", "5:6"])
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(BadWorkload, match="expected N, uniform"):
            parse_lengths(text)


class TestMix:
    def test_shares_add_up(self) -> None:
        assert parse_mix("tight=3, default=1") == {"tight": 0.75, "default": 0.25}
        assert parse_mix("default") == {"default": 1.0}

    @pytest.mark.parametrize("text", ["", "tight=much", "=1", "tight=-1", "tight=inf", "tight=nan", "a=0,b=0"])
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(BadWorkload):
            parse_mix(text)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000))), st.integers(2, 3000))
def test_requests_fit_the_context_and_only_what_does_not_is_cut(lengths: list[tuple[int, int]], context: int) -> None:
    arrivals = [Arrival(0.0, prompt, output, "default") for prompt, output in lengths]
    found, cut = fitted(arrivals, context)
    assert cut == sum(sum(pair) > context for pair in lengths)
    for old, new in zip(arrivals, found, strict=True):
        assert new.prompt_tokens + new.output_tokens <= context
        assert 1 <= new.prompt_tokens <= old.prompt_tokens
        assert 1 <= new.output_tokens <= old.output_tokens
