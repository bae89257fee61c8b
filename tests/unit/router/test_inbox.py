"""The inbox: order, waiting, and one timer however many waits."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.inbox import Inbox
from tests.support.virtual_time import VirtualLoop, run_virtual


@given(st.lists(st.sampled_from(["put", "take", "put_back"]), max_size=40))
def test_order(actions: list[str]) -> None:
    inbox: Inbox[int] = Inbox()
    model: list[int] = []
    for number, action in enumerate(actions):
        if action == "put":
            inbox.put(number)
            model.append(number)
        elif (got := inbox.take()) is None:
            assert not model
        else:
            assert got == model.pop(0)
            if action == "put_back":
                inbox.put_back(got)
                model.insert(0, got)
    assert [inbox.take() for _ in model] == model


def test_waits_for_as_long_as_it_was_told_each_time() -> None:
    async def main() -> None:
        inbox: Inbox[str] = Inbox()
        loop = asyncio.get_running_loop()
        loop.call_at(2.0, inbox.put, "first")
        assert await inbox.get(10.0) == "first"
        for patience_s in (5.0, 1.0, 30.0, 0.0):  # shorter and longer than what the timer is armed for
            before = loop.time()
            with pytest.raises(TimeoutError):
                await inbox.get(patience_s)
            assert loop.time() - before == pytest.approx(patience_s)
        inbox.put("there")
        assert await inbox.get(0.0) == "there"
        inbox.close()

    run_virtual(main())


def test_many_waits_share_one_timer() -> None:
    async def main() -> int:
        inbox: Inbox[int] = Inbox()
        loop = asyncio.get_running_loop()
        armed = 0
        real = loop.call_at

        def counting(when: float, *args: object, **kwargs: object) -> asyncio.TimerHandle:
            nonlocal armed
            armed += args[0] == inbox._ring  # type: ignore[operator]
            return real(when, *args, **kwargs)  # type: ignore[arg-type]

        loop.call_at = counting  # type: ignore[method-assign, assignment]
        for number in range(100):
            loop.call_soon(inbox.put, number)
            assert await inbox.get(30.0) == number
        inbox.close()
        return armed

    assert run_virtual(main()) == 1


def test_nothing_stays_behind_a_cancelled_wait() -> None:
    async def main() -> None:
        inbox: Inbox[str] = Inbox()
        waiting = asyncio.create_task(inbox.get(5.0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        inbox.put("kept")
        assert inbox.take() == "kept"
        inbox.close()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert not [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]

    run_virtual(main())
