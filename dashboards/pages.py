"""What the dashboards show: pages of rows of panels, each panel's queries made from declared series."""

from dataclasses import dataclass
from enum import StrEnum

from dashboards import foreign
from dashboards.promql import Expr, PromQL, combine
from tidemill.core import metrics
from tidemill.core.metrics import Series
from tidemill.core.model import Role

HERE = PromQL("$__rate_interval", {"cluster": "$cluster"})
RAY = PromQL("$__rate_interval")  # Ray's agents know nothing of our clusters
ROLE_CODES = {role: code for code, role in enumerate(Role, start=1)}  # a timeline shows numbers by name


class Look(StrEnum):
    """How a panel draws its queries."""

    LINES = "lines"
    STACKED = "stacked"
    TIMELINE = "timeline"


@dataclass(frozen=True, slots=True)
class Panel:
    """Queries with their legends. `unit` is Grafana's name of it; `only_with` names what a machine may lack."""

    title: str
    queries: tuple[tuple[Expr, str], ...]
    unit: str = "short"
    look: Look = Look.LINES
    only_with: str = ""

    @property
    def description(self) -> str:
        """What the series are, and what to do when they move, as declared."""
        series = dict.fromkeys(each for expr, _ in self.queries for each in expr.series)
        return "\n\n".join(f"`{each.name}`: {each.help} When it moves: {each.when_it_moves}" for each in series)


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """One dashboard; `uid` is its address in Grafana and its file's name."""

    uid: str
    title: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def _percentiles(title: str, series: Series, *by: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)) -> Panel:
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    queries = tuple((HERE.quantile(share, series, by), f"p{share * 100:g} {legend}".strip()) for share in shares)
    return Panel(title, queries, "s")


def _rates(title: str, series: Series, *by: str, unit: str = "ops", look: Look = Look.LINES) -> Panel:
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return Panel(title, ((HERE.rate(series, by), legend),), unit, look)


def _gauges(title: str, series: Series, *by: str, unit: str = "short", look: Look = Look.LINES) -> Panel:
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return Panel(title, ((HERE.value(series, by), legend),), unit, look)


def _failures(title: str, series: Series, label: str) -> Panel:
    """What should not happen: 0 while it did not."""
    return Panel(title, ((HERE.rate(series, (label,)).or_zero(), f"{{{{{label}}}}}"),), "ops")


MET = HERE.rate(metrics.SLO_REQUESTS, ("slo_class",), verdict="met")

SLO_PAGE = Page(
    "tidemill-slo",
    "Tidemill / SLO",
    (
        Row("Goals", (
            Panel(
                "Attainment", ((MET / HERE.rate(metrics.SLO_REQUESTS, ("slo_class",)), "{{slo_class}}"),), "percentunit"
            ),
            Panel("Goodput, requests", ((MET, "{{slo_class}}"),), "reqps"),
            Panel(
                "Goodput and throughput, tokens",
                (
                    (HERE.rate(metrics.GOODPUT_TOKENS, ("slo_class",)), "{{slo_class}} in time"),
                    (HERE.rate(metrics.OUTPUT_TOKENS, ("slo_class",)), "{{slo_class}} all"),
                ),
            ),
            _rates("Requests by verdict", metrics.SLO_REQUESTS, "verdict", unit="reqps", look=Look.STACKED),
        )),
        Row("Time to first token", (
            Panel(
                "Where TTFT goes, mean",
                (
                    (HERE.mean(metrics.TTFT_QUEUE), "queue"),
                    (HERE.mean(metrics.TTFT_PREFILL), "prefill"),
                    (HERE.mean(metrics.TTFT_TRANSFER), "transfer"),
                    (HERE.mean(metrics.TTFT_FIRST_DECODE), "first decode"),
                ),
                "s",
                Look.STACKED,
            ),
            _percentiles("TTFT", metrics.TTFT, "slo_class"),
        )),
        Row("Tokens after it", (
            _percentiles("TPOT", metrics.TPOT, "slo_class"),
            _percentiles("ITL", metrics.ITL, "slo_class", shares=(0.5, 0.9, 0.99, 0.999)),
        )),
        Row("The router", (
            _rates("Requests by outcome", metrics.REQUESTS, "outcome", unit="reqps", look=Look.STACKED),
            Panel(
                "Admitted and waiting",
                ((HERE.value(metrics.ROUTER_ACTIVE, ()), "active"), (HERE.value(metrics.ROUTER_QUEUED, ()), "queued")),
            ),
            _failures("Requests taken elsewhere", metrics.RETRIES, "failure"),
        )),
    ),
)  # fmt: skip


