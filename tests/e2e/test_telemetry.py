"""What the router tells the controller, of requests and workers that are real."""

import asyncio

from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.model import Role


async def test_the_picture_is_that_of_what_was_served() -> None:
    prompts = [tuple(range(10 + index, 110 + index)) for index in range(6)]
    async with local_cluster(settings_for()) as cluster, AsyncClient(cluster.address) as client:
        answers = await asyncio.gather(*(client.generate(prompt, max_tokens=12, ignore_eos=True) for prompt in prompts))
        await cluster.settled(lambda: len(cluster.router.telemetry().workers) == 4)
        await asyncio.sleep(0.6)  # a report after the last half second's end, which closes it
        picture = cluster.router.telemetry()
        traffic = picture.windows[-1].all
        assert (traffic.arrived, traffic.started, traffic.finished, traffic.failed) == (6, 6, 6, 0)
        assert (traffic.prompt_tokens, traffic.output_tokens, traffic.known) == (600, 72, 6)
        parts = traffic.queue_s + traffic.prefill_s + traffic.transfer_s + traffic.first_decode_s
        assert abs(parts - sum(each.summary.timing.ttft_s for each in answers)) < 1e-6
        assert picture.waiting.requests == 0
        assert sorted(worker.role for worker in picture.workers) == ["draft", "prefill", "verify", "verify"]
        verify, prefill = picture.windows[-1].of(Role.VERIFY), picture.windows[-1].of(Role.PREFILL)
        assert verify.tokens == 72
        assert verify.drafted >= verify.accepted > 0, "the draft model is the target here"
        assert prefill.prompt_tokens == sum(len(prompt) - 1 for prompt in prompts)
        assert 0 < prefill.busy_s < prefill.seconds
