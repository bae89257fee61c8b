"""The `tidemill` command."""

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.bench.command import bench
from tidemill import Client, Message, TidemillError
from tidemill.core.model import Role
from tidemill.core.settings import SettingsError
from tidemill.core.settings_file import load_settings

app = typer.Typer(
    help="Serve large language models from pools of prefill, draft and verify workers on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Settings file (YAML).")]
NameOption = Annotated[str, typer.Option("--name", help="Cluster, as named in its settings.")]
AddressOption = Annotated[str, typer.Option(help="Router, host:port; several with commas.")]
SHOWN_DECISIONS, SHOWN_TRACES = 5, 20
DEFAULT_NAME, DEFAULT_ADDRESS = "local", "127.0.0.1:7071"


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """Errors users can mend leave as one sentence and exit code 1; anything else is a defect and shows its trace."""
    from cluster.head import HeadError  # noqa: PLC0415 - Ray takes a second to import, and `generate` needs none
    from cluster.launch import LaunchError  # noqa: PLC0415

    try:
        yield
    except (SettingsError, LaunchError, HeadError) as error:
        err.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(130) from None


def _say(line: str) -> None:
    err.print(f"[dim]· {line}[/]", highlight=False)


@app.command()
def up(
    config: ConfigOption = Path("deploy/local.yaml"),
    if_down: Annotated[bool, typer.Option("--if-down", help="Leave it as it is if it is up already.")] = False,
) -> None:
    """Bring a cluster up and leave it running."""
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415

        state = launch.up(load_settings(config), _say, if_down=if_down)
    several = "," in state.router_address
    listen = "routers listen" if several else "router listens"
    out.print(f"[green]up[/]: the {listen} at [bold]{state.router_address}[/]")
    out.print('try: tidemill generate "def fib(n):" --max-tokens 64', highlight=False)


def _state(name: str) -> Any:
    from cluster.launch import LaunchError  # noqa: PLC0415
    from cluster.state import read_state  # noqa: PLC0415

    state = read_state(name)
    if state is None:
        raise LaunchError(f"no cluster {name!r} is up; start one with `tidemill up -c deploy/local.yaml`")
    return state


@app.command()
def down(name: NameOption = DEFAULT_NAME) -> None:
    """End a cluster and everything it started."""
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415

        launch.down(_state(name), _say)


@app.command()
def status(
    name: NameOption = DEFAULT_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show the router and the workers."""
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415

        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it hears of nodes; scripts read JSON here
            described = launch.status(_state(name))
    if as_json:
        out.print_json(json.dumps(described))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("worker", "role", "state", "run", "queue", "KV blocks", "steps", "pid", "metrics"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("run", "queue", "steps") else "left")
    for each in described["workers"]:
        leased = f"+{each['kv_blocks_leased']}" if each["kv_blocks_leased"] else ""
        blocks = f"{each['kv_blocks_used']}{leased}/{each['kv_blocks_total']}"
        load = [each["running"], each["queued"], blocks, each["steps"]]
        shown = load if each["state"] != "unreachable" else ["-"] * len(load)  # nobody knows
        cells = [each["worker"].partition("@")[0], each["role"], each["state"], *shown]
        table.add_row(*(str(cell) for cell in [*cells, each["pid"], each["metrics_address"]]))
    for each in described["routers"]:
        out.print(
            f"{each['router']} {each['address']}  model {described['model']}  active {each['active']}  "
            f"queued {each['queued']}  metrics {each['metrics_address']}  pid {each['pid']}",
            highlight=False,
        )
    out.print(table)
    if described["controller"] is not None:
        _print_controller(described["controller"])
    for silent, cause in described["silent"].items():
        out.print(f"[red]{silent} does not answer[/]: {escape(cause)}", highlight=False)
    for each in described["routers"]:
        if each["page_address"]:
            out.print(f"status page {each['page_address']}", highlight=False)
    if described["logs"]:
        out.print(f"logs: {described['logs']}", highlight=False)


def _print_controller(controller: dict[str, Any]) -> None:
    mode = "rebalances" if controller["rebalance"] else "leaves roles as they are"
    out.print(f"controller {mode}  metrics {controller['metrics_address']}", highlight=False)
    for each in [decision for decision in controller["decisions"] if decision["changes"]][:SHOWN_DECISIONS]:
        when = datetime.fromtimestamp(each["at"]).strftime("%H:%M:%S")
        out.print(f"  {when} {each['reason']}: {', '.join(each['changes'])}", highlight=False)


@app.command()
def top(
    name: NameOption = DEFAULT_NAME,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: for scripts.")] = False,
) -> None:
    """Watch pools, roles, goals and decisions live; q ends it."""
    if as_json and not once:
        raise typer.BadParameter("--json needs --once")
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415
        from cluster.telemetry import outlook  # noqa: PLC0415
        from cluster.view.picture import draw_picture  # noqa: PLC0415
        from cluster.view.top import live  # noqa: PLC0415

        def look() -> Any:
            return outlook(list(ask("outlook").values())).picture(time.time())

        if not once:
            with launch.asking_routers(_state(name)) as ask:
                live(out, look)
            return
        with contextlib.redirect_stdout(sys.stderr), launch.asking_routers(_state(name)) as ask:
            picture = look()
    if as_json:
        out.print_json(json.dumps(asdict(picture)))
    else:
        out.print(draw_picture(picture))


@app.command()
def trace(
    request: Annotated[str | None, typer.Argument(help="Its id, as its summary says; none: list the latest.")] = None,
    name: NameOption = DEFAULT_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show where the time of one of the latest requests went."""
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415
        from cluster.view.trace import draw_list, draw_trace  # noqa: PLC0415

        with contextlib.redirect_stdout(sys.stderr), launch.asking_routers(_state(name)) as ask:
            if request:
                found = next((each for each in ask("trace", request).values() if each is not None), None)
            else:
                latest = chain.from_iterable(ask("latest_traces").values())
                found = sorted(latest, key=lambda each: -each.at)[:SHOWN_TRACES]
        if found is None:
            raise launch.LaunchError(
                f"the router does not remember a request {request!r}; it keeps the latest that ended, "
                "see `tidemill trace`"
            )
    if as_json:
        out.print_json(json.dumps(asdict(found) if request else [asdict(each) for each in found]))
    else:
        out.print(draw_trace(found) if request else draw_list(found))


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="Worker's name, such as verify-0.")],
    to: Annotated[Role, typer.Argument(help="Its new role.")],
    name: NameOption = DEFAULT_NAME,
) -> None:
    """Change a worker's role; requests it holds go on elsewhere."""
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415

        out.print(f"{launch.change_role(_state(name), worker, to)} is a {to} worker now", highlight=False)


