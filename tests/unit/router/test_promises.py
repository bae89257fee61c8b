"""What engines promise of tokens, and what they do not take."""

import pytest

from tidemill import Sameness, SamplingParams
from tidemill.core.promises import sameness, unsupported

SAMPLED = SamplingParams(temperature=1.0, min_p=0.1)


@pytest.mark.parametrize("engine", ["native", "emulated"])
def test_our_engines_promise_everything_and_take_everything(engine: str) -> None:
    for sampling in (SamplingParams(), SAMPLED, SamplingParams(temperature=50.0, presence_penalty=1.0)):
        assert sameness(engine, sampling) is Sameness.EXACT
        assert unsupported(engine, sampling, drafts=True) is None


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), Sameness.ROUNDED),
        (SamplingParams(repetition_penalty=1.2), Sameness.ROUNDED),
        (SamplingParams(presence_penalty=0.5), Sameness.DISTRIBUTED),
        (SamplingParams(frequency_penalty=0.5), Sameness.DISTRIBUTED),
        (SAMPLED, Sameness.DISTRIBUTED),
    ],
)
def test_vllm_promises_what_it_can(sampling: SamplingParams, expected: Sameness) -> None:
    assert sameness("vllm", sampling) is expected


def test_vllm_takes_no_min_p_beside_drafts_and_nothing_too_hot() -> None:
    assert "min_p" in (unsupported("vllm", SAMPLED, drafts=True) or "")
    assert unsupported("vllm", SAMPLED, drafts=False) is None
    assert unsupported("vllm", SamplingParams(min_p=0.5), drafts=True) is None, "greedy ones do not use it"
    assert "at most 2" in (unsupported("vllm", SamplingParams(temperature=2.1), drafts=False) or "")
