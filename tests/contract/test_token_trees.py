"""What a tree leaves behind: nothing but the tokens and the KV that plain decoding would have, to the bit.

Of a node's row: it is what its path alone would give, and no node beside the path takes part in it. Of the KV pool:
what was accepted is where a prompt would have put it, and what was rejected is found by nobody.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.engines import SMALL, VOCABULARY, bundled_engine, make_engine, one_by_one, prompt_of, random_tree
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import ROOT, TokenTree
from tidemill.types import FinishReason, SamplingParams
from workers.engine.base import SequenceOutput
from workers.engine.native.engine import NativeEngine
from workers.engine.native.scheduler import Slice

Rows = dict[int, npt.NDArray[np.float32]]  # of each node that had one, and of ROOT

PROMPT = prompt_of(37)
#                      0  1  2  3  4  5  6   7   8
TREE = TokenTree((5, 6, 7, 8, 9, 5, 11, 12, 13), (-1, 0, 0, 2, 3, -1, 5, 3, 6))


@pytest.fixture(
    params=[f"native-{kernels}-{dtype}" for kernels in ("cpu", "torch") for dtype in ("float32", "bfloat16")]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def request_of(prompt: tuple[int, ...] = PROMPT, name: str = "r", **sampling: object) -> Request:
    return Request(name, prompt, SamplingParams(**({"max_tokens": 100, "ignore_eos": True, "seed": 1} | sampling)))  # type: ignore[arg-type]


def spied(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """Logits of every sequence's rows in every step from now on."""
    seen: list[Rows] = []
    accept = engine._accept

    def spy(piece: Slice, chosen: list[int], logits: npt.NDArray[np.float32]) -> SequenceOutput:
        seen.append({node: logits[place].copy() for node, place in piece.places.items()})
        return accept(piece, chosen, logits)

    monkeypatch.setattr(engine, "_accept", spy)
    return seen


def rows_of(kind: str, tree: TokenTree, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Rows]:
    """The token that comes first, and the logits of the step that verifies a tree after it."""
    engine = make_engine(kind)
    engine.submit(request_of())
    first = engine.step().outputs[0].tokens[0]
    seen = spied(engine, monkeypatch)
    assert engine.propose(Draft("r", len(PROMPT) + 1, tree))
    engine.step()
    engine.check()
    return first, seen[0]


def test_a_nodes_row_is_that_of_its_path_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, rows = rows_of(kind, TREE, monkeypatch)
    assert set(rows) == {ROOT, *range(len(TREE))}
    for node, row in rows.items():
        alone = make_engine(kind)
        seen = spied(alone, monkeypatch)
        path = tuple(TREE.tokens[each] for each in TREE.path(node)) if node != ROOT else ()
        alone.submit(request_of((*PROMPT, first, *path)))
        alone.step()
        assert np.array_equal(seen[0][ROOT], row), f"node {node}"


