"""What both clients share, and what applications may rely on."""

import inspect
import subprocess
import sys
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tidemill
from tidemill import InvalidRequest, Message, MessageTooLarge, SamplingParams, Slo, _call, errors
from tidemill.errors import KIND_METADATA_KEY, TABLE, status_of


def test_public_names_are_these() -> None:
    assert set(tidemill.__all__) == {
        "Client", "AsyncClient", "Tls", "SamplingParams", "Slo", "Message", "Chunk", "Completion", "Summary", "Timing",
        "Route", "Speculation", "TokenLogprobs", "FinishReason", "Sameness", "ModelCard", "TidemillError",
        "InvalidRequest", "ModelNotFound", "MessageTooLarge", "Unauthenticated", "Overloaded", "DeadlineExceeded",
        "Cancelled", "Unavailable", "InternalError",
    }  # fmt: skip
    assert all(hasattr(tidemill, name) for name in tidemill.__all__)


def test_importing_the_client_is_light() -> None:
    code = "import sys, tidemill; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert {"grpc", "google"} <= loaded
    assert not loaded & {"ray", "torch", "numpy", "pydantic", "yaml", "tokenizers", "prometheus_client", "jinja2"}


def test_clients_have_nothing_in_common_that_only_one_has() -> None:
    for method in ("generate", "stream", "chat", "stream_chat", "tokenize", "models", "health", "close"):
        one, other = getattr(tidemill.Client, method), getattr(tidemill.AsyncClient, method)
        assert str(inspect.signature(one)).split(" ->")[0] == str(inspect.signature(other)).split(" ->")[0]


def test_keywords_go_on_top_of_params() -> None:
    base = SamplingParams(max_tokens=5, temperature=0.5)
    assert _call.sampling_params(base, {"max_tokens": 9}) == SamplingParams(max_tokens=9, temperature=0.5)
    assert _call.sampling_params(None, {"stop": "one"}).stop == ("one",), "a lone string is one stop string"
    with pytest.raises(InvalidRequest, match="unknown sampling parameter 'temprature'; there are max_tokens"):
        _call.sampling_params(None, {"temprature": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 2**32), ("max_tokens", "five"), ("seed", -1), ("seed", 2**64),
        ("temperature", "hot"), ("stop", 5), ("stop_token_ids", [-1]), ("logprobs", 1.5),
    ],
)  # fmt: skip
def test_what_cannot_even_be_sent_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is .* wrong type or range"):
        _call.generate_request("x", _call.sampling_params(None, {name: value}), "", "", "", "")


@pytest.mark.parametrize("prompt", [[-1], [2**32], ["a"], 5, [1.5], None])
def test_prompts_that_are_neither_text_nor_ids(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="the prompt must be text, or token ids from 0 up"):
        _call.generate_request(prompt, SamplingParams(), "", "", "", "")


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(InvalidRequest, match="must be text"):
        _call.generate_request("\ud800", SamplingParams(), "", "", "", "")
    with pytest.raises(InvalidRequest, match=r"messages must be tidemill\.Message\(role, content\)"):
        _call.chat_request([Message("user", "\ud800")], SamplingParams(), "", "", "", "")
    with pytest.raises(InvalidRequest, match="must be text"):
        _call.tokenize_request("\ud800", "")


def test_values_of_the_wrong_kind() -> None:
    not_messages: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(InvalidRequest, match="messages must be"):
        _call.chat_request(not_messages, SamplingParams(), "", "", "", "")
    number: Any = 5
    with pytest.raises(InvalidRequest, match="model, request_id and tenant must be text"):
        _call.generate_request("x", SamplingParams(), "", number, "", "")
    with pytest.raises(InvalidRequest, match="model, request_id and tenant must be text"):
        _call.chat_request([], SamplingParams(), number, "", "", "")
    with pytest.raises(InvalidRequest, match="slo a class's name or an Slo"):
        _call.generate_request("x", SamplingParams(), "", "", number, "")
    with pytest.raises(InvalidRequest, match="the two goals of an Slo must be seconds"):
        _call.generate_request("x", SamplingParams(), "", "", Slo("soon", 1.0), "")  # type: ignore[arg-type]


@given(st.integers(0, 20))
def test_pauses_grow_are_bounded_and_differ(retries: int) -> None:
    options = _call.CallOptions(None, None, None, retries, 5.0)
    pauses = list(options.pauses())
    assert len(pauses) == retries
    for index, pause in enumerate(pauses):
        full = min(_call.FIRST_PAUSE_S * 2**index, _call.MAX_PAUSE_S)
        assert 0.5 * full <= pause <= 1.5 * full


class Failure(grpc.RpcError):  # type: ignore[misc]
    """What grpcio raises, as far as the mapping looks."""

    def __init__(self, status: str, details: str, kind: str | None = None) -> None:
        self._status, self._details, self._kind = status, details, kind

    def code(self) -> grpc.StatusCode:
        return getattr(grpc.StatusCode, self._status)  # type: ignore[no-any-return]

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((KIND_METADATA_KEY, self._kind),) if self._kind else ()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.error.__name__)
def test_errors_arrive_as_what_they_left_as(row: errors.WireError) -> None:
    sent = row.error("what was wrong")
    got = _call.error_of(Failure(status_of(sent), str(sent), sent.kind))
    assert (type(got), str(got)) == (row.error, "what was wrong")


def test_errors_of_grpc_itself() -> None:
    too_large = _call.error_of(Failure("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (70 vs. 50)"))
    assert isinstance(too_large, MessageTooLarge)
    assert "70 vs. 50" in str(too_large)
    assert "router.max_message_bytes" in str(too_large)
    for status, kind in (
        ("UNAVAILABLE", "unavailable"),
        ("DEADLINE_EXCEEDED", "deadline_exceeded"),
        ("CANCELLED", "cancelled"),
        ("UNIMPLEMENTED", "invalid_request"),
        ("UNKNOWN", "internal"),
        ("DATA_LOSS", "internal"),
    ):
        assert _call.error_of(Failure(status, "said")).kind == kind


def test_only_what_may_pass_is_retried() -> None:
    retried = {row.error.kind for row in TABLE if row.error.retryable}
    assert retried == {"overloaded", "unavailable"}


def test_reading_a_health_answer() -> None:
    from grpc_health.v1 import health_pb2

    for status in health_pb2.HealthCheckResponse.ServingStatus.values():
        answer = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        assert _call.is_serving(answer) == (status == health_pb2.HealthCheckResponse.SERVING)
