"""Did a request keep its latency goal? Pure; attainment, goodput and alerts are made of what is counted here."""

from enum import StrEnum

from router.journey import Journey
from tidemill.errors import Cancelled, InvalidRequest, MessageTooLarge, ModelNotFound

# Ends that say nothing about the service: the caller went away, or asked for what cannot be.
NOT_OURS = frozenset(error.kind for error in (Cancelled, InvalidRequest, MessageTooLarge, ModelNotFound))


class Verdict(StrEnum):
    """A request's goal is met when both of its limits are."""

    MET = "met"
    TTFT_MISSED = "ttft_missed"  # and maybe TPOT too
    TPOT_MISSED = "tpot_missed"
    FAILED = "failed"  # turned away, given up, or over its deadline


def verdict(journey: Journey, outcome: str) -> Verdict | None:
    """`outcome`: the finish reason, or the kind of error. None if it does not count."""
    if journey.finish is None:
        return None if outcome in NOT_OURS else Verdict.FAILED
    slo = journey.request.slo
    if journey.timing.ttft_s > slo.ttft_s:
        return Verdict.TTFT_MISSED
    return Verdict.TPOT_MISSED if journey.tpot_s > slo.tpot_s else Verdict.MET
