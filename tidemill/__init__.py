"""Tidemill's client library: `Client` and `AsyncClient`, what they take and what they hand out.

Importing this package needs grpcio and protobuf, nothing else: no torch, no Ray.
"""

from tidemill._call import Tls
from tidemill.aio import AsyncClient
from tidemill.client import Client
from tidemill.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    ModelNotFound,
    Overloaded,
    TidemillError,
    Unauthenticated,
    Unavailable,
)
from tidemill.types import (
    Chunk,
    Completion,
    FinishReason,
    Message,
    ModelCard,
    Route,
    Sameness,
    SamplingParams,
    Slo,
    Speculation,
    Summary,
    Timing,
    TokenLogprobs,
)

__all__ = [
    "Client",
    "AsyncClient",
    "Tls",
    "SamplingParams",
    "Slo",
    "Message",
    "Chunk",
    "Completion",
    "Summary",
    "Timing",
    "Route",
    "Speculation",
    "TokenLogprobs",
    "FinishReason",
    "Sameness",
    "ModelCard",
    "TidemillError",
    "InvalidRequest",
    "ModelNotFound",
    "MessageTooLarge",
    "Unauthenticated",
    "Overloaded",
    "DeadlineExceeded",
    "Cancelled",
    "Unavailable",
    "InternalError",
]