def _role_now() -> Expr:
    """A worker's role as a number; see ROLE_CODES."""
    one_hot = {str(role): HERE.value(metrics.WORKER_ROLE, ("worker",), "max", role=role) for role in Role}
    return combine(" + ".join(f"{{{role}}} * {code}" for role, code in ROLE_CODES.items()), **one_hot)


KV_USE = HERE.value(metrics.KV_BLOCKS_USED, ("role",)) / HERE.value(metrics.KV_BLOCKS, ("role",))

POOLS_PAGE = Page(
    "tidemill-pools",
    "Tidemill / Pools and roles",
    (
        Row("Roles", (
            Panel("Role of each worker", ((_role_now(), "{{worker}}"),), look=Look.TIMELINE),
            _gauges("Workers of each role", metrics.WORKER_ROLE, "role", look=Look.STACKED),
        )),
        Row("Load", (
            _gauges("Waiting", metrics.WORKER_QUEUED, "role"),
            _gauges("Running", metrics.WORKER_RUNNING, "role"),
            Panel("KV blocks in use", ((KV_USE, "{{role}}"),), "percentunit"),
        )),
        Row("Steps", (
            _percentiles("Duration", metrics.STEP_TIME, "role", shares=(0.5, 0.99)),
            Panel("Rows of a step, mean", ((HERE.mean(metrics.STEP_TOKENS, ("role",)), "{{role}}"),)),
            _rates("Steps a second", metrics.STEPS, "worker", "role"),
            _failures("Preemptions", metrics.PREEMPTIONS, "role"),
        )),
        Row("Decisions", (_rates("By policy and reason", metrics.DECISIONS, "policy", "reason"),)),
    ),
)  # fmt: skip

KV_PAGE = Page(
    "tidemill-kv",
    "Tidemill / KV movement",
    (
        Row("Links", (
            _rates("Bytes", metrics.TRANSFER_BYTES, "direction", unit="Bps"),
            _rates("Bytes by worker", metrics.TRANSFER_BYTES, "worker", "direction", unit="Bps"),
            _percentiles("Seconds of a message", metrics.TRANSFER_TIME, "direction"),
            _percentiles("Transfer's part of TTFT", metrics.TTFT_TRANSFER, "slo_class"),
        )),
        Row("Leases", (
            _gauges("Blocks under lease", metrics.KV_BLOCKS_LEASED, "worker"),
            _rates("Leases by their end", metrics.LEASES, "end"),
        )),
        Row("Failures", (_failures("Requests given up by workers", metrics.ERRORS, "failure"),)),
    ),
)  # fmt: skip

USED = HERE.rate(metrics.DRAFTS_USED, ())
ROUNDS = HERE.rate(metrics.DRAFT_ROUNDS, ())
PER_VERIFY = HERE.rate(metrics.ACCEPTED, ("worker",)) / HERE.rate(metrics.VERIFIES, ("worker",))
PER_VERIFY_OF_CLASS = HERE.rate(metrics.REQUEST_ACCEPTED, ("slo_class",)) / HERE.rate(
    metrics.REQUEST_VERIFIES, ("slo_class",)
)

