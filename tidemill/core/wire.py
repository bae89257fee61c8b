"""Control protobuf <-> model types, once each way. The only place that knows control_pb2's fields."""

from dataclasses import fields

from tidemill.core import control_pb2 as pb
from tidemill.core.messages import (
    Cancel,
    Command,
    Draft,
    DraftAsk,
    DraftCall,
    DraftOpen,
    DraftReply,
    Event,
    Failed,
    Failure,
    FirstToken,
    Lease,
    LeaseGranted,
    Migrate,
    Paused,
    Prefill,
    Prefilled,
    Proceed,
    Refusal,
    Refused,
    Released,
    Reserve,
    Resume,
    Stay,
    Staying,
    StepReport,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, SloClass, WorkerId, WorkerLoad
from tidemill.core.tree import Shape, TokenTree
from tidemill.types import FinishReason, SamplingParams, TokenLogprobs

_LOAD_FIELDS = tuple(field.name for field in fields(WorkerLoad))
_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))


def worker_id_to_pb(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(name=worker.name, epoch=worker.epoch)


def worker_id_from_pb(message: pb.WorkerId) -> WorkerId:
    return WorkerId(message.name, message.epoch)


def peer_to_pb(peer: Peer | None) -> pb.Peer | None:
    return None if peer is None else pb.Peer(id=worker_id_to_pb(peer.id), address=peer.address)


def peer_from_pb(message: pb.Peer) -> Peer:
    return Peer(worker_id_from_pb(message.id), message.address)


def load_to_pb(load: WorkerLoad) -> pb.Load:
    return pb.Load(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def load_from_pb(message: pb.Load) -> WorkerLoad:
    return WorkerLoad(*(getattr(message, name) for name in _LOAD_FIELDS))


def request_to_pb(request: Request) -> pb.Request:
    sampling = pb.Sampling(**{name: getattr(request.sampling, name) for name in _SAMPLING_FIELDS})
    return pb.Request(
        id=request.id,
        prompt=request.prompt,
        output=request.output,
        sampling=sampling,
        slo=pb.Slo(name=request.slo.name, ttft_s=request.slo.ttft_s, tpot_s=request.slo.tpot_s),
        tenant=request.tenant,
    )


def request_from_pb(message: pb.Request) -> Request:
    sampling = message.sampling
    values = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS}
    values["stop"] = tuple(sampling.stop)
    values["stop_token_ids"] = tuple(sampling.stop_token_ids)
    for name in ("seed", "logprobs"):
        values[name] = getattr(sampling, name) if sampling.HasField(name) else None
    return Request(
        message.id,
        tuple(message.prompt),
        SamplingParams(**values),
        tuple(message.output),
        SloClass(message.slo.name, message.slo.ttft_s, message.slo.tpot_s),
        message.tenant,
    )


def lease_to_pb(lease: Lease) -> pb.Lease:
    return pb.Lease(
        id=lease.id,
        request_id=lease.request_id,
        holder=peer_to_pb(lease.holder),
        first_block=lease.first_block,
        end_block=lease.end_block,
        ttl_s=lease.ttl_s,
    )


def lease_from_pb(message: pb.Lease) -> Lease:
    return Lease(
        message.id,
        message.request_id,
        peer_from_pb(message.holder),
        message.first_block,
        message.end_block,
        message.ttl_s,
    )


def command_to_pb(command: Command) -> pb.Command:  # noqa: PLR0911 - one for each kind
    match command:
        case Reserve(request, ttl_s, drafter, headroom_tokens):
            return pb.Command(
                reserve=pb.Reserve(
                    request=request_to_pb(request),
                    ttl_s=ttl_s,
                    drafter=peer_to_pb(drafter),
                    headroom_tokens=headroom_tokens,
                )
            )
        case Submit(request, drafter):
            return pb.Command(submit=pb.Submit(request=request_to_pb(request), drafter=peer_to_pb(drafter)))
        case Prefill(request, lease):
            return pb.Command(prefill=pb.Prefill(request=request_to_pb(request), lease=lease_to_pb(lease)))
        case Cancel(request_id):
            return pb.Command(cancel=pb.Cancel(request_id=request_id))
        case Migrate(request_id, lease, known_tokens):
            return pb.Command(
                migrate=pb.Migrate(request_id=request_id, lease=lease_to_pb(lease), known_tokens=known_tokens)
            )
        case Resume(request_id):
            return pb.Command(resume=pb.Resume(request_id=request_id))
        case Proceed(request_id):
            return pb.Command(proceed=pb.Proceed(request_id=request_id))


def command_from_pb(message: pb.Command) -> Command:  # noqa: PLR0911 - one for each kind
    """Raises ValueError for a kind this release does not know."""

    def drafter(of: pb.Reserve | pb.Submit) -> Peer | None:
        return peer_from_pb(of.drafter) if of.HasField("drafter") else None

    match message.WhichOneof("kind"):
        case "reserve":
            reserve = message.reserve
            return Reserve(request_from_pb(reserve.request), reserve.ttl_s, drafter(reserve), reserve.headroom_tokens)
        case "submit":
            return Submit(request_from_pb(message.submit.request), drafter(message.submit))
        case "prefill":
            return Prefill(request_from_pb(message.prefill.request), lease_from_pb(message.prefill.lease))
        case "cancel":
            return Cancel(message.cancel.request_id)
        case "migrate":
            migrate = message.migrate
            return Migrate(migrate.request_id, lease_from_pb(migrate.lease), migrate.known_tokens)
        case "resume":
            return Resume(message.resume.request_id)
        case "proceed":
            return Proceed(message.proceed.request_id)
        case kind:
            raise ValueError(f"unknown command {kind!r}: router and worker are of different releases")


def _tokens_to_pb(event: Tokens) -> pb.Tokens:
    message = pb.Tokens(
        request_id=event.request_id,
        tokens=event.tokens,
        drafted=event.drafted,
        accepted=event.accepted,
        finish=event.finish or "",
    )
    for each in event.logprobs:
        message.logprobs.add(
            token=each.token,
            logprob=each.logprob,
            top_tokens=[token for token, _ in each.top],
            top_logprobs=[logprob for _, logprob in each.top],
        )
    if event.first:
        message.first.queue_s = event.first.queue_s
        message.first.prefill_s = event.first.prefill_s
        message.first.decode_s = event.first.decode_s
        message.first.SetInParent()
    return message


def _tokens_from_pb(message: pb.Tokens) -> Tokens:
    first = message.first
    return Tokens(
        message.request_id,
        tuple(message.tokens),
        tuple(
            TokenLogprobs(each.token, each.logprob, tuple(zip(each.top_tokens, each.top_logprobs, strict=True)))
            for each in message.logprobs
        ),
        message.drafted,
        message.accepted,
        FinishReason(message.finish) if message.finish else None,
        FirstToken(first.queue_s, first.prefill_s, first.decode_s) if message.HasField("first") else None,
    )


def event_to_pb(event: Event) -> pb.Event:  # noqa: PLR0911 - one for each kind
    match event:
        case Tokens():
            return pb.Event(tokens=_tokens_to_pb(event))
        case LeaseGranted(request_id, lease):
            return pb.Event(lease_granted=pb.LeaseGranted(request_id=request_id, lease=lease_to_pb(lease)))
        case Refused(request_id, reason):
            return pb.Event(refused=pb.Refused(request_id=request_id, reason=reason))
        case Prefilled(request_id, queue_s, prefill_s):
            return pb.Event(prefilled=pb.Prefilled(request_id=request_id, queue_s=queue_s, prefill_s=prefill_s))
        case Failed(request_id, failure, detail):
            return pb.Event(failed=pb.Failed(request_id=request_id, failure=failure, detail=detail))
        case Paused(request_id, lease_id):
            return pb.Event(paused=pb.Paused(request_id=request_id, lease_id=lease_id))
        case Staying(request_id, lease_id, reason):
            return pb.Event(staying=pb.Staying(request_id=request_id, lease_id=lease_id, reason=reason))
        case Released(request_id):
            return pb.Event(released=pb.Released(request_id=request_id))


def event_from_pb(message: pb.Event) -> Event:  # noqa: PLR0911 - one for each kind
    """Raises ValueError for a kind this release does not know."""
    match message.WhichOneof("kind"):
        case "tokens":
            return _tokens_from_pb(message.tokens)
        case "lease_granted":
            return LeaseGranted(message.lease_granted.request_id, lease_from_pb(message.lease_granted.lease))
        case "refused":
            return Refused(message.refused.request_id, Refusal(message.refused.reason))
        case "prefilled":
            return Prefilled(message.prefilled.request_id, message.prefilled.queue_s, message.prefilled.prefill_s)
        case "failed":
            return Failed(message.failed.request_id, Failure(message.failed.failure), message.failed.detail)
        case "paused":
            return Paused(message.paused.request_id, message.paused.lease_id)
        case "staying":
            return Staying(message.staying.request_id, message.staying.lease_id, Stay(message.staying.reason))
        case "released":
            return Released(message.released.request_id)
        case kind:
            raise ValueError(f"unknown event {kind!r}: router and worker are of different releases")


def report_to_pb(report: StepReport) -> pb.StepReport:
    return pb.StepReport(
        worker=worker_id_to_pb(report.worker),
        role=report.role,
        accepting=report.accepting,
        sequence=report.sequence,
        load=load_to_pb(report.load),
        events=[event_to_pb(event) for event in report.events],
    )


def report_from_pb(message: pb.StepReport) -> StepReport:
    return StepReport(
        worker_id_from_pb(message.worker),
        Role(message.role),
        message.accepting,
        message.sequence,
        load_from_pb(message.load),
        tuple(event_from_pb(event) for event in message.events),
    )


def draft_call_to_pb(call: DraftCall) -> pb.DraftCall:
    return pb.DraftCall(
        round=call.round,
        opens=[request_to_pb(each.request) for each in call.opens],
        asks=[
            pb.DraftAsk(
                request_id=ask.request_id,
                base=ask.base,
                tokens=ask.tokens,
                shape=pb.Shape(depth=ask.shape.depth, width=ask.shape.width, nodes=ask.shape.nodes),
                ahead=ask.ahead,
            )
            for ask in call.asks
        ],
        closes=call.closes,
    )


def draft_call_from_pb(message: pb.DraftCall) -> DraftCall:
    return DraftCall(
        message.round,
        tuple(DraftOpen(request_from_pb(each)) for each in message.opens),
        tuple(
            DraftAsk(
                ask.request_id,
                ask.base,
                tuple(ask.tokens),
                Shape(ask.shape.depth, ask.shape.width, ask.shape.nodes),
                ask.ahead,
            )
            for ask in message.asks
        ),
        tuple(message.closes),
    )


def draft_reply_to_pb(reply: DraftReply) -> pb.DraftReply:
    return pb.DraftReply(
        round=reply.round,
        drafts=[
            pb.Draft(
                request_id=each.request_id,
                base=each.base,
                tokens=each.tree.tokens,
                parents=each.tree.parents,
                chances=each.tree.chances,
                prefix=each.prefix,
            )
            for each in reply.drafts
        ],
        lost=reply.lost,
        step_s=reply.step_s,
    )


def draft_reply_from_pb(message: pb.DraftReply) -> DraftReply:
    """Raises ValueError if a tree is none."""
    return DraftReply(
        message.round,
        tuple(
            Draft(
                each.request_id,
                each.base,
                TokenTree(tuple(each.tokens), tuple(each.parents), tuple(each.chances)),
                each.prefix,
            )
            for each in message.drafts
        ),
        tuple(message.lost),
        message.step_s,
    )
