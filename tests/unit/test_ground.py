"""The ground floor: lifecycles, settings, wire forms, errors, metrics, text."""

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, Gauge
from tokenizers import Tokenizer

import tidemill
from tidemill import errors
from tidemill.core import lifecycle, messages, wire
from tidemill.core.metrics import ROUTER_SERIES, TTFT, WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Request, Role, SloClass, WorkerId, WorkerLoad
from tidemill.core.settings import SettingsError
from tidemill.core.settings_file import load_settings
from tidemill.core.text import TextStream, TokenizerError, load_tokenizer
from tidemill.core.tree import Shape, TokenTree
from tidemill.types import FinishReason, SamplingParams, TokenLogprobs

TABLES = [
    (lifecycle.RequestState, lifecycle.REQUEST_MOVES),
    (lifecycle.LeaseState, lifecycle.LEASE_MOVES),
    (lifecycle.MoveState, lifecycle.MOVE_MOVES),
    (lifecycle.WorkerState, lifecycle.WORKER_MOVES),
]


@pytest.mark.parametrize(("states", "moves"), TABLES)
def test_every_move_outside_the_table_raises_and_changes_nothing(
    states: type[StrEnum], moves: Mapping[StrEnum, frozenset[StrEnum]]
) -> None:
    assert set(moves) == set(states)
    for start in states:
        for to in states:
            thing = lifecycle.Lifecycle(start, moves)
            if to in moves[start]:
                thing.move(to)
                assert thing.state is to
            else:
                with pytest.raises(lifecycle.IllegalMove):
                    thing.move(to)
                assert thing.state is start
            assert thing.ended is not moves[thing.state]


class TestSettings:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "settings.yaml"
        path.write_text(text)
        return path

    def test_the_shipped_file_loads_and_paths_are_absolute(self) -> None:
        settings = load_settings(Path("deploy/local.yaml"))
        assert settings.target.path.is_absolute()
        assert settings.target.path.name == "target"
        assert settings.pools.verify == 2

    def test_the_shipped_emulated_cluster(self, tmp_path: Path) -> None:
        settings = load_settings(Path("deploy/emulated.yaml"))
        assert (settings.engine.kind, settings.emulated.target.model) == ("emulated", "opt-13b")
        text = "target: {path: m}\npools: {draft: 0}\nemulated: {target: {model: fitted, measured: steps.csv}}"
        assert load_settings(self.write(tmp_path, text)).emulated.target.measured == tmp_path / "steps.csv"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("target: {path: m}\nporls: {}", "porls: unknown key"),
            ("target: {path: m}\npools: {verify: many}", "pools.verify: Input should be a valid integer"),
            ("target: {path: m}\npools: {verify: 0}", "pools.verify: Input should be greater than 0"),
            ("pools: {draft: 0}", "target: Field required"),
            ("target: {path: m}", "needs a `draft` model"),
            ("target: {path: m}\npools: {draft: 0}\nrouter: {host: 0.0.0.0}", "is not loopback"),
            ("target: {path: m}\npools: {draft: 0}\nstatus_page: {host: '::'}", "status_page.host '::' is not"),
            ("target: {path: m}\npools: {draft: 0}\ntraces: {endpoint: 'otel:4317'}", "traces.endpoint"),
            ("target: {path: m}\npools: {draft: 0}\nengine: {dtype: int4}", "engine.dtype"),
            ("- a list", "expected a mapping"),
            ("a: [", "is not YAML"),
        ],
    )
    def test_faults_say_where_and_what(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(SettingsError, match=".*") as caught:
            load_settings(self.write(tmp_path, text))
        assert said in str(caught.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read: No such file"):
            load_settings(tmp_path / "nowhere.yaml")


def test_every_error_has_one_row_and_survives_the_wire() -> None:
    kinds = [row.error.kind for row in errors.TABLE]
    assert len(set(kinds)) == len(kinds)
    for row in errors.TABLE:
        back = errors.error_from_wire(row.status, "why", row.error.kind)
        assert type(back) is row.error
        assert str(back) == "why"
    public = {getattr(tidemill, name) for name in tidemill.__all__}
    assert {row.error for row in errors.TABLE} <= public


tokens = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
names = st.text(max_size=12)
peers = st.builds(Peer, st.builds(WorkerId, names, st.integers(0, 2**60)), names)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 2**31),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    stop=st.lists(names, max_size=3).map(tuple),
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
slos = st.builds(SloClass, names, st.floats(0, 99), st.floats(0, 99))
requests = st.builds(Request, names, tokens, sampling, tokens, slos, names)
leases = st.builds(
    messages.Lease, st.integers(0, 2**60), names, peers, st.integers(0, 99), st.integers(0, 99), st.floats(0, 99)
)
half = st.floats(-50, 0, width=32)
logprobs = st.lists(
    st.builds(
        TokenLogprobs, st.integers(0, 999), half, st.lists(st.tuples(st.integers(0, 999), half), max_size=3).map(tuple)
    ),
    max_size=3,
).map(tuple)
events = st.one_of(
    st.builds(messages.LeaseGranted, names, leases),
    st.builds(messages.Refused, names, st.sampled_from(messages.Refusal)),
    st.builds(messages.Prefilled, names, st.floats(0, 9), st.floats(0, 9)),
    st.builds(messages.Failed, names, st.sampled_from(messages.Failure), names),
    st.builds(messages.Released, names),
    st.builds(messages.Paused, names, st.integers(0, 2**60)),
    st.builds(messages.Staying, names, st.integers(0, 2**60), st.sampled_from(messages.Stay)),
    st.builds(
        messages.Tokens,
        names,
        tokens,
        logprobs,
        st.integers(0, 9),
        st.integers(0, 9),
        st.none() | st.sampled_from(FinishReason),
        st.none() | st.builds(messages.FirstToken, st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)),
    ),
)
loads = st.builds(WorkerLoad, *[st.integers(0, 9)] * 8, st.floats(0, 9))
commands = st.one_of(
    st.builds(messages.Reserve, requests, st.floats(0, 9), st.none() | peers, st.integers(0, 999)),
    st.builds(messages.Submit, requests, st.none() | peers),
    st.builds(messages.Prefill, requests, leases),
    st.builds(messages.Cancel, names),
    st.builds(messages.Migrate, names, leases, st.integers(0, 2**31)),
    st.builds(messages.Resume, names),
)


