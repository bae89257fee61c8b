"""python -m tests.support.fault_cells [WORDS...]: run the cells of the matrix, all or those with the words in them.

What they show is written to docs/faults.md.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

from tests.support.fault_matrix import MATRIX, Cell, Fault, Found, row
from tests.support.fault_ray import STAFF, RayStand
from tests.support.fault_stand import STALL_S, Stand

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
MARK = "<!-- what follows is written by `make faults` -->\n"


async def run(cells: Sequence[Cell]) -> AsyncIterator[tuple[Cell, Found | None]]:
    """First those of the workers, links and routers that are processes here, then those that need Ray."""
    for kind, on_ray in ((Stand, False), (RayStand, True)):
        theirs = [each for each in cells if (each.target in STAFF) is on_ray]
        if theirs:
            async with kind().running() as stand:
                for cell in theirs:
                    yield cell, None if cell.not_applicable else await stand.run(cell)


async def main(words: list[str]) -> bool:
    """True if all cells hold. Progress goes to standard output, and each result into the page."""
    cells = [each for each in MATRIX if all(word in (each.target, each.fault, each.stage) for word in words)]
    cells.sort(key=lambda cell: cell.fault is Fault.SLOW)  # what takes long comes last
    results: list[tuple[Cell, Found | None]] = []
    async with aclosing(run(cells)) as running:
        async for cell, found in running:
            results.append((cell, found))
            print(f"{len(results):>3}/{len(cells)} {row(cell, found, STALL_S)}", flush=True)
            write(results[-1:])
    return all(found is None or found.holds(cell, STALL_S) for cell, found in results)


def write(results: list[tuple[Cell, Found | None]]) -> None:
    """Into the page, below what is written by hand, in place of what these cells showed before."""
    by_hand, _, written = PAGE.read_text().partition(MARK)
    rows = {_where(line): line for line in written.splitlines() if line.startswith("| ")}
    rows |= {_where(line): line for line in (row(cell, found, STALL_S) for cell, found in results)}
    known = [rows[where] for where in (_where(row(cell, None, STALL_S)) for cell in MATRIX) if where in rows]
    ran, broken = sum("n/a" not in each for each in known), sum("**broken**" in each for each in known)
    said = f"\n{ran} of {len(MATRIX)} cells ran, {broken} broken; stall limit {STALL_S:g} s.\n\n"
    head = "| struck | fault | stage | failed | changed | recovery s | leaked | verdict |\n"
    head += "|---|---|---|--:|--:|--:|--:|---|\n"
    PAGE.write_text(by_hand + MARK + said + head + "\n".join(known) + "\n")


def _where(line: str) -> tuple[str, ...]:
    return tuple(line.split(" | ")[:3])


if __name__ == "__main__":
    sys.exit(not asyncio.run(main(sys.argv[1:])))
