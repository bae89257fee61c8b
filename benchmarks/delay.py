"""A link between two workers that takes its time: every byte comes so much later, however many are on their way."""

import asyncio
import contextlib


class DelayedLink:
    """Forwards connections to `target` (host:port); bytes take `delay_s` longer each way. It may be raised."""

    def __init__(self, target: str, delay_s: float) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.delay_s = delay_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def address(self) -> str:
        """Where to connect instead."""
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> "DelayedLink":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def stop(self) -> None:
        """Cut all connections; nobody can connect again."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()

    def cut(self) -> None:
        """Cut the connections there are, both ends of each; new ones may be made."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:  # nobody is there, and whoever asks for it learns that
            writer.transport.abort()
            return
        self._writers += [writer, back]
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                loop.call_later(self.delay_s, sink.write, data)
        loop.call_later(self.delay_s, sink.close)
