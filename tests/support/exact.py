"""Every outcome of a random experiment with its exact probability, by walking through all that chance can decide.

And an experiment: decoding a toy language with drafts, where everything that a mutant may get wrong can be replaced.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import EMPTY, ROOT, TokenTree
from workers.speculation.acceptance import (
    EXACT_FOR,
    Choice,
    Choose,
    Proposal,
    Randomness,
    RejectionRule,
    Rule,
    verifier,
    verify_tree,
)

EXACT = 1e-12  # total variation below it: equal
PAIRINGS = [(rule, proposal) for rule in Rule for proposal in sorted(EXACT_FOR[rule])]
REJECTIONS = [(rule, proposal) for rule, proposal in PAIRINGS if rule is not Rule.SAMPLE_MATCH]

Outcome = TypeVar("Outcome", bound=Hashable)
Floats = npt.NDArray[np.float64]
Tokens = tuple[int, ...]
Pair = tuple[Floats, Floats]  # target, draft
Kind = Callable[[np.random.Generator, int], Pair]
OfNode = Callable[[int], Floats]
Chooser = Callable[[OfNode, OfNode, Randomness], Choose]


class AllBranches:
    """Randomness that takes one run through a given path of decisions.

    Past the path's end it takes the first branch that is possible, and remembers the others in `untaken`.
    """

    def __init__(self, path: list[tuple[int, float]]) -> None:
        self._path = path  # of branches taken and the probability up to and with each
        self._decided = 0
        self.untaken: list[list[tuple[int, float]]] = []

    @property
    def probability(self) -> float:
        """Of the run so far."""
        return self._path[-1][1] if self._path else 1.0

    def coin(self, probability: float) -> bool:
        assert 0.0 <= probability <= 1.0
        return bool(self._branch([1.0 - probability, probability]))

    def draw(self, weights: Floats) -> int:
        values = weights.tolist()
        assert min(values) >= 0.0
        total = sum(values)
        return self._branch([value / total for value in values])

    def _branch(self, probabilities: list[float]) -> int:
        if self._decided == len(self._path):
            so_far = self.probability
            possible = [(branch, so_far * chance) for branch, chance in enumerate(probabilities) if chance > 0.0]
            self.untaken += [[*self._path, other] for other in possible[1:]]
            self._path.append(possible[0])
        self._decided += 1
        return self._path[self._decided - 1][0]


def outcomes(experiment: Callable[[AllBranches], Outcome]) -> dict[Outcome, float]:
    """How likely each result of `experiment` is; it is run once for each way its coins and draws can fall."""
    found: dict[Outcome, float] = {}
    todo: list[list[tuple[int, float]]] = [[]]
    while todo:
        randomness = AllBranches(todo.pop())
        outcome = experiment(randomness)
        found[outcome] = found.get(outcome, 0.0) + randomness.probability
        todo += randomness.untaken
    return found


def total_variation(one: Mapping[Outcome, float], other: Mapping[Outcome, float]) -> float:
    """Half the sum of differences; 0 if the distributions are equal, 1 if they have no outcome in common."""
    return sum(abs(one.get(each, 0.0) - other.get(each, 0.0)) for each in {*one, *other}) / 2


def norm(weights: Floats | Sequence[float]) -> Floats:
    values: Floats = np.array(weights, np.float64)
    return values / float(values.sum())


# Kinds of distributions of the next token.


def general(random: np.random.Generator, size: int) -> Pair:
    return random.dirichlet(np.ones(size)), random.dirichlet(np.ones(size))


def target_lacks(random: np.random.Generator, size: int) -> Pair:
    target, draft = general(random, size)
    target[random.integers(size)] = 0.0
    return norm(target), draft


def draft_lacks(random: np.random.Generator, size: int) -> Pair:
    draft, target = target_lacks(random, size)
    return target, draft


def equal(random: np.random.Generator, size: int) -> Pair:
    target, _ = general(random, size)
    return target, target.copy()


def nearly_equal(random: np.random.Generator, size: int) -> Pair:
    target, _ = general(random, size)
    return target, norm(target * (1 + 1e-15 * random.normal(size=size)))


def disjoint(random: np.random.Generator, size: int) -> Pair:
    target, draft = general(random, size)
    return norm(target * (np.arange(size) % 2 == 0)), norm(draft * (np.arange(size) % 2 == 1))


def greedy_target(random: np.random.Generator, size: int) -> Pair:
    target, draft = general(random, size)
    return np.eye(size)[target.argmax()], draft


def greedy_draft(random: np.random.Generator, size: int) -> Pair:
    draft, target = greedy_target(random, size)
    return target, draft


KINDS = [general, target_lacks, draft_lacks, equal, nearly_equal, disjoint, greedy_target, greedy_draft]


@dataclass
class Toy:
    """A target and a draft model whose distributions depend on all tokens so far."""

    size: int = 3
    kinds: Sequence[Kind] = (general,)  # one for each prefix
    seed: int = 0
    known: dict[Tokens, Pair] = field(default_factory=dict)

    def pair(self, prefix: Tokens) -> Pair:
        if prefix not in self.known:
            random = np.random.default_rng([self.seed, len(prefix), *prefix])
            self.known[prefix] = self.kinds[int(random.integers(len(self.kinds)))](random, self.size)
        return self.known[prefix]

    def target(self, prefix: Tokens) -> Floats:
        return self.pair(prefix)[0]

    def draft(self, prefix: Tokens) -> Floats:
        return self.pair(prefix)[1]

    def continuations(self, count: int) -> dict[Tokens, float]:
        """How likely the target is to begin with each `count` tokens."""
        found: dict[Tokens, float] = {(): 1.0}
        for _ in range(count):
            found = {
                (*prefix, token): so_far * chance
                for prefix, so_far in found.items()
                for token, chance in enumerate(self.target(prefix).tolist())
                if chance > 0
            }
        return found


def text_to(tree: TokenTree, node: int, prefix: Tokens) -> Tokens:
    """All tokens up to and with the node's."""
    return (*prefix, *(tree.tokens[each] for each in tree.path(node)))


