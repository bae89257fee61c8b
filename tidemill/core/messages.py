"""What routers and workers say to each other, as plain types; `core/wire.py` turns them into protobuf and back.

A router and a worker share one long-lived stream. The router sends commands; the worker answers each turn of its
engine loop with at most one `StepReport`, which carries the events of all of that router's requests.
Workers that hand KV over talk to each other over the KV link only; a verify worker asks a draft worker for drafts over
a stream of their own, at most one `DraftCall` and one `DraftReply` a step.
"""

from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.model import Peer, Request, Role, WorkerId, WorkerLoad
from tidemill.core.tree import Shape, TokenTree
from tidemill.types import FinishReason, TokenLogprobs


class Refusal(StrEnum):
    """Why a worker does not take a request; another worker may."""

    NO_BLOCKS = "no_blocks"
    QUEUE_FULL = "queue_full"
    WRONG_ROLE = "wrong_role"
    DRAINING = "draining"
    TOO_LONG = "too_long"  # longer than the whole KV pool


class Failure(StrEnum):
    """Why a request cannot go on where it is; the router takes it elsewhere from the tokens already sent."""

    LEASE_EXPIRED = "lease_expired"
    KV_LINK = "kv_link"  # the link to the peer broke or timed out
    ROLE_CHANGED = "role_changed"
    ENGINE = "engine"  # the engine's step raised
    STOPPING = "stopping"


class Stay(StrEnum):
    """Why a worker does not let a request go; it decodes on there."""

    NOT_DECODING = "not_decoding"  # its KV is being computed: it has not begun, or was preempted
    NO_ROOM = "no_room"  # it has grown beyond its lease
    KV_LINK = "kv_link"  # the link to the lease's holder broke before all was sent


@dataclass(frozen=True, slots=True)
class Lease:
    """KV blocks a verify worker holds for a request whose KV will come from elsewhere.

    Owner and only party that frees: the engine thread of the worker in `holder`. Blocks before `first_block` were
    found in its prefix cache and are not sent. A lease ends as committed (all blocks came), cut (the holder computes
    what did not come), aborted or expired.
    """

    id: int
    request_id: str
    holder: Peer
    first_block: int
    end_block: int
    ttl_s: float


# --- router -> worker -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hold blocks for a request whose KV comes over a link, then decode it. Answer: `LeaseGranted` or `Refused`.

    With `headroom_tokens` the request decodes elsewhere meanwhile, and there are blocks for so many tokens more. It
    decodes here once its last blocks have come, and those tokens with them.
    """

    request: Request
    ttl_s: float
    drafter: Peer | None = None
    headroom_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Submit:
    """Prefill and decode a request on this verify worker. Answer: tokens, or `Refused`."""

    request: Request
    drafter: Peer | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute the KV of all tokens but the last and send it to the lease's holder. Answer: `Prefilled`."""

    request: Request
    lease: Lease


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop everything held for a request, at whatever stage; harmless if unknown. Answer: `Released`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Proceed:
    """No more KV will come for a reserved request: compute what is missing and decode it. Answer: tokens.

    Nothing happens if all of it came, or the verify worker has found out by itself.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Send a decoding request's KV to the lease's holder while it decodes on; with little left, pause it and send that
    too, with the tokens that came after the `known_tokens` of prompt and output that the holder was told.

    Answer: `Paused` or `Staying`; none if the request has ended.
    """

    request_id: str
    lease: Lease
    known_tokens: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Decode a request on that was to be moved away. Never answered; harmless if unknown, or if it decodes anyway."""

    request_id: str


NewWork = Reserve | Submit | Prefill
Command = NewWork | Cancel | Proceed | Migrate | Resume


# --- worker -> router -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """Answer to `Reserve`."""

    request_id: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker did not take the request and holds nothing of it."""

    request_id: str
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Prefilled:
    """All KV of a request is computed and handed to the link. Seconds are the prefill worker's own."""

    request_id: str
    queue_s: float  # from the command to the first chunk's step
    prefill_s: float  # from then to the end of the last chunk's step


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds a verify worker spent before a request's first token; comes with its first `Tokens`."""

    queue_s: float  # waiting for blocks or a place in a step (in-place prefill only)
    prefill_s: float  # computing the prompt here (in-place prefill only)
    decode_s: float  # from the KV being complete to the first token


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step gave one request. A finished request's blocks are already free."""

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    drafted: int = 0  # draft tokens verified in this step
    accepted: int = 0
    finish: FinishReason | None = None
    first: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gave the request up and holds nothing of it."""

    request_id: str
    failure: Failure
    detail: str


@dataclass(frozen=True, slots=True)
class Paused:
    """All KV of a request is with the link to its lease. It is kept, and gets no token here, until `Resume`."""

    request_id: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class Staying:
    """The request was not moved to this lease, and decodes on here."""

    request_id: str
    lease_id: int
    reason: Stay


@dataclass(frozen=True, slots=True)
class Released:
    """Answer to `Cancel`: the worker holds no block and no lease for the request."""

    request_id: str


Event = LeaseGranted | Refused | Prefilled | Tokens | Failed | Paused | Staying | Released


@dataclass(frozen=True, slots=True)
class StepReport:
    """One turn of a worker's loop, for one router. `sequence` counts the reports of the stream from 0."""

    worker: WorkerId
    role: Role
    accepting: bool
    sequence: int  # within a stream; the same again: the worker lives, and its engine has not come round since
    load: WorkerLoad
    events: tuple[Event, ...] = ()


# --- verify worker <-> draft worker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DraftOpen:
    """A request the draft worker should keep its own KV for, starting now with all its tokens."""

    request: Request


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """The request's newly committed tokens, and what is wanted after them.

    `tokens` follow position `base` (0 = first prompt token): committed length is `base + len(tokens)`. The tree of
    `shape` is sent as soon as it is there. Then the draft worker goes on, without being asked, to what may be wanted
    after the verdict on it, and sends that too: `ahead` times as much again.
    """

    request_id: str
    base: int
    tokens: tuple[int, ...]
    shape: Shape
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class DraftCall:
    """One message a step: everything a verify worker has to say to a draft worker."""

    round: int
    opens: tuple[DraftOpen, ...] = ()
    asks: tuple[DraftAsk, ...] = ()
    closes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """A token tree after the first `base` tokens of a request; `prefix` is their `prefix_hash`.

    It is of use as long as the request's tokens begin with those `base`, and go on along one of the tree's paths.
    """

    request_id: str
    base: int
    tree: TokenTree
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class DraftReply:
    """All calls up to `round` were carried out. Drafts come as they are ready, so some belong to later calls already,
    and some come unasked. The draft worker has lost track of the requests in `lost`, and will draft no more for them.
    `step_s`: what a step of its engine takes, on average; 0 before the first.
    """

    round: int
    drafts: tuple[Draft, ...] = ()
    lost: tuple[str, ...] = ()
    step_s: float = 0.0
