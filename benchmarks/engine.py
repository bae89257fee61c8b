"""The native engine against vLLM for CPUs: same random 27M-parameter Llama, same prompts, same core, one thread each.

    python -m benchmarks.engine               # both, alternating; prints a table of medians and ratios
    python -m benchmarks.engine --rounds 5

vLLM runs in an environment of its own (--venv; `make bench` makes it), eagerly and without prefix cache; so does
the native engine. Each round runs both in fresh processes, one after the other, pinned to the same core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MEASURES = {
    "decode1": ("decode step, batch 1", "ms", 0.65),
    "decode8": ("decode step, batch 8", "ms", 0.80),
    "decode32": ("decode step, batch 32", "ms", 1.0),
    "prefill": ("prefill, 512 tokens", "tokens/s", 1.0),
    "first_token": ("cold process to first token", "s", None),
}
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 8, 512, 1408, 8, 4, 2048


def make_model(folder: Path) -> None:
    """A Llama of random bf16 weights with a word-level tokenizer nobody uses: prompts are token ids."""
    import torch  # noqa: PLC0415 - the child processes time their own imports
    from safetensors.torch import save_file  # noqa: PLC0415

    torch.manual_seed(0)
    head = HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    tensors = {name: (torch.randn(shape) * shape[-1] ** -0.5).bfloat16() for name, shape in weights.items()}
    for name in ["model.norm.weight"] + [
        f"model.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")
    ]:
        tensors[name] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": head, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def parameters() -> float:
    """Millions, embeddings included."""
    head = HIDDEN // HEADS
    layer = 2 * HIDDEN * HIDDEN + 2 * KV_HEADS * head * HIDDEN + 3 * HIDDEN * INNER
    return (LAYERS * layer + 2 * VOCABULARY * HIDDEN) / 1e6


def run_side(side: str, folder: Path, python: str, core: int) -> dict[str, Any]:
    """One fresh process, pinned; its measurements."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [python, "-m", f"benchmarks.engine_{side}", str(folder)]
    done = subprocess.run(
        ["taskset", "-c", str(core), *command], env=environment, capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="environment with vllm-cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the medians here too")
    args = parser.parse_args()
    peer = args.venv / "bin" / "python"
    if not peer.is_file():
        sys.exit(f"{peer} is missing; make it with `make .venv-vllm/.installed`")
    runs: dict[str, list[dict[str, Any]]] = {"native": [], "vllm": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "llama-27m"
        make_model(folder)
        print(f"random Llama of {parameters():.1f}M parameters, bf16, one thread, core {args.core}", flush=True)
        for number in range(args.rounds):
            for side, python in (("native", sys.executable), ("vllm", str(peer))):
                runs[side].append(run_side(side, folder, python, args.core))
                print(f"round {number + 1} of {args.rounds}: {side} done", flush=True)
    _print(runs, args.json)


def _print(runs: dict[str, list[dict[str, Any]]], path: Path | None) -> None:
    medians = {
        side: {key: statistics.median(run[key] for run in found) for key in MEASURES} for side, found in runs.items()
    }
    print(f"\n{'':30}{'native':>10}{'vLLM':>10}{'native / vLLM':>16}{'aim':>12}")
    for key, (name, unit, aim) in MEASURES.items():
        ours, theirs = medians["native"][key], medians["vllm"][key]
        bound = "" if aim is None else f"{'>=' if key == 'prefill' else '<='} {aim:.2f}"
        digits = 0 if key == "prefill" else 2
        print(f"{name + ', ' + unit:30}{ours:10.{digits}f}{theirs:10.{digits}f}{ours / theirs:16.2f}{bound:>12}")
    if path:
        path.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
