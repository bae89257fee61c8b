"""Whether a prompt is computed on a prefill worker or where it will be decoded."""

from enum import StrEnum

from tidemill.core.model import Decision, PoolSnapshot, Request, Role


class SplitReason(StrEnum):
    """Why; travels to the client in the summary."""

    DISAGGREGATED = "disaggregated"
    SHORT_PROMPT = "short_prompt"  # the hand-over would cost more than it frees
    NO_PREFILL_WORKERS = "no_prefill_workers"


def split(snapshot: PoolSnapshot, request: Request, min_prefill_tokens: int) -> Decision[bool]:
    """True: prefill elsewhere."""
    if not snapshot.of(Role.PREFILL):
        return Decision(False, SplitReason.NO_PREFILL_WORKERS)
    if request.kv_tokens < max(min_prefill_tokens, 1):
        return Decision(False, SplitReason.SHORT_PROMPT)
    return Decision(True, SplitReason.DISAGGREGATED)
