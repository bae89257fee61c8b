"""What levelling is told of the verify workers."""

from cluster.policy.levelling import Held, Holder
from cluster.telemetry import holders
from tidemill.core.model import Role, WorkerId, WorkerLoad
from tidemill.core.telemetry import Decoding, WorkerTelemetry


def worker(name: str, role: Role = Role.VERIFY, accepting: bool = True) -> WorkerTelemetry:
    load = WorkerLoad(kv_blocks_total=100, block_size=16, queued_tokens=33)
    return WorkerTelemetry(WorkerId(name, 1), role, accepting, load, 0.0, 0.0)


def test_blocks_by_worker() -> None:
    """A request on an incarnation that is gone is nobody's."""
    a, b = WorkerId("a", 1), WorkerId("b", 1)
    decoding = [Decoding("r", a, 16), Decoding("s", a, 17), Decoding("t", b, 1), Decoding("gone", WorkerId("a", 0), 9)]
    found = holders([worker("a"), worker("b", accepting=False), worker("p", Role.PREFILL)], decoding)
    assert found == [
        Holder("a", 100, (Held("r", 1), Held("s", 2)), 3),
        Holder("b", 100, (Held("t", 1),), 3, leaving=True),
    ]