@given(commands)
def test_commands_survive_the_wire(command: messages.Command) -> None:
    assert wire.command_from_pb(wire.command_to_pb(command)) == command


@given(
    st.builds(
        messages.StepReport,
        st.builds(WorkerId, names, st.integers(0, 2**60)),
        st.sampled_from(Role),
        st.booleans(),
        st.integers(0, 2**60),
        loads,
        st.lists(events, max_size=4).map(tuple),
    )
)
def test_reports_survive_the_wire(report: messages.StepReport) -> None:
    assert wire.report_from_pb(wire.report_to_pb(report)) == report


shapes = st.builds(Shape, *[st.integers(0, 99)] * 3)
trees = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 99), st.floats(0, 1, width=32)), max_size=9).map(
    lambda nodes: TokenTree(
        tuple(token for token, _, _ in nodes),
        tuple(parent % (index + 1) - 1 for index, (_, parent, _) in enumerate(nodes)),
        tuple(chance for _, _, chance in nodes),
    )
)


@given(
    st.builds(
        messages.DraftCall,
        st.integers(0, 2**60),
        st.lists(st.builds(messages.DraftOpen, requests), max_size=3).map(tuple),
        st.lists(
            st.builds(messages.DraftAsk, names, st.integers(0, 999), tokens, shapes, st.integers(0, 9)), max_size=3
        ).map(tuple),
        st.lists(names, max_size=3).map(tuple),
    )
)
def test_draft_calls_survive_the_wire(call: messages.DraftCall) -> None:
    assert wire.draft_call_from_pb(wire.draft_call_to_pb(call)) == call