@app.command()
def scale(
    wanted: Annotated[list[str], typer.Argument(help="ROLE=COUNT, such as verify=3; roles not named stay.")],
    name: NameOption = DEFAULT_NAME,
) -> None:
    """Have more or fewer workers. Who has to go finishes what it has first, and the least busy go.

    With `controller.rebalance` on, roles may change again afterwards; the number of workers stays.
    """
    with _told_plainly():
        from cluster import launch  # noqa: PLC0415

        launch.scale(_state(name), dict(_role_count(each) for each in wanted), _say)


def _role_count(text: str) -> tuple[Role, int]:
    role, _, count = text.partition("=")
    if role not in set(Role) or not count.isdecimal():
        raise typer.BadParameter(f"{text!r} is not ROLE=COUNT; roles are {', '.join(Role)}")
    return Role(role), int(count)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads it from standard input.")],
    address: AddressOption = DEFAULT_ADDRESS,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option(help="Lay the prompt out with the model's chat template.")] = False,
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="PEM file of the authority that signed the router's certificate.")
    ] = None,
    stats: Annotated[bool, typer.Option(help="Say afterwards where the time went.")] = False,
) -> None:
    """Send one prompt and print the answer as it comes."""
    from tidemill import Tls  # noqa: PLC0415

    text = sys.stdin.read() if prompt == "-" else prompt
    token = token_file.read_text(encoding="utf-8").strip() if token_file else None
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed,
        "stop": tuple(stop or ()),
    }  # fmt: skip
    try:
        with Client(address, token=token, tls=Tls(ca) if ca else None) as client:
            chunks = client.stream_chat([Message("user", text)], **options) if chat else client.stream(text, **options)
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
                if chunk.summary is not None and stats:
                    _print_stats(chunk.summary)
        print()
    except TidemillError as error:
        hint = "; is it up? see `tidemill status`" if error.kind == "unavailable" else ""
        err.print(f"\n[red]error:[/] {error}{hint}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_stats(summary: Any) -> None:
    timing, route = summary.timing, summary.route
    err.print(
        f"\n\nrequest {summary.request_id}\n"
        f"{summary.output_tokens} tokens, TTFT {timing.ttft_s * 1e3:.1f} ms, TPOT {timing.tpot_s * 1e3:.2f} ms, "
        f"{summary.speculation.accepted_per_verify:.2f} accepted per verify, "
        f"prefill {route.prefill_worker or 'in place'}, verify {route.verify_worker}, "
        f"draft {route.draft_worker or 'none'}",
        highlight=False,
    )


@app.command()
def demo(
    config: ConfigOption = Path("deploy/local.yaml"),
    requests: Annotated[int, typer.Option(help="How many prompts to send.")] = 12,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 64,
) -> None:
    """Bring a cluster up, serve a dozen prompts, show where their time went, take it down."""
    with _told_plainly():
        from cluster.demo import run_demo  # noqa: PLC0415

        _say("reading the settings")
        run_demo(load_settings(config), requests, max_tokens, out, _say)


app.command()(bench)


def _end(number: int, frame: FrameType | None) -> None:
    """As after Ctrl-C: what a command started is taken down on the way out.

    While asyncio runs, its own handler of Ctrl-C does it: a SystemExit in the midst of a task is reported as a defect.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt) and interrupt is not signal.default_int_handler:
        interrupt(signal.SIGINT, frame)
    else:
        sys.exit(128 + number)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    app()


if __name__ == "__main__":
    main()
