"""Every metric series, declared once: name, kind, labels, unit, and what to do when it moves.

Router and workers make a `Metrics` each and serve it for Prometheus. Labels are bounded: roles, reasons, kinds and the
SLO classes of the settings; never request ids, tenants or prompts.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidemill.core.exposition import Lines, heading, lines_of


class Kind(StrEnum):
    """Prometheus type of a series."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Series:
    """Declaration of one series. `help` says what it counts, `when_it_moves` what an operator does about it."""

    name: str
    kind: Kind
    help: str
    when_it_moves: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """Of a sample's value. Names end in it, but for the words Prometheus wants last."""
        words = self.name.split("_")
        return next((unit for unit in UNITS if unit in words), "1")


UNITS = ("seconds", "bytes", "tokens", "blocks", "requests", "steps")

# Seconds; from half a millisecond (a small model's step) to the longest deadline anyone sets.
LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0,
)  # fmt: skip
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def _latency(name: str, help: str, when_it_moves: str, *labels: str) -> Series:
    return Series(f"tidemill_{name}_seconds", Kind.HISTOGRAM, help, when_it_moves, labels, LATENCY_BUCKETS)


def _counter(name: str, help: str, when_it_moves: str, *labels: str) -> Series:
    return Series(f"tidemill_{name}", Kind.COUNTER, help, when_it_moves, labels)


def _gauge(name: str, help: str, when_it_moves: str, *labels: str) -> Series:
    return Series(f"tidemill_{name}", Kind.GAUGE, help, when_it_moves, labels)


# --- router -----------------------------------------------------------------------------------------------------

