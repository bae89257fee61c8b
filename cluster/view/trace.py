"""One request's life as a timeline in a terminal."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.view.picture import millis
from tidemill.core.trace import Stage, Trace

WIDTH = 32  # of the timeline, characters
STYLES = {
    Stage.QUEUE: "bright_black",
    Stage.RESERVE: "blue",
    Stage.PREFILL: "yellow",
    Stage.FIRST: "magenta",
    Stage.DECODE: "cyan",
}


def draw_trace(trace: Trace) -> RenderableType:
    """What became of it, its timeline, and the parts of TTFT."""
    return Group(_heading(trace), Text(), _timeline(trace), Text(), *_sums(trace))


def draw_list(traces: Sequence[Trace]) -> RenderableType:
    table = Table("request", "ended", "outcome", "class", "tokens", "TTFT", "TPOT", "total", box=None, pad_edge=False)
    for each in traces:
        when = datetime.fromtimestamp(each.at).strftime("%H:%M:%S")
        ttft_s = each.timing.ttft_s if each.output_tokens else None
        table.add_row(
            *(each.request_id, when, each.outcome, each.slo_class, f"{each.prompt_tokens}+{each.output_tokens}"),
            *(millis(ttft_s), millis(each.timing.tpot_s), millis(each.timing.total_s)),
        )
    return table


def placed(start: float, end: float, total: float, width: int) -> tuple[int, int]:
    """First and end character of a span on a line of `width`; at least one, so that no span is invisible."""
    if total <= 0:
        return 0, 1
    first = min(int(start / total * width), width - 1)
    return first, min(max(round(end / total * width), first + 1), width)


def _heading(trace: Trace) -> Text:
    verdict = "" if not trace.output_tokens else f", goals {millis(trace.ttft_goal_s)} and {millis(trace.tpot_goal_s)}"
    return Text.assemble(
        (trace.request_id, "bold"),
        f"  {trace.outcome}  class {trace.slo_class}{verdict}\n",
        f"{trace.prompt_tokens} prompt tokens, {trace.output_tokens} output tokens; "
        f"{trace.failures} failed workers; split {trace.split_reason or 'undecided'}",
    )


def _timeline(trace: Trace) -> Table:
    total = trace.timing.total_s
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for heading in ("at", "stage", "took", "", "where"):
        table.add_column(heading, justify="right" if heading in ("at", "took") else "left", no_wrap=heading != "where")
    for span in trace.spans:
        first, end = placed(span.start_s, span.end_s, total, WIDTH)
        line = Text("╌" * first, style="dim") + Text("█" * (end - first), style=STYLES[span.stage])
        line += Text("╌" * (WIDTH - end), style="dim")
        where = span.worker.partition("@")[0]
        note = f"{where} ({span.note})" if where and span.note else where or span.note
        table.add_row(millis(span.start_s), span.stage, millis(span.seconds), line, note)
    return table


def _sums(trace: Trace) -> list[Text]:
    total, timing = trace.timing.total_s or 1.0, trace.timing
    stages = ", ".join(
        f"{stage} {millis(seconds)} ({100 * seconds / total:.0f} %)" for stage, seconds in trace.by_stage.items()
    )
    lines = [Text(f"{millis(timing.total_s)} in all: {stages}")]
    if trace.output_tokens:
        lines.append(
            Text(
                f"TTFT {millis(timing.ttft_s)}: queue {millis(timing.queue_s)}, prefill {millis(timing.prefill_s)}, "
                f"transfer {millis(timing.transfer_s)}, first decode {millis(timing.first_decode_s)}; "
                f"TPOT {millis(timing.tpot_s)}"
            )
        )
    if trace.drafted:
        lines.append(
            Text(
                f"{trace.accepted} of {trace.drafted} drafted tokens accepted in {trace.verify_steps} steps; "
                f"drafts of {trace.draft_worker.partition('@')[0] or 'its verify worker'}"
            )
        )
    return lines
