"""Token trees: what a draft proposes after the committed tokens of a request."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import lt

VERDICTS = 3  # likely outcomes of a round that drafts made ahead of it have room for
ROOT = -1  # stands for the last committed token
_PRIME, _FACTOR = (1 << 61) - 1, 0x1B873593CC9E2D51 % ((1 << 61) - 1)


def prefix_hash(tokens: Iterable[int], before: int = 0) -> int:
    """Tells one sequence of tokens from another, 61 bits; `before` is the hash of what they follow.

    A polynomial over the tokens (Rabin and Karp 1987): cheap to carry on by a few tokens, and the same everywhere.
    """
    state = before
    for token in tokens:
        state = (state * _FACTOR + token + 1) % _PRIME
    return state


@dataclass(frozen=True, slots=True)
class Shape:
    """Bounds of a tree: levels, children of a node, nodes in all."""

    depth: int
    width: int
    nodes: int

    def times(self, rounds: int) -> "Shape":
        """Room for so many rounds, the first of which is known and the others of which follow verdicts that are not.

        After each round comes a token that the target chooses alone; a further round has room for several verdicts.
        """
        return Shape(self.depth * rounds + rounds - 1, self.width, self.nodes * (1 + VERDICTS * (rounds - 1)))


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Node i carries `tokens[i]` and follows node `parents[i]` < i, or the root.

    `chances[i]` estimates how likely the target takes node i given that it took the node's parent; empty: not known.
    Siblings may carry the same token: independent draws do. Raises ValueError if it is no such tree.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    _path_chances: tuple[float, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or len(self.chances) not in (0, len(self.tokens)):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.parents)} parents, {len(self.chances)} chances")
        if min(self.parents, default=ROOT) < ROOT or not all(map(lt, self.parents, count())):
            raise ValueError(f"a parent comes before its child, or is {ROOT}; parents are {self.parents}")

    @classmethod
    def chain(cls, tokens: Sequence[int], chances: Sequence[float] = ()) -> "TokenTree":
        """One token after another."""
        return cls(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)), tuple(chances))

    def __len__(self) -> int:
        return len(self.tokens)

    def depths(self) -> list[int]:
        """Of each node; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def path(self, node: int) -> list[int]:
        """Nodes from below the root to `node`."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def child(self, parent: int, token: int) -> int | None:
        """The child of `parent` that carries `token`."""
        tokens, parents = self.tokens, self.parents
        for node in range(parent + 1, len(tokens)):
            if tokens[node] == token and parents[node] == parent:
                return node
        return None

    def find(self, tokens: Iterable[int], root: int = ROOT) -> int | None:
        """The node that `tokens` lead to from `root`, and `root` itself if there are none; None if no path has them."""
        node: int | None = root
        for token in tokens:
            if node is None:
                break
            node = self.child(node, token)
        return node

    def path_chances(self) -> tuple[float, ...]:
        """How likely the target takes the whole path to each node; 1 where chances are not known.

        Computed once: whoever grows a tree asks more than once.
        """
        if self._path_chances is None:
            chances: list[float] = []
            for own, parent in zip(self.chances or (1.0,) * len(self.tokens), self.parents, strict=True):
                chances.append(own if parent < 0 else own * chances[parent])
            object.__setattr__(self, "_path_chances", tuple(chances))
        assert self._path_chances is not None
        return self._path_chances

    @classmethod
    def _known(cls, tokens: tuple[int, ...], parents: tuple[int, ...], chances: tuple[float, ...]) -> "TokenTree":
        """One that is derived from a tree, and so is one: it is not checked again."""
        tree = object.__new__(cls)
        put = object.__setattr__
        put(tree, "tokens", tokens)
        put(tree, "parents", parents)
        put(tree, "chances", chances)
        put(tree, "_path_chances", None)
        return tree

    def best_chain(self, longest: int) -> list[int]:
        """Tokens from the root on, each that of the child with the best chance, at most `longest`.

        Where chances are not known the first child counts.
        """
        best: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            if parent not in best or (self.chances and self.chances[node] > self.chances[best[parent]]):
                best[parent] = node
        chain: list[int] = []
        node = ROOT
        while node in best and len(chain) < longest:
            node = best[node]
            chain.append(self.tokens[node])
        return chain

    def subset(self, nodes: Iterable[int], root: int = ROOT) -> "TokenTree":
        """The tree of these nodes, in their order; every node's parent is among them, or is `root`."""
        kept = sorted(set(nodes))
        if len(kept) == len(self.tokens):
            return self
        place = dict(zip((root, *kept), count(ROOT), strict=False))
        return self._known(
            tuple([self.tokens[node] for node in kept]),
            tuple([place[self.parents[node]] for node in kept]),
            tuple([self.chances[node] for node in kept]) if self.chances else (),
        )

    def up_to(self, depth: int) -> "TokenTree":
        """Its nodes of at most this depth."""
        if len(self.tokens) <= depth:
            return self
        depths = self.depths()
        if max(depths, default=0) <= depth:
            return self
        return self.subset(node for node, own in enumerate(depths) if own <= depth)


EMPTY = TokenTree()
