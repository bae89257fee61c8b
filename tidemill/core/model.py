"""Requests, workers and decisions as everyone sees them: frozen, standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Generic, TypeVar

from tidemill.types import SamplingParams

Choice = TypeVar("Choice")


class Role(StrEnum):
    """What a worker does with its accelerator."""

    PREFILL = "prefill"
    DRAFT = "draft"
    VERIFY = "verify"  # verifies drafts, and decodes without them


@dataclass(frozen=True, slots=True)
class WorkerId:
    """A worker's incarnation: a restart or a role switch gives a larger epoch."""

    name: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.name}@{self.epoch}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker and where its control service listens (`host:port`)."""

    id: WorkerId
    address: str


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as the controller publishes it to the routers."""

    peer: Peer
    role: Role


@dataclass(frozen=True, slots=True)
class SloClass:
    """A latency goal. The name is a metric label: a class of the settings, or "custom" for a request's own goal."""

    name: str
    ttft_s: float
    tpot_s: float


DEFAULT_SLO = SloClass("default", 1.0, 0.1)


@dataclass(frozen=True, slots=True)
class Request:
    """A request inside the system: tokens, not text; the seed is always set.

    `output` holds the tokens already sent to the client: empty at first, filled when the request goes on elsewhere
    after a failure. Positions, and so the sampling noise, count from the first prompt token.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    output: tuple[int, ...] = ()
    slo: SloClass = DEFAULT_SLO
    tenant: str = ""  # what is learned from its texts is used for no other

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.prompt + self.output

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV is needed before the next token can be decoded: all but the last.

        The last one is the first row of the first decode step, on the verify worker; so nothing is computed twice.
        """
        return len(self.prompt) + len(self.output) - 1

    def resumed(self, sent: Iterable[int]) -> "Request":
        """The same request after `sent` more tokens reached the client."""
        return replace(self, output=self.output + tuple(sent))


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker says of itself after each step."""

    queued_requests: int = 0
    queued_tokens: int = 0  # prompt tokens not yet computed
    running_requests: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0  # of sequences; cached prefixes that can be evicted are free
    kv_blocks_leased: int = 0
    block_size: int = 16
    steps: int = 0
    step_s: float = 0.0  # duration of the last step
    busy_s: float = 0.0  # spent in steps since the worker began


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker as a policy sees it: what it reported, and what the router has sent it since."""

    peer: Peer
    role: Role
    load: WorkerLoad = field(default_factory=WorkerLoad)
    inflight_requests: int = 0  # this router's own
    inflight_tokens: int = 0  # prompt tokens this router sent and that are not yet prefilled


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All workers that can be reached, at one moment."""

    workers: tuple[WorkerSnapshot, ...] = ()

    def of(self, role: Role) -> tuple[WorkerSnapshot, ...]:
        """The workers of one role."""
        return tuple(w for w in self.workers if w.role is role)


@dataclass(frozen=True, slots=True)
class Decision(Generic[Choice]):
    """A policy's outcome. The reason is an enum: metric label and log field."""

    choice: Choice
    reason: StrEnum
