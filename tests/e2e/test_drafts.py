"""Whatever drafts, and however trees grow: tokens are those of plain decoding.

The KV pool is too small for eight requests at once, so that some wait and some are preempted, and prompts are computed
in small chunks beside decoding. A sample of the prompts by default; `make identity` takes all of them.
"""

from pathlib import Path

import pytest

from tests.support.identity import Work, compare, send, work_of
from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core import metrics
from tidemill.core.model import Role
from tidemill.core.settings import SpeculationSettings

BUILDERS = ("chain", "beam", "heap", "static")
LOCAL = ("early_layers", "lookup", "recycling", "trigram")
CASES = {
    **{builder: {"strategy": builder, "adaptive": False, "wait_s": 0.2} for builder in BUILDERS},
    **{source: {"sources": (source,), "adaptive": False} for source in LOCAL},
    "everything, adaptive": {"sources": ("draft", *LOCAL)},
}


@pytest.fixture(scope="module")
def work(models: Path, prompts: list[str], request: pytest.FixtureRequest) -> Work:
    everything = request.config.getoption("--all-prompts")
    return work_of(models, prompts if everything else prompts[3::14], "bfloat16", 48, longest=100)


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("case", CASES)
async def test_same_tokens(case: str, at_once: int, work: Work) -> None:
    settings = settings_for("native", kv_blocks=40, max_batch_tokens=64)
    settings = settings.model_copy(update={"speculation": SpeculationSettings(**CASES[case])})  # type: ignore[arg-type]
    roles = (Role.VERIFY, Role.DRAFT) if "draft" in settings.speculation.sources else (Role.VERIFY,)
    async with local_cluster(settings, roles) as cluster, AsyncClient(cluster.address) as client:
        answers = await send(client, work, at_once)
        compare(answers, work)
        counted = cluster.workers[0].metrics
        assert counted.value(metrics.DRAFTED) > 0
