"""vLLM's scheduler (setting `scheduler_cls`), with what vLLM has no other place for."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus


class TidemillScheduler(Scheduler):
    """Takes drafts from outside, lets requests pause, and can take a step aside: one that computes nothing, but admits
    a single load and frees what finished transfers held. All of it runs on the engine's thread.
    """

    # vLLM's own; declared since it is not typed where Tidemill is checked.
    running: list[Request]
    waiting: RequestQueue
    kv_holding_waiting: RequestQueue
    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planned: SchedulerOutput | None = None  # the last step
        self._aside = False
        self._admit: str | None = None
        self._paused: set[str] = set()

    def propose(self, request_id: str, chain: list[int]) -> bool:
        """Verify these tokens in the request's next step; False if its next row does not decode."""
        if not self._decodes(request_id):
            return False
        super().update_draft_token_ids(DraftTokenIds([request_id], [chain]))
        return True

    def _decodes(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        if request is None or request.status != RequestStatus.RUNNING:
            return False
        return bool(request.num_computed_tokens == request.num_tokens - 1)

    def pause(self, request_id: str) -> bool:
        """Leave it out of steps; it keeps its blocks and its place. False if its next row does not decode."""
        if not self.propose(request_id, []):
            return False
        self._paused.add(request_id)
        return True

    def resume(self, request_id: str) -> None:
        """Nothing happens if it is not paused. To be called before a paused request is aborted, too."""
        self._paused.discard(request_id)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """What the model runner proposes after a step is of no interest: near the end of the context it is not even
        nothing, but zeros."""

    @contextmanager
    def aside(self, admit: str | None = None) -> Iterator[None]:
        """Steps meanwhile are taken aside; `admit`: the request whose load may start."""
        self._aside, self._admit = True, admit
        try:
            yield
        finally:
            self._aside, self._admit = False, None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._aside:
            self.planned = self._schedule_aside()
        else:
            with self._out_of_sight(self._paused):
                self.planned = super().schedule(throttle_prefills)
        return self.planned

    @contextmanager
    def _out_of_sight(self, paused: Iterable[str]) -> Iterator[None]:
        """Requests that run, but not in this step: nobody takes their blocks, nor their slots in the model runner."""
        hidden = [request for each in paused if (request := self.requests[each]) in self.running]
        self.running = [request for request in self.running if request not in hidden]
        self.max_num_active_reqs -= len(hidden)
        try:
            yield
        finally:
            self.running = [*hidden, *self.running]
            self.max_num_active_reqs += len(hidden)

    def _schedule_aside(self) -> SchedulerOutput:
        """All but the request to admit are out of sight meanwhile, so that it waits for none of them."""
        running, waiting, holding = self.running, self.waiting, self.kv_holding_waiting
        load = self.requests.get(self._admit) if self._admit is not None else None
        self.running = []
        self.waiting, self.kv_holding_waiting = create_request_queue(self.policy), create_request_queue(self.policy)
        if load is not None:
            waiting.remove_requests([load])
            self.waiting.add_request(load)
        try:
            output = super().schedule()
        finally:
            self.running, self.waiting, self.kv_holding_waiting = running, waiting, holding
            if load is not None:
                admitted = load.status == RequestStatus.WAITING_FOR_REMOTE_KVS
                (holding if admitted else waiting).add_request(load)
        assert output.total_num_scheduled_tokens == 0, "a step aside computes nothing"
        return output