ACCEPTED_AT_DEPTH = HERE.rate(metrics.ACCEPTED_AT_DEPTH, ("depth",))
DRAFT_LENGTH = HERE.mean(metrics.DRAFT_LENGTH, ("slo_class",))
SPECULATION_PAGE = Page(
    "tidemill-speculation",
    "Tidemill / Speculation",
    (
        Row("What it yields", (
            Panel("Accepted per verify, by class", ((PER_VERIFY_OF_CLASS, "{{slo_class}}"),)),
            Panel("Accepted per verify, by worker", ((PER_VERIFY, "{{worker}}"),)),
            Panel(
                "Share of drafted tokens accepted",
                ((HERE.rate(metrics.ACCEPTED, ()) / HERE.rate(metrics.DRAFTED, ()), "accepted"),),
                "percentunit",
            ),
        )),
        Row("Where drafts come from", (
            _rates("Trees verified, by source and fate", metrics.DRAFTS_USED, "source", "fate"),
            Panel(
                "Branch-cache hits",
                (((HERE.rate(metrics.DRAFTS_USED, (), fate="branch") / USED).or_zero(), "branches"),),
                "percentunit",
            ),
            _rates("Trees that came, by fate", metrics.DRAFT_TREES, "fate"),
            _rates("Accepted, by source", metrics.ACCEPTED_FROM, "source"),
        )),
        Row("What is chosen", (
            Panel(
                "Share of levels accepted, by depth",
                ((ACCEPTED_AT_DEPTH / HERE.rate(metrics.OFFERED_AT_DEPTH, ("depth",)), "{{depth}}"),),
                "percentunit",
            ),
            Panel("Accepted draft length, by class", ((DRAFT_LENGTH, "{{slo_class}}"),)),
            _rates("Nodes verified, by reason", metrics.NODES_CHOSEN, "reason"),
            _failures("Steps of requests whose goal is out of reach", metrics.GOALS_OUT_OF_REACH, "slo_class"),
            Panel(
                "Share of step time spent choosing",
                ((HERE.spent(metrics.SELECTION_TIME) / HERE.spent(metrics.STEP_TIME, role="verify"), "choosing"),),
                "percentunit",
            ),
        )),
        Row("Draft workers", (
            _rates("Rounds by result", metrics.DRAFT_ROUNDS, "result"),
            Panel(
                "Late drafts",
                (((HERE.rate(metrics.DRAFT_ROUNDS, (), result="late") / ROUNDS).or_zero(), "late"),),
                "percentunit",
            ),
        )),
    ),
)  # fmt: skip

FLEET_PAGE = Page(
    "tidemill-fleet",
    "Tidemill / Fleet",
    (
        Row("Processes", (
            _gauges("Targets that answer", foreign.UP, "component"),
            Panel("CPU", ((HERE.rate(foreign.PROCESS_CPU, ("worker",)), "{{worker}}"),)),
            _gauges("Memory", foreign.PROCESS_MEMORY, "worker", unit="bytes"),
            _gauges("Open files", foreign.PROCESS_FILES, "worker"),
            _rates("Messages to routers", metrics.REPORTS, "worker"),
        )),
        Row("Nodes", (
            Panel("CPU", ((RAY.value(foreign.RAY_CPU, ("ip",), "avg"), "{{ip}}"),), "percent"),
            Panel("Memory", ((RAY.value(foreign.RAY_MEMORY, ("ip",)), "{{ip}}"),), "bytes"),
            Panel("Network, sent", ((RAY.value(foreign.RAY_NETWORK, ("ip",)), "{{ip}}"),), "Bps"),
            Panel(
                "GPU",
                ((RAY.value(foreign.RAY_GPU, ("ip", "GpuIndex"), "avg"), "{{ip}} {{GpuIndex}}"),),
                "percent",
                only_with="a GPU",
            ),
            Panel(
                "GPU memory",
                ((RAY.value(foreign.RAY_GPU_MEMORY, ("ip", "GpuIndex")), "{{ip}} {{GpuIndex}}"),),
                "decmbytes",
                only_with="a GPU",
            ),
        )),
    ),
)  # fmt: skip

PAGES = (SLO_PAGE, POOLS_PAGE, KV_PAGE, SPECULATION_PAGE, FLEET_PAGE)
