"""Both kernels, for every shape they accept: right, and the same to the bit however the rows come."""

import random

import pytest
import torch

from tests.support.miniatures import random_model, shaped, step
from workers.engine.native.config import ModelConfig
from workers.engine.native.model import NativeModel
from workers.engine.native.runner_cpu import unsupported

KERNELS = ("cpu", "torch")
TYPES = (torch.float32, torch.bfloat16)
BLOCKS = 48

SHAPES: dict[str, tuple[ModelConfig, int]] = {
    "head of 16": (shaped(head_dim=16), 16),
    "head of 48": (shaped(head_dim=48, hidden_size=48), 16),
    "head of 80": (shaped(head_dim=80, hidden_size=80, num_heads=3, num_kv_heads=1), 32),
    "head of 128": (shaped(head_dim=128, num_heads=2, num_kv_heads=1), 64),
    "head of 256": (shaped(head_dim=256, num_heads=2, num_kv_heads=2), 128),
    "sixteen heads share a key": (shaped(num_heads=16, num_kv_heads=1, head_dim=32), 16),
    "forty heads": (shaped(num_heads=40, num_kv_heads=8, head_dim=16), 16),
    "panels that do not fill": (shaped(hidden_size=144, intermediate_size=208, vocab_size=131), 16),
    "feed-forward of one vector": (shaped(intermediate_size=16), 16),
}


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def blocks(seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(BLOCKS), BLOCKS // 2)


@pytest.mark.parametrize("name", SHAPES)
def test_compiled_equals_stock_in_float32(name: str) -> None:
    config, block_size = SHAPES[name]
    assert unsupported(config, block_size) is None
    batch = step([(tokens(75), 0, blocks())], block_size)
    logits = []
    for kernels in KERNELS:
        model = random_model(config, torch.float32, kernels)
        logits.append(model.forward(batch, model.new_kv(BLOCKS, block_size)))
    assert torch.allclose(*logits, atol=2e-4, rtol=1e-4)
    assert logits[0].std() > 0.1, "logits that do not differ would agree with anything"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_is_near_float32(name: str, kernels: str) -> None:
    """The same weights, rounded; three significant digits survive two layers."""
    config, block_size = SHAPES[name]
    batch = step([(tokens(75), 0, blocks())], block_size)
    logits = []
    for dtype in TYPES:
        model = random_model(config, dtype, kernels)
        logits.append(model.forward(batch, model.new_kv(BLOCKS, block_size)))
    assert (logits[0] - logits[1]).abs().mean() < 0.02 * logits[0].abs().mean()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_decode_after_prefill_has_the_bits_of_one_prefill(name: str, dtype: torch.dtype) -> None:
    config, block_size = SHAPES[name]
    text, table = tokens(75), blocks()
    model = random_model(config, dtype, "cpu")
    whole = model.forward(step([(text, 0, table)], block_size), model.new_kv(BLOCKS, block_size))
    kv, found, done = model.new_kv(BLOCKS, block_size), [], 0
    for count in (1, 1, 30, 1, 7, 1, 23, 1, 1, 1, 8):
        found.append(model.forward(step([(text[done : done + count], done, table)], block_size), kv))
        done += count
    assert done == len(text)
    assert torch.equal(torch.cat(found), whole)


@pytest.fixture(params=[(k, d) for k in KERNELS for d in TYPES], ids=str)
def model(request: pytest.FixtureRequest) -> NativeModel:
    kernels, dtype = request.param
    return random_model(shaped(), dtype, kernels)


def test_every_number_of_rows_gives_the_same_bits(model: NativeModel) -> None:
    """Past the compiled kernels' blocks of rows (6) and chunks (192), and the tiles of keys (64)."""
    text, table = tokens(330), blocks()
    whole = model.forward(step([(text, 0, table)]), model.new_kv(BLOCKS, 16))
    kv = model.new_kv(BLOCKS, 16)
    model.forward(step([(text, 0, table)]), kv)
    for rows in [*range(1, 20), 63, 64, 65, 191, 192, 193, 200]:
        start = (rows * 37) % (len(text) - rows + 1)
        found = model.forward(step([(text[start : start + rows], start, table)]), kv)
        assert torch.equal(found, whole[start : start + rows]), f"{rows} rows from {start} on"


def test_place_in_the_step_changes_no_bit(model: NativeModel) -> None:
    """One row, decoded in front of, between and behind other sequences of all lengths."""
    text, table = tokens(100), blocks()
    others = [block for block in range(BLOCKS) if block not in table]
    kv = model.new_kv(BLOCKS, 16)
    alone = model.forward(step([(text, 0, table)]), kv)[-1]
    for seed in range(8):
        rng = random.Random(seed)
        before = [(tokens(rng.randrange(1, 20), seed), 0, [others[i], others[i + 1]]) for i in range(0, 6, 2)]
        after = [(tokens(rng.randrange(1, 20), seed), 0, [others[i], others[i + 1]]) for i in range(6, 12, 2)]
        before, after = before[: rng.randrange(4)], after[: rng.randrange(4)]
        found = model.forward(step([*before, (text[99:], 99, table), *after]), kv)
        assert torch.equal(found[sum(len(each) for each, _, _ in before)], alone)


def test_nothing_left_in_the_pool_shows(model: NativeModel) -> None:
    """Whatever earlier owners left in a block, even what is not a number, stays theirs."""
    text, table = tokens(81), blocks()
    clean, dirty = model.new_kv(BLOCKS, 16), torch.full_like(model.new_kv(BLOCKS, 16), float("nan"))
    for start, end in ((0, 17), (17, 18), (18, 19), (19, 64), (64, 65), (65, 81)):
        batch = step([(text[start:end], start, table)])
        assert torch.equal(model.forward(batch, dirty), model.forward(batch, clean))


def test_threads_change_no_bit() -> None:
    model = random_model(shaped(), torch.bfloat16, "cpu")
    batch = step([(tokens(75), 0, blocks())])
    alone = model.forward(batch, model.new_kv(BLOCKS, 16))
    torch.set_num_threads(2)
    try:
        assert torch.equal(model.forward(batch, model.new_kv(BLOCKS, 16)), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("config", "block_size"),
    [
        (shaped(hidden_size=72), 16),
        (shaped(intermediate_size=100), 16),
        (shaped(head_dim=24), 16),
        (shaped(), 8),
        (shaped(head_dim=512), 16),
        (shaped(num_heads=256), 16),
    ],
)
def test_other_shapes_are_left_to_stock_kernels(config: ModelConfig, block_size: int) -> None:
    assert unsupported(config, block_size) is not None
