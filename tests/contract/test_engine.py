"""What workers/engine/base.py promises, for every engine."""

import random

import pytest

from tests.support.engines import SMALL, VOCABULARY, drain, make_engine, one_by_one, random_requests, with_drafts
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.types import FinishReason, SamplingParams
from workers.engine.base import OutOfBlocks, RequestTooLong

KINDS = ["emulated", "native-cpu-float32", "native-cpu-bfloat16", "native-torch-float32", "native-torch-bfloat16"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def request_of(tokens: int, max_tokens: int = 8, name: str = "r", **sampling: object) -> Request:
    rng = random.Random(tokens)
    prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1, **sampling))  # type: ignore[arg-type]


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
    def requests(self) -> list[Request]:
        return random_requests(seed=3)

    @pytest.fixture
    def plain(self, kind: str, requests: list[Request]) -> dict[str, tuple[int, ...]]:
        return one_by_one(make_engine(kind, SMALL.model_copy(update={"prefix_cache": False})), requests)

    def test_in_a_batch(self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]) -> None:
        engine = make_engine(kind)
        for request in requests:
            engine.submit(request)
        assert drain(engine) == plain
        assert engine.load().kv_blocks_used == 0

    def test_with_small_chunks_and_preemption(
        self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]
    ) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 8, "max_batch_tokens": 9}))
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

        def draft(request: Request, out: tuple[int, ...]) -> list[int]:
            tokens = list(plain[request.id][len(out) : len(out) + 4])
            if quality == "random" or (quality == "mixed" and rng.random() < 0.5):
                tokens = [rng.randrange(VOCABULARY) for _ in tokens]
            return tokens

        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 40}))
        assert with_drafts(engine, requests, draft) == plain

    def test_after_hand_over(self, kind: str, requests: list[Request], plain: dict[str, tuple[int, ...]]) -> None:
        source, target = make_engine(kind), make_engine(kind)
        for request in requests:
            hand_over(source, target, request)
        assert drain(target) == plain
        assert source.load().kv_blocks_used == 0
        source.check()

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
    def test_accepts_what_it_would_have_chosen(self, kind: str) -> None:
        engine = make_engine(kind)
        request = request_of(20, max_tokens=6)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        engine.submit(request)
        engine.step()
        assert engine.propose(Draft(request.id, 21, plain[1:4], (-1, 0, 1)))
        output = engine.step().outputs[0]
        assert (output.tokens, output.drafted, output.accepted) == (plain[1:5], 3, 3)

    def test_refuses_stale_foreign_and_unknown(self, kind: str) -> None:
        engine = make_engine(kind)
        engine.submit(request_of(20))
        engine.step()
        assert not engine.propose(Draft("r", 20, (5,), (-1,)))  # behind
        assert not engine.propose(Draft("r", 22, (5,), (-1,)))  # ahead
        assert not engine.propose(Draft("x", 21, (5,), (-1,)))
        assert not engine.propose(Draft("r", 21, (VOCABULARY,), (-1,)))
        assert not engine.propose(Draft("r", 21, (), ()))
        assert not engine.propose(Draft("r", 21, (5, 6), (-1, -1)))  # a tree

    def test_stop_inside_an_accepted_block_cuts_as_plain_decoding_would(self, kind: str) -> None:
        request = request_of(20, max_tokens=12)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        stop = plain[5]
        stopped = request_of(20, max_tokens=12, stop_token_ids=(stop,))
        expected = plain[: plain.index(stop) + 1]
        engine = make_engine(kind)
        out = with_drafts(engine, [stopped], lambda _, sent: plain[len(sent) : len(sent) + 4])
        assert out[request.id] == expected
        assert engine.load().kv_blocks_used == 0


class TestDrafting:
    """`prefill` and `rewrite`, as a draft worker uses them."""

    def test_goes_on_from_any_output_and_rolls_back(self, kind: str) -> None:
        request = request_of(30, max_tokens=100)
        plain = one_by_one(make_engine(kind), [request])[request.id]
        engine = make_engine(kind)
        engine.prefill(request)
        drain(engine)
        for output in ((), plain[:3], (*plain[:3], 7, 8), plain[:20], plain[:4], ()):
            engine.rewrite(request.id, output, 5)
            drafted = drain(engine)[request.id]
            assert len(drafted) == 5
            fresh = make_engine(kind)
            fresh.submit(request.resumed(output))
            assert drain(fresh)[request.id][:5] == drafted
        engine.release(request.id)
        assert engine.load().kv_blocks_used == 0
        engine.check()

    def test_unknown_request(self, kind: str) -> None:
        with pytest.raises(KeyError):
            make_engine(kind).rewrite("nobody", (), 1)


class TestLimits:
    def test_max_tokens(self, kind: str) -> None:
        engine = make_engine(kind)
        engine.submit(request_of(5, max_tokens=3))
        outputs = [each for _ in range(3) for each in engine.step().outputs]
        assert [each.finish for each in outputs] == [None, None, FinishReason.LENGTH]

    def test_full_context_ends_the_output(self, kind: str) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 4}))  # 64 tokens
        engine.submit(request_of(50, max_tokens=10**9))
        assert len(drain(engine)["r"]) == 14

    def test_too_long_is_refused_and_holds_nothing(self, kind: str) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 4}))
        for take in (engine.submit, engine.prefill, engine.reserve):
            with pytest.raises(RequestTooLong):
                take(request_of(64))
        assert engine.load().kv_blocks_used == 0

    def test_reservation_without_room_holds_nothing(self, kind: str) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 4}))
        engine.reserve(request_of(40, name="first"))
        with pytest.raises(OutOfBlocks):
            engine.reserve(request_of(40, name="second"))
        assert engine.load().kv_blocks_used == engine.load().kv_blocks_leased == 3
        engine.release("first")
        assert engine.load().kv_blocks_used == 0

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_release_in_any_state_frees_everything(self, kind: str, steps: int) -> None:
        engine = make_engine(kind, SMALL.model_copy(update={"max_batch_tokens": 16}))
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
        request = request_of(40)
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
