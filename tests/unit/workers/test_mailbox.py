"""What other threads give the loop to do."""

import pytest

from workers.mailbox import Mailbox, MailboxFull


class TestMailbox:
    def test_requests_are_bounded_and_ends_are_not(self) -> None:
        mailbox, done = Mailbox(limit=2), []
        mailbox.post(lambda: done.append(1))
        mailbox.post(lambda: done.append(2))
        with pytest.raises(MailboxFull):
            mailbox.post(lambda: done.append(3))
        mailbox.deliver(lambda: done.append(4))
        assert mailbox.run(0.0) == 3
        assert done == [1, 2, 4]

    def test_what_comes_meanwhile_waits_for_the_next_turn(self) -> None:
        mailbox, done = Mailbox(), []

        def again() -> None:
            done.append(1)
            mailbox.deliver(again)

        mailbox.deliver(again)
        assert mailbox.run(0.0) == 1
        assert mailbox.run(0.0) == 1
        assert done == [1, 1]

    def test_a_task_that_raises_does_not_stop_the_others(self) -> None:
        mailbox, done = Mailbox(), []
        mailbox.deliver(lambda: 1 / 0)
        mailbox.deliver(lambda: done.append(1))
        mailbox.run(0.0)
        assert done == [1]
