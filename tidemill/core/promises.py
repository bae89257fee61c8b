"""What each engine promises of a request's tokens, and which parameters it takes. docs/engines.md has the table."""

from tidemill.types import Sameness, SamplingParams

VLLM_HOTTEST = 2.0


def sameness(engine: str, sampling: SamplingParams) -> Sameness:
    """What a request may rely on, whatever shares its steps and wherever it goes on."""
    if engine != "vllm":
        return Sameness.EXACT
    counts_output = sampling.presence_penalty or sampling.frequency_penalty
    return Sameness.ROUNDED if sampling.temperature == 0 and not counts_output else Sameness.DISTRIBUTED


def unsupported(engine: str, sampling: SamplingParams, *, drafts: bool) -> str | None:
    """What the engine does not take, in words; None if it takes all. `drafts`: it verifies some."""
    if engine != "vllm":
        return None
    if sampling.temperature > VLLM_HOTTEST:
        return f"temperature is {sampling.temperature}; engine vllm takes at most {VLLM_HOTTEST:g}"
    if sampling.min_p and sampling.temperature > 0 and drafts:
        return "min_p is set; engine vllm does not take it where drafts are verified; use top_p or top_k"
    return None
