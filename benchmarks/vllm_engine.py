"""What a cluster on vLLM costs and gains, against vLLM alone on the same two cores. In the environment with vLLM:

    .venv-vllm/bin/python -m benchmarks.vllm_engine hand-over   # TTFT and second token at 1,500 prompt tokens
    .venv-vllm/bin/python -m benchmarks.vllm_engine drafts      # tokens a second at batch 1 and 8, padded target
    .venv-vllm/bin/python -m benchmarks.vllm_engine start       # one more worker, from asking Ray for it to serving

Both sides serve in turn, a round each, and every figure is a median. vLLM alone has its default settings but for the
type, KV blocks and chunk. Both sides have two cores; vLLM has two threads in either (`--threads`, `--our-threads`),
which in the cluster share them with the draft worker, the router and Ray.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from benchmarks.padded import make_padded
from benchmarks.speculation import CHANNELS
from cluster import launch
from cluster.pools import Pools
from tidemill import Client, Summary
from tidemill.core.model import Role
from tidemill.core.settings import (
    ControllerSettings,
    EngineSettings,
    ModelSettings,
    PoolSettings,
    RouterSettings,
    Settings,
    SpeculationSettings,
)
from tidemill.core.text import load_tokenizer
from workers.openmp import INTEL

MODELS = Path(__file__).parents[1] / "models"
ENGINE = EngineSettings(kind="vllm", dtype="float32", block_size=32, kv_blocks=512, prefix_cache=False)
Stamps = list[tuple[float, int]]  # when tokens came, and how many


def alone(connection: Connection, folder: str) -> None:
    """vLLM by itself, in a process of its own: prompts and a length come, stamps of each prompt go."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import SamplingParams  # noqa: PLC0415 - after the environment
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: PLC0415

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            dtype=ENGINE.dtype,
            skip_tokenizer_init=True,
            block_size=ENGINE.block_size,
            num_gpu_blocks_override=ENGINE.kv_blocks + 1,
            kv_cache_memory_bytes=1 << 20,
            max_num_batched_tokens=ENGINE.max_batch_tokens,
            max_num_seqs=ENGINE.max_running,
            enable_prefix_caching=False,
            enforce_eager=True,
            distributed_executor_backend="uni",
        )
    )
    connection.send("ready")
    while (work := connection.recv()) is not None:
        prompts, tokens = work
        params = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        stamps: list[Stamps] = [[] for _ in prompts]
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for answer in engine.step():
                stamps[int(answer.request_id)].append((time.perf_counter() - started, len(answer.outputs[0].token_ids)))
        connection.send(stamps)


