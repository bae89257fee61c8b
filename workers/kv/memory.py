"""Links inside one process, for tests: the message is copied and handed over on the sender's thread."""

import itertools

from tidemill.core.model import Peer
from workers.kv.link import Arrival, KvMessage, LinkError, Opener, Receiver, SendingEnd


class MemoryLinks:
    """All receivers of one process, by worker; stands for the network."""

    def __init__(self) -> None:
        self._receivers: dict[str, Receiver] = {}
        self._serial = itertools.count(1)

    def listen(self, peer: Peer, receiver: Receiver) -> None:
        self._receivers[str(peer.id)] = receiver

    def leave(self, peer: Peer) -> None:
        """The worker is gone: links to it break."""
        self._receivers.pop(str(peer.id), None)

    def opener(self, me: Peer) -> Opener:
        return lambda to: self._open(me, to)

    def _open(self, me: Peer, to: Peer) -> SendingEnd:
        if str(to.id) not in self._receivers:
            raise LinkError(f"{to.id} does not answer")
        name = f"{me.id}>{to.id}#{next(self._serial)}"
        return _MemoryEnd(self._receivers, name, str(me.id), str(to.id))


class _MemoryEnd:
    def __init__(self, receivers: dict[str, Receiver], name: str, me: str, to: str) -> None:
        self._receivers = receivers
        self._name = name
        self._me = me
        self._to = to
        self._closed = False

    def send(self, message: KvMessage) -> None:
        receiver = self._receivers.get(self._to)
        if self._closed or receiver is None:
            raise LinkError(f"{self._to} is gone")
        kv, layer = message.kv.clone(), message.first_layer
        receiver(Arrival(self._name, self._me, message.lease_id, message.first_block, kv, layer, message.output))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            receiver = self._receivers.get(self._to)
            if receiver is not None:
                receiver(Arrival(self._name, self._me, error="closed by the sender"))
