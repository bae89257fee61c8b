"""What workers/engine/base.py promises, for every engine."""

import random
from dataclasses import replace

import pytest

from tests.support.engines import (
    SMALL,
    VOCABULARY,
    drain,
    make_engine,
    one_by_one,
    pool_of,
    random_requests,
    random_tree,
    with_drafts,
)
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
from tidemill.types import FinishReason, SamplingParams
from workers.engine.base import OutOfBlocks, RequestTooLong
from workers.engine.native.engine import NativeEngine

TREES = pytest.mark.trees


def request_of(tokens: int, max_tokens: int = 8, name: str = "r", **sampling: object) -> Request:
    rng = random.Random(tokens)
    prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1, **sampling))  # type: ignore[arg-type]


def greedy(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, temperature=0.0, frequency_penalty=0.0))


def hand_over(source: object, target: object, request: Request) -> None:
    """Prefill on one engine, move the blocks, activate on the other."""
    reservation = target.reserve(request)  # type: ignore[attr-defined]
    source.prefill(request)  # type: ignore[attr-defined]
    while not any(each.held for each in source.step().progress):  # type: ignore[attr-defined]
        pass
    if reservation.first_block < reservation.end_block:
        kv = source.export_kv(request.id, reservation.first_block, reservation.end_block)  # type: ignore[attr-defined]
        target.import_kv(request.id, reservation.first_block, kv)  # type: ignore[attr-defined]
    source.release(request.id)  # type: ignore[attr-defined]
    target.activate(request.id)  # type: ignore[attr-defined]


