"""What workers/kv/link.py promises, for links in memory and over torch.distributed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from tidemill.core.model import Peer, WorkerId
from workers.engine.base import KvLayout
from workers.kv.link import Arrival, KvMessage, LinkError, Opener, Outgoing
from workers.kv.memory import MemoryLinks
from workers.kv.torch_dist import LinkHost, TorchSendingEnd

LAYOUT = KvLayout(2, 2, 16, 16, "float32")
SENDER = Peer(WorkerId("prefill-0", 1), "")
RECEIVER = Peer(WorkerId("verify-0", 1), "")


@dataclass
class Net:
    """A receiver, and how to reach it."""

    opener: Opener
    heard: list[Arrival] = field(default_factory=list)
    new: threading.Event = field(default_factory=threading.Event)

    def receive(self, arrival: Arrival) -> None:
        self.heard.append(arrival)
        self.new.set()

    def wait(self, count: int, timeout_s: float = 10.0) -> list[Arrival]:
        deadline = time.monotonic() + timeout_s
        while len(self.heard) < count and time.monotonic() < deadline:
            self.new.wait(0.05)
            self.new.clear()
        return self.heard


@pytest.fixture(params=["memory", "gloo"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    if request.param == "memory":
        links = MemoryLinks()
        made = Net(links.opener(SENDER))
        links.listen(RECEIVER, made.receive)
    else:
        made = Net(lambda _: pytest.fail("replaced below"))
        host = LinkHost("127.0.0.1", LAYOUT, torch.device("cpu"), 5.0, made.receive)
        made.opener = lambda to: TorchSendingEnd(host.rendezvous, host.accept(to.id, SENDER), torch.device("cpu"), 5.0)
    return made


def message(number: int, blocks: int = 3) -> KvMessage:
    return KvMessage(number, f"r{number}", number, torch.randn(2, blocks, 2, 2, 16, 16))


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


def test_closing_is_heard(net: Net) -> None:
    end = net.opener(RECEIVER)
    end.send(message(1))
    end.close()
    end.close()
    heard = net.wait(2)
    assert heard[1].kv is None
    assert heard[1].error
    with pytest.raises(LinkError):
        end.send(message(2))


def test_a_second_link_of_the_same_pair(net: Net) -> None:
    first = net.opener(RECEIVER)
    first.send(message(1))
    first.close()
    second = net.opener(RECEIVER)
    second.send(message(2))
    assert [each.lease_id for each in net.wait(3) if each.kv is not None] == [1, 2]


def test_outgoing_reports_what_was_sent_and_what_was_not(net: Net) -> None:
    sent: list[int] = []
    failed: list[int] = []
    broken = threading.Event()

    def opener(to: Peer) -> object:
        if broken.is_set():
            raise LinkError("cut")
        return net.opener(to)

    outgoing = Outgoing(
        RECEIVER,
        opener,  # type: ignore[arg-type]
        lambda each, _: sent.append(each.lease_id),
        lambda each, _: failed.append(each.lease_id),
    )
    outgoing.put(message(1))
    net.wait(1)
    assert outgoing._end is not None
    outgoing._end.close()
    broken.set()
    outgoing.put(message(2))
    outgoing.put(message(3))
    deadline = time.monotonic() + 5
    while len(failed) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (sent, failed) == ([1], [2, 3])
    assert outgoing.backlog_bytes == 0
    broken.clear()
    outgoing.put(message(4))
    while len(sent) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sent == [1, 4], "the next message opens a new link"
    outgoing.close()


SENDING_PROCESS = """
import sys, torch
from workers.kv.link import KvMessage
from workers.kv.torch_dist import TorchSendingEnd
end = TorchSendingEnd(sys.argv[1], sys.argv[2], torch.device("cpu"), 5.0)
end.send(KvMessage(1, "r", 0, torch.ones(2, 1, 2, 2, 16, 16)))
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_killed_sender_is_noticed_at_once_and_can_come_back() -> None:
    net = Net(lambda _: pytest.fail("the sender is another process"))
    host = LinkHost("127.0.0.1", LAYOUT, torch.device("cpu"), 5.0, net.receive)
    for incarnation in (1, 2):
        net.heard.clear()
        group = host.accept(RECEIVER.id, Peer(WorkerId("prefill-0", incarnation), ""))
        process = subprocess.Popen(
            [sys.executable, "-c", SENDING_PROCESS, host.rendezvous, group],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"sent\n"
        assert net.wait(1)[0].kv is not None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert net.wait(2, timeout_s=2.0)[1].error


def test_a_receiver_that_never_joins_costs_the_deadline_and_no_more() -> None:
    host = LinkHost("127.0.0.1", LAYOUT, torch.device("cpu"), 1.0, lambda _: None)
    started = time.monotonic()
    with pytest.raises(LinkError):
        TorchSendingEnd(host.rendezvous, "nobody>nobody#1", torch.device("cpu"), 1.0)
    assert time.monotonic() - started < 10
