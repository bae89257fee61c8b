"""What every source offers, and the parts they are made of."""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import EMPTY, ROOT, Shape, TokenTree

T = TypeVar("T")


class Source(Protocol):
    """Drafts without a draft model. Belongs to one tenant: see PerTenant. Not safe for several threads.

    What a source has no use for it inherits from here, and ignores.

    A step of the engine calls `learn` for what it committed, then `observe`, then `propose`: a source that measures
    how good it is must meet a token before it is told of it otherwise.
    """

    name: str

    def propose(self, request_id: str, tokens: Sequence[int], shape: Shape) -> TokenTree:
        """A tree to follow `tokens`, all the request's tokens, within `shape`; EMPTY if nothing comes to mind.

        `chances` are estimates, and those of siblings add up to 1 at most. Tokens that are not committed yet may be
        at the end: nothing is learned here.
        """

    def learn(self, request_id: str, tokens: Sequence[int], start: int) -> None:
        """`tokens[start:]` were committed since the last call; what comes before is context, at first the prompt."""
        return None

    def observe(self, tokens: npt.NDArray[np.integer], successors: npt.NDArray[np.integer]) -> None:
        """The target's likeliest tokens [n, k], best first, after each of `tokens` [n] that it has computed."""
        return None

    def forget(self, request_id: str) -> None:
        """The request is over. Unknown ones are ignored."""
        return None


class Rates:
    """How often each of several things came true, by number; recent notes weigh more than old ones.

    An estimate is (times true + WEIGHT · guess) / (times noted + WEIGHT).
    """

    WEIGHT = 8.0
    WINDOW = 1024.0  # once so many are noted, all of them count half

    def __init__(self, guesses: Iterable[float]) -> None:
        guesses = list(guesses)
        self._true = [self.WEIGHT * guess for guess in guesses]
        self._noted = [self.WEIGHT] * len(guesses)

    def __getitem__(self, index: int) -> float:
        return self._true[index] / self._noted[index]

    def note(self, index: int, came_true: bool) -> None:
        self._true[index] += came_true
        self._noted[index] += 1.0
        if self._noted[index] >= self.WINDOW:
            self._true[index] /= 2
            self._noted[index] /= 2


class Recent(Generic[T]):
    """At most `limit` things by name, made when first asked for; the one not asked for the longest gives way."""

    def __init__(self, make: Callable[[], T], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"room for at least one is needed, not for {limit}")
        self._make = make
        self._limit = limit
        self._things: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, name: str) -> bool:
        return name in self._things

    def things(self) -> Iterable[T]:
        return self._things.values()

    def get(self, name: str) -> T:
        if name not in self._things:
            if len(self._things) >= self._limit:
                self._things.popitem(last=False)
            self._things[name] = self._make()
        self._things.move_to_end(name)
        return self._things[name]

    def peek(self, name: str) -> T | None:
        """None if it is not there; does not count as asking."""
        return self._things.get(name)

    def pop(self, name: str) -> T | None:
        """Take it out; None if it is not there."""
        return self._things.pop(name, None)


State = TypeVar("State")
Expand = Callable[[State], Sequence[tuple[int, float, State]]]


def best_first(start: State, expand: Expand[State], shape: Shape) -> TokenTree:
    """The likeliest paths first, until the shape is full; ties go to what was found earlier.

    `expand` gives a state's successors, likeliest first: token, chance, and the state after it.
    """
    if min(shape.depth, shape.width, shape.nodes) < 1:
        return EMPTY
    tokens: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    slots: list[tuple[float, int, int, int, float, int, State]] = []
    found = 0  # keeps the order of what is equally likely, and states from being compared
    node, depth, value, state = ROOT, 0, -1.0, start  # values are negative: the heap gives the smallest
    while True:
        if depth < shape.depth:
            for token, chance, after in expand(state)[: shape.width]:
                heapq.heappush(slots, (value * chance, found, node, token, chance, depth + 1, after))
                found += 1
        if not slots or len(tokens) == shape.nodes:
            return TokenTree(tuple(tokens), tuple(parents), tuple(chances))
        value, _, parent, token, chance, depth, state = heapq.heappop(slots)
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        chances.append(chance)
