"""Which drafted tokens stand: rules that walk a token tree and leave the target's distribution as it is.

Every rule is exact for some ways of drawing the children of a node, and wrong for the others; EXACT_FOR says which.
The default, sample-match, is exact for any draft, because what the target picks does not depend on it.

At each node the rejection rules know two float64 arrays of shape [vocabulary] that add up to 1: `target`, the target's
distribution of the next token after temperature and filters, and `draft`, the distribution that the node's children
were drawn from. Randomness comes in as an argument, so a test can walk through every outcome.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import ROOT, TokenTree

Floats = npt.NDArray[np.float64]
_ROUNDING = 1e-14  # what float64 arithmetic on probabilities may be off by


class Rule(StrEnum):
    """How it is decided whether a child is accepted."""

    SAMPLE_MATCH = "sample_match"  # the target picks; a child that carries its token is accepted
    MULTI_STEP = "multi_step"  # SpecInfer's multi-step speculative sampling; with one child Leviathan's rule
    K_SEQ = "k_seq"  # SpecTr
    WITHOUT_REPLACEMENT = "without_replacement"  # DySpec, Sequoia


class Proposal(StrEnum):
    """How the children of a node came about."""

    KEYED = "keyed"  # with the target's own noise, or in any other way: they may depend on what the target will pick
    INDEPENDENT = "independent"  # each drawn from `draft`; siblings may carry the same token
    WITHOUT_REPLACEMENT = "without_replacement"  # each from `draft` without its earlier siblings, renormalised
    TOP_K = "top_k"  # the likeliest tokens, nothing drawn


EXACT_FOR: Mapping[Rule, frozenset[Proposal]] = {
    Rule.SAMPLE_MATCH: frozenset(Proposal),
    Rule.MULTI_STEP: frozenset({Proposal.INDEPENDENT}),
    Rule.K_SEQ: frozenset({Proposal.INDEPENDENT}),
    Rule.WITHOUT_REPLACEMENT: frozenset({Proposal.WITHOUT_REPLACEMENT}),
}


class InexactPairing(ValueError):
    """A rule whose output would not follow the target's distribution with what it is given."""


class Randomness(Protocol):
    """Where a rule's decisions come from. All of them are independent of each other and of the draft."""

    def coin(self, probability: float) -> bool:
        """True with this probability, 0 to 1."""

    def draw(self, weights: Floats) -> int:
        """An index, with a probability in proportion to its weight, not negative; one at least is positive."""


@dataclass(frozen=True, slots=True)
class RandomNumbers:
    """Randomness from numbers that `generator` makes, one a decision."""

    generator: np.random.Generator

    def coin(self, probability: float) -> bool:
        return bool(self.generator.random() < probability)

    def draw(self, weights: Floats) -> int:
        sums = np.cumsum(weights)
        return int(np.searchsorted(sums, self.generator.random() * sums[-1], side="right"))


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen after a node, and which of the node's children it is; None: not one of them."""

    token: int
    child: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Accepted nodes of a tree from below the root downward, and the token emitted after the last of them.

    That token is a correction if the last node has children, else the bonus token.
    """

    nodes: tuple[int, ...]
    token: int


Choose = Callable[[int, Sequence[int]], Choice]  # from a node, or ROOT, and the tokens of its children in their order
RejectionRule = Callable[[Floats, Floats, Sequence[int], Randomness], Choice]  # target, draft, children, randomness


def verify_tree(tree: TokenTree, choose: Choose) -> Verdict:
    """Go from the root down for as long as children are accepted. `choose` is asked once for each node on the way."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    accepted: list[int] = []
    node = ROOT
    while True:
        below = children.get(node, [])
        choice = choose(node, [tree.tokens[child] for child in below])
        if choice.child is None:
            return Verdict(tuple(accepted), choice.token)
        node = below[choice.child]
        accepted.append(node)


def check_pairing(rule: Rule, proposal: Proposal) -> None:
    """Raise InexactPairing unless the rule is exact for children made like this."""
    if proposal not in EXACT_FOR[rule]:
        exact = ", ".join(sorted(EXACT_FOR[rule]))
        raise InexactPairing(
            f"rule {rule} with proposal {proposal} would not follow the target's distribution: {rule} is exact only "
            f"for {exact}; draw the children like that, or use {Rule.SAMPLE_MATCH}, which is exact for any"
        )


def verifier(
    rule: Rule,
    proposal: Proposal,
    target: Callable[[int], Floats],
    draft: Callable[[int], Floats],
    randomness: Randomness,
) -> Choose:
    """The rule, for `verify_tree`. `target` and `draft` give a node's distributions; leaves are not asked for `draft`.

    Raises InexactPairing if the rule is not exact for the proposal.
    """
    check_pairing(rule, proposal)
    if rule is Rule.SAMPLE_MATCH:
        return sample_match(lambda node: randomness.draw(target(node)))
    decide = _REJECTION_RULES[rule]

    def choose(node: int, children: Sequence[int]) -> Choice:
        if not children:
            return Choice(randomness.draw(target(node)))
        return decide(target(node), draft(node), children, randomness)

    return choose


