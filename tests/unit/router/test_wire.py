"""What clients send: everything impossible is named, everything possible passes unchanged."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import wire
from tidemill import _call
from tidemill.core.messages import Tokens
from tidemill.core.model import Request, SloClass
from tidemill.core.settings import SloSettings
from tidemill.errors import InvalidRequest, ModelNotFound
from tidemill.proto import inference_pb2 as pb
from tidemill.types import (
    FinishReason,
    ModelCard,
    Route,
    SamplingParams,
    Speculation,
    Summary,
    Timing,
    TokenLogprobs,
)

CARD = ModelCard("tiny", context_length=100, vocab_size=50, has_chat_template=True)


def parsed(**options: Any) -> SamplingParams:
    return wire.sampling_from_pb(pb.SamplingParams(**options), CARD, prompt_tokens=10)


possible = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 90),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**32 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 1e6, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    stop=st.lists(st.text(min_size=1, max_size=20), max_size=16).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 49), max_size=5).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
)


@given(possible)
def test_possible_parameters_arrive_as_they_were_sent(sampling: SamplingParams) -> None:
    request = _call.generate_request("x", sampling, "", "", "", "")
    assert wire.sampling_from_pb(request.sampling, CARD, 10) == sampling


def test_what_is_left_out_has_the_defaults() -> None:
    assert parsed() == SamplingParams(seed=0, max_tokens=90)


impossible = st.one_of(
    st.floats(max_value=0, exclude_max=True).map(lambda x: {"temperature": x}),
    st.sampled_from(["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"])
    .flatmap(lambda name: st.sampled_from([math.nan, math.inf, -math.inf]).map(lambda x: {name: x})),
    st.floats(max_value=0).map(lambda x: {"top_p": x}),
    st.floats(min_value=1, exclude_min=True).map(lambda x: {"top_p": x}),
    st.floats(max_value=0, exclude_max=True).map(lambda x: {"min_p": x}),
    st.floats(min_value=1, exclude_min=True).map(lambda x: {"min_p": x}),
    st.floats(max_value=0).map(lambda x: {"repetition_penalty": x}),
    st.floats(min_value=2, exclude_min=True).map(lambda x: {"presence_penalty": x}),
    st.floats(max_value=-2, exclude_max=True).map(lambda x: {"frequency_penalty": x}),
    st.integers(21, 2**32 - 1).map(lambda x: {"logprobs": x}),
    st.integers(2**63, 2**64 - 1).map(lambda x: {"seed": x}),
    st.integers(50, 2**32 - 1).map(lambda x: {"stop_token_ids": [x]}),
    st.just({"max_tokens": 0}),
    st.just({"stop": [""]}),
    st.just({"stop": ["ok", "x" * 257]}),
    st.just({"stop": ["x"] * 17}),
)  # fmt: skip


@given(impossible)
def test_impossible_parameters_are_named_with_what_was_expected(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**options)
    (name,) = options
    said = str(caught.value)
    assert said.startswith(name)
    assert any(word in said for word in ("expected", "at most", "must be")), said


@given(st.integers(1, 99), st.integers(1, 2**32 - 1))
def test_max_tokens_never_leaves_the_context(prompt_tokens: int, max_tokens: int) -> None:
    sampling = wire.sampling_from_pb(pb.SamplingParams(max_tokens=max_tokens), CARD, prompt_tokens)
    assert sampling.max_tokens == min(max_tokens, 100 - prompt_tokens)


def test_a_seed_is_drawn_only_where_chance_is_wanted() -> None:
    drawn = {parsed(temperature=1.0).seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in drawn)
    assert parsed(temperature=0.0).seed == 0
    assert parsed(temperature=1.0, seed=5).seed == 5


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the prompt is empty"),
        ([1, 50, 2], "token id 50 is outside the vocabulary of 'tiny', which has 50 tokens"),
        ([2**32 - 1], "token id 4294967295 is outside"),
        ([1] * 100, "the prompt has 100 tokens, which leaves no room in the context of 100; shorten it"),
    ],
)
def test_impossible_prompts(prompt: list[int], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        wire.check_prompt(prompt, CARD)


def test_possible_prompts() -> None:
    wire.check_prompt([0], CARD)
    wire.check_prompt([49] * 99, CARD)


def test_models() -> None:
    wire.check_model("", CARD)
    wire.check_model("tiny", CARD)
    with pytest.raises(ModelNotFound, match="model 'large' is not served here; 'tiny' is"):
        wire.check_model("large", CARD)


CLASSES = {"default": SloSettings(ttft_s=1, tpot_s=0.1), "batch": SloSettings(ttft_s=9, tpot_s=2)}


def made(**fields: Any) -> Request:
    return wire.new_request(pb.GenerateRequest(**fields), [1], SamplingParams(), CLASSES)


@pytest.mark.parametrize("name", ["r" * 129, "a\nb", "\x00", "a\tb"])
@pytest.mark.parametrize("field", ["request_id", "tenant"])
def test_impossible_names(field: str, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be at most 128 printable characters"):
        made(**{field: name})


def test_ids_are_made_where_none_is_given() -> None:
    assert len({made().id for _ in range(50)}) == 50
    assert made(request_id="mine").id == "mine"


def test_a_goal_is_a_class_or_the_requests_own() -> None:
    assert made().slo == SloClass("default", 1, 0.1)
    assert made(slo_class="batch", tenant="acme").slo == SloClass("batch", 9, 2)
    assert made(slo=pb.Slo(ttft_s=0.5, tpot_s=0.02)).slo == SloClass("custom", 0.5, 0.02)
    with pytest.raises(InvalidRequest, match="'gold' is not in the settings; there are default, batch"):
        made(slo_class="gold")
    with pytest.raises(InvalidRequest, match="both set"):
        made(slo_class="batch", slo=pb.Slo(ttft_s=0.5, tpot_s=0.02))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_impossible_goals(seconds: float) -> None:
    for goal in (pb.Slo(ttft_s=seconds, tpot_s=1), pb.Slo(ttft_s=1, tpot_s=seconds)):
        with pytest.raises(InvalidRequest, match="expected seconds above 0"):
            made(slo=goal)


@given(st.text(max_size=300))
def test_errors_repeat_little_of_what_was_sent(name: str) -> None:
    if name not in ("", "tiny"):
        with pytest.raises(ModelNotFound) as caught:
            wire.check_model(name, CARD)
        assert len(str(caught.value)) < 64 * 10 + 60, "at most ten characters for one that has to be escaped"


logprobs = st.builds(
    TokenLogprobs,
    st.integers(0, 49),
    st.floats(-50, 0, width=32),
    st.lists(st.tuples(st.integers(0, 49), st.floats(-50, 0, width=32)), max_size=3).map(tuple),
)
steps = st.lists(
    st.builds(Tokens, st.just("r"), st.lists(st.integers(0, 49)).map(tuple), st.lists(logprobs, max_size=2).map(tuple)),
    min_size=1,
    max_size=4,
)
SUMMARY = Summary(
    "r", "tiny", FinishReason.STOP_STRING, 3, 4, 2**63 - 1, Timing(0.25, 0.5, 0.125, 0.0625, 0.9375, 0.01, 2.0),
    Route("p@1", "v@2", "d@3", "disaggregated", 1), Speculation(3, 8, 2),
)  # fmt: skip


@given(st.text(), steps)
def test_chunks_come_to_the_client_as_they_were(text: str, some: list[Tokens]) -> None:
    chunk = wire.chunk_to_pb(text, some)
    chunk.summary.CopyFrom(wire.summary_to_pb(SUMMARY))
    got = _call.chunk_from_pb(pb.GenerateChunk.FromString(chunk.SerializeToString()))
    assert got.text == text
    assert got.tokens == tuple(token for step in some for token in step.tokens)
    assert got.logprobs == tuple(each for step in some for each in step.logprobs)
    assert got.summary == SUMMARY


@given(st.lists(st.tuples(st.text(), steps), min_size=1, max_size=4))
def test_a_whole_answer_is_its_chunks(parts: list[tuple[str, list[Tokens]]]) -> None:
    chunks = [wire.chunk_to_pb(text, some) for text, some in parts]
    chunks[-1].summary.CopyFrom(wire.summary_to_pb(SUMMARY))
    done = _call.completion_from_pb(wire.response_to_pb(chunks))
    assert done.text == "".join(text for text, _ in parts)
    assert done.tokens == tuple(token for _, some in parts for step in some for token in step.tokens)
    assert done.summary == SUMMARY


def test_chats() -> None:
    for messages, said in (([], "messages is empty"), ([pb.Message(role="boss")], "role 'boss' is unknown")):
        with pytest.raises(InvalidRequest, match=said):
            wire.messages_from_pb(messages)