class Alone:
    def __init__(self, folder: Path, threads: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        arguments = (theirs, str(folder))
        self._process = multiprocessing.get_context("spawn").Process(target=alone, args=arguments, daemon=True)
        # As vLLM's manual says. The process imports torch with this module, so all of it has to be there before.
        own = {"LD_PRELOAD": str(INTEL), "KMP_BLOCKTIME": "1", "OMP_NUM_THREADS": str(threads)}
        with mock.patch.dict(os.environ, own):
            self._process.start()
        self._connection.recv()

    def serve(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Stamps]:
        self._connection.send((prompts, tokens))
        found: list[Stamps] = self._connection.recv()
        return found

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


class Ours:
    """A cluster, as an application sees it."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)
        self.summary: Summary | None = None  # of the last request that ended

    def serve(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Stamps]:
        started = time.perf_counter()

        def one(prompt: Sequence[int]) -> Stamps:
            stamps: Stamps = []
            for chunk in self._client.stream(prompt, max_tokens=tokens, ignore_eos=True):
                stamps += [(time.perf_counter() - started, len(chunk.tokens))] * bool(chunk.tokens)
                self.summary = chunk.summary or self.summary
            return stamps

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(one, prompts))


@contextmanager
def cluster(settings: Settings) -> Iterator[Ours]:
    state = launch.up(settings, lambda line: None)
    try:
        yield Ours(state.router_address)
    finally:
        launch.down(state, lambda line: None)


def settings_of(target: Path, pools: PoolSettings, speculation: SpeculationSettings, threads: int = 1) -> Settings:
    return Settings(
        name="bench-vllm",
        target=ModelSettings(path=target),
        draft=ModelSettings(path=MODELS / "draft", threads=1),
        engine=ENGINE.model_copy(update={"threads": threads}),
        pools=pools,
        router=RouterSettings(port=0),
        controller=ControllerSettings(rebalance=False),
        speculation=speculation,
    )


def hand_over(args: argparse.Namespace) -> None:
    settings = settings_of(
        MODELS / "target", PoolSettings(prefill=1, draft=0, verify=1), SpeculationSettings(enabled=False)
    )
    peer = Alone(MODELS / "target", 1)
    parts: dict[str, list[float]] = {"queue": [], "prefill": [], "transfer": [], "first decode": []}
    first: dict[str, list[float]] = {"alone": [], "handed over": []}
    second: dict[str, list[float]] = {"alone": [], "handed over": []}
    with cluster(settings) as ours:
        for turn in range(args.rounds + 1):
            prompt = [2 + (turn * 7919 + i * 31) % 4000 for i in range(1500)]
            for way, side in (("alone", peer), ("handed over", ours)):
                stamps = side.serve([prompt], 8)[0]
                if turn:  # the first warms up
                    first[way].append(stamps[0][0])
                    second[way].append(stamps[1][0] - stamps[0][0])
            if turn and ours.summary is not None:
                timing = ours.summary.timing
                for name, seconds in zip(
                    parts, (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.first_decode_s), strict=True
                ):
                    parts[name].append(seconds)
    peer.end()
    base, more = statistics.median(first["alone"]), statistics.median(first["handed over"])
    print(
        f"TTFT at 1,500 tokens: vLLM alone {base * 1e3:.1f} ms, handed over {more * 1e3:.1f} ms: {more / base - 1:+.1%}"
    )
    print("of it, ms:", ", ".join(f"{name} {statistics.median(each) * 1e3:.1f}" for name, each in parts.items()))
    gaps = {way: statistics.median(each) * 1e3 for way, each in second.items()}
    print(f"second token after the first: vLLM alone {gaps['alone']:.1f} ms, handed over {gaps['handed over']:.1f} ms")


def drafts(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(MODELS / "target")
    lines = (MODELS / "prompts.jsonl").read_text().splitlines()
    prompts = [tokenizer.encode(json.loads(line)["prompt"]).ids for line in lines][:8]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "padded"
        parameters = make_padded(MODELS / "target", target, args.channels)
        print(
            f"padded target of {parameters / 1e6:.0f}M parameters, drafts of {args.depth}, {args.threads} threads alone"
        )
        speculation = SpeculationSettings(strategy="chain", max_depth=args.depth, max_nodes=args.depth, width=1)
        settings = settings_of(target, PoolSettings(prefill=0, draft=1, verify=1), speculation, args.our_threads)
        peer = Alone(target, args.threads)
        with cluster(settings) as ours:
            for batch in (1, 8):
                rates: dict[str, list[float]] = {"alone": [], "ours": []}
                for turn in range(args.rounds + 1):
                    chosen = [prompts[(turn + i) % len(prompts)] for i in range(batch)]
                    for way, side in (("alone", peer), ("ours", ours)):
                        stamps = side.serve(chosen, args.tokens)
                        if turn:
                            rates[way].append(decode_rate(stamps))
                one, other = (statistics.median(rates[way]) for way in ("alone", "ours"))
                accepted = ours.summary.speculation.accepted_per_verify if ours.summary is not None else 0.0
                print(
                    f"batch {batch}: vLLM alone {one:.0f} tokens/s, with drafts from the pool {other:.0f} tokens/s: "
                    f"{other / one:.2f}x, {accepted:.2f} accepted a step",
                    flush=True,
                )
        peer.end()


def start(args: argparse.Namespace) -> None:
    settings = settings_of(
        MODELS / "target", PoolSettings(prefill=0, draft=0, verify=1), SpeculationSettings(enabled=False)
    )
    took = []
    with cluster(settings):
        for turn in range(args.rounds):
            began = time.perf_counter()
            worker = Pools(settings).start_worker(f"{Role.VERIFY}-{turn + 1}", Role.VERIFY)
            launch.ray.get(worker.describe.remote())
            took.append(time.perf_counter() - began)
            launch.ray.kill(worker)
            time.sleep(2.0)  # its end is not part of the next one's start
    print(f"one more vLLM worker serves after {statistics.median(took):.1f} s (median), {max(took):.1f} s (worst)")


def decode_rate(stamps: list[Stamps]) -> float:
    """Tokens a second of all requests together while all of them decode: from the last first token to the first end."""
    begin, end = max(each[0][0] for each in stamps), min(each[-1][0] for each in stamps)
    return sum(count for each in stamps for at, count in each if begin < at <= end) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["hand-over", "drafts", "start"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--channels", type=int, default=CHANNELS, help="feed-forward channels of the padded target")
    parser.add_argument("--depth", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--threads", type=int, default=2, help="of vLLM alone")
    parser.add_argument("--our-threads", type=int, default=2, help="of our vLLM; the draft has one")
    args = parser.parse_args()
    {"hand-over": hand_over, "drafts": drafts, "start": start}[args.what](args)


if __name__ == "__main__":
    main()
