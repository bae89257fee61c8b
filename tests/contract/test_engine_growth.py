"""What workers/engine/base.py promises of engines that grow token trees."""

import random
from collections.abc import Sequence

import pytest

from tests.contract.test_engine import request_of
from tests.support.engines import SMALL, drain, make_engine, one_by_one, random_requests
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import ROOT, TokenTree
from workers.engine.native.engine import NativeEngine

pytestmark = pytest.mark.trees


class TestGrowth:
    """`prefill`, `follow` and `grow`, as a draft worker uses them."""

    def held(self, kind: str, request: Request) -> NativeEngine:
        engine = make_engine(kind)
        engine.prefill(request)
        drain(engine)
        return engine

    def grow(self, engine: NativeEngine, nodes: Sequence[int], width: int = 3) -> TokenTree:
        assert engine.grow("r", nodes, width)
        assert engine.step().grown == ("r",)
        engine.check()
        return engine.growth("r").tree

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_first_children_are_what_decoding_would_choose(self, kind: str, temperature: float) -> None:
        request = request_of(30, max_tokens=100, temperature=temperature)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        engine = self.held(kind, request)
        for done in (0, 1, 4, 6, 20):
            engine.follow(request.id, plain[:done])
            if not engine.grow(request.id, [ROOT], 3):
                drain(engine)  # far behind: it computes as a prompt does
            tree = self.grow(engine, [ROOT])
            tree = self.grow(engine, [0])
            assert (tree.tokens[0], tree.tokens[3]) == plain[done : done + 2]
            assert tree.parents == (-1, -1, -1, 0, 0, 0)
            assert all(0 <= chance <= 1 for chance in tree.chances)
            assert list(tree.chances[:3]) == sorted(tree.chances[:3], reverse=True)
        engine.release(request.id)
        assert engine.load().kv_blocks_used == 0

    def test_every_node_has_the_children_its_path_would_have_alone(self, kind: str) -> None:
        """Whatever was computed beside it, and whichever way the tree was re-rooted."""
        request = request_of(30, max_tokens=200, temperature=0.8, repetition_penalty=1.1)
        engine, rng = self.held(kind, request), random.Random(3)
        output: tuple[int, ...] = ()
        for _ in range(8):
            for _ in range(4):
                growing = engine.growth(request.id)
                open_nodes = [n for n in (ROOT, *range(len(growing.tree))) if n not in growing.done]
                self.grow(engine, rng.sample(open_nodes, min(3, len(open_nodes))), width=2)
            tree = engine.growth(request.id).tree
            for node in sorted(engine.growth(request.id).done):
                children = [c for c, parent in enumerate(tree.parents) if parent == node]
                path = tuple(tree.tokens[each] for each in tree.path(node))
                alone = self.held(kind, request.resumed(output + path))
                assert [tree.tokens[c] for c in children] == list(self.grow(alone, [ROOT], width=2).tokens)
            leaf = rng.choice([n for n in range(len(tree)) if n not in tree.parents])
            path = tuple(tree.tokens[each] for each in tree.path(leaf))
            output += path[: rng.randrange(1, len(path) + 1)]
            output += (5,) * rng.randrange(2)
            engine.follow(request.id, output)
            engine.check()
        engine.release(request.id)
        assert engine.load().kv_blocks_used == 0
        engine.check()

    def test_other_outputs_than_it_had(self, kind: str) -> None:
        request = request_of(30, max_tokens=100)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        engine = self.held(kind, request)
        for output in (plain[:3], (*plain[:3], 7, 8), plain[:4], ()):
            engine.follow(request.id, output)
            tree = self.grow(engine, [ROOT])
            alone = self.held(kind, request.resumed(output))
            assert self.grow(alone, [ROOT]).tokens == tree.tokens

    def test_nothing_grows_past_the_context_or_without_blocks(self, kind: str) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 2}))
        engine.prefill(request_of(30))
        drain(engine)
        tree = self.grow(engine, [ROOT])
        assert len(tree) == 3
        tree = self.grow(engine, [0, 1])  # positions 30 and 31: the second would need a block of its own
        assert tree.parents == (-1, -1, -1, 0, 0, 0)
        assert engine.growth("r").done == {ROOT, 0, 1}
        tree = self.grow(engine, [3])
        assert len(tree) == 6, "position 32 is past the pool"
        engine.release("r")
        assert engine.load().kv_blocks_used == 0

    def test_unknown_request(self, kind: str) -> None:
        for call in (lambda e: e.follow("nobody", ()), lambda e: e.grow("nobody", [ROOT], 1)):
            with pytest.raises(KeyError):
                call(make_engine(kind))


class TestForesight:
    """Drafts from the model's own early layers."""

    def test_all_layers_foresee_what_comes(self, kind: str) -> None:
        request = request_of(20, max_tokens=12, temperature=0.7)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        engine = make_engine(kind)
        engine.submit(request)
        engine.step()
        layers = engine.info.kv.layers
        tree = engine.foresee(["r"], 4, 2, layers)["r"]
        engine.check()
        assert tree.parents == (-1, -1, 0, 0, 2, 2, 4, 4)
        assert tree.tokens[::2] == plain[1:5]
        engine.propose(Draft("r", 21, tree))
        assert engine.step().outputs[0].tokens == plain[1:6]
        assert drain(engine)["r"] == plain[6:]

    def test_fewer_layers_change_no_token(self, kind: str) -> None:
        requests = random_requests(7)
        plain = one_by_one(make_engine(kind), requests)
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 40}))
        for request in requests:
            engine.submit(request)
        out: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
        while engine.has_work():
            for name, tree in engine.foresee(list(out), 3, 2, 1).items():
                base = len(next(r for r in requests if r.id == name).prompt) + len(out[name])
                engine.propose(Draft(name, base, tree))
            for each in engine.step().outputs:
                out[each.request_id] += each.tokens
            engine.check()
        assert out == plain