class TestSameTokens:
    """Batching, chunking, preemption, caching, drafts and hand-over change when a token comes, never which."""

    @pytest.fixture
    def requests(self, kind: str) -> list[Request]:
        """vLLM promises it for greedy ones, and penalties on the output only where it began."""
        requests = random_requests(seed=3)
        return [greedy(each) for each in requests] if kind == "vllm" else requests

    @pytest.fixture
    def plain(self, kind: str, requests: list[Request]) -> dict[str, tuple[int, ...]]:
        return one_by_one(make_engine(kind, pool_of(kind, 4096, prefix_cache=False)), requests)

    def test_in_a_batch(self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]) -> None:
        engine = make_engine(kind)
        for request in requests:
            engine.submit(request)
        assert drain(engine) == plain
        assert engine.load().kv_blocks_used == 0

    def test_with_small_chunks_and_preemption(
        self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        engine = make_engine(kind, pool_of(kind, 128, max_batch_tokens=9))
        for request in requests:
            engine.submit(request)
        preempted, out = 0, {}
        while engine.has_work():
            output = engine.step()
            preempted += len(output.preempted)
            for each in output.outputs:
                out[each.request_id] = out.get(each.request_id, ()) + each.tokens
            engine.check()
        assert out == plain
        assert preempted > 0, "the pool was to be too small"

    @pytest.mark.parametrize("quality", ["perfect", "random", "mixed"])
    def test_with_drafts(
        self, kind: str, quality: str, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        rng = random.Random(5)

        def draft(request: Request, out: tuple[int, ...]) -> TokenTree:
            tokens = list(plain[request.id][len(out) : len(out) + 4])
            if quality == "random" or (quality == "mixed" and rng.random() < 0.5):
                tokens = [rng.randrange(VOCABULARY) for _ in tokens]
            return TokenTree.chain(tokens)

        engine = make_engine(kind, pool_of(kind, 640))
        assert with_drafts(engine, requests, draft) == plain

    @TREES
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_with_trees(
        self, kind: str, block_size: int, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        """Steps too small for all rows, and a pool too small for all branches, prompts computed beside them."""
        rng = random.Random(block_size)
        blocks = {16: 30, 64: 16}[block_size]
        changes = {"kv_blocks": blocks, "block_size": block_size, "max_batch_tokens": 40}
        engine = make_engine(kind, SMALL.model_copy(update=changes))
        out = with_drafts(
            engine, requests, lambda request, sent: random_tree(rng, plain[request.id][len(sent) :], size=14)
        )
        assert out == plain

    def test_after_hand_over(self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]) -> None:
        source, target = make_engine(kind), make_engine(kind)
        for request in requests:
            hand_over(source, target, request)
        assert drain(target) == plain
        assert source.load().kv_blocks_used == 0
        source.check()

    def test_only_what_did_not_come_is_computed(self, kind: str) -> None:
        """Of a prompt's KV one block came, then the link was lost."""
        request = greedy(request_of(100))
        plain = one_by_one(make_engine(kind), [request])
        source, target = make_engine(kind), make_engine(kind, pool_of(kind, 4096, prefix_cache=False))
        reservation = target.reserve(request)
        source.prefill(request)
        while not any(each.held for each in source.step().progress):
            pass
        target.import_kv(request.id, 0, source.export_kv(request.id, 0, 1))
        assert (reservation.first_block, reservation.end_block) == (0, -(-99 // target.info.kv.block_size))
        target.activate(request.id, end_block=1)
        rows, tokens = 0, ()
        while not tokens:
            output = target.step()
            rows += output.batch_tokens
            tokens = sum((each.tokens for each in output.outputs), ())
        assert rows == 100 - target.info.kv.block_size
        assert {request.id: tokens + drain(target)[request.id]} == plain

    def test_resumed_elsewhere_after_some_tokens(
        self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        for request in requests:
            sent = plain[request.id][: len(plain[request.id]) // 2]
            if len(sent) < len(plain[request.id]):
                engine = make_engine(kind)
                engine.submit(request.resumed(sent))
                assert sent + drain(engine)[request.id] == plain[request.id]

    def test_again_from_the_prefix_cache(
        self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        engine = make_engine(kind)
        assert one_by_one(engine, requests) == plain
        rows = 0
        for request in requests:
            engine.submit(request)
            rows += engine.step().batch_tokens
            engine.release(request.id)
        assert rows < sum(len(request.prompt) for request in requests), "no prefix was found"
        assert one_by_one(engine, requests) == plain


class TestDrafts:
    @pytest.fixture
    def plain(self, kind: str) -> tuple[int, ...]:
        request = request_of(20, max_tokens=12)
        return one_by_one(make_engine(kind), [request])[request.id]

    @pytest.fixture
    def engine(self, kind: str) -> NativeEngine:
        """One request, of which one token is decoded."""
        engine = make_engine(kind)
        engine.submit(request_of(20, max_tokens=12))
        engine.step()
        return engine

    def test_accepts_what_it_would_have_chosen(self, engine: NativeEngine, plain: tuple[int, ...]) -> None:
        assert engine.propose(Draft("r", 21, TokenTree.chain(plain[1:4])))
        output = engine.step().outputs[0]
        assert (output.tokens, output.drafted, output.accepted) == (plain[1:5], 3, 3)

    @TREES
    def test_descends_where_the_tree_has_its_choice(self, engine: NativeEngine, plain: tuple[int, ...]) -> None:
        a, b, c = plain[1:4]
        tree = TokenTree((a + 1, a, b + 1, b, c, c + 1), (-1, -1, 0, 1, 3, 3))
        assert engine.propose(Draft("r", 21, tree))
        output = engine.step()
        assert output.batch_tokens == 7
        assert (output.outputs[0].tokens, output.outputs[0].drafted, output.outputs[0].accepted) == (plain[1:5], 6, 3)
        assert drain(engine)["r"] == plain[5:]

    @TREES
    def test_a_tree_is_cut_to_the_tokens_that_may_come(self, kind: str) -> None:
        engine = make_engine(kind)
        engine.submit(request_of(20, max_tokens=3))
        engine.step()
        assert engine.propose(Draft("r", 21, TokenTree((5, 6, 7), (-1, 0, 0))))
        assert engine.step().batch_tokens == 2

    def test_refuses_stale_foreign_and_unknown(self, engine: NativeEngine) -> None:
        one = TokenTree.chain([5])
        assert not engine.propose(Draft("r", 20, one))  # behind
        assert not engine.propose(Draft("r", 22, one))  # ahead
        assert not engine.propose(Draft("x", 21, one))
        assert not engine.propose(Draft("r", 21, TokenTree.chain([VOCABULARY])))
        assert not engine.propose(Draft("r", 21, TokenTree()))

    def test_stop_inside_an_accepted_block_cuts_as_plain_decoding_would(self, kind: str) -> None:
        request = request_of(20, max_tokens=12)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        stop = plain[5]
        stopped = request_of(20, max_tokens=12, stop_token_ids=(stop,))
        expected = plain[: plain.index(stop) + 1]
        engine = make_engine(kind)
        out = with_drafts(engine, [stopped], lambda _, sent: TokenTree.chain(plain[len(sent) : len(sent) + 4]))
        assert out[request.id] == expected
        assert engine.load().kv_blocks_used == 0


class TestLimits:
    def test_max_tokens(self, kind: str) -> None:
        engine = make_engine(kind)
        engine.submit(request_of(5, max_tokens=3))
        outputs = [each for _ in range(3) for each in engine.step().outputs]
        assert [each.finish for each in outputs] == [None, None, FinishReason.LENGTH]

    def test_full_context_ends_the_output(self, kind: str) -> None:
        engine = make_engine(kind, pool_of(kind, 64))
        engine.submit(request_of(50, max_tokens=10**9))
        assert len(drain(engine)["r"]) == 14

    def test_too_long_is_refused_and_holds_nothing(self, kind: str) -> None:
        engine = make_engine(kind, pool_of(kind, 64))
        for take in (engine.submit, engine.prefill, engine.reserve):
            with pytest.raises(RequestTooLong):
                take(request_of(64))
        assert engine.load().kv_blocks_used == 0

    def test_reservation_without_room_holds_nothing(self, kind: str) -> None:
        size = pool_of(kind, 0).block_size
        engine = make_engine(kind, pool_of(kind, 5 * size))
        engine.reserve(request_of(3 * size, name="first"))
        with pytest.raises(OutOfBlocks):
            engine.reserve(request_of(3 * size, name="second"))
        assert engine.load().kv_blocks_used == engine.load().kv_blocks_leased == 3
        engine.release("first")
        assert engine.load().kv_blocks_used == 0

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_release_in_any_state_frees_everything(self, kind: str, steps: int) -> None:
        engine = make_engine(kind, pool_of(kind, 4096, max_batch_tokens=16))
        for index in range(4):
            engine.submit(request_of(30, name=f"r{index}"))
        engine.prefill(request_of(30, name="held"))
        engine.reserve(request_of(30, name="receiving"))
        for _ in range(steps):
            engine.step()
        for name in ("r0", "r1", "r2", "r3", "held", "receiving", "receiving", "nobody"):
            engine.release(name)
        assert engine.load().kv_blocks_used == 0
        assert not engine.has_work()
        engine.check()

    def test_wrong_import_is_refused(self, kind: str) -> None:
        engine = make_engine(kind)
        request = request_of(3 * engine.info.kv.block_size)
        engine.reserve(request)
        good = make_engine(kind)
        good.prefill(request)
        drain(good)
        kv = good.export_kv(request.id, 0, 3)
        with pytest.raises(ValueError, match="not among those reserved"):
            engine.import_kv(request.id, 1, kv)
        with pytest.raises(ValueError, match="expected blocks of"):
            engine.import_kv(request.id, 0, kv.double())
        with pytest.raises(KeyError):
            engine.import_kv("nobody", 0, kv)

    def test_same_id_twice(self, kind: str) -> None:
        engine = make_engine(kind)
        engine.submit(request_of(5))
        with pytest.raises(ValueError, match="here already"):
            engine.submit(request_of(6))


def test_logprobs_are_of_the_models_own_distribution(kind: str) -> None:
    engine = make_engine(kind)
    engine.submit(request_of(10, max_tokens=2, temperature=1.0, logprobs=3))
    output = engine.step().outputs[0]
    (found,) = output.logprobs
    assert found.token == output.tokens[0]
    assert len(found.top) == 3
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    assert found.logprob <= found.top[0][1] <= 0.0
