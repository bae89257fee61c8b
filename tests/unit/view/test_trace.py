"""A request's life: kept by the router, bounded, and drawn."""

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.view.trace import WIDTH, draw_list, draw_trace, placed
from router.journey import MAX_STAGES, Journey
from router.traces import KEPT_TRACES, Traces
from tidemill.core.messages import FirstToken, Prefilled, Tokens
from tidemill.core.model import Request, WorkerId
from tidemill.core.trace import Stage, Trace
from tidemill.types import FinishReason, SamplingParams

PREFILL, VERIFY, OTHER = WorkerId("prefill-0", 1), WorkerId("verify-0", 1), WorkerId("verify-1", 1)


def journey(name: str = "r") -> Journey:
    return Journey(Request(name, (1, 2, 3), SamplingParams()), 10.0, 100.0)


def tokens(*ids: int, finish: FinishReason | None = None, first: FirstToken | None = None) -> Tokens:
    return Tokens("r#1", ids, finish=finish, first=first, drafted=2, accepted=1)


def resumed() -> Trace:
    """Prefilled elsewhere; its verify worker fails after two tokens, another goes on."""
    ours = journey()
    ours.enter(Stage.RESERVE, 11.0, VERIFY)
    ours.prefill_worker = str(PREFILL)
    ours.enter(Stage.PREFILL, 11.5, PREFILL)
    ours.prefilled(Prefilled("r#1", 2, 0.5), 12.5)
    ours.enter(Stage.FIRST, 12.5, VERIFY)
    ours.enter(Stage.DECODE, 13.0, VERIFY)
    ours.took(tokens(5, first=FirstToken(0.0, 0.0, 0.25)), 13.0)
    ours.took(tokens(6), 14.0)
    ours.failures = 1
    ours.enter(Stage.QUEUE, 15.0, note=f"{VERIFY} failed: timeout")
    ours.enter(Stage.FIRST, 15.25, OTHER, "prefilled in place")
    ours.enter(Stage.DECODE, 17.0, OTHER)
    ours.took(tokens(7, 8, finish=FinishReason.LENGTH), 20.0)
    return ours.trace("length", 20.5, 1e9)


def test_spans_follow_each_other_from_arrival_to_the_last_token() -> None:
    trace = resumed()
    assert trace.spans[0].start_s == 0.0
    assert all(before.end_s == after.start_s for before, after in zip(trace.spans, trace.spans[1:], strict=False))
    assert trace.spans[-1].end_s == trace.timing.total_s == 10.0
    assert [each.stage for each in trace.spans].count(Stage.DECODE) == 2
    assert sum(trace.by_stage.values()) == 10.0
    assert trace.by_stage[Stage.DECODE] == 5.0
    assert trace.timing.prefill_s == 0.5
    assert (trace.output_tokens, trace.drafted, trace.accepted) == (4, 6, 3)


def test_one_that_failed_ends_when_it_was_given_up() -> None:
    trace = journey().trace("overloaded", 12.0, 1e9)
    assert [(each.stage, each.seconds) for each in trace.spans] == [(Stage.QUEUE, 2.0)]
    assert trace.timing.total_s == 2.0


def test_the_stages_kept_of_one_request_are_bounded() -> None:
    ours = journey()
    for index in range(10 * MAX_STAGES):
        ours.enter(Stage.RESERVE, 10.0 + index, VERIFY)
    trace = ours.trace("overloaded", 10_000.0, 1e9)
    assert len(trace.spans) == MAX_STAGES
    assert trace.spans[-1].end_s == trace.timing.total_s


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 8))
def test_the_latest_traces_are_kept_and_no_more(ids: list[int], kept: int) -> None:
    store = Traces(kept)
    for index, each in enumerate(ids):
        store.ended(journey(f"r{each}"), "length", 10.0 + index, float(index))
    newest = list(dict.fromkeys(f"r{each}" for each in reversed(ids)))
    assert [each.request_id for each in store.latest()] == newest[:kept]
    for name in newest[:kept]:
        found = store.find(name)
        assert found is not None
        assert found.at == max(index for index, each in enumerate(ids) if f"r{each}" == name)
    assert all(store.find(name) is None for name in newest[kept:])


def test_the_router_keeps_256() -> None:
    store = Traces()
    for index in range(1000):
        store.ended(journey(f"r{index}"), "length", 11.0, 0.0)
    assert len(store.latest()) == KEPT_TRACES == 256


def test_the_timeline_says_where_the_time_went() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(draw_trace(resumed()))
    console.print(draw_list([resumed()]))
    text = console.export_text()
    assert "verify-0@1 failed: timeout" in text
    assert "decode 5000ms (50 %)" in text
    assert "3 of 6 drafted tokens accepted in 3 steps" in text
    assert "TTFT 3000ms: queue 2000ms, prefill 500ms, transfer 250ms, first decode 250ms" in text
    assert max(map(len, text.split("\n"))) <= 100


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_no_span_is_invisible_or_leaves_the_line(start: float, length: float, rest: float) -> None:
    first, end = placed(start, start + length, start + length + rest, WIDTH)
    assert 0 <= first < end <= WIDTH
