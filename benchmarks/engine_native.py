"""The native side of benchmarks/engine.py."""

import time

STARTED = time.time()

import sys  # noqa: E402 - imports are part of what is measured
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.engine_work import measure  # noqa: E402
from tidemill.core.model import Request  # noqa: E402
from tidemill.core.settings import EngineSettings  # noqa: E402
from tidemill.types import SamplingParams  # noqa: E402
from workers.engine.native.engine import NativeEngine  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    settings = EngineSettings(kv_blocks=1024, max_batch_tokens=2048, prefix_cache=False)
    engine = NativeEngine.from_folder(Path(sys.argv[1]), settings)

    def run(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)
        for index, prompt in enumerate(prompts):
            engine.submit(Request(str(index), tuple(prompt), params))
        while engine.has_work():
            engine.step()

    measure(run, STARTED)


if __name__ == "__main__":
    main()
