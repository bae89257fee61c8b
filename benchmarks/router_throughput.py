"""Streamed tokens per second through the router alone, beside a bare grpc.aio stream and a Ray Serve deployment.

    python -m benchmarks.router_throughput [--streams 64] [--tokens 400] [--worker emulated|instant] [--ray-serve]

Each server runs in a process of its own on one core; client and worker share another. The worker answers at once, so
what is measured is the router: one token of one stream is one message to the client, unless the client is slower than
that and gets several in one. `CPU us` is processor time of the server's process per token, which a busy machine does
not change much; its inverse is what one core can carry.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from tidemill import AsyncClient
from tidemill.core import control_pb2 as control
from tidemill.core.control_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tidemill.core.model import Member, Peer, Role, WorkerId
from tidemill.core.settings import (
    EngineSettings,
    ModelSettings,
    PoolSettings,
    RouterSettings,
    Settings,
    SpeculationSettings,
)
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server

MODEL = Path(__file__).parents[1] / "models" / "target"
PROMPT = tuple(range(10, 26))
SERVER_CORE, CLIENT_CORE = 0, 1


@dataclass(frozen=True)
class Result:
    """One server under one load."""

    name: str
    tokens_per_s: float
    messages_per_s: float  # fewer than tokens: several came in one
    cpu_us_per_token: float  # of the server's process; nan if it has several


@dataclass(frozen=True)
class Load:
    """What the client asks for."""

    streams: int
    tokens: int

    @property
    def total(self) -> int:
        return self.streams * self.tokens


# --- processes --------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A server process. Its address comes first; each later message asks for its processor time."""

    process: Any
    pipe: Connection
    address: Any

    def cpu_s(self) -> float:
        self.pipe.send("cpu")
        return float(self.pipe.recv())


@contextmanager
def child(serve: Callable[..., Coroutine[Any, Any, Any]], core: int, *args: Any) -> Any:
    """Run `serve(*args)`, which returns an address and serves until the process ends."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child_main, args=(serve, core, there, args), daemon=True)
    process.start()
    there.close()  # or a child that dies at once would leave us waiting
    try:
        yield Child(process, here, here.recv())
    finally:
        process.kill()
        process.join()


def _child_main(serve: Callable[..., Coroutine[Any, Any, Any]], core: int, pipe: Connection, args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _pin(core)
    asyncio.run(_child_serve(serve, pipe, args))


async def _child_serve(serve: Callable[..., Coroutine[Any, Any, Any]], pipe: Connection, args: Any) -> None:
    pipe.send(await serve(*args))
    while True:
        await asyncio.to_thread(pipe.recv)
        pipe.send(time.process_time())


def _pin(core: int) -> None:
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})


# --- what is measured -------------------------------------------------------------------------------------------

_keep: list[Any] = []  # servers live as long as their process


async def serve_bare(load: Load) -> str:
    """A grpc.aio server that streams one prepared token a message: the floor under any Python router."""

    class Bare(InferenceServicer):
        async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            chunk = pb.GenerateChunk(text="word ", tokens=[5])
            for _ in range(load.tokens):
                yield chunk

    return await _listen(lambda server: add_InferenceServicer_to_server(Bare(), server))


async def serve_router(load: Load, worker: Member) -> str:
    """The router, with its one verify worker connected."""
    from router.server import RouterServer  # noqa: PLC0415 - only this process needs it

    server = RouterServer(_settings())
    address = await server.start()
    await server.set_members([worker])
    async with AsyncClient(address) as client:
        await client.generate(PROMPT, max_tokens=1)  # the worker is connected then
    _keep.append(server)
    return address


async def serve_instant_worker() -> Member:
    """A worker without an engine: every turn gives each request one token."""
    address = await _listen(lambda server: add_WorkerServicer_to_server(InstantWorker(), server))
    return Member(Peer(WorkerId("instant", 1), address), Role.VERIFY)


async def serve_emulated_worker() -> Member:
    """The real worker with the engine that computes no model."""
    from workers.worker import Worker  # noqa: PLC0415 - only this process needs torch

    worker = Worker("emulated", Role.VERIFY, _settings())
    _keep.append(worker)
    return Member(worker.start(), Role.VERIFY)


async def _listen(add: Callable[[Any], None]) -> str:
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _keep.append(server)
    return f"127.0.0.1:{port}"


def _settings() -> Settings:
    return Settings(
        target=ModelSettings(path=MODEL, name="bench"),
        engine=EngineSettings(kind="emulated", kv_blocks=8192, max_running=512),
        pools=PoolSettings(draft=0),
        router=RouterSettings(port=0, max_active=1024),
        speculation=SpeculationSettings(enabled=False),
    )


class InstantWorker(WorkerServicer):
    """Speaks control.proto. A turn is sent as soon as the router took the one before."""

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[control.StepReport]:
        left: dict[str, int] = {}
        fresh: set[str] = set()
        wake = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, left, fresh, wake))
        turn = control.StepReport(role="verify", accepting=True)
        turn.worker.name, turn.worker.epoch = "instant", 1
        try:
            while True:
                del turn.events[:]
                for request_id in list(left):
                    tokens = turn.events.add().tokens
                    tokens.request_id = request_id
                    tokens.tokens.append(300 + left[request_id] % 700)
                    if request_id in fresh:
                        fresh.discard(request_id)
                        tokens.first.SetInParent()
                    left[request_id] -= 1
                    if not left[request_id]:
                        tokens.finish = "length"
                        del left[request_id]
                yield turn
                turn.sequence += 1
                if not left:
                    wake.clear()
                    try:
                        await asyncio.wait_for(wake.wait(), 0.5)
                    except TimeoutError:
                        continue
        finally:
            reader.cancel()

    @staticmethod
    async def _read(requests: Any, left: dict[str, int], fresh: set[str], wake: asyncio.Event) -> None:
        async for command in requests:
            if command.HasField("submit"):
                request = command.submit.request
                left[request.id] = request.sampling.max_tokens
                fresh.add(request.id)
            elif command.HasField("cancel"):
                left.pop(command.cancel.request_id, None)
            wake.set()


# --- clients ----------------------------------------------------------------------------------------------------


async def drain_bare(address: str, load: Load) -> int:
    """Messages read by generated stubs; nothing is done with them."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        messages = 0

        async def one() -> None:
            nonlocal messages
            async for _ in stub.GenerateStream(pb.GenerateRequest(text="x")):  # type: ignore[attr-defined]
                messages += 1

        await asyncio.gather(*(one() for _ in range(load.streams)))
        return messages


