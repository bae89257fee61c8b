"""Every error an application can meet, and the one table that maps it to and from the wire.

TidemillError
├── InvalidRequest        the request can never succeed as it is
│   ├── ModelNotFound
│   └── MessageTooLarge
├── Unauthenticated       missing or wrong bearer token
├── Overloaded            queues are full; retry after a pause
├── DeadlineExceeded      the caller's deadline, or a stage's, passed
├── Cancelled             the caller went away
├── Unavailable           no worker or router could serve it; retry elsewhere or later
└── InternalError         a defect of ours; the message says where
"""

from dataclasses import dataclass
from typing import ClassVar


class TidemillError(Exception):
    """Base of all errors. `kind` is the stable name used on the wire, as metric label and in logs."""

    kind: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class InvalidRequest(TidemillError):
    """The request can never succeed as it is; the message says what was expected."""

    kind = "invalid_request"


class ModelNotFound(InvalidRequest):
    """No such model is served here."""

    kind = "model_not_found"


class MessageTooLarge(InvalidRequest):
    """The request, or the answer, is larger than the limit on one gRPC message."""

    kind = "message_too_large"


class Unauthenticated(TidemillError):
    """The bearer token is missing or wrong."""

    kind = "unauthenticated"


class Overloaded(TidemillError):
    """A bounded queue is full."""

    kind = "overloaded"
    retryable = True


class DeadlineExceeded(TidemillError):
    """The caller's deadline passed."""

    kind = "deadline_exceeded"


class Cancelled(TidemillError):
    """The caller went away or cancelled."""

    kind = "cancelled"


class Unavailable(TidemillError):
    """No worker could serve the request, or the router cannot be reached."""

    kind = "unavailable"
    retryable = True


class InternalError(TidemillError):
    """A defect of Tidemill."""

    kind = "internal"


@dataclass(frozen=True, slots=True)
class WireError:
    """One row of the table: error class and the name of its `grpc.StatusCode`."""

    error: type[TidemillError]
    status: str


# The kind travels as trailing metadata, because gRPC itself answers RESOURCE_EXHAUSTED and CANCELLED too.
KIND_METADATA_KEY = "tidemill-error"

TABLE: tuple[WireError, ...] = (
    WireError(InvalidRequest, "INVALID_ARGUMENT"),
    WireError(ModelNotFound, "NOT_FOUND"),
    WireError(MessageTooLarge, "RESOURCE_EXHAUSTED"),
    WireError(Unauthenticated, "UNAUTHENTICATED"),
    WireError(Overloaded, "RESOURCE_EXHAUSTED"),
    WireError(DeadlineExceeded, "DEADLINE_EXCEEDED"),
    WireError(Cancelled, "CANCELLED"),
    WireError(Unavailable, "UNAVAILABLE"),
    WireError(InternalError, "INTERNAL"),
)

_STATUS_BY_KIND = {row.error.kind: row.status for row in TABLE}
_ERROR_BY_KIND = {row.error.kind: row.error for row in TABLE}
_ERROR_BY_STATUS = {row.status: row.error for row in reversed(TABLE)} | {"UNIMPLEMENTED": InvalidRequest}


def status_of(error: TidemillError) -> str:
    """Name of the `grpc.StatusCode` an error travels as."""
    return _STATUS_BY_KIND[error.kind]


def error_from_wire(status: str, message: str, kind: str | None = None) -> TidemillError:
    """The error a gRPC status stands for; `kind` (trailing metadata) decides where a status has several meanings."""
    by_kind = _ERROR_BY_KIND.get(kind) if kind else None
    return (by_kind or _ERROR_BY_STATUS.get(status, InternalError))(message)
