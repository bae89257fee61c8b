"""The demonstration: a cluster for a minute, a dozen prompts through the client library, and where their time went."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster import launch
from cluster.launch import LaunchError, Say
from tidemill import AsyncClient, Summary
from tidemill.core.settings import Settings

PROMPTS = "prompts.jsonl"  # beside the target's folder
CONCURRENT = 4
TAIL = 90  # characters of an answer shown while it comes


@dataclass(slots=True)
class Exchange:
    """A prompt, its answer so far, and its summary once finished."""

    number: int
    prompt: str
    temperature: float
    text: str = ""
    summary: Summary | None = field(default=None)

    @property
    def kind(self) -> str:
        return "greedy" if self.temperature == 0 else f"T={self.temperature:g}"


def run_demo(settings: Settings, requests: int, max_tokens: int, console: Console, say: Say) -> None:
    """Raises LaunchError. Whatever happens, the cluster it brought up is down afterwards."""
    prompts = _read_prompts(settings.target.path.parent / PROMPTS)
    ours = settings.model_copy(
        update={"name": f"{settings.name}-demo", "router": settings.router.model_copy(update={"port": 0})}
    )
    state = launch.up(ours, say)
    try:
        exchanges = [Exchange(i + 1, prompts[i % len(prompts)], 0.8 if i % 3 == 2 else 0.0) for i in range(requests)]
        asyncio.run(_send_all(state.router_address, exchanges, max_tokens, console))
        console.print(_answer_shown(exchanges[0]))
        console.print(_table(exchanges))
    finally:
        say("taking everything down")
        launch.down(state, say)


def _read_prompts(path: Path) -> list[str]:
    try:
        return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise LaunchError(f"{path}: the demonstration's prompts cannot be read: {error.strerror}") from error


async def _send_all(address: str, exchanges: list[Exchange], max_tokens: int, console: Console) -> None:
    """Several at once; what has come so far is shown as it grows."""
    gate = asyncio.Semaphore(CONCURRENT)
    with Live(console=console, refresh_per_second=12, get_renderable=lambda: _progress(exchanges)) as live:
        async with AsyncClient(address) as client:

            async def send(exchange: Exchange) -> None:
                async with gate:
                    options = {"max_tokens": max_tokens, "temperature": exchange.temperature, "seed": exchange.number}
                    async for chunk in client.stream(exchange.prompt, **options):  # type: ignore[arg-type]
                        exchange.text += chunk.text
                        exchange.summary = chunk.summary or exchange.summary

            await asyncio.gather(*(send(exchange) for exchange in exchanges))
            live.refresh()


def _progress(exchanges: list[Exchange]) -> Group:
    lines = []
    for each in exchanges:
        mark = "✓" if each.summary else "…" if each.text else " "
        tail = " ".join(each.text.split())[-TAIL:]
        lines.append(Text(f"{mark} {each.number:2d} {each.kind:6} {tail}", no_wrap=True, overflow="crop"))
    return Group(*lines)


def _answer_shown(exchange: Exchange) -> Group:
    prompt = exchange.prompt.rstrip("\n").splitlines()[-6:]
    return Group(
        Text(f"\nthe end of prompt {exchange.number}, and what the model made of it:", style="dim"),
        Text("\n".join(prompt) + "\n", style="dim", end=""),
        Text(exchange.text.strip("\n"), style="green"),
        Text(""),
    )


def _table(exchanges: list[Exchange]) -> Table:
    """Fits a terminal of 80 columns."""
    table = Table(
        title="where the time went (milliseconds)",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold underline",
    )
    for name in ("#", "mode", "in", "out", "queue", "prefill", "transf", "decode", "= TTFT", "TPOT", "acc", "workers"):
        table.add_column(name, justify="left" if name in ("mode", "workers") else "right", no_wrap=True)
    for each in exchanges:
        assert each.summary is not None
        timing, route = each.summary.timing, each.summary.route
        parts = (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.first_decode_s, timing.ttft_s)
        workers = (route.prefill_worker, route.draft_worker, route.verify_worker)
        table.add_row(
            str(each.number),
            each.kind,
            str(each.summary.prompt_tokens),
            str(each.summary.output_tokens),
            *(f"{seconds * 1e3:.1f}" for seconds in parts),
            f"{timing.tpot_s * 1e3:.2f}",
            f"{each.summary.speculation.accepted_per_verify:.2f}",
            " ".join(_short(worker) for worker in workers),
        )
    table.caption = (
        "\nqueue + prefill + transfer + first decode = TTFT; acc: draft tokens accepted a step\n"
        "workers: p prefill (- in place), d draft (- none), v verify"
    )
    table.caption_justify = "left"
    return table


def _short(worker: str) -> str:
    """verify-0@1795218335990 -> v0"""
    name, _, number = worker.partition("@")[0].partition("-")
    return name[:1] + number if worker else "-"
