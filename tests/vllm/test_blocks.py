"""What peers compare before KV moves: whatever would make a block mean something else is in the layout."""

import pytest
import torch

NAMES = ("model.layers.0.attn", "model.layers.1.attn")


def layout(names=NAMES, shape=(9, 2, 32, 16), dtype=torch.float32, block_size=32, kernel="CPU_ATTN"):  # type: ignore[no-untyped-def]
    """Of KV tensors [blocks, kv_heads, block_size, 2 * head_dim], as vLLM's CPU kernels have them."""
    from workers.engine.vllm.blocks import KvBlocks

    return KvBlocks({name: torch.zeros(shape, dtype=dtype) for name in names}, shape[0], block_size, kernel).layout


@pytest.mark.vllm
def test_layouts_tell_apart_what_does_not_fit() -> None:
    same = layout(shape=(17, 2, 32, 16))
    others = [
        layout(names=NAMES[::-1]),
        layout(names=(*NAMES, "model.layers.2.attn")),
        layout(shape=(9, 32, 2, 16)),
        layout(shape=(9, 2, 64, 16), block_size=64),
        layout(dtype=torch.bfloat16),
        layout(kernel="FLASH_ATTN"),
    ]
    assert layout() == same, "pools may differ in size"
    assert len({str(each) for each in [same, *others]}) == 7


@pytest.mark.vllm
def test_what_cannot_be_handed_over_is_refused() -> None:
    from workers.engine.vllm.blocks import KvBlocks

    with pytest.raises(ValueError, match="different shapes"):
        KvBlocks({"a": torch.zeros(9, 2, 32, 16), "b": torch.zeros(9, 4, 32, 16)}, 9, 32, "CPU_ATTN")
    with pytest.raises(ValueError, match="no one axis of 9 blocks"):
        layout(shape=(9, 9, 32, 16))
    with pytest.raises(ValueError, match="cannot be handed over"):
        layout(dtype=torch.float16)
