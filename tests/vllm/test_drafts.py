"""Chains out of trees, and what they do to sampled tokens."""

import math
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.engines import make_engine, pool_of, prompt_of, vllm_engines
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
from tidemill.types import SamplingParams

SAMPLES, AT_ONCE = 5120, 64
PROMPT = prompt_of(24)
Z_999 = 3.09  # of the normal distribution: one run in a thousand is rejected by chance


@pytest.fixture(autouse=True)
def _engines() -> Iterator[None]:
    yield
    vllm_engines().take_back()


def requests(first: int) -> list[Request]:
    """Hot enough that the first choice comes half of the time or less, cold enough for common outcomes."""
    sampling = [
        SamplingParams(max_tokens=3, temperature=1.5, top_k=3, top_p=0.95, seed=first + i, ignore_eos=True)
        for i in range(AT_ONCE)
    ]
    return [Request(f"s{first + i}", PROMPT, each) for i, each in enumerate(sampling)]


def outcomes(chains: dict[int, list[int]], first: int) -> tuple[Counter[tuple[int, ...]], int]:
    """What came, how often, and how many draft tokens were accepted. `chains`: the draft after each first token."""
    engine = make_engine("vllm", pool_of("vllm", 8192, max_batch_tokens=512))
    found: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for start in range(first, first + SAMPLES, AT_ONCE):
        tokens: dict[str, tuple[int, ...]] = {}
        for request in requests(start):
            engine.submit(request)
            tokens[request.id] = ()
        while engine.has_work():
            for name, out in tokens.items():
                if len(out) == 1 and out[0] in chains:
                    engine.propose(Draft(name, len(PROMPT) + 1, TokenTree.chain(chains[out[0]])))
            for each in engine.step().outputs:
                tokens[each.request_id] += each.tokens
                accepted += each.accepted
        found.update(tokens.values())
    return found, accepted


def chi_square(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, float]:
    """Of two samples of one size: (statistic, its 99.9 % quantile if they are of one distribution).

    Rare outcomes count as one. The quantile is Wilson and Hilferty's (1931).
    """
    common = [each for each in one.keys() | other.keys() if one[each] + other[each] >= 10]
    pairs = [(one[each], other[each]) for each in common]
    rest = (one.total() - sum(a for a, _ in pairs), other.total() - sum(b for _, b in pairs))
    if sum(rest):
        pairs.append(rest)
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    free = len(pairs) - 1
    return statistic, free * (1 - 2 / (9 * free) + Z_999 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.vllm
def test_sampled_tokens_with_drafts_are_of_the_same_distribution() -> None:
    plain, _ = outcomes({}, first=0)
    likeliest: dict[int, list[int]] = {}
    for out, _ in plain.most_common():
        likeliest.setdefault(out[0], list(out[1:]))
    drafted, accepted = outcomes(likeliest, first=10**6)
    assert accepted > SAMPLES / 10, "the drafts were of no use, so nothing was tested"
    statistic, bound = chi_square(plain, drafted)
    assert statistic < bound
    biased = Counter({out: round(n * (1.3 if out[1] == likeliest[out[0]][0] else 0.9)) for out, n in plain.items()})
    statistic, bound = chi_square(plain, biased)
    assert statistic > bound, "the test sees a draft that is accepted too often"
