"""A few cells of the matrix of faults; `make faults` runs all."""

from tests.support.fault_cells import run
from tests.support.fault_matrix import Cell, Fault, Stage, Target, row
from tests.support.fault_stand import STALL_S

SAMPLE = [
    Cell(Target.VERIFY, Fault.STOP, Stage.DECODING),
    Cell(Target.VERIFY, Fault.CUT, Stage.VERIFYING),
    Cell(Target.PREFILL, Fault.STOP, Stage.PREFILLING),
    Cell(Target.LINK, Fault.STOP, Stage.TRANSFERRING),
    Cell(Target.LINK, Fault.CUT, Stage.QUEUED),
    Cell(Target.VERIFY, Fault.KILL, Stage.TRANSFERRING),
]


async def test_nothing_fails_changes_or_leaks_and_it_goes_on_in_time() -> None:
    broken = [
        row(cell, found, STALL_S) async for cell, found in run(SAMPLE) if not (found and found.holds(cell, STALL_S))
    ]
    assert not broken, "\n".join(broken)