@pytest.mark.parametrize("changed", range(len(TREE)))
def test_only_ancestors_take_part_in_a_row(kind: str, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (*TREE.tokens[:changed], 60, *TREE.tokens[changed + 1 :])
    _, before = rows_of(kind, TREE, monkeypatch)
    _, after = rows_of(kind, TokenTree(tokens, TREE.parents), monkeypatch)
    same = {node for node in before if np.array_equal(before[node], after[node])}
    assert same == {ROOT} | {node for node in range(len(TREE)) if changed not in TREE.path(node)}


def test_kv_of_what_was_accepted_is_that_of_a_prompt(kind: str) -> None:
    """Rounds of trees, right to some depth, on branches of their own; then every full block is compared."""
    rng = random.Random(7)
    request = request_of(max_tokens=60)
    plain = one_by_one(make_engine(kind), [request])["r"]
    engine, out, accepted = make_engine(kind), (), 0
    engine.submit(request)
    while len(out) < 45:
        engine.propose(Draft("r", len(PROMPT) + len(out), random_tree(rng, plain[len(out) :], size=14)))
        output = engine.step().outputs[0]
        out, accepted = out + output.tokens, accepted + output.accepted
    assert accepted > 5
    alone = make_engine(kind)
    alone.submit(request_of((*PROMPT, *out[:-1])))
    while not alone.step().outputs:
        pass
    full = (len(PROMPT) + len(out) - 1) // SMALL.block_size  # how a block is laid out inside is the kernels' matter
    found, expected = (each.export_kv("r", 0, full) for each in (engine, alone))
    assert torch.equal(found, expected)
    assert found.float().std() > 0.01, "slots that are all alike would agree with anything"


@pytest.mark.parametrize("right", [0, 5, 40])
def test_the_prefix_cache_has_what_was_accepted_and_no_more(kind: str, right: int) -> None:
    """A chain over several blocks is right so far; then somebody asks for a prompt that begins as all of it does."""
    plain = one_by_one(make_engine(kind), [request_of(max_tokens=60)])["r"]
    drafted = (*plain[1 : 1 + right], *((token + 1) % VOCABULARY for token in plain[1 + right : 41]))
    engine = make_engine(kind)
    engine.submit(request_of())
    engine.step()
    assert engine.propose(Draft("r", len(PROMPT) + 1, TokenTree.chain(drafted)))
    assert engine.step().outputs[0].accepted == right
    engine.check()
    other = request_of((*PROMPT, plain[0], *drafted, 3), "other", max_tokens=8)
    reservation = engine.reserve(other)
    assert reservation.first_block == (len(PROMPT) + 1 + right) // SMALL.block_size
    engine.release("other")
    engine.release("r")
    assert one_by_one(engine, [other]) == one_by_one(make_engine(kind), [other])


def chain(right: tuple[int, ...]) -> TokenTree:
    return TokenTree.chain(right[:6])


def bushy(right: tuple[int, ...]) -> TokenTree:
    """The right path is the second child everywhere."""
    tree = TokenTree()
    parent = ROOT
    for token in right[:6]:
        tokens, parents = (*tree.tokens, token + 1, token), (*tree.parents, parent, parent)
        tree, parent = TokenTree(tokens, parents), len(tokens) - 1
    return tree


@pytest.mark.parametrize("shape", [chain, bushy])
@pytest.mark.parametrize("ends", ["length", "stop token", "end of text", "stop string", "context"])
def test_the_end_inside_an_accepted_block(
    ends: str, shape: Callable[[tuple[int, ...]], TokenTree], models: object
) -> None:
    """The tree goes on past the end; tokens, finish and what is held are as if each token had come by itself."""

    def engine_of() -> NativeEngine:
        blocks = 4 if ends == "context" else 256  # of 16 tokens: 64 in all
        engine = bundled_engine(models, SMALL.model_copy(update={"kv_blocks": blocks}))  # type: ignore[arg-type]
        if ends == "end of text":
            engine.info = replace(engine.info, eos_token_ids=frozenset({endless[9]}))
        return engine

    def finish_of(engine: NativeEngine, request: Request, drafts: bool) -> tuple[tuple[int, ...], FinishReason | None]:
        engine.submit(request)
        out: tuple[int, ...] = ()
        while True:
            if drafts and out:
                engine.propose(Draft("r", len(PROMPT) + len(out), shape(endless[len(out) :])))
            output = engine.step().outputs[0]
            out += output.tokens
            if output.finish is not None:
                engine.check()
                assert engine.load().kv_blocks_used == 0
                return out, output.finish

    endless = ()
    endless = one_by_one(bundled_engine(models, SMALL), [request_of(max_tokens=80)])["r"]  # type: ignore[arg-type]
    text = bundled_engine(models, SMALL)._tokenizer.decode(list(endless[8:11]))  # type: ignore[arg-type,union-attr]
    changes: dict[str, dict[str, object]] = {
        "length": {"max_tokens": 10},
        "stop token": {"stop_token_ids": (endless[9],)},
        "end of text": {"ignore_eos": False},
        "stop string": {"stop": (text,)},
        "context": {"max_tokens": 1000},
    }
    request = request_of(**changes[ends])
    plain = finish_of(engine_of(), request, drafts=False)
    assert finish_of(engine_of(), request, drafts=True) == plain
    assert 1 < len(plain[0]) < 80
