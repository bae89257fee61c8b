"""Acceptance rules leave the target's distribution as it is: every outcome is enumerated."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.exact import (
    EXACT,
    KINDS,
    PAIRINGS,
    REJECTIONS,
    AllBranches,
    Floats,
    Kind,
    Speculation,
    Tokens,
    Toy,
    disjoint,
    equal,
    general,
    nearly_equal,
    norm,
    outcomes,
    speculation,
    target_lacks,
    text_to,
    total_variation,
    unchecked,
)
from tidemill.core.tree import EMPTY, ROOT, TokenTree
from workers.speculation.acceptance import (
    InexactPairing,
    Proposal,
    RandomNumbers,
    RejectionRule,
    Rule,
    Verdict,
    check_pairing,
    k_seq,
    least_rho,
    multi_step,
    sample_match,
    verifier,
    verify_tree,
    without_replacement,
)

NODE_RULES = [multi_step, k_seq, without_replacement]
ONE, TWO, THREE = (ROOT,), (ROOT, ROOT), (ROOT, ROOT, ROOT)
CHAIN, BUSHY, RAGGED = (ROOT, 0), (ROOT, ROOT, 0, 1), (ROOT, ROOT, 0, 0, 1)
WEIGHTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=4).filter(
    lambda pairs: all(any(column) for column in zip(*pairs, strict=True))
)
TOY = Toy(size=4)


class TestExactness:
    """Total variation to the target below 1e-12, by enumeration."""

    @pytest.mark.parametrize(("rule", "proposal"), PAIRINGS)
    @pytest.mark.parametrize("shape", [(), ONE, TWO, THREE, CHAIN, BUSHY])
    def test_two_tokens_across_a_round_boundary(self, rule: Rule, proposal: Proposal, shape: Tokens) -> None:
        assert speculation(rule, proposal, shape).error(2) < EXACT

    @pytest.mark.parametrize(("rule", "proposal"), PAIRINGS)
    def test_three_tokens_after_prefixes_of_all_kinds(self, rule: Rule, proposal: Proposal) -> None:
        assert speculation(rule, proposal, RAGGED, kinds=KINDS, size=2, seed=3).error(3) < EXACT

    @pytest.mark.parametrize(("rule", "proposal"), PAIRINGS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_edge_cases(self, rule: Rule, proposal: Proposal, kind: Kind) -> None:
        assert speculation(rule, proposal, THREE, kinds=[kind], size=4, seed=1).error(1) < EXACT
        assert speculation(rule, proposal, (ROOT, 0, 0), kinds=[kind], seed=2).error(2) < EXACT

    @pytest.mark.parametrize(("rule", "proposal"), PAIRINGS)
    def test_six_tokens(self, rule: Rule, proposal: Proposal) -> None:
        assert speculation(rule, proposal, TWO, size=6).error(1) < EXACT

    @pytest.mark.parametrize(("rule", "proposal"), REJECTIONS)
    @settings(max_examples=25, deadline=None)
    @given(WEIGHTS, st.integers(0, 3))
    def test_any_distributions(
        self, rule: Rule, proposal: Proposal, weights: list[tuple[int, int]], count: int
    ) -> None:
        target, draft = (norm(column) for column in zip(*weights, strict=True))
        known = {(): (target, draft)}
        assert speculation(rule, proposal, (ROOT,) * count, size=target.size, known=known).error(1) < EXACT

    @pytest.mark.parametrize("more", [0.0, 0.01, 1.0, 5.0])
    def test_k_seq_with_more_rho_than_needed(self, more: float) -> None:
        rho = least_rho(*TOY.pair(()), 3) + more
        chooser = unchecked(partial(k_seq, rho=rho))
        assert Speculation(TOY, THREE, Proposal.INDEPENDENT, chooser).error(1) < EXACT


class SharedNoise:
    """One uniform number for each position, which all models turn into tokens.

    It matters only by where it lies among the cumulative sums of all distributions that there can be at that position.
    """

    def __init__(self, toy: Toy, positions: int) -> None:
        self._size = toy.size
        self._borders: list[Floats] = []
        for position in range(positions):
            pairs = [toy.pair(prefix) for prefix in np.ndindex(*[toy.size] * position)]
            sums = [np.cumsum(each).clip(0.0, 1.0) for pair in pairs for each in pair]
            self._borders.append(np.unique(np.concatenate([[0.0, 1.0], *sums])))

    def picker(self, randomness: AllBranches) -> Callable[[Floats, int], int]:
        """(distribution, position) -> token."""
        noise: dict[int, float] = {}

        def pick(distribution: Floats, position: int) -> int:
            if position not in noise:
                borders = self._borders[position]
                cell = randomness.draw(np.diff(borders))
                noise[position] = (borders[cell] + borders[cell + 1]) / 2
            return min(int(np.searchsorted(np.cumsum(distribution), noise[position])), self._size - 1)

        return pick


class TestDraftsFromTheTargetsNoise:
    """Sample-match takes drafts that know what the target will pick."""

    @pytest.mark.parametrize("drafter", ["same noise", "perfect", "adversarial"])
    def test_two_tokens_and_how_often_the_first_was_drafted(self, drafter: str) -> None:
        toy = Toy(kinds=[general, target_lacks])
        noise = SharedNoise(toy, positions=3)

        def two_tokens(randomness: AllBranches) -> tuple[Tokens, bool]:
            pick = noise.picker(randomness)
            output: Tokens = ()
            first_drafted = False
            while len(output) < 2:
                tree = EMPTY
                for parent in CHAIN[: 2 - len(output)]:
                    text = text_to(tree, parent, output)
                    token = pick(toy.draft(text) if drafter == "same noise" else toy.target(text), len(text))
                    token = (token + 1) % toy.size if drafter == "adversarial" else token
                    tree = TokenTree((*tree.tokens, token), (*tree.parents, parent))
                texts = {node: text_to(tree, node, output) for node in (ROOT, *range(len(tree)))}
                picks = partial(lambda texts, node: pick(toy.target(texts[node]), len(texts[node])), texts)
                verdict = verify_tree(tree, sample_match(picks))
                first_drafted |= not output and bool(verdict.nodes)
                output += (*(tree.tokens[node] for node in verdict.nodes), verdict.token)
            return output[:2], first_drafted

        tokens: dict[Tokens, float] = defaultdict(float)
        drafted = 0.0
        for (output, first_drafted), chance in outcomes(two_tokens).items():
            tokens[output] += chance
            drafted += chance * first_drafted
        assert total_variation(tokens, toy.continuations(2)) < EXACT
        expected = {"same noise": overlap(*toy.pair(())), "perfect": 1.0, "adversarial": 0.0}
        assert drafted == pytest.approx(expected[drafter], abs=EXACT)


def overlap(target: Floats, draft: Floats) -> float:
    """How often one uniform number gives the same token of both."""
    ends, other_ends = np.cumsum(target), np.cumsum(draft)
    return float(np.maximum(np.minimum(ends, other_ends) - np.maximum(ends - target, other_ends - draft), 0.0).sum())


class TestAcceptance:
    """A rule that accepts nothing is exact too; these accept as much as they should."""

    @staticmethod
    def accepted(speculation: Speculation) -> float:
        return outcomes(lambda randomness: len(speculation.one_round((), randomness)) > 1).get(True, 0.0)

    @pytest.mark.parametrize(("rule", "proposal"), REJECTIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_child_as_often_as_distributions_overlap(self, rule: Rule, proposal: Proposal, kind: Kind) -> None:
        one = speculation(rule, proposal, ONE, kinds=[kind], size=5)
        assert self.accepted(one) == pytest.approx(np.minimum(*one.toy.pair(())).sum(), abs=EXACT)

    @pytest.mark.parametrize("count", [2, 3])
    def test_k_seq(self, count: int) -> None:
        target, draft = TOY.pair(())
        beta = np.minimum(draft, target / least_rho(target, draft, count)).sum()
        some = speculation(Rule.K_SEQ, Proposal.INDEPENDENT, (ROOT,) * count, size=4)
        assert self.accepted(some) == pytest.approx(1 - (1 - beta) ** count, abs=EXACT)

    @pytest.mark.parametrize("count", [2, 3])
    def test_multi_step(self, count: int) -> None:
        target, draft = TOY.pair(())
        missed = 1.0
        for _ in range(count):
            missed *= 1 - np.minimum(target, draft).sum()
            target = norm(np.maximum(target - draft, 0))
        some = speculation(Rule.MULTI_STEP, Proposal.INDEPENDENT, (ROOT,) * count, size=4)
        assert self.accepted(some) == pytest.approx(1 - missed, abs=EXACT)

    def test_without_replacement_accepts_one_of_all_tokens(self) -> None:
        everything = speculation(Rule.WITHOUT_REPLACEMENT, Proposal.WITHOUT_REPLACEMENT, (ROOT,) * 4, size=4)
        assert self.accepted(everything) == pytest.approx(1.0, abs=EXACT)

    @pytest.mark.parametrize(("rule", "proposal"), REJECTIONS)
    def test_always_if_distributions_are_equal(self, rule: Rule, proposal: Proposal) -> None:
        for kind in (equal, nearly_equal):
            assert self.accepted(speculation(rule, proposal, THREE, kinds=[kind])) == pytest.approx(1.0, abs=EXACT)


class TestPairing:
    def test_what_is_exact(self) -> None:
        for rule in Rule:
            for proposal in Proposal:
                if (rule, proposal) in PAIRINGS:
                    check_pairing(rule, proposal)
                else:
                    with pytest.raises(
                        InexactPairing, match=f"{rule} with proposal {proposal}.*exact only.*sample_match"
                    ):
                        check_pairing(rule, proposal)
        assert len(PAIRINGS) == 4 + 1 + 1 + 1

    def test_a_verifier_is_not_made_of_an_inexact_pairing(self) -> None:
        with pytest.raises(InexactPairing):
            verifier(Rule.MULTI_STEP, Proposal.TOP_K, TOY.target, TOY.draft, AllBranches([]))  # type: ignore[arg-type]

    def test_too_little_rho_is_refused(self) -> None:
        target, draft = norm([5, 3, 2]), norm([2, 3, 5])
        least = least_rho(target, draft, 3)
        for rho in (least - 1e-6, 1.0, 0.0, -1.0):
            with pytest.raises(InexactPairing, match=f"rho {rho} and 3 children"):
                k_seq(target, draft, [0, 1, 1], AllBranches([]), rho)
        k_seq(target, draft, [0, 1, 1], AllBranches([]), least)


class TestLeastRho:
    @settings(max_examples=60, deadline=None)
    @given(WEIGHTS, st.integers(1, 5))
    def test_solves_its_equation(self, weights: list[tuple[int, int]], count: int) -> None:
        target, draft = (norm(column) for column in zip(*weights, strict=True))
        rho = least_rho(target, draft, count)
        beta = np.minimum(draft, target / rho).sum()
        assert 1 <= rho <= count
        assert 1 - (1 - beta) ** count == pytest.approx(rho * beta, abs=1e-8)

    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_is_one_if_nothing_or_all_is_in_common(self, count: int) -> None:
        random = np.random.default_rng(0)
        assert least_rho(*equal(random, 5), count) == 1.0
        assert least_rho(*disjoint(random, 5), count) == 1.0

    def test_is_one_for_one_child(self) -> None:
        assert least_rho(*TOY.pair(()), 1) == 1.0


class Unlucky:
    """Loses every coin, whatever its odds, as rounding might; draws the first that can be drawn."""

    def coin(self, probability: float) -> bool:
        return False

    def draw(self, weights: Floats) -> int:
        assert np.isfinite(weights).all()
        assert weights.sum() > 0
        return int(np.flatnonzero(weights)[0])


class TestNodes:
    @pytest.mark.parametrize("rule", NODE_RULES)
    def test_a_rejection_by_rounding_still_gives_a_token_of_the_target(self, rule: RejectionRule) -> None:
        same = norm([0, 1, 2, 3])
        for target in (same, norm(same * (1 + 1e-16)), norm([0, 1, 2 + 1e-15, 3])):
            assert rule(target, same, [1, 2, 3], Unlucky()).token in (1, 2, 3)

    @pytest.mark.parametrize("rule", NODE_RULES)
    def test_a_child_that_cannot_have_been_drawn(self, rule: RejectionRule) -> None:
        with pytest.raises(ValueError, match="token 1, which cannot be drawn"):
            rule(norm([1, 1]), norm([1, 0]), [1], Unlucky())

    def test_a_token_drawn_twice_without_replacement(self) -> None:
        with pytest.raises(ValueError, match="token 1, which cannot be drawn"):
            without_replacement(norm([1, 1, 1]), norm([1, 1, 1]), [1, 1], Unlucky())

    @pytest.mark.parametrize("rule", NODE_RULES)
    def test_inputs_are_left_alone(self, rule: RejectionRule) -> None:
        target, draft = norm([3, 2, 1]), norm([1, 2, 3])
        rule(target, draft, [2, 1], Unlucky())
        assert np.array_equal(target, norm([3, 2, 1]))
        assert np.array_equal(draft, norm([1, 2, 3]))


class TestTrees:
    def test_an_empty_tree_yields_the_targets_pick(self) -> None:
        assert verify_tree(EMPTY, sample_match(lambda node: 10 + node)) == Verdict((), 9)

    def test_a_path_is_accepted_up_to_its_bonus_token(self) -> None:
        tree = TokenTree((5, 6, 7, 8), (ROOT, ROOT, 1, 1))
        picks = {ROOT: 6, 1: 8, 3: 4}
        assert verify_tree(tree, sample_match(picks.__getitem__)) == Verdict((1, 3), 4)

    def test_a_correction_ends_the_path(self) -> None:
        tree = TokenTree.chain([5, 6, 7])
        picks = {ROOT: 5, 0: 7}
        assert verify_tree(tree, sample_match(picks.__getitem__)) == Verdict((0,), 7)

    def test_of_siblings_with_one_token_the_first_is_accepted(self) -> None:
        tree = TokenTree((5, 5, 6, 6), (ROOT, ROOT, 0, 1))
        assert verify_tree(tree, sample_match({ROOT: 5, 0: 6, 2: 9}.__getitem__)) == Verdict((0, 2), 9)

    @pytest.mark.parametrize(("rule", "proposal"), REJECTIONS)
    def test_leaves_need_no_draft_distribution(self, rule: Rule, proposal: Proposal) -> None:
        same = norm([1, 2, 3])
        drafts = {ROOT: same, 0: same}
        choose = verifier(rule, proposal, lambda _: same, drafts.__getitem__, RandomNumbers(np.random.default_rng(0)))
        assert verify_tree(TokenTree.chain([1, 2]), choose).nodes == (0, 1)


class TestRandomNumbers:
    @given(
        st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 3.0]), min_size=1, max_size=6).filter(any), st.integers(0, 9)
    )
    def test_what_has_no_weight_is_not_drawn(self, weights: list[float], seed: int) -> None:
        numbers = RandomNumbers(np.random.default_rng(seed))
        assert weights[numbers.draw(np.array(weights))] > 0

    def test_sure_coins(self) -> None:
        numbers = RandomNumbers(np.random.default_rng(0))
        assert all(numbers.coin(1.0) for _ in range(100))
        assert not any(numbers.coin(0.0) for _ in range(100))


def p_value(speculation: Speculation, runs: int, seed: int) -> float:
    """Chi-square test of the first two tokens, nine of them with a vocabulary of three, against the target's."""
    numbers = RandomNumbers(np.random.default_rng(seed))
    seen = Counter(speculation.decode(2, numbers) for _ in range(runs))
    expected = speculation.toy.continuations(2)
    half = sum((seen[each] - runs * chance) ** 2 / (runs * chance) for each, chance in expected.items()) / 2
    return math.exp(-half) * sum(half**power / math.factorial(power) for power in range(4))  # 8 degrees of freedom


class TestStatistics:
    """As at run time, with numbers from a seeded generator."""

    @pytest.mark.parametrize(("rule", "proposal"), PAIRINGS)
    def test_two_tokens_across_a_round_boundary(self, rule: Rule, proposal: Proposal) -> None:
        assert p_value(speculation(rule, proposal, BUSHY), runs=1500, seed=1) > 0.001

    def test_a_mutant_is_caught(self) -> None:
        right = speculation(Rule.MULTI_STEP, Proposal.INDEPENDENT, BUSHY)
        assert p_value(replace(right, drawn_from=lambda draft: norm(draft**0.5)), runs=1500, seed=1) < 1e-6
