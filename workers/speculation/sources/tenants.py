"""Shared draft state, one for each tenant: nothing that one tenant wrote can show in another's drafts."""

from collections.abc import Callable

from workers.speculation.sources.base import Recent, Source


class PerTenant:
    """One source for each tenant, blank when the tenant is first heard of.

    At most `limit` tenants are remembered; the one not heard of the longest loses what its source has learned, which
    costs speed only. Requests without a tenant's name share the tenant "".
    """

    def __init__(self, make: Callable[[], Source], limit: int = 64) -> None:
        """`make` returns a new source that shares nothing with the ones before."""
        self._sources = Recent(make, limit)

    def __len__(self) -> int:
        return len(self._sources)

    def of(self, tenant: str) -> Source:
        """The tenant's own. Ask again at every step: it may have given way meanwhile."""
        return self._sources.get(tenant)

    def forget(self, tenant: str, request_id: str) -> None:
        """The request is over; its tenant's source stays, if it is still there."""
        source = self._sources.peek(tenant)
        if source is not None:
            source.forget(request_id)
