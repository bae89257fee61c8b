"""A target that costs what a larger one costs and says what the bundled one says.

Speculation pays where a step of the target is expensive beside one of the draft. The bundled target is too cheap for
that on a CPU, so channels are added to its feed-forward layers whose output weights are zero: they are computed, and
add exact zeros. Every token stays the same; a step takes as long as that of a model with so many parameters. Wherever a
figure is shown that was measured with such a target, it says "padded".
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def make_padded(source: Path, folder: Path, channels: int) -> int:
    """Copy a Llama folder with `channels` feed-forward channels in all; returns its parameters."""
    config = json.loads((source / "config.json").read_text())
    added = channels - config["intermediate_size"]
    if added < 0:
        raise ValueError(f"{source} has {config['intermediate_size']} channels already, more than {channels}")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if "mlp.down_proj" in name:
            tensors[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], added)], 1)
        elif "mlp.gate_proj" in name or "mlp.up_proj" in name:
            extra = torch.randn(added, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            tensors[name] = torch.cat([weight, extra.to(weight.dtype)])
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": channels}, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.numel() for weight in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "models" / "target")
    parser.add_argument("--channels", type=int, default=16384)
    args = parser.parse_args()
    print(f"{make_padded(args.source, args.folder, args.channels) / 1e6:.0f}M parameters in {args.folder}")


if __name__ == "__main__":
    main()