async def drain_client(address: str, load: Load) -> int:
    """The client library, as an application uses it."""
    messages = tokens = 0

    async def one(client: AsyncClient) -> None:
        nonlocal messages, tokens
        async for chunk in client.stream(PROMPT, max_tokens=load.tokens):
            messages += 1
            tokens += len(chunk.tokens)

    async with AsyncClient(address) as client:
        await asyncio.gather(*(one(client) for _ in range(load.streams)))
    assert tokens == load.total, f"{tokens} tokens came, expected {load.total}"
    return messages


Drain = Callable[[str, Load], Coroutine[Any, Any, int]]


def measure(name: str, server: Child, drain: Drain, load: Load, rounds: int) -> Result:
    """Median of some rounds after one that warms up."""
    asyncio.run(drain(server.address, Load(load.streams, max(load.tokens // 4, 1))))
    found = []
    for _ in range(rounds):
        cpu_s, started = server.cpu_s(), time.perf_counter()
        messages = asyncio.run(drain(server.address, load))
        wall_s = time.perf_counter() - started
        cpu_us = 1e6 * (server.cpu_s() - cpu_s) / load.total
        found.append((load.total / wall_s, messages / wall_s, cpu_us))
    return Result(name, *(statistics.median(values) for values in zip(*found, strict=True)))


def measure_router(load: Load, rounds: int, kind: str) -> Result:
    serve_worker = serve_instant_worker if kind == "instant" else serve_emulated_worker
    with child(serve_worker, CLIENT_CORE) as worker, child(serve_router, SERVER_CORE, load, worker.address) as router:
        return measure(f"tidemill router ({kind} worker)", router, drain_client, load, rounds)


def measure_bare(load: Load, rounds: int) -> Result:
    with child(serve_bare, SERVER_CORE, load) as server:
        return measure("bare grpc.aio stream", server, drain_bare, load, rounds)


# --- Ray Serve --------------------------------------------------------------------------------------------------


def measure_ray_serve(load: Load, rounds: int) -> Result:
    """A streaming deployment with one replica behind Serve's gRPC proxy: the same messages, nothing computed.

    Needs `pip install "ray[serve]"`. Proxy and replica are processes of their own, so Serve is given both cores.
    """
    import ray  # noqa: PLC0415 - an optional peer
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import gRPCOptions  # noqa: PLC0415

    @serve.deployment(max_ongoing_requests=1024)  # type: ignore[untyped-decorator]
    class Streamer:
        async def GenerateStream(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateChunk]:
            chunk = pb.GenerateChunk(text="word ", tokens=[5])
            for _ in range(load.tokens):
                yield chunk

    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        add = "tidemill.proto.inference_pb2_grpc.add_InferenceServicer_to_server"
        serve.start(grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[add]))
        serve.run(Streamer.bind())
        _pin(CLIENT_CORE)
        found = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            messages = asyncio.run(drain_bare(f"127.0.0.1:{port}", load))
            wall_s = time.perf_counter() - started
            found.append((load.total / wall_s, messages / wall_s))
        rates = [statistics.median(values) for values in zip(*found[1:], strict=True)]
        return Result("Ray Serve streaming deployment", rates[0], rates[1], float("nan"))
    finally:
        serve.shutdown()
        ray.shutdown()


# --- the command ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of one stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=("emulated", "instant"), default="emulated")
    parser.add_argument("--only-router", action="store_true", help="leave out the peers")
    parser.add_argument("--ray-serve", action="store_true", help="measure Ray Serve too; needs ray[serve]")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    load = Load(options.streams, options.tokens)
    _pin(CLIENT_CORE)
    results = [measure_router(load, options.rounds, options.worker)]
    if not options.only_router:
        results.append(measure_bare(load, options.rounds))
    if options.ray_serve:
        results.append(measure_ray_serve(load, options.rounds))
    print(f"{options.streams} streams x {options.tokens} tokens, median of {options.rounds}")
    print(f"{'':40}{'tokens/s':>10}{'messages/s':>12}{'CPU us':>9}{'per core':>10}")
    for each in results:
        per_core = 1e6 / each.cpu_us_per_token if each.cpu_us_per_token == each.cpu_us_per_token else float("nan")
        print(
            f"{each.name:40}{each.tokens_per_s:10,.0f}{each.messages_per_s:12,.0f}"
            f"{each.cpu_us_per_token:9.1f}{per_core:10,.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
