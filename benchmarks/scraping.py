"""CPU time that Prometheus' scrapes cost the cluster: 32 workers and a router, each with every series it declares.

    python -m benchmarks.scraping

One process serves all endpoints, and counts its CPU time; another asks as Prometheus does. Every label has as many
values as a busy cluster gives it.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
import urllib.request
from multiprocessing.connection import Connection

from prometheus_client import start_http_server

from tidemill.core.metrics import ROUTER_SERIES, WORKER_SERIES, Kind, Metrics, Series

WORKERS, PERIOD_S = 32, 5.0
VALUES = {"role": 1, "direction": 1, "slo_class": 4, "outcome": 8, "policy": 3}  # others: 4
HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75",
    "Accept-Encoding": "gzip",
}


def filled(declared: tuple[Series, ...]) -> Metrics:
    """Every series with every combination of its labels, some observations each."""
    metrics = Metrics(declared)
    for series in declared:
        for values in itertools.product(*(range(VALUES.get(label, 4)) for label in series.labels)):
            labels = {label: f"some-{label}-{value}" for label, value in zip(series.labels, values, strict=True)}
            for observation in (0.0031, 0.27, 12.0):
                if series.kind is Kind.HISTOGRAM:
                    metrics.observe(series, observation, **labels)
                else:
                    metrics.add(series, observation, **labels)
    return metrics


def scrape(pipe: Connection, ports: list[int]) -> None:
    """The asking process: all endpoints once for each message; answers with the bytes and samples that came."""
    while pipe.recv():
        received = 0
        for port in ports:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=HEADERS)
            with urllib.request.urlopen(request) as answer:
                received += len(answer.read())
        pipe.send(received)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    registries = [filled(WORKER_SERIES) for _ in range(WORKERS)] + [filled(ROUTER_SERIES)]
    servers = [start_http_server(0, "127.0.0.1", each.registry)[0] for each in registries]
    ours, theirs = multiprocessing.Pipe()
    asking = multiprocessing.get_context("spawn").Process(
        target=scrape, args=(theirs, [server.server_port for server in servers])
    )
    asking.start()
    ours.send(True)  # the first round warms up
    received = ours.recv()
    spent = []
    for _ in range(rounds):
        before = time.process_time()
        ours.send(True)
        ours.recv()
        spent.append(time.process_time() - before)
    round_s = statistics.median(spent)
    ours.send(False)
    asking.join()
    samples = sum(1 for each in registries for family in each.registry.collect() for _ in family.samples)
    print(f"{WORKERS} workers and a router: {samples} samples, {received / 1024:.0f} KiB compressed a round")
    print(f"CPU time of a round: {round_s * 1e3:.1f} ms, median of {rounds}")
    print(f"every {PERIOD_S:g} s: {round_s / PERIOD_S:.2%} of a core, in all {len(registries)} processes together")


if __name__ == "__main__":
    main()
