"""The enumeration that finds the acceptance rules exact finds their mutants wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.support.exact import EXACT, REJECTIONS, Floats, OfNode, Speculation, Toy, checked, norm, unchecked
from tidemill.core.tree import ROOT, TokenTree
from workers.speculation.acceptance import (
    Choice,
    Choose,
    Proposal,
    Randomness,
    RejectionRule,
    Rule,
    k_seq,
    least_rho,
    multi_step,
    without_replacement,
)

WRONG = 1e-3  # total variation to the target
TWO, THREE = (ROOT, ROOT), (ROOT, ROOT, ROOT)


@dataclass(frozen=True)
class Likeliest:
    """A mutant's randomness: draws only from the `keep` largest weights."""

    randomness: Randomness
    keep: int

    def coin(self, probability: float) -> bool:
        return self.randomness.coin(probability)

    def draw(self, weights: Floats) -> int:
        return self.randomness.draw(np.where(weights >= np.sort(weights)[-self.keep], weights, 0.0))


def always_accept(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    return Choice(children[0], 0)


def truncated_residual(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    return multi_step(target, draft, children, Likeliest(randomness, 2))


def greedy_correction(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    return multi_step(target, draft, children, Likeliest(randomness, 1))


def same_target_for_all(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    for child in range(len(children)):
        choice = multi_step(target, draft, children[child : child + 1], randomness)
        if choice.child is not None:
            return Choice(choice.token, child)
    return choice


def greedy_accept_on_a_miss(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
    token = randomness.draw(target)
    for accepted in (token, int(target.argmax())):
        if accepted in children:
            return Choice(accepted, children.index(accepted))
    return Choice(token)


def careless_k_seq(part: float) -> RejectionRule:
    """k-SEQ with rho `part` of the way from 1 to the least that is exact."""

    def rule(target: Floats, draft: Floats, children: Sequence[int], randomness: Randomness) -> Choice:
        count = len(children)
        rho = 1 + part * (least_rho(target, draft, count) - 1)
        for child, token in enumerate(children):
            if randomness.coin(min(1.0, target[token] / (rho * draft[token]))):
                return Choice(token, child)
        common = np.minimum(draft, target / rho)
        beta = common.sum()
        return Choice(randomness.draw(np.maximum(target - common * (1 - (1 - beta) ** count) / beta, 0.0)))

    return rule


def without_unlikely(toy: Toy) -> Callable[[TokenTree], TokenTree]:
    """Prunes children of the root for the tokens they carry."""
    likely = toy.draft(()) > np.median(toy.draft(()))
    return lambda tree: tree.subset(node for node, token in enumerate(tree.tokens) if likely[token])


def without_duplicates(tree: TokenTree) -> TokenTree:
    return tree.subset({token: node for node, token in reversed(list(enumerate(tree.tokens)))}.values())


TOY = Toy(size=4, known={(): (norm([5, 4, 3, 1]), norm([1, 1, 1, 6]))})
RIGHT = {rule: Speculation(TOY, THREE, proposal, checked(rule, proposal)) for rule, proposal in REJECTIONS}
MULTI_STEP = RIGHT[Rule.MULTI_STEP]
MUTANTS = {
    "always accept": replace(MULTI_STEP, chooser=unchecked(always_accept)),
    "truncated residual": replace(MULTI_STEP, chooser=unchecked(truncated_residual)),
    "greedy correction": replace(MULTI_STEP, chooser=unchecked(greedy_correction)),
    "same target for all": replace(MULTI_STEP, chooser=unchecked(same_target_for_all)),
    "greedy accept on a miss": replace(MULTI_STEP, chooser=unchecked(greedy_accept_on_a_miss)),
    "k_seq, rho 1": replace(MULTI_STEP, chooser=unchecked(careless_k_seq(0.0))),
    "k_seq, rho too small": replace(MULTI_STEP, chooser=unchecked(careless_k_seq(0.5))),
    "multi_step, duplicates dropped": replace(MULTI_STEP, edit=without_duplicates),
    "k_seq, duplicates dropped": replace(RIGHT[Rule.K_SEQ], edit=without_duplicates),
    **{f"{rule}, unlikely dropped": replace(right, edit=without_unlikely(TOY)) for rule, right in RIGHT.items()},
    **{f"{rule}, draft hotter": replace(right, drawn_from=lambda q: norm(q**0.7)) for rule, right in RIGHT.items()},
    **{f"{rule}, draft colder": replace(right, drawn_from=lambda q: norm(q**1.5)) for rule, right in RIGHT.items()},
}


class TestMutants:
    """The same enumeration sees what is wrong."""

    @pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
    def test_is_caught(self, mutant: Speculation) -> None:
        assert mutant.error(1) > WRONG

    @pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
    def test_what_they_were_made_from_is_right(self, right: Speculation) -> None:
        assert right.error(1) < EXACT

    def test_careless_k_seq_with_enough_rho_is_right(self) -> None:
        assert replace(MULTI_STEP, chooser=unchecked(careless_k_seq(1.0))).error(1) < EXACT

    @pytest.mark.parametrize("proposal", [Proposal.KEYED, Proposal.TOP_K])
    @pytest.mark.parametrize("rule", [multi_step, k_seq])
    def test_rejection_of_drafts_that_were_not_drawn(self, rule: RejectionRule, proposal: Proposal) -> None:
        assert Speculation(TOY, TWO, proposal, unchecked(rule)).error(1) > 0.01

    def test_without_replacement_of_the_likeliest(self) -> None:
        assert Speculation(TOY, TWO, Proposal.TOP_K, unchecked(without_replacement)).error(1) > 0.01

    @pytest.mark.parametrize("rule", [multi_step, k_seq])
    def test_rules_for_independent_children_with_others(self, rule: RejectionRule) -> None:
        assert Speculation(TOY, TWO, Proposal.WITHOUT_REPLACEMENT, unchecked(rule)).error(1) > WRONG

    def test_a_bonus_token_of_the_draft_shows_in_the_second_token(self) -> None:
        def bonus_of_the_draft(target: OfNode, draft: OfNode, randomness: Randomness) -> Choose:
            right = checked(Rule.MULTI_STEP, Proposal.INDEPENDENT)(target, draft, randomness)
            return lambda node, children: right(node, children) if children else Choice(randomness.draw(draft(node)))

        mutant = replace(MULTI_STEP, chooser=bonus_of_the_draft, shape=TWO)
        assert mutant.error(1) < EXACT
        assert mutant.error(2) > WRONG
