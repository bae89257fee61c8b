"""The live view: draws each second until its user has seen enough."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from cluster.view.picture import draw_picture
from tidemill.core.picture import Picture

PERIOD_S = 1.0


def live(console: Console, ask: Callable[[], Picture]) -> None:
    """Returns on q; Ctrl-C raises KeyboardInterrupt. Either way the terminal is as it was before."""
    with _keys() as wait, Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            begun = time.monotonic()
            screen.update(draw_picture(ask(), console.height), refresh=True)
            while (left_s := begun + PERIOD_S - time.monotonic()) > 0:
                if b"q" in wait(left_s).lower():
                    return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Waits so long for keys, and returns them. Without a terminal there are no keys."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import termios  # noqa: PLC0415 - not on every system, and of no use without a terminal
    import tty  # noqa: PLC0415

    before = termios.tcgetattr(sys.stdin)

    def wait(seconds: float) -> bytes:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 64) if ready else b""

    try:
        tty.setcbreak(sys.stdin)
        yield wait
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bytes:
    time.sleep(seconds)
    return b""
