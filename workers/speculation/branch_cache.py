"""Drafts that came before they were wanted, or after: what is left of each is kept until the request's tokens leave it.

A draft worker goes on drafting while its last tree is being verified, so its trees hold what is wanted after the likely
verdicts. Once a verdict is known, the branch that begins with the accepted tokens and the target's own next token is
the draft for the next step; it is here already, and no round trip is waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.messages import Draft
from tidemill.core.tree import EMPTY, prefix_hash
from workers.speculation.branches import Branch

REMOTE = "draft"  # the source that draft workers are
BASES = 16  # lengths a request's draft may refer to: those last told to the draft worker


class Fate(StrEnum):
    """What became of a draft that came; metric label."""

    FRESH = "fresh"  # for the tokens there are now
    BRANCH = "branch"  # for earlier ones; the rest of it still fits
    STALE = "stale"  # for earlier ones, and the tokens went another way
    FOREIGN = "foreign"  # for a request, or tokens, that this worker knows nothing of


NOTHING = Branch.of(EMPTY, REMOTE, Fate.BRANCH)


@dataclass(slots=True)
class _Known:
    tokens: list[int]  # all of the request's; whoever opened it appends what is committed
    hashes: dict[int, int]  # length -> hash of so many tokens, for lengths told to the draft worker, shortest first
    best: Branch = NOTHING  # after all tokens


class BranchCache:
    """The best branch at hand for each request that drafts."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def open(self, request_id: str, tokens: list[int]) -> None:
        """A request with these tokens so far, all of which are told to the draft worker.

        The list is the caller's, who appends to it before `commit`.
        """
        self._known[request_id] = _Known(tokens, {len(tokens): prefix_hash(tokens)})

    def close(self, request_id: str) -> None:
        self._known.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        """The request has these tokens more: only the branch that begins with them is of use, without them."""
        known = self._known.get(request_id)
        if known is not None:
            known.best = known.best.after(tokens, Fate.BRANCH) or NOTHING

    def told(self, request_id: str) -> None:
        """The draft worker is being told all tokens there are; its drafts may refer to them from now on."""
        known = self._known.get(request_id)
        if known is not None and len(known.tokens) not in known.hashes:
            last = next(reversed(known.hashes))
            known.hashes[len(known.tokens)] = prefix_hash(known.tokens[last:], known.hashes[last])
            if len(known.hashes) > BASES:
                del known.hashes[next(iter(known.hashes))]

    def put(self, draft: Draft) -> Fate:
        """Keep what of a draft still fits, if it is more than what is here."""
        known = self._known.get(draft.request_id)
        if known is None or known.hashes.get(draft.base) != draft.prefix:
            return Fate.FOREIGN
        fate = Fate.FRESH if draft.base == len(known.tokens) else Fate.BRANCH
        branch = Branch.of(draft.tree, REMOTE, fate).after(known.tokens[draft.base :], fate)
        if branch is None:
            return Fate.STALE
        if branch.expected_tokens() >= known.best.expected_tokens():
            known.best = branch
        return fate

    def branch(self, request_id: str) -> Branch:
        """What is at hand for a request: FRESH, drafted from all its tokens, or a BRANCH of an earlier draft."""
        known = self._known.get(request_id)
        return known.best if known is not None else NOTHING
