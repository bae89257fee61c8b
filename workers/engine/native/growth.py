"""A token tree that grows, node by node, from a sequence whose tokens are being drafted.

Every computed node's KV lies in one block table together with that of all its ancestors: the sequence's own table, or a
branch of it. The first child of a node to be computed extends its parent's table; the others fork it.
"""

from array import array
from collections.abc import Sequence

from tidemill.core.tree import ROOT, TokenTree
from workers.engine.native.table import BlockTable, Branch

Copies = list[tuple[int, int]]  # blocks, and those their contents have to be copied to


class Growth:
    """The tree after the first `start` tokens of a sequence, and the KV of what of it was computed. Owns the branches.

    A branch is forked from position `start` on: nothing of the tree is shared between two tables.
    """

    def __init__(self, table: BlockTable, start: int) -> None:
        self.start = start
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.chances: list[float] = []
        self._depths: list[int] = []
        self._table = table
        self._home: dict[int, Branch | None] = {}  # computed nodes, and the root; None: the sequence's own table
        self._tip: dict[Branch | None, int] = {}  # the last node computed in each table
        self._barren: set[int] = set()  # nodes that found no place

    @property
    def tree(self) -> TokenTree:
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.chances))

    @property
    def done(self) -> frozenset[int]:
        """Nodes that were computed, or cannot be."""
        return frozenset(self._home) | self._barren

    def computed(self, node: int) -> bool:
        """True if the node's KV is here, and its children are known."""
        return node in self._home

    def depth(self, node: int) -> int:
        return 0 if node == ROOT else self._depths[node]

    def path_tokens(self, node: int) -> tuple[int, ...]:
        """From below the root to the node."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tuple(tokens[::-1])

    def blocks(self, node: int) -> "array[int]":
        """The table that holds a placed node's path."""
        home = self._home[node]
        return self._table.blocks if home is None else home.blocks

    def place(self, node: int) -> Copies | None:
        """Find a place for the KV of a node whose parent was computed; None if there is none.

        The node counts as computed from here on.
        """
        parent, copies = self.parents[node], []
        end = self.start + self._depths[node]
        home = self._home[parent]
        if self._tip[home] == parent:
            found = (self._table if home is None else home).grow(end)
        else:
            source, home = self.blocks(parent), self._table.branch(self.start, end)
            found = home is not None
            if home is not None:
                copies = list(zip(source[home.first :], home.blocks[home.first :], strict=False))
        if not found:
            self._barren.add(node)
            return None
        self._home[node], self._tip[home] = home, node
        return copies

    def place_root(self) -> None:
        """The root's row is the sequence's own last token, in its own table."""
        self._home[ROOT], self._tip[None] = None, ROOT

    def no_root(self) -> None:
        """There is no block for that row: nothing grows until the next tokens are committed."""
        self._barren.add(ROOT)

    def add(self, node: int, tokens: Sequence[int], chances: Sequence[float]) -> None:
        """What may follow a node, likeliest first."""
        self.tokens += tokens
        self.chances += chances
        self.parents += [node] * len(tokens)
        self._depths += [self.depth(node) + 1] * len(tokens)

    def follow(self, tokens: Sequence[int]) -> int:
        """These tokens were committed: the tree goes on where they lead, in the sequence's own table.

        Returns of how many tokens, from the old root's on, that table holds the KV.
        """
        path = [ROOT]
        for token in tokens:
            child = next((n for n, p in enumerate(self.parents) if p == path[-1] and self.tokens[n] == token), None)
            if child is None:
                break
            path.append(child)
        computed = [node for node in path if node in self._home]
        if computed:
            self._move_to(self._home[computed[-1]])
        if len(path) <= len(tokens):
            self.clear()
        else:
            self._keep_below(path[-1])
        self.start += len(tokens)
        return len(computed)

    def _move_to(self, branch: Branch | None) -> None:
        """The sequence's own table becomes the branch's. What was in it alone is off the path."""
        if branch is None:
            return
        self._table.follow(branch)
        self._home = {node: None if home is branch else home for node, home in self._home.items() if home is not None}

    def _keep_below(self, root: int) -> None:
        """Everything but what is below a node leaves the tree; that node is its root now."""
        depth, kept = self.depth(root), {root: ROOT}
        for node in range(root + 1, len(self.tokens)):
            if self.parents[node] in kept:
                kept[node] = len(kept) - 1
        nodes = list(kept)[1:]
        old, self._home = self._home, {kept[node]: home for node, home in self._home.items() if node in kept}
        self._tip = {self._home[node]: node for node in sorted(self._home)}  # a table's nodes are one below the other
        for branch in {*old.values()} - {*self._home.values()} - {None}:
            assert branch is not None
            branch.release()
        self._barren = {kept[node] for node in self._barren if node in kept}
        self.parents = [kept[self.parents[node]] for node in nodes]
        self.tokens = [self.tokens[node] for node in nodes]
        self.chances = [self.chances[node] for node in nodes]
        self._depths = [self._depths[node] - depth for node in nodes]

    def clear(self) -> None:
        """Forget the tree and free what it holds."""
        for branch in {*self._home.values()} - {None}:
            assert branch is not None
            branch.release()
        self.tokens, self.parents, self.chances, self._depths = [], [], [], []
        self._home, self._tip, self._barren = {}, {}, set()

    @property
    def held_blocks(self) -> list[int]:
        """Of all branches; for tests."""
        branches = [branch for branch in {*self._home.values()} if branch is not None]
        return [block for branch in branches for block in branch.blocks[branch.first :]]