def sample_match(pick: Callable[[int], int]) -> Choose:
    """Accept the first child that carries `pick(node)`, the token that the target itself chooses after the node."""

    def choose(node: int, children: Sequence[int]) -> Choice:
        token = pick(node)
        return Choice(token, children.index(token) if token in children else None)

    return choose


def multi_step(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    """Multi-step speculative sampling (SpecInfer, arXiv 2305.09781), for children drawn independently.

    A child x is accepted with probability min(1, target[x] / draft[x]); each rejection leaves the residual
    norm(max(0, target - draft)) as the target of what comes after. Raises ValueError if draft[x] is 0.
    """
    for index, token in enumerate(children):
        if randomness.coin(_ratio(target[token], draft[token], token)):
            return Choice(token, index)
        target = _residual(target, draft)
    return Choice(randomness.draw(target))


def without_replacement(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    """As `multi_step`, for children drawn one after another, each from what its earlier siblings left of `draft`.

    DySpec, arXiv 2410.11744; Sequoia, arXiv 2402.12374. Raises ValueError if a child could not be drawn: draft[x] is 0,
    or a sibling carries the same token.
    """
    for index, token in enumerate(children):
        if randomness.coin(_ratio(target[token], draft[token], token)):
            return Choice(token, index)
        target = _residual(target, draft)
        draft = _without(draft, token)
    return Choice(randomness.draw(target))


def k_seq(
    target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness, rho: float | None = None
) -> Choice:
    """K-sequential selection (SpecTr, arXiv 2310.15141), for children drawn independently.

    The first child x that passes with probability min(1, target[x] / (rho draft[x])) is accepted; if none does, a
    token of the target is emitted, less what was accepted on average. `rho` is `least_rho` unless given; the number of
    children always suffices, and spares the search. Raises InexactPairing if `rho` is less than `least_rho`, ValueError
    if draft[x] is 0.
    """
    count = len(children)
    if rho is None:
        rho = least_rho(target, draft, count)
    elif not _suffices(rho, target, draft, count):
        raise InexactPairing(
            f"{Rule.K_SEQ} with rho {rho} and {count} children would not follow the target's distribution: "
            f"rho must be {least_rho(target, draft, count)} at least; leave it out to have it computed"
        )
    for index, token in enumerate(children):
        if randomness.coin(_ratio(target[token], rho * draft[token], token)):
            return Choice(token, index)
    common = np.minimum(draft, target / rho)
    return Choice(randomness.draw(_residual(target, common * _tries(float(common.sum()), count))))


def least_rho(target: Floats, draft: Floats, count: int) -> float:
    """The least rho for which `k_seq` is exact with `count` children, from 1 to `count`; it accepts the most.

    It solves 1 - (1 - beta)^count = rho beta, where beta = sum(min(draft, target / rho)) is the chance that one child
    passes. The right side rises with rho and the left side falls, so bisection finds it; at rho = count it is reached.
    """
    low, high = 1.0, float(max(count, 1))
    if _suffices(low, target, draft, count):
        return low
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if _suffices(middle, target, draft, count) else (middle, high)
    return high


def _suffices(rho: float, target: Floats, draft: Floats, count: int) -> bool:
    """True if no token is accepted more often than the target has it."""
    if rho < 1.0:
        return False
    beta = float(np.minimum(draft, target / rho).sum())
    return beta * (rho - _tries(beta, count)) >= -_ROUNDING


def _tries(beta: float, count: int) -> float:
    """How many children are looked at on average if each passes with chance beta: (1 - (1 - beta)^count) / beta."""
    return sum((1.0 - beta) ** index for index in range(count))


def _ratio(target: float, draft: float, token: int) -> float:
    """The chance to accept a child."""
    if draft <= 0.0:
        raise ValueError(
            f"a child carries token {token}, which cannot be drawn from the draft distribution given: give the one "
            f"that the children were drawn from, temperature and filters included"
        )
    return 1.0 if target >= draft else float(target / draft)


def _residual(target: Floats, covered: Floats) -> Floats:
    """norm(max(0, target - covered)), [vocabulary].

    The target itself if nothing is left: the two are equal, and a rejection that brought us here was a rounding error.
    """
    left = np.maximum(target - covered, 0.0)
    total = left.sum()
    return left / total if total > 0.0 else target


def _without(draft: Floats, token: int) -> Floats:
    """The distribution of the next sibling; all 0 if there can be none."""
    rest = draft.copy()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0.0 else rest


_REJECTION_RULES: Mapping[Rule, RejectionRule] = {
    Rule.MULTI_STEP: multi_step,
    Rule.K_SEQ: k_seq,
    Rule.WITHOUT_REPLACEMENT: without_replacement,
}
