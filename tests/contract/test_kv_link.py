"""What workers/kv/link.py promises, for links in memory and over torch.distributed."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.support import sending_process as sender
from tests.support.forked import Forked
from tidemill.core.model import Peer, WorkerId
from workers.engine.base import KvLayout
from workers.kv.link import Arrival, KvMessage, LinkError, Opener, Outgoing, SendingEnd
from workers.kv.memory import MemoryLinks
from workers.kv.torch_dist import BUFFERS, INLINE_TOKENS, MAX_LINKS_PER_SENDER, LinkHost, TorchSendingEnd

LAYOUT = KvLayout(2, 2, 16, 16, "float32")
SENDER = Peer(WorkerId("prefill-0", 1), "")
RECEIVER = Peer(WorkerId("verify-0", 1), "")
CPU = torch.device("cpu")


def wait_for(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


@dataclass
class Net:
    """A receiver, and how to reach it."""

    opener: Opener
    leave: Callable[[], None]  # the receiver goes away
    heard: list[Arrival] = field(default_factory=list)
    keep: bool = False  # arrivals stay where they are, as with an engine that does not come round

    def receive(self, arrival: Arrival) -> None:
        if arrival.kv is not None and not self.keep:
            copy = arrival.kv.clone()
            arrival.done()
            arrival = replace(arrival, kv=copy)
        self.heard.append(arrival)

    def wait(self, count: int, timeout_s: float = 20.0) -> list[Arrival]:
        wait_for(lambda: len(self.heard) >= count, timeout_s)
        return self.heard


def gloo_net(timeout_s: float = 5.0, stall_s: float = 5.0) -> tuple[Net, LinkHost]:
    net = Net(lambda _: pytest.fail("replaced below"), lambda: None)
    host = LinkHost("127.0.0.1", LAYOUT, CPU, timeout_s, stall_s, net.receive)
    net.opener = lambda to: TorchSendingEnd(host.rendezvous, host.accept(to.id, SENDER), CPU, timeout_s, stall_s)
    net.leave = host.close
    return net, host


@pytest.fixture(params=["memory", "gloo"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    if request.param == "memory":
        links = MemoryLinks()
        made = Net(links.opener(SENDER), lambda: links.leave(RECEIVER))
        links.listen(RECEIVER, made.receive)
        yield made
    else:
        made, host = gloo_net()
        yield made
        host.close()
        wait_for(lambda: not host.open_links)


def message(number: int, blocks: int = 3) -> KvMessage:
    return KvMessage(number, f"r{number}", number, torch.randn(2, blocks, 2, 2, 16, 16))


# --- the two ends -----------------------------------------------------------------------------------------------


def test_messages_come_whole_and_in_order(net: Net) -> None:
    messages = [message(i, blocks=1 + i % 5) for i in range(20)]
    end = net.opener(RECEIVER)
    for each in messages:
        end.send(each)
    heard = net.wait(20)
    assert [(each.lease_id, each.first_block) for each in heard] == [(i, i) for i in range(20)]
    for sent, arrived in zip(messages, heard, strict=True):
        assert arrived.kv is not None
        assert torch.equal(sent.kv, arrived.kv)
        assert arrived.sender == str(SENDER.id)
        assert arrived.link == heard[0].link
    end.close()


def test_the_tokens_that_end_a_move_come_with_its_last_blocks(net: Net) -> None:
    outputs = [None, *(tuple(range(count)) for count in (0, 1, INLINE_TOKENS, INLINE_TOKENS + 1, 400))]
    end = net.opener(RECEIVER)
    for number, output in enumerate(outputs):
        end.send(replace(message(number), output=output))
    assert [each.output for each in net.wait(len(outputs))] == outputs
    end.close()


def test_closing_is_heard(net: Net) -> None:
    end = net.opener(RECEIVER)
    end.send(message(1))
    net.wait(1)
    end.close()
    end.close()
    heard = net.wait(2)
    assert heard[1].kv is None
    assert heard[1].error
    assert heard[1].link == heard[0].link
    with pytest.raises(LinkError):
        end.send(message(2))


def test_a_receiver_that_leaves_is_noticed(net: Net) -> None:
    end = net.opener(RECEIVER)
    end.send(message(1))
    net.wait(1)
    net.leave()
    started = time.monotonic()
    with pytest.raises(LinkError):
        for number in range(100):  # the first may still find room in the system's buffers
            end.send(message(number))
    assert time.monotonic() - started < 3
    end.close()


def test_a_second_link_of_the_same_pair_has_another_name(net: Net) -> None:
    ends = [net.opener(RECEIVER), net.opener(RECEIVER)]
    for number, end in enumerate(ends):
        end.send(message(number))
        net.wait(number + 1)
    first, second = net.heard
    assert first.link != second.link
    ends[0].close()
    assert net.wait(3)[2].link == first.link, "the end of one is not the end of the other"
    ends[1].send(message(7))
    assert net.wait(4)[3].lease_id == 7
    ends[1].close()


# --- the thread that feeds them ---------------------------------------------------------------------------------


class Feed:
    """An Outgoing over a net, with a switch that breaks new links."""

    def __init__(self, net: Net) -> None:
        self.sent: list[int] = []
        self.failed: list[int] = []
        self.ends: list[SendingEnd] = []
        self.cut = False
        self._net = net
        self.outgoing = Outgoing(
            RECEIVER,
            lambda each, _: self.sent.append(each.lease_id),
            lambda each, _: self.failed.append(each.lease_id),
            self._open,
        )

    def _open(self, to: Peer) -> SendingEnd:
        if self.cut:
            raise LinkError("cut")
        self.ends.append(self._net.opener(to))
        return self.ends[-1]


@pytest.fixture
def feed(net: Net) -> Iterator[Feed]:
    made = Feed(net)
    yield made
    made.outgoing.close()
    assert made.outgoing.join(5.0), "the thread of a closed link is still there"


def test_outgoing_reports_what_was_sent_and_what_was_not(net: Net, feed: Feed) -> None:
    feed.outgoing.put(message(1))
    wait_for(lambda: feed.sent == [1])
    net.wait(1)
    feed.ends[0].close()
    feed.cut = True
    feed.outgoing.put(message(2))
    feed.outgoing.put(message(3))
    wait_for(lambda: feed.failed == [2, 3])
    assert feed.sent == [1]
    assert feed.outgoing.backlog_bytes == 0
    feed.cut = False
    feed.outgoing.put(message(4))
    wait_for(lambda: feed.sent == [1, 4])
    assert len(feed.ends) == 2, "the next message opens a new link"


def test_outgoing_opens_before_the_first_message_when_told(net: Net, feed: Feed) -> None:
    feed.outgoing.prepare()
    wait_for(lambda: feed.ends)
    feed.outgoing.put(message(1))
    wait_for(lambda: feed.sent == [1])
    assert len(feed.ends) == 1


def test_a_dropped_lease_is_not_sent(net: Net, feed: Feed) -> None:
    gate = threading.Event()
    real = net.opener
    net.opener = lambda to: (gate.wait(5), real(to))[1]  # type: ignore[func-returns-value]
    for number in (1, 2, 1, 3):
        feed.outgoing.put(message(number))
    feed.outgoing.drop(1)
    assert feed.outgoing.backlog_bytes == 2 * message(2).nbytes
    gate.set()
    wait_for(lambda: feed.sent == [2, 3])
    assert [each.lease_id for each in net.wait(2)] == [2, 3]
    assert feed.outgoing.backlog_bytes == 0


# --- torch.distributed only -------------------------------------------------------------------------------------


def sending_process(host: LinkHost, epoch: int, what: str = "one") -> Forked:
    """Returns when it has sent a message."""
    process = Forked(sender.serve, host.rendezvous, what)
    assert process.said() == "ready"
    process.connection.send(host.accept(RECEIVER.id, Peer(WorkerId("prefill-0", epoch), "")))
    assert process.said() == "sent"
    return process


def test_a_killed_sender_is_noticed_at_once_and_can_come_back() -> None:
    net, host = gloo_net()
    for incarnation in (1, 2):
        net.heard.clear()
        process = sending_process(host, incarnation)
        assert net.wait(1)[0].kv is not None
        process.end()
        assert net.wait(2, timeout_s=5.0)[1].error
        wait_for(lambda: not host.open_links)


def test_a_sender_killed_in_the_middle_of_a_message() -> None:
    net, host = gloo_net()
    process = sending_process(host, 1, "for ever")
    net.wait(3)
    process.end()
    wait_for(lambda: net.heard and net.heard[-1].error, timeout_s=20.0)
    assert all(torch.equal(each.kv, torch.ones_like(each.kv)) for each in net.heard[:-1] if each.kv is not None)
    wait_for(lambda: not host.open_links)


def test_a_sender_stopped_in_the_middle_of_a_message_costs_the_stall_limit() -> None:
    net, host = gloo_net(timeout_s=60.0, stall_s=4.0)
    process = sending_process(host, 1, "half")
    try:
        started = time.monotonic()
        wait_for(lambda: net.heard and net.heard[-1].error)
        assert time.monotonic() - started < 20
        wait_for(lambda: not host.open_links)
    finally:
        process.end()


def test_a_receiver_that_reads_no_more_costs_the_stall_limit() -> None:
    net, host = gloo_net(timeout_s=60.0, stall_s=1.0)
    net.keep = True  # its buffers are never given back
    end = net.opener(RECEIVER)
    for number in range(BUFFERS):
        end.send(message(number))
    started = time.monotonic()
    with pytest.raises(LinkError, match="Timed out"):
        for _ in range(3):
            end.send(message(9, blocks=2000))
    assert 0.5 < time.monotonic() - started < 15
    end.close()
    host.close()
    wait_for(lambda: not host.open_links)


def test_a_send_under_way_can_be_cut() -> None:
    net, host = gloo_net(stall_s=30.0)
    net.keep = True
    feed = Feed(net)
    for number in range(BUFFERS + 3):
        feed.outgoing.put(message(number, blocks=2000))
    net.wait(BUFFERS)
    started = time.monotonic()
    feed.outgoing.close()
    assert feed.outgoing.join(5.0)
    assert time.monotonic() - started < 5
    host.close()
    wait_for(lambda: not host.open_links)


def test_a_receiver_that_never_joins_costs_the_deadline_and_no_more() -> None:
    _, host = gloo_net(timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(LinkError):
        TorchSendingEnd(host.rendezvous, "nobody>nobody#1", CPU, 1.0, 1.0)
    assert time.monotonic() - started < 10


def test_a_sender_that_never_joins_costs_the_deadline_and_no_more() -> None:
    net, host = gloo_net(timeout_s=1.0)
    host.accept(RECEIVER.id, SENDER)
    assert net.wait(1, timeout_s=10)[0].error
    wait_for(lambda: not host.open_links)


def test_one_sender_holds_few_links() -> None:
    net, host = gloo_net()
    ends = [net.opener(RECEIVER) for _ in range(MAX_LINKS_PER_SENDER + 2)]
    wait_for(lambda: host.open_links <= MAX_LINKS_PER_SENDER)
    ends[-1].send(message(5))
    wait_for(lambda: any(each.lease_id == 5 for each in net.heard))
    host.close()
    wait_for(lambda: not host.open_links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
def test_links_leave_no_threads_and_no_files_behind() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    net, host = gloo_net()

    def use_one() -> None:
        end = net.opener(RECEIVER)
        end.send(message(1))
        end.close()
        wait_for(lambda: not host.open_links)

    use_one()
    before = count()
    for _ in range(5):
        use_one()
    wait_for(lambda: count() <= before)