def checked(rule: Rule, proposal: Proposal) -> Chooser:
    """The rule as production code makes it."""
    return lambda target, draft, randomness: verifier(rule, proposal, target, draft, randomness)


def unchecked(rule: RejectionRule) -> Chooser:
    """As `verifier`, for any rule and any proposal."""

    def chooser(target: OfNode, draft: OfNode, randomness: Randomness) -> Choose:
        def choose(node: int, children: Sequence[int]) -> Choice:
            if not children:
                return Choice(randomness.draw(target(node)))
            return rule(target(node), draft(node), children, randomness)

        return choose

    return chooser


@dataclass(frozen=True)
class Speculation:
    """Decoding with drafts, round after round."""

    toy: Toy
    shape: Tokens  # the parents of a tree's nodes
    proposal: Proposal
    chooser: Chooser
    drawn_from: Callable[[Floats], Floats] = lambda draft: draft
    edit: Callable[[TokenTree], TokenTree] = lambda tree: tree  # between drafting and verification

    def one_round(self, prefix: Tokens, randomness: Randomness) -> Tokens:
        tree = self.edit(self.propose(prefix, randomness))
        choose = self.chooser(
            lambda node: self.toy.target(text_to(tree, node, prefix)),
            lambda node: self.toy.draft(text_to(tree, node, prefix)),
            randomness,
        )
        verdict = verify_tree(tree, choose)
        return (*(tree.tokens[node] for node in verdict.nodes), verdict.token)

    def propose(self, prefix: Tokens, randomness: Randomness) -> TokenTree:
        """A tree of this shape, without the nodes for which the draft had no token left."""
        place = {ROOT: ROOT}
        tree = EMPTY
        for node, parent in enumerate(self.shape):
            if parent not in place:
                continue
            path = text_to(tree, place[parent], prefix)
            siblings = [t for t, p in zip(tree.tokens, tree.parents, strict=True) if p == place[parent]]
            token = self._propose_token(path, siblings, randomness)
            if token is not None:
                place[node] = len(tree)
                tree = TokenTree((*tree.tokens, token), (*tree.parents, place[parent]))
        return tree

    def _propose_token(self, path: Tokens, siblings: list[int], randomness: Randomness) -> int | None:
        draft = self.drawn_from(self.toy.draft(path))
        match self.proposal:
            case Proposal.INDEPENDENT:
                return randomness.draw(draft)
            case Proposal.WITHOUT_REPLACEMENT:
                left = draft.copy()
                left[siblings] = 0.0
                return randomness.draw(left) if left.any() else None
            case Proposal.TOP_K:
                return int(np.argsort(-draft)[len(siblings)]) if len(siblings) < draft.size else None
            case Proposal.KEYED:  # any token will do
                return (sum(path) + len(siblings) // 2) % draft.size

    def continuations(self, count: int, prefix: Tokens = ()) -> dict[Tokens, float]:
        """How likely each `count` tokens are, over as many rounds as they take."""
        found: dict[Tokens, float] = defaultdict(float)
        for tokens, chance in outcomes(lambda randomness: self.one_round(prefix, randomness)[:count]).items():
            if len(tokens) == count:
                found[tokens] += chance
            else:
                for rest, further in self.continuations(count - len(tokens), prefix + tokens).items():
                    found[tokens + rest] += chance * further
        return found

    def error(self, count: int = 2) -> float:
        return total_variation(self.continuations(count), self.toy.continuations(count))

    def decode(self, count: int, randomness: Randomness) -> Tokens:
        """As at run time: one round after another."""
        tokens: Tokens = ()
        while len(tokens) < count:
            tokens += self.one_round(tokens, randomness)
        return tokens[:count]


def speculation(rule: Rule, proposal: Proposal, shape: Tokens, **toy: object) -> Speculation:
    """As it should be, in a toy language."""
    return Speculation(Toy(**toy), shape, proposal, checked(rule, proposal))  # type: ignore[arg-type]
