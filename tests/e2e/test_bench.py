"""`tidemill bench` against a cluster of emulated workers whose steps take a known time."""

import asyncio
import csv
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.local import LocalCluster, local_cluster, settings_for
from tidemill.core import metrics
from tidemill.core.settings import EmulatedSettings, LatencySettings

ROOT = Path(__file__).parents[2]
STEP_S = 0.02
TIMEOUT_S = 120


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    emulated = EmulatedSettings(
        target=LatencySettings(step_s=STEP_S), draft=LatencySettings(step_s=0.002), agreement=0.7, context_length=4096
    )
    async with local_cluster(settings_for(emulated=emulated, kv_blocks=2048, max_batch_tokens=2048)) as cluster:
        yield cluster


async def bench(address: str, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "cluster.cli", "bench", "--address", address, *arguments],
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )


async def said(process: Process) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


async def test_two_rates_from_a_trace(cluster: LocalCluster, tmp_path: Path) -> None:
    trace = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    trace += [f"2023-11-16 18:15:{at:02d}.5,{100 + at},{4 + at % 3}" for at in range(40)]
    (tmp_path / "trace.csv").write_text("\n".join(trace))
    arguments = ["--trace", str(tmp_path / "trace.csv"), "--speed", "10,20", "--duration", "1"]
    arguments += ["--goal", "default=60,60", "--out", str(tmp_path / "out")]
    code, out, err = await said(await bench(cluster.address, *arguments))
    assert code == 0, err
    assert "100.0%" in out
    requests, summary = read(tmp_path / "out" / "requests.csv"), read(tmp_path / "out" / "summary.csv")
    assert [(row["rate"], row["sent"], row["ok"]) for row in summary] == [("10.0", "10", "10"), ("20.0", "20", "20")]
    assert {row["result"] for row in requests} == {"ok"}
    assert all(row["output_tokens"] == row["wanted_tokens"] for row in requests)
    assert all(row["prefill_worker"].startswith("prefill-0@") for row in requests)
    assert all(float(row["ttft_s"]) >= 2 * STEP_S for row in requests), "a prefill and a decode step"
    assert sum(float(row["accepted_per_verify"]) > 0 for row in requests) > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"rates.png", "latencies.png"}


async def test_ctrl_c_cancels_what_is_in_flight_and_reports_the_rest(cluster: LocalCluster, tmp_path: Path) -> None:
    arguments = ["--rates", "20", "--duration", "60", "--output-tokens", "uniform:5:500", "--out", str(tmp_path)]
    process = await bench(cluster.address, *arguments)
    counters = cluster.router.metrics
    await cluster.settled(lambda: counters.value(metrics.REQUESTS, outcome="length") >= 5, TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    code, out, err = await said(process)
    assert code == 130
    assert "interrupted: requests in flight were cancelled" in err
    results = [row["result"] for row in read(tmp_path / "requests.csv")]
    assert results.count("ok") >= 5
    assert results.count("cancelled") >= 1
    assert "default" in out
    await cluster.nothing_held()


async def test_errors_are_counted_by_kind(cluster: LocalCluster, tmp_path: Path) -> None:
    arguments = ["--rates", "10", "--duration", "1", "--mix", "tight=0.5,default=0.5", "--out", str(tmp_path)]
    code, _, err = await said(await bench(cluster.address, *arguments))
    assert code == 1
    assert "no goal is known of class 'tight'" in err
    code, _, err = await said(await bench(cluster.address, *arguments, "--goal", "tight=1,1"))
    assert code == 0
    assert "failed: invalid_request" in err, "the cluster knows no class of that name"
    assert {(row["slo_class"], row["result"]) for row in read(tmp_path / "requests.csv")} == {
        ("tight", "invalid_request"),
        ("default", "ok"),
    }


async def test_no_cluster(tmp_path: Path) -> None:
    code, out, err = await said(await bench("127.0.0.1:9", "--out", str(tmp_path / "out")))
    assert code == 1
    assert "is it up?" in " ".join(err.split())
    assert not out
    assert not (tmp_path / "out").exists()
