"""One picture of the cluster from those of its routers."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from cluster.policy.levelling import Held, Holder
from tidemill.core.model import Role
from tidemill.core.picture import Outlook
from tidemill.core.telemetry import (
    Decoding,
    History,
    Progress,
    RouterTelemetry,
    Traffic,
    Waiting,
    Window,
    WorkerTelemetry,
)


def merge(pictures: Sequence[RouterTelemetry]) -> RouterTelemetry:
    """Requests add up: each belongs to one router. Workers are everybody's: the newest word of each counts."""
    if len(pictures) == 1:
        return pictures[0]
    windows = zip_longest(*(picture.windows for picture in pictures), fillvalue=Window(0.0))
    waiting = [picture.waiting for picture in pictures]
    return RouterTelemetry(
        tuple(_window(each) for each in windows),
        Waiting(
            sum(each.requests for each in waiting),
            sum(each.tokens for each in waiting),
            max((each.oldest_of_goal for each in waiting), default=0.0),
        ),
        _workers(worker for picture in pictures for worker in picture.workers),
    )


def outlook(of_routers: Sequence[Outlook]) -> Outlook:
    """Of the whole cluster, from those of its routers: their addresses as clients take them."""
    fronts, histories = [each.front for each in of_routers], [each.history for each in of_routers]
    front = replace(
        fronts[0],
        address=",".join(each.address for each in fronts),
        active=sum(each.active for each in fronts),
        queued=sum(each.queued for each in fronts),
    )
    classes: dict[str, tuple[Traffic, ...]] = {}
    roles: dict[Role, tuple[Progress, ...]] = {}
    for history in histories:
        for name, points in history.classes:
            known = classes.get(name)
            classes[name] = tuple(map(operator.add, known, points)) if known else points
        for role, seen in history.roles:
            before = roles.get(role)
            roles[role] = tuple(map(Progress.beside, before, seen)) if before else seen
    return Outlook(
        front,
        merge([each.telemetry for each in of_routers]),
        History(histories[0].step_s, tuple(sorted(classes.items())), tuple(roles.items())),
        max((each.decisions for each in of_routers), key=lambda told: told[-1].at if told else 0.0),
    )


def holders(workers: Iterable[WorkerTelemetry], decoding: Iterable[Decoding]) -> list[Holder]:
    """The verify workers as levelling sees them: what decodes there, in blocks."""
    found = {each.worker: each for each in workers if each.role is Role.VERIFY}
    held: dict[str, list[Held]] = {each.name: [] for each in found}
    for request in decoding:
        worker = found.get(request.worker)
        if worker is not None:
            blocks = -(-request.tokens // worker.load.block_size)
            held[request.worker.name].append(Held(request.request_id, blocks))
    return [
        Holder(
            name.name,
            worker.load.kv_blocks_total,
            tuple(held[name.name]),
            -(-worker.load.queued_tokens // worker.load.block_size),
            not worker.accepting,
        )
        for name, worker in found.items()
    ]


def _window(windows: Sequence[Window]) -> Window:
    """As long as the longest: a router that began later had no requests before."""
    classes: dict[str, Traffic] = {}
    roles: dict[Role, Progress] = {}
    for window in windows:
        for name, traffic in window.classes:
            classes[name] = classes[name] + traffic if name in classes else traffic
        for role, progress in window.roles:
            roles[role] = roles[role].beside(progress) if role in roles else progress
    return Window(max(window.seconds for window in windows), tuple(sorted(classes.items())), tuple(roles.items()))


def _workers(workers: Iterable[WorkerTelemetry]) -> tuple[WorkerTelemetry, ...]:
    """Of each the latest incarnation, as it was heard last; with what all routers saw of its progress."""
    found: dict[str, WorkerTelemetry] = {}
    for worker in workers:
        other = found.get(worker.worker.name)
        if other is None or other.worker.epoch < worker.worker.epoch:
            found[worker.worker.name] = worker
        elif other.worker.epoch == worker.worker.epoch:
            newer = min(worker, other, key=lambda each: each.heard_s)
            found[worker.worker.name] = WorkerTelemetry(
                newer.worker,
                newer.role,
                newer.accepting,
                newer.load,
                newer.heard_s,
                min(worker.stalled_s, other.stalled_s),
                worker.progress.beside(other.progress),
            )
    return tuple(found[name] for name in sorted(found))