@given(
    st.builds(
        messages.DraftReply,
        st.integers(0, 2**60),
        st.lists(st.builds(messages.Draft, names, st.integers(0, 999), trees, st.integers(0, 2**61)), max_size=3).map(
            tuple
        ),
        st.lists(names, max_size=3).map(tuple),
    )
)
def test_draft_replies_survive_the_wire(reply: messages.DraftReply) -> None:
    assert wire.draft_reply_from_pb(wire.draft_reply_to_pb(reply)) == reply


def test_a_tree_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="a parent comes before its child"):
        wire.draft_reply_from_pb(wire.pb.DraftReply(drafts=[wire.pb.Draft(tokens=[1], parents=[0])]))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="different releases"):
        wire.command_from_pb(wire.pb.Command())
    with pytest.raises(ValueError, match="different releases"):
        wire.event_from_pb(wire.pb.Event())


def test_metric_names_are_unique_documented_and_countable() -> None:
    series = [*ROUTER_SERIES, *WORKER_SERIES]
    assert len({each.name for each in series}) == len(series)
    assert all(each.help and each.when_it_moves for each in series)
    assert all(each.name.startswith("tidemill_") for each in series)
    metrics = Metrics(ROUTER_SERIES)
    metrics.observe(TTFT, 0.1, slo_class="default")
    assert metrics.value(TTFT, slo_class="default") == 1


class TestText:
    @pytest.fixture
    def tokenizer(self, models: Path) -> Tokenizer:
        return load_tokenizer(models / "target")

    @pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "naïve — 漢字 🙂 ok", "a\t\tb  c"])
    @pytest.mark.parametrize("piece", [1, 3, 100])
    def test_pieces_add_up_to_the_text(self, tokenizer: Tokenizer, text: str, piece: int) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        stream = TextStream(tokenizer)
        found = "".join(stream.push(ids[i : i + piece]) for i in range(0, len(ids), piece)) + stream.finish()
        assert found == text

    def test_a_stop_string_cuts_even_when_split_over_tokens(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("return x + 1\nclass B:\n", add_special_tokens=False).ids
        stream = TextStream(tokenizer, ["\nclass B"])
        pieces = [stream.push((token,)) for token in ids]
        assert stream.stopped
        assert "".join(pieces) + stream.finish() == "return x + 1"

    def test_what_only_looked_like_a_stop_comes_in_the_end(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("ab\nclas", add_special_tokens=False).ids
        stream = TextStream(tokenizer, ["\nclass"])
        early = stream.push(ids)
        assert early == "ab"
        assert early + stream.finish() == "ab\nclas"

    @pytest.mark.parametrize("stop", [(), ("\nclass B",), ("x + 2", "def"), ("1\nclass C",)])
    def test_a_second_stream_goes_on_after_the_tokens_of_a_first(
        self, tokenizer: Tokenizer, stop: tuple[str, ...]
    ) -> None:
        ids = tokenizer.encode("return x + 1 \u2192 \U0001f30a\nclass A:\n", add_special_tokens=False).ids
        for cut in range(len(ids)):
            whole, other = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
            for token in ids[:cut]:
                whole.push((token,))
            other.push(ids[:cut])
            rest = [whole.push((token,)) for token in ids[cut:]] + [whole.finish()]
            assert [other.push((token,)) for token in ids[cut:]] + [other.finish()] == rest

    def test_broken_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(TokenizerError, match="no such file"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match="not a tokenizer"):
            load_tokenizer(tmp_path)


def test_public_types_are_frozen() -> None:
    for name in tidemill.__all__:
        each = getattr(tidemill, name)
        if dataclasses.is_dataclass(each):
            assert each.__dataclass_params__.frozen, name  # type: ignore[attr-defined]


def test_series_of_a_library_pass_through_by_name() -> None:
    ours, other = Gauge("vllm:depth", "of a queue"), Gauge("foreign_depth", "of another")
    metrics = Metrics(WORKER_SERIES)
    metrics.pass_through("vllm:")
    try:
        ours.set(3)
        other.set(4)
        assert "\nvllm:depth 3.0\n" in metrics.text()
        assert "foreign_depth" not in metrics.text()
    finally:
        REGISTRY.unregister(ours)
        REGISTRY.unregister(other)
