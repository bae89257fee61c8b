"""A row's logits are the same to the bit whatever shares its step, and right."""

import random

import pytest
import torch

from tests.support.engines import TINY, VOCABULARY, tiny_model
from workers.engine.native.batch import StepBatch
from workers.engine.native.model import NativeModel

BLOCK = 16


def batch(pieces: list[tuple[list[int], int, list[int]]]) -> StepBatch:
    """From (tokens, context, blocks) of each sequence; logits of all rows."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for new, context, blocks in pieces:
        span = range(context, context + len(new))
        tokens += new
        positions += span
        slots += [blocks[at // BLOCK] * BLOCK + at % BLOCK for at in span]
        starts.append(len(tokens))
    width = max(len(blocks) for _, _, blocks in pieces)
    return StepBatch(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([context for _, context, _ in pieces], dtype=torch.int32),
        torch.tensor([blocks + [0] * (width - len(blocks)) for _, _, blocks in pieces], dtype=torch.int32),
        torch.arange(len(tokens)),
    )


@pytest.fixture(params=[(k, d) for k in ("cpu", "torch") for d in (torch.float32, torch.bfloat16)], ids=str)
def model(request: pytest.FixtureRequest) -> NativeModel:
    kernels, dtype = request.param
    return tiny_model(dtype, kernels)


TOKENS = random.Random(1).choices(range(VOCABULARY), k=150)
BLOCKS = random.Random(2).sample(range(40), 10)
OTHERS = [block for block in range(40) if block not in BLOCKS]


@pytest.fixture
def whole(model: NativeModel) -> torch.Tensor:
    """Logits of all rows from one prefill."""
    return model.forward(batch([(TOKENS, 0, BLOCKS)]), model.new_kv(40, BLOCK))


def test_chunks_and_decodes_give_the_same_bits(model: NativeModel, whole: torch.Tensor) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        kv, found, done = model.new_kv(40, BLOCK), [], 0
        while done < len(TOKENS):
            count = min(rng.choice([1, 1, 2, 3, 5, 8, 17, 40]), len(TOKENS) - done)
            found.append(model.forward(batch([(TOKENS[done : done + count], done, BLOCKS)]), kv))
            done += count
        assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 33])
def test_company_changes_no_bit(model: NativeModel, whole: torch.Tensor, rows: int) -> None:
    """The same rows with others before and after them, in a pool full of others' leavings."""
    kv = torch.randn_like(model.new_kv(40, BLOCK))
    model.forward(batch([(TOKENS[:100], 0, BLOCKS)]), kv)
    other = [5] * rows
    pieces = [(other, 0, OTHERS[:3]), (TOKENS[100 : 100 + rows], 100, BLOCKS), ([7], 0, OTHERS[3:4])]
    found = model.forward(batch(pieces), kv)[rows : 2 * rows]
    assert torch.equal(found, whole[100 : 100 + rows])


def test_compiled_and_stock_kernels_agree() -> None:
    logits = [
        tiny_model(torch.float32, kernels).forward(batch([(TOKENS, 0, BLOCKS)]), kv)
        for kernels in ("cpu", "torch")
        for kv in [tiny_model(torch.float32, kernels).new_kv(40, BLOCK)]
    ]
    assert torch.allclose(*logits, atol=1e-4)
    assert logits[0].std() > 0.1, "logits that do not differ would agree with anything"


def test_every_block_matters(model: NativeModel, whole: torch.Tensor) -> None:
    """The test's own test: a wrong block table gives other logits."""
    kv = model.new_kv(40, BLOCK)
    model.forward(batch([(TOKENS[:100], 0, BLOCKS)]), kv)
    wrong = [BLOCKS[0], OTHERS[0], *BLOCKS[2:]]
    found = model.forward(batch([(TOKENS[100:101], 100, wrong)]), kv)
    assert not torch.allclose(found, whole[100:101], atol=1e-4)


def test_pool_shape(model: NativeModel) -> None:
    shape = (TINY.num_layers, 3, 2, TINY.num_kv_heads, BLOCK, TINY.head_dim)
    assert model.new_kv(3, BLOCK).shape == shape