TTFT = _latency(
    "time_to_first_token", "From a request's arrival to its first token leaving the router.",
    "Look at its four parts, which add up to it.", "slo_class",
)  # fmt: skip
TTFT_QUEUE = _latency(
    "ttft_queue", "Part of TTFT before the prompt's computation began: admission, placement, reservation, queues.",
    "Add prefill workers, or verify workers if reservations are refused.", "slo_class",
)  # fmt: skip
TTFT_PREFILL = _latency(
    "ttft_prefill", "Part of TTFT during which the prompt was computed.",
    "Longer prompts, fewer prefix-cache hits, or too many prompts sharing a step.", "slo_class",
)  # fmt: skip
TTFT_TRANSFER = _latency(
    "ttft_transfer", "Part of TTFT between the end of prefill and the KV being complete on the verify worker.",
    "Look at the KV links: bandwidth, or a slow peer.", "slo_class",
)  # fmt: skip
TTFT_FIRST_DECODE = _latency(
    "ttft_first_decode", "Part of TTFT from complete KV to the first token.",
    "Steps of the verify workers are long: too many sequences, or prompts prefilled there.", "slo_class",
)  # fmt: skip
TPOT = _latency(
    "time_per_output_token", "Mean time per output token after the first, one observation a request.",
    "Add verify workers; check accepted tokens per verify.", "slo_class",
)  # fmt: skip
ITL = _latency(
    "inter_token_latency", "Time between two messages with tokens of one request.",
    "A tail far above the median means prompts or preemptions between decodes.", "slo_class",
)  # fmt: skip
REQUESTS = _counter(
    "requests_total", "Requests by outcome: finish reason, or kind of error.",
    "Errors other than the clients' own: see the router's log.", "outcome",
)  # fmt: skip
SLO_REQUESTS = _counter(
    "slo_requests_total", "Requests by whether they kept their class's goal; the callers' own errors do not count.",
    "ttft_missed: add prefill workers; tpot_missed: add verify workers; failed: see outcomes.", "slo_class", "verdict",
)  # fmt: skip
OUTPUT_TOKENS = _counter(
    "output_tokens_total", "Tokens sent to clients.", "Throughput; follows the load.", "slo_class",
)  # fmt: skip
GOODPUT_TOKENS = _counter(
    "goodput_tokens_total", "Tokens of requests that kept their goal.",
    "Below the tokens sent: work was done too late; admit less or add workers.", "slo_class",
)  # fmt: skip
REQUEST_VERIFIES = _counter(
    "request_verify_steps_total", "Steps in which requests got tokens, counted when they end.",
    "Base of accepted tokens per verify.", "slo_class",
)  # fmt: skip
REQUEST_ACCEPTED = _counter(
    "request_accepted_tokens_total", "Draft tokens accepted, counted when requests end.",
    "A falling share of the steps: the draft fits this class's texts less.", "slo_class",
)  # fmt: skip
ROUTER_QUEUED = _gauge("router_queued_requests", "Requests waiting to be admitted.", "Sustained: add workers.")
ROUTER_ACTIVE = _gauge("router_active_requests", "Requests being served.", "At its limit: raise it or add workers.")
DECISIONS = _counter(
    "decisions_total", "Decisions of the router's policies by reason.",
    "A shift shows why requests went where they went.", "policy", "reason",
)  # fmt: skip
RETRIES = _counter(
    "retries_total", "Requests taken elsewhere, by the failure that caused it.",
    "Look at the workers that failed.", "failure",
)  # fmt: skip
MIGRATIONS = _counter(
    "migrations_total", "Moves of decoding requests to other verify workers, by how they ended and why they began.",
    "Refused: the others are full. Failed or timeout: look at the KV links. What did not move decodes where it was.",
    "outcome", "reason",
)  # fmt: skip
MIGRATION_PAUSE = _latency(
    "migration_pause", "Time a request that moved got no token: from its pause to its first token elsewhere.",
    "Steps of the verify workers are long, or the router is busy.",
)  # fmt: skip
CANCEL_TO_RELEASE = Series(
    "tidemill_cancel_to_release_seconds", Kind.HISTOGRAM,
    "From the router's dropping a request to the word of a worker that its blocks are free; one for each worker.",
    "A worker ends its step first: steps are long. Or the router's event loop is too busy.",
    (), (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
)  # fmt: skip

# --- worker -----------------------------------------------------------------------------------------------------

WORKER_ROLE = _gauge(
    "worker_role", "1 for the role a worker has now, 0 for the others.",
    "Often, and back again: roles flap; see the reasons of the switches.", "role",
)  # fmt: skip
STEPS = _counter("worker_steps_total", "Engine steps.", "None while requests run: the worker is stalled.", "role")
STEP_TIME = _latency("worker_step", "Duration of an engine step.", "Smaller batches or chunks shorten it.", "role")
STEP_TOKENS = Series(
    "tidemill_worker_step_tokens", Kind.HISTOGRAM, "Rows of a step's forward pass.",
    "Near max_batch_tokens: prompts queue.", ("role",), COUNT_BUCKETS,
)  # fmt: skip
WORKER_QUEUED = _gauge("worker_queued_requests", "Sequences waiting on a worker.", "Sustained: add workers.", "role")
WORKER_RUNNING = _gauge("worker_running_requests", "Sequences running on a worker.", "The worker's batch.", "role")
PREEMPTIONS = _counter(
    "worker_preemptions_total", "Sequences whose blocks were taken and whose KV is computed again.",
    "The KV pool is too small for the load.", "role",
)  # fmt: skip
KV_BLOCKS = _gauge("kv_blocks", "KV blocks of the pool.", "Constant.", "role")
KV_BLOCKS_USED = _gauge("kv_blocks_used", "KV blocks held by sequences.", "Near the pool: preemptions follow.", "role")
KV_BLOCKS_LEASED = _gauge(
    "kv_blocks_leased", "KV blocks that wait for contents from a peer.",
    "Not returning to 0 on an idle cluster: a leak.", "role",
)  # fmt: skip
LEASES = _counter("kv_leases_total", "Leases by how they ended.", "Expired ones: a prefill worker or link died.", "end")
TRANSFER_BYTES = _counter("kv_transfer_bytes_total", "KV bytes over links.", "Bandwidth in use.", "direction")
TRANSFER_TIME = _latency("kv_transfer", "Time of one KV message on a link.", "Links are slow or shared.", "direction")
MIGRATION_BYTES = _counter(
    "migration_bytes_total", "KV bytes sent to other verify workers for requests that move there.",
    "Bandwidth that moves take from hand-overs.",
)  # fmt: skip
DRAFTED = _counter("draft_tokens_total", "Draft tokens verified.", "None: drafts are late or off.")
ACCEPTED = _counter("accepted_tokens_total", "Draft tokens accepted.", "Falling share: the draft fits the load less.")
VERIFIES = _counter("verify_steps_total", "Sequences verified or decoded, one a step.", "Base of tokens per verify.")
DRAFT_ROUNDS = _counter(
    "draft_rounds_total", "Asks for drafts by result: answered in time, late, or lost with the draft worker.",
    "Late: raise speculation.wait_s or add draft workers.", "result",
)  # fmt: skip
DRAFT_TREES = _counter(
    "draft_trees_total", "Trees that came from draft workers: fresh, a branch that still fits, stale, or foreign.",
    "Stale: the draft workers are too far away or too slow for the verify step.", "fate",
)  # fmt: skip
DRAFTS_USED = _counter(
    "drafts_used_total", "Trees verified, by source, and whether they were fresh or a branch of an earlier one.",
    "Branches are round trips that nobody waited for.", "source", "fate",
)  # fmt: skip
ACCEPTED_FROM = _counter(
    "accepted_tokens_by_source_total", "Draft tokens accepted, by the source that drafted them.",
    "A source that brings nothing costs selection time; leave it out of speculation.sources.", "source",
)  # fmt: skip
OFFERED_AT_DEPTH = _counter(
    "draft_depth_offered_total", "Draft levels verified whose parent was accepted, by depth and source.",
    "Base of acceptance by depth.", "depth", "source",
)  # fmt: skip
ACCEPTED_AT_DEPTH = _counter(
    "draft_depth_accepted_total", "Of these, levels of which a token was accepted.",
    "Falling with depth: deep drafts are wasted; lower speculation.max_depth if `adaptive` is off.", "depth", "source",
)  # fmt: skip
DRAFT_LENGTH = Series(
    "tidemill_draft_accepted_length", Kind.HISTOGRAM, "Draft tokens accepted in one verification.",
    "The effective draft length of a class; a tight one should get more.", ("slo_class",), COUNT_BUCKETS,
)  # fmt: skip
NODES_CHOSEN = _counter(
    "draft_nodes_chosen_total", "Draft nodes chosen for verification: needed by a latency goal, or surplus.",
    "Mostly needed: verify workers are short of time for the goals.", "reason",
)  # fmt: skip
GOALS_OUT_OF_REACH = _counter(
    "goals_out_of_reach_total", "Steps of requests whose goal is lost, or needs more tokens than their drafts bring.",
    "Relax the goal, add verify workers, or improve the draft.", "slo_class",
)  # fmt: skip
SELECTION_TIME = _latency(
    "draft_selection", "Time to choose the nodes of one step, before they are handed to the engine.",
    "Above 1 % of a step: lower max_nodes.",
)  # fmt: skip
ERRORS = _counter("worker_errors_total", "Requests a worker gave up, by failure.", "See the worker's log.", "failure")
REPORTS = _counter("worker_reports_total", "Messages sent to routers: at most one a turn and router.", "Follows steps.")

# --- controller -------------------------------------------------------------------------------------------------

CONTROLLER_DECISIONS = _counter(
    "controller_decisions_total", "Looks at the cluster, by what the rebalancing policy decided and why.",
    "The reason says whether roles changed, and what kept them.", "reason",
)  # fmt: skip
ROLE_SWITCHES = _counter(
    "role_switches_total", "Changes of role that the controller began, by how they ended.",
    "Failed ones: see the worker's log; it went on in its old role.", "role", "result",
)  # fmt: skip
ROLE_SWITCH_TIME = _latency(
    "role_switch", "From telling a worker to its answer under the new role.",
    "Long: its requests do not drain, or a model is loaded.", "role",
)  # fmt: skip
WORKERS = _gauge("workers", "Workers that serve a role.", "Changes of role, starts and losses.", "role")
ROLE_LOAD = _gauge(
    "role_load_ratio", "A role's load to the latency goals: predicted TTFT or TPOT over the goal, or KV over its room.",
    "Near 1: the role is short of workers, and gets some if others have them to spare.", "role",
)  # fmt: skip
ATTAINMENT = _gauge(
    "slo_attainment_ratio", "Share of requests that met both goals, over the second longest window.",
    "Falling: look at the loads of the roles.", "slo_class",
)  # fmt: skip

CONTROLLER_SERIES = (CONTROLLER_DECISIONS, ROLE_SWITCHES, ROLE_SWITCH_TIME, WORKERS, ROLE_LOAD, ATTAINMENT)
ROUTER_SERIES = (
    TTFT, TTFT_QUEUE, TTFT_PREFILL, TTFT_TRANSFER, TTFT_FIRST_DECODE, TPOT, ITL, REQUESTS, SLO_REQUESTS, OUTPUT_TOKENS,
    GOODPUT_TOKENS, REQUEST_VERIFIES, REQUEST_ACCEPTED, ROUTER_QUEUED, ROUTER_ACTIVE, DECISIONS, RETRIES, MIGRATIONS,
    MIGRATION_PAUSE, CANCEL_TO_RELEASE,
)  # fmt: skip
WORKER_SERIES = (
    WORKER_ROLE, STEPS, STEP_TIME, STEP_TOKENS, WORKER_QUEUED, WORKER_RUNNING, PREEMPTIONS, KV_BLOCKS, KV_BLOCKS_USED,
    KV_BLOCKS_LEASED, LEASES, TRANSFER_BYTES, TRANSFER_TIME, MIGRATION_BYTES, DRAFTED, ACCEPTED, VERIFIES,
    DRAFT_ROUNDS, DRAFT_TREES, DRAFTS_USED, ACCEPTED_FROM, OFFERED_AT_DEPTH, ACCEPTED_AT_DEPTH, DRAFT_LENGTH,
    NODES_CHOSEN, GOALS_OUT_OF_REACH, SELECTION_TIME, ERRORS, REPORTS,
)  # fmt: skip


# When each series began is nothing anybody asks for, and would be a quarter of what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]


class PassThrough(Collector):
    """Series that a library of the same process counts, such as an engine's `vllm:*`, served beside ours."""

    def __init__(self, prefix: str, source: CollectorRegistry = REGISTRY) -> None:
        self._prefix = prefix
        self._source = source

    def collect(self) -> Iterator[Metric]:
        return (family for family in self._source.collect() if family.name.startswith(self._prefix))


class Metrics:
    """The series of one process, its CPU time, memory and files (`process_*`), and what libraries in it count."""

    def __init__(self, series: tuple[Series, ...]) -> None:
        self.registry = CollectorRegistry()  # what is declared
        self._others = CollectorRegistry()
        ProcessCollector(registry=self._others)
        self._collectors = {each.name: self._make(each) for each in series}
        # Labels are bounded, so these are too; the library's own look-up costs more than the counting.
        self._children: dict[tuple[object, ...], Counter | Gauge | Histogram] = {}
        self._lock = threading.Lock()
        self._lines: dict[str, list[Lines]] = {each.name: [] for each in series}
        self._headings = {each.name: heading(each.name, each.kind, each.help) for each in series}
        for each in series:
            if not each.labels:
                self._of(each, {})  # shown from the start, as 0

    def _make(self, series: Series) -> Counter | Gauge | Histogram:
        if series.kind is Kind.HISTOGRAM:
            return Histogram(
                series.name,
                series.help,
                series.labels,
                buckets=series.buckets or LATENCY_BUCKETS,
                registry=self.registry,
            )
        maker = Counter if series.kind is Kind.COUNTER else Gauge
        return maker(series.name, series.help, series.labels, registry=self.registry)

    def pass_through(self, prefix: str) -> None:
        """Serve a library's series of this name beside ours."""
        self._others.register(PassThrough(prefix))

    def text(self) -> str:
        """Everything as Prometheus reads it, from any thread."""
        ours = (self._headings[name] + "".join([each() for each in lines]) for name, lines in self._lines.items())
        return "".join(ours) + generate_latest(self._others).decode()

    def add(self, series: Series, amount: float = 1.0, **labels: str) -> None:
        """Count up. Raises KeyError for a series this process did not declare."""
        collector = self._of(series, labels)
        assert isinstance(collector, Counter | Gauge)
        collector.inc(amount)

    def set(self, series: Series, value: float, **labels: str) -> None:
        """Set a gauge."""
        collector = self._of(series, labels)
        assert isinstance(collector, Gauge)
        collector.set(value)

    def observe(self, series: Series, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        collector = self._of(series, labels)
        assert isinstance(collector, Histogram)
        collector.observe(value)

    def value(self, series: Series, **labels: str) -> float:
        """Current value of a counter or gauge; 0 if nothing was counted yet. A histogram's is its count."""
        suffix = "_count" if series.kind is Kind.HISTOGRAM else ""
        return self.registry.get_sample_value(series.name + suffix, labels) or 0.0

    def _of(self, series: Series, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        key = (series.name, *labels.items())
        found = self._children.get(key)
        if found is None:
            collector = self._collectors[series.name]
            found = collector.labels(**labels) if labels else collector
            with self._lock:  # two threads may come first, and a sample must not be there twice
                if key not in self._children:
                    self._lines[series.name].append(lines_of(series.name, labels.items(), found))
                    self._children[key] = found
        return found
