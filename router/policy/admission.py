"""Whether a request is served now, waits, or is turned away."""

from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.model import Decision


class Admission(StrEnum):
    """What happens to an arriving request."""

    SERVE = "serve"
    WAIT = "wait"
    REJECT = "reject"


class AdmissionReason(StrEnum):
    """Why."""

    ROOM = "room"
    ALL_ACTIVE = "all_active"  # as many are served as may be; there is room in the queue
    QUEUE_FULL = "queue_full"


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on the requests of one router."""

    max_active: int
    max_queued: int


def admit(active: int, queued: int, limits: AdmissionLimits) -> Decision[Admission]:
    """First come, first served: nobody overtakes the queue."""
    if active < limits.max_active and queued == 0:
        return Decision(Admission.SERVE, AdmissionReason.ROOM)
    if queued < limits.max_queued:
        return Decision(Admission.WAIT, AdmissionReason.ALL_ACTIVE)
    return Decision(Admission.REJECT, AdmissionReason.QUEUE_FULL)
