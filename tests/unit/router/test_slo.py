"""Which requests kept their goal."""

import pytest

from router.journey import Journey
from router.slo import Verdict, verdict
from tidemill.core.model import Request, SloClass
from tidemill.types import FinishReason, SamplingParams, Timing

SLO = SloClass("chat", ttft_s=0.5, tpot_s=0.1)


def journey(ttft_s: float, tpot_s: float, finish: FinishReason | None = FinishReason.LENGTH) -> Journey:
    request = Request("r", (1, 2), SamplingParams(max_tokens=3), slo=SLO)
    made = Journey(request, 0.0, 100.0, finish=finish)
    made.timing, made.first_at, made.last_at = Timing(ttft_s=ttft_s), ttft_s, ttft_s + 2 * tpot_s
    made.sent = [1, 2, 3]
    return made


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "expected"),
    [
        (0.5, 0.05, Verdict.MET),
        (0.51, 0.05, Verdict.TTFT_MISSED),
        (0.51, 0.2, Verdict.TTFT_MISSED),
        (0.1, 0.2, Verdict.TPOT_MISSED),
    ],
)
def test_finished_requests(ttft_s: float, tpot_s: float, expected: Verdict) -> None:
    assert verdict(journey(ttft_s, tpot_s), "length") is expected


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("overloaded", Verdict.FAILED),
        ("unavailable", Verdict.FAILED),
        ("deadline_exceeded", Verdict.FAILED),
        ("internal", Verdict.FAILED),
        ("cancelled", None),
        ("invalid_request", None),
        ("model_not_found", None),
    ],
)
def test_requests_that_did_not_finish(outcome: str, expected: Verdict | None) -> None:
    assert verdict(journey(0.1, 0.01, finish=None), outcome) is expected
