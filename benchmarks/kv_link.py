"""Throughput of a KV link between two processes over loopback, with a bare TCP socket beside it.

    python -m benchmarks.kv_link

Each figure is the median over rounds of a burst's bytes divided by the time from its first byte's departure to its last
byte's arrival; on the link's side every message is also copied out of the link's memory, as a worker does.
"""

import argparse
import multiprocessing
import socket
import statistics
import threading
import time
from multiprocessing.connection import Connection

import torch

from tidemill.core.model import Peer, WorkerId
from workers.engine.base import KvLayout
from workers.kv.link import Arrival, KvMessage
from workers.kv.torch_dist import LinkHost, TorchSendingEnd

LAYOUT = KvLayout(8, 4, 64, 16, "bfloat16")
SENDER, RECEIVER = Peer(WorkerId("prefill-0", 1), ""), Peer(WorkerId("verify-0", 1), "")
SIZES_MB = (1, 4, 16, 64)
BURST_BYTES = 256 * 1024 * 1024
CPU = torch.device("cpu")


def send_over_link(pipe: Connection, rendezvous: str) -> None:
    """The sending process: bursts as the parent asks for them."""
    torch.set_num_threads(1)
    end = TorchSendingEnd(rendezvous, pipe.recv(), CPU, 30.0, 30.0)
    while (blocks := pipe.recv()) is not None:
        kv = torch.ones(LAYOUT.layers, blocks, 2, LAYOUT.kv_heads, LAYOUT.block_size, LAYOUT.head_dim).bfloat16()
        messages = BURST_BYTES // (kv.numel() * 2)
        pipe.send(time.perf_counter())
        for number in range(messages):
            end.send(KvMessage(number, "r", 0, kv))
    end.close()


def send_over_socket(pipe: Connection, address: tuple[str, int]) -> None:
    """The same over a bare socket."""
    with socket.create_connection(address) as out:
        while (size := pipe.recv()) is not None:
            data = bytes(size)
            pipe.send(time.perf_counter())
            for _ in range(BURST_BYTES // size):
                out.sendall(data)


def link_speeds(rounds: int) -> dict[int, float]:
    """Bytes a second by size of message."""
    arrived = threading.Semaphore(0)
    room: dict[int, torch.Tensor] = {}

    def receive(arrival: Arrival) -> None:
        if arrival.kv is not None:
            into = room.setdefault(arrival.kv.numel(), torch.empty_like(arrival.kv))
            into.copy_(arrival.kv)
            arrival.done()
            arrived.release()

    host = LinkHost("127.0.0.1", LAYOUT, CPU, 30.0, 30.0, receive)
    pipe, theirs = multiprocessing.Pipe()
    process = _spawn(send_over_link, theirs, host.rendezvous)
    pipe.send(host.accept(RECEIVER.id, SENDER))
    found = {}
    for size_mb in SIZES_MB:
        blocks = size_mb * 1024 * 1024 // LAYOUT.block_bytes

        def burst(blocks: int = blocks) -> float:
            pipe.send(blocks)
            started = pipe.recv()
            for _ in range(BURST_BYTES // (blocks * LAYOUT.block_bytes)):
                arrived.acquire()
            return BURST_BYTES / (time.perf_counter() - started)

        burst()
        found[size_mb] = statistics.median(burst() for _ in range(rounds))
    pipe.send(None)
    process.join()
    host.close()
    return found


def socket_speeds(rounds: int) -> dict[int, float]:
    """Bytes a second by size of message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe, theirs = multiprocessing.Pipe()
        process = _spawn(send_over_socket, theirs, listener.getsockname())
        connection, _ = listener.accept()
        found = {}
        for size_mb in SIZES_MB:
            size = size_mb * 1024 * 1024
            buffer = memoryview(bytearray(size))

            def burst(size: int = size, buffer: memoryview = buffer) -> float:
                pipe.send(size)
                started = pipe.recv()
                for _ in range(BURST_BYTES // size):
                    got = 0
                    while got < size:
                        got += connection.recv_into(buffer[got:])
                return BURST_BYTES / (time.perf_counter() - started)

            burst()
            found[size_mb] = statistics.median(burst() for _ in range(rounds))
        pipe.send(None)
        process.join()
    return found


def _spawn(target: object, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    link, bare = link_speeds(args.rounds), socket_speeds(args.rounds)
    print(f"{'message':>8}  {'KV link, GB/s':>14}  {'bare socket, GB/s':>18}  {'ratio':>6}")
    for size in SIZES_MB:
        print(f"{size:5d} MB  {link[size] / 1e9:14.2f}  {bare[size] / 1e9:18.2f}  {link[size] / bare[size]:6.2f}")


if __name__ == "__main__":
    main()
