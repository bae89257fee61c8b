"""Every state machine's transitions in one place. An illegal move raises and changes nothing."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar


class IllegalMove(RuntimeError):
    """A transition that the table does not have: a defect of the caller."""


class RequestState(StrEnum):
    """A request in the router, see router/route.py."""

    QUEUED = "queued"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILLED = "prefilled"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"


REQUEST_MOVES: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.PLACED, RequestState.FAILED}),
    # A refused placement is tried elsewhere: PLACED again.
    RequestState.PLACED: frozenset(
        {RequestState.PLACED, RequestState.RESERVED, RequestState.DECODING, RequestState.FAILED}
    ),
    RequestState.RESERVED: frozenset({RequestState.PREFILLED, RequestState.PLACED, RequestState.FAILED}),
    RequestState.PREFILLED: frozenset({RequestState.DECODING, RequestState.PLACED, RequestState.FAILED}),
    RequestState.DECODING: frozenset({RequestState.FINISHED, RequestState.PLACED, RequestState.FAILED}),
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
}


class LeaseState(StrEnum):
    """KV blocks that wait for their contents, on the worker that holds them."""

    GRANTED = "granted"
    COMMITTED = "committed"  # all blocks came; the sequence owns them now
    CUT = "cut"  # no more will come; the sequence owns them, and what is missing is computed where they are
    ABORTED = "aborted"
    EXPIRED = "expired"


LEASE_MOVES: Mapping[LeaseState, frozenset[LeaseState]] = {
    LeaseState.GRANTED: frozenset(LeaseState) - {LeaseState.GRANTED},
    LeaseState.COMMITTED: frozenset(),
    LeaseState.CUT: frozenset(),
    LeaseState.ABORTED: frozenset(),
    LeaseState.EXPIRED: frozenset(),
}


class MoveState(StrEnum):
    """A decoding request on its way to another verify worker, see router/move.py."""

    RESERVING = "reserving"
    COPYING = "copying"  # the source decodes on
    RESUMING = "resuming"  # the source has paused
    MOVED = "moved"
    CALLED_OFF = "called_off"  # it decodes where it did, unless it has ended


MOVE_MOVES: Mapping[MoveState, frozenset[MoveState]] = {
    MoveState.RESERVING: frozenset({MoveState.COPYING, MoveState.CALLED_OFF}),
    MoveState.COPYING: frozenset({MoveState.RESUMING, MoveState.CALLED_OFF}),
    MoveState.RESUMING: frozenset({MoveState.MOVED, MoveState.CALLED_OFF}),
    MoveState.MOVED: frozenset(),
    MoveState.CALLED_OFF: frozenset(),
}


class WorkerState(StrEnum):
    """A worker process; a role switch is SERVING -> DRAINING -> SWITCHING -> SERVING under a new epoch."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    SWITCHING = "switching"
    STOPPED = "stopped"


WORKER_MOVES: Mapping[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset({WorkerState.SERVING, WorkerState.STOPPED}),
    WorkerState.SERVING: frozenset({WorkerState.DRAINING, WorkerState.STOPPED}),
    WorkerState.DRAINING: frozenset({WorkerState.SWITCHING, WorkerState.STOPPED}),
    WorkerState.SWITCHING: frozenset({WorkerState.SERVING, WorkerState.STOPPED}),
    WorkerState.STOPPED: frozenset(),
}

State = TypeVar("State", bound=StrEnum)


class Lifecycle(Generic[State]):
    """The current state of one thing, and the only way to change it."""

    def __init__(self, start: State, moves: Mapping[State, frozenset[State]]) -> None:
        self._state = start
        self._moves = moves

    @property
    def state(self) -> State:
        return self._state

    @property
    def ended(self) -> bool:
        """True in a state that nothing leaves."""
        return not self._moves[self._state]

    def move(self, to: State) -> None:
        """Raises IllegalMove, and stays where it is, if the table does not have the move."""
        if to not in self._moves[self._state]:
            raise IllegalMove(f"{type(to).__name__}: {self._state} -> {to} is not in the table")
        self._state = to
