"""CPU time that Prometheus' scrapes cost the cluster: 32 workers, router and controller, each with all it declares.

    python -m benchmarks.scraping

One process serves all endpoints, and counts its CPU time; another asks as Prometheus does, on connections that it
keeps. Every label has as many values as a busy cluster gives it.
"""

import argparse
import http.client
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

from tests.support.series import counted
from tidemill.core.exposition import MetricsServer
from tidemill.core.metrics import CONTROLLER_SERIES, ROUTER_SERIES, WORKER_SERIES

WORKERS, PERIOD_S = 32, 5.0
HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75",
    "Accept-Encoding": "gzip",
}


def scrape(pipe: Connection, ports: list[int]) -> None:
    """The asking process: all endpoints once for each message; answers with the bytes that came."""
    connections = [http.client.HTTPConnection("127.0.0.1", port) for port in ports]
    while pipe.recv():
        received = 0
        for connection in connections:
            connection.request("GET", "/metrics", headers=HEADERS)
            received += len(connection.getresponse().read())
        pipe.send(received)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    declared = [*[WORKER_SERIES] * WORKERS, ROUTER_SERIES, CONTROLLER_SERIES]
    served = [counted(each) for each in declared]
    servers = [MetricsServer(each.text, "127.0.0.1") for each in served]
    ours, theirs = multiprocessing.Pipe()
    asking = multiprocessing.get_context("spawn").Process(
        target=scrape, args=(theirs, [server.port for server in servers])
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
    each_s = round_s / len(served)
    samples = sum(not line.startswith("#") for each in served for line in each.text().splitlines())
    print(f"{WORKERS} workers, router and controller: {samples} samples, {received / 1024:.0f} KiB a round")
    print(f"CPU time of a round: {round_s * 1e3:.1f} ms, median of {rounds}; a scrape: {each_s * 1e3:.2f} ms")
    print(f"every {PERIOD_S:g} s: {round_s / PERIOD_S:.2%} of a core, in all {len(served)} processes together")


if __name__ == "__main__":
    main()
