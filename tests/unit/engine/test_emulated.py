"""The emulated engine takes the time its model says, and its draft agrees as often as it should."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.support.engines import SMALL, VOCABULARY, drain, make_engine, one_by_one, random_requests
from tidemill.core.messages import Draft
from tidemill.core.model import Request, Role
from tidemill.core.settings import (
    DeadlineSettings,
    EmulatedSettings,
    EngineSettings,
    LatencySettings,
    ModelSettings,
    Settings,
)
from tidemill.core.tree import ROOT, TokenTree
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine, HashModel
from workers.engine.latency import LinearLatency, StepWork
from workers.engines import make_engine as made_by_settings


@dataclass
class Time:
    """Passes by sleeping only, too long by `oversleep_s`, and by `busy_s` whenever it is read."""

    now: float = 100.0
    busy_s: float = 0.0
    oversleep_s: float = 0.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        self.now += self.busy_s
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.oversleep_s


def request_of(tokens: int, max_tokens: int = 8, name: str = "r") -> Request:
    rng = random.Random(tokens)
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=1))


class TestPace:
    """One second each: a prompt token, 10; a decoding row, 100; a token of context, 1000; a drafted row, 10000."""

    LATENCY = LinearLatency(
        0.5, prefill_token_s=10.0, decode_row_s=100.0, context_token_s=1000.0, drafted_row_s=10_000.0
    )

    def engine(self, time: Time, **settings: object) -> EmulatedEngine:
        return EmulatedEngine(
            SMALL.model_copy(update={"max_batch_tokens": 16} | settings),
            VOCABULARY,
            512,
            latency=self.LATENCY,
            clock=time,
            sleep=time.sleep,
        )

    def test_prompts_in_chunks_then_decoding(self) -> None:
        time = Time()
        engine = self.engine(time)
        engine.submit(request_of(20, max_tokens=3))
        seconds = [engine.step().seconds for _ in range(4)]
        assert seconds == pytest.approx([160.5, 40.5, 21_100.5, 22_100.5])
        assert time.slept == pytest.approx(seconds)
        assert not engine.has_work()

    def test_the_load_says_so_too(self) -> None:
        engine = self.engine(Time())
        engine.submit(request_of(5))
        assert engine.step().seconds == engine.load().step_s == pytest.approx(50.5)

    def test_a_prefill_workers_last_row_is_left_to_the_one_that_decodes(self) -> None:
        engine = self.engine(Time())
        engine.prefill(request_of(10))
        assert engine.step().seconds == pytest.approx(90.5)

    def test_drafted_rows(self) -> None:
        request = request_of(5)
        plain = one_by_one(make_engine("emulated"), [request])["r"]
        engine = self.engine(Time())
        engine.submit(request)
        engine.step()
        engine.propose(Draft("r", 6, TokenTree((plain[1], 3, plain[2]), (-1, -1, 0))))
        assert engine.step().seconds == pytest.approx(0.5 + 100 + 6000 + 30_000)

    def test_growing_trees_is_a_pass_of_its_own(self) -> None:
        engine = self.engine(Time())
        engine.prefill(request_of(10))
        drain(engine)
        engine.grow("r", [ROOT], 3)
        assert engine.step().seconds == pytest.approx(0.5 + 100 + 10_000)
        engine.prefill(request_of(6, name="other"))
        engine.grow("r", [0, 1], 3)
        assert engine.step().seconds == pytest.approx((0.5 + 50) + (0.5 + 200 + 10_000))

    def test_each_level_that_is_foreseen_is_a_pass(self) -> None:
        time = Time()
        engine = self.engine(time)
        engine.submit(request_of(10))
        engine.step()
        time.slept.clear()
        assert engine.foresee(["r", "nobody"], 3, 2, 1)
        assert time.slept == pytest.approx([3 * (0.5 + 100 + 11_000)])

    def test_bookkeeping_is_part_of_the_step(self) -> None:
        time = Time(busy_s=20.0)
        engine = self.engine(time)
        engine.submit(request_of(5))
        assert engine.step().seconds == pytest.approx(50.5)
        assert time.slept == pytest.approx([30.5])

    def test_a_machine_too_slow_for_the_model_is_not_denied(self) -> None:
        time = Time(busy_s=70.0)
        engine = self.engine(time)
        engine.submit(request_of(5))
        assert engine.step().seconds == pytest.approx(70.0)
        assert not time.slept

    def test_what_was_overslept_does_not_add_up(self) -> None:
        time = Time(oversleep_s=3.0)
        engine = self.engine(time)
        engine.submit(request_of(40))
        seconds = [engine.step().seconds for _ in range(3)]
        assert seconds == pytest.approx([160.5, 160.5, 80.5])
        assert time.slept == pytest.approx([160.5, 157.5, 77.5])

    def test_no_more_is_made_up_for_than_a_step(self) -> None:
        time = Time(oversleep_s=1000.0)
        engine = self.engine(time)
        engine.submit(request_of(50))
        assert [engine.step().seconds for _ in range(4)] == pytest.approx([160.5, 160.5, 160.5, 20.5])
        assert time.slept == pytest.approx([160.5, 160.5])

    def test_a_step_that_does_nothing_takes_no_time(self) -> None:
        time = Time()
        engine = self.engine(time, kv_blocks=4)
        engine.reserve(request_of(40, name="receiving"))
        engine.submit(request_of(40))
        assert engine.step().batch_tokens == 0
        assert not time.slept

    def test_time_changes_no_token(self) -> None:
        requests = random_requests(3)
        plain = one_by_one(make_engine("emulated"), requests)
        engine = self.engine(Time())
        for request in requests:
            engine.submit(request)
        assert drain(engine) == plain


class TestAgreement:
    @pytest.mark.parametrize("agreement", [0.1, 0.7, 0.95])
    def test_ranks_of_the_right_token(self, agreement: float) -> None:
        """Geometric, and the same share is what the draft believes."""
        hashes = np.random.default_rng(1).integers(0, 2**64, 20_000, np.uint64)
        right = HashModel(VOCABULARY, 512).logits_of(hashes).argmax(-1)
        logits = HashModel(VOCABULARY, 512, agreement).logits_of(hashes)
        order = np.argsort(-logits, -1, kind="stable")[:, :3]
        chances = np.exp(logits.astype(np.float64))
        chances /= chances.sum(-1, keepdims=True)
        for rank in range(3):
            expected = agreement * (1 - agreement) ** rank
            assert (order[:, rank] == right).mean() == pytest.approx(expected, abs=0.012)
            assert np.take_along_axis(chances, order[:, rank : rank + 1], 1) == pytest.approx(expected, abs=1e-3)

    def test_choices_are_different_tokens_and_always_the_same(self) -> None:
        hashes = np.arange(1000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        model = HashModel(64, 512, 0.3)
        first = model.logits_of(hashes).copy()
        assert ((first > 0).sum(-1) == 8).all()
        model.logits_of(hashes[::-1])
        assert (model.logits_of(hashes) == first).all()

    def test_a_chain_is_accepted_as_far_as_agreement_foretells(self) -> None:
        """Mean of accepted tokens of a chain of 3 with share 0.7: 0.7 + 0.7² + 0.7³."""
        target = make_engine("emulated", SMALL.model_copy(update={"kv_blocks": 512}))
        draft = EmulatedEngine(SMALL, VOCABULARY, 512, agreement=0.7)
        drafted, accepted = 0, 0
        for seed in range(40):
            request = request_of(5 + seed, max_tokens=40)
            target.submit(request)
            tokens = list(target.step().outputs[0].tokens)
            while target.has_work():
                draft.submit(Request("r", request.prompt, SamplingParams(max_tokens=len(tokens) + 3), tuple(tokens)))
                target.propose(Draft("r", len(request.prompt) + len(tokens), TokenTree.chain(drain(draft)["r"])))
                output = target.step().outputs[0]
                tokens += output.tokens
                drafted += output.drafted == 3
                accepted += output.accepted * (output.drafted == 3)
        assert accepted / drafted == pytest.approx(0.7 + 0.49 + 0.343, abs=0.1)


class TestSettings:
    def settings(self, models: object, **emulated: object) -> Settings:
        return Settings(
            target=ModelSettings(path=models / "target"),  # type: ignore[operator]
            draft=ModelSettings(path=models / "draft"),  # type: ignore[operator]
            engine=EngineSettings(kind="emulated", kv_blocks=1024),
            emulated=EmulatedSettings(**emulated),  # type: ignore[arg-type]
            deadlines=DeadlineSettings(),
        )

    def test_sizes_are_the_folders_unless_told(self, models: object) -> None:
        found = made_by_settings(self.settings(models), Role.VERIFY).info
        assert (found.kind, found.vocab_size, found.context_length) == ("emulated", 4096, 2048)
        told = made_by_settings(self.settings(models, vocab_size=5000, context_length=9000), Role.VERIFY).info
        assert (told.vocab_size, told.context_length) == (5000, 9000)

    def test_draft_workers_have_a_model_of_their_own(self, models: object) -> None:
        settings = self.settings(
            models, target=LatencySettings(step_s=0.5), draft=LatencySettings(step_s=0.25), agreement=0.6
        )
        engines = [made_by_settings(settings, role) for role in Role]
        work = StepWork(decode_rows=1)
        assert [each._latency(work) for each in engines] == [0.5, 0.25, 0.5]  # type: ignore[attr-defined]
        assert [each._model._agreement for each in engines] == [1.0, 0.6, 1.0]  # type: ignore[attr-defined]
