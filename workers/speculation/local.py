"""Drafts that a verify worker makes itself: from texts it has seen, or with its model's own first layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tidemill.core.model import Request
from tidemill.core.settings import SpeculationSettings
from tidemill.core.tree import EMPTY, Shape, TokenTree
from workers.engine.base import Engine, Successors
from workers.speculation.branches import Branch
from workers.speculation.sources.base import Source
from workers.speculation.sources.lookup import Lookup
from workers.speculation.sources.recycling import SUCCESSORS, Recycling
from workers.speculation.sources.tenants import PerTenant
from workers.speculation.sources.trigram import Trigram

EARLY_LAYERS = "early_layers"
RECYCLING = "recycling"
LOCAL = "local"  # how their branches are come by
Asked = tuple[Request, list[int], int]  # a request that decodes, all its tokens, and how many more are of use


class LocalDrafts:
    """All sources of one verify worker that need no other; each tenant's texts are its own."""

    def __init__(self, engine: Engine, settings: SpeculationSettings) -> None:
        self._engine = engine
        self._early_layers = settings.early_layers if EARLY_LAYERS in settings.sources else 0
        makers: dict[str, Callable[[], Source]] = {
            "lookup": Lookup,
            RECYCLING: lambda: Recycling(engine.info.vocab_size),
            "trigram": Trigram,
        }
        self._sources: dict[str, PerTenant] = {
            name: PerTenant(makers[name]) for name in settings.sources if name in makers
        }
        engine.tell_successors(SUCCESSORS if RECYCLING in self._sources else 0)

    @property
    def sources(self) -> tuple[str, ...]:
        """Their names."""
        return (*self._sources, *([EARLY_LAYERS] if self._early_layers else []))

    def propose(self, asked: Sequence[Asked], shape: Shape) -> list[list[Branch]]:
        """For each source the trees of all requests, within `shape`."""
        return [
            [Branch.of(tree, source, LOCAL) for tree in self._trees(source, asked, shape)] for source in self.sources
        ]

    def _trees(self, source: str, asked: Sequence[Asked], shape: Shape) -> list[TokenTree]:
        if source == EARLY_LAYERS:
            found = self._foresee(asked, shape)
            return [found.get(request.id, EMPTY) for request, _, _ in asked]
        texts = self._sources[source]
        return [
            texts.of(request.tenant).propose(request.id, tokens, replace(shape, depth=min(shape.depth, room)))
            for request, tokens, room in asked
        ]

    def _foresee(self, asked: Sequence[Asked], shape: Shape) -> dict[str, TokenTree]:
        if not self._early_layers or not shape.depth:
            return {}
        wanted = {request.id: room for request, _, room in asked if room > 0}
        layers = min(self._early_layers, self._engine.info.kv.layers)
        found = self._engine.foresee(list(wanted), shape.depth, shape.width, layers)
        return {request_id: tree.up_to(wanted[request_id]) for request_id, tree in found.items()}

    def learn(self, request: Request, tokens: Sequence[int], new: int, successors: Iterable[Successors]) -> None:
        """The last `new` of a request's tokens were committed; `successors` are what the target found likely."""
        for source in self._sources.values():
            source.of(request.tenant).learn(request.id, tokens, len(tokens) - new)
        told = list(successors)
        if told:
            computed = np.array([token for token, _ in told])
            self._sources[RECYCLING].of(request.tenant).observe(computed, np.array([after for _, after in told]))

    def forget(self, request: Request) -> None:
        """The request is over."""
        for source in self._sources.values():
            source.forget(request.tenant, request.id)
