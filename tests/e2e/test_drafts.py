"""Whatever drafts, and however trees grow: tokens are those of plain decoding.

The KV pool is too small for eight requests at once, so that some wait and some are preempted, and prompts are computed
in small chunks beside decoding. By default a sample of the prompts, and each builder and source once; `make identity`
takes all prompts and every source under every builder, alone and with others.
"""

from itertools import product
from pathlib import Path

import pytest

from tests.support.identity import Work, compare, send, work_of
from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core import metrics
from tidemill.core.model import Role
from tidemill.core.settings import SpeculationSettings

LONGEST, CHUNK, KV_BLOCKS = 32, 28, 11  # tokens of a prompt, rows of a step; a request ends with five blocks
BUILDERS = ("chain", "beam", "heap", "static")
LOCAL = ("early_layers", "lookup", "recycling", "trigram")
WITH_DRAFT_WORKERS = (("draft",), *(("draft", source) for source in LOCAL), ("draft", *LOCAL))
WITHOUT = (*((source,) for source in LOCAL), LOCAL)  # builders are the draft workers'; these make no use of one
FIXED = {"adaptive": False, "wait_s": 0.2, "max_depth": 4, "max_nodes": 8}
LARGEST = FIXED | {"max_depth": 16, "width": 16, "max_nodes": 64, "ahead": 4}


def named(sources: tuple[str, ...]) -> str:
    return "everything" if len(sources) > len(LOCAL) else "+".join(sources)


ADAPTIVE = {"everything, adaptive": {"sources": ("draft", *LOCAL)}}
SAMPLE = {
    **{builder: FIXED | {"strategy": builder} for builder in BUILDERS},
    **{source: FIXED | {"sources": (source,)} for source in LOCAL},
    **ADAPTIVE,
}
ALL = {
    **{
        f"{builder}, {named(sources)}": FIXED | {"strategy": builder, "sources": sources}
        for builder, sources in product(BUILDERS, WITH_DRAFT_WORKERS)
    },
    **{named(sources): FIXED | {"sources": sources} for sources in WITHOUT},
    "everything, as large as may be": LARGEST | {"sources": ("draft", *LOCAL)},
    **ADAPTIVE,
}
CASES = SAMPLE | ALL


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", ALL if metafunc.config.getoption("--all-prompts") else SAMPLE)


@pytest.fixture(scope="module")
def work(models: Path, prompts: list[str], request: pytest.FixtureRequest) -> Work:
    everything = request.config.getoption("--all-prompts")
    return work_of(models, prompts if everything else prompts[3::14], "bfloat16", 48, longest=LONGEST)


@pytest.mark.parametrize("at_once", [1, 8])
async def test_same_tokens(case: str, at_once: int, work: Work) -> None:
    settings = settings_for("native", kv_blocks=KV_BLOCKS, max_batch_tokens=CHUNK)
    settings = settings.model_copy(update={"speculation": SpeculationSettings(**CASES[case])})  # type: ignore[arg-type]
    roles = (Role.VERIFY, Role.DRAFT) if "draft" in settings.speculation.sources else (Role.VERIFY,)
    async with local_cluster(settings, roles) as cluster, AsyncClient(cluster.address) as client:
        answers = await send(client, work, at_once)
        compare(answers, work)
        counted = cluster.workers[0].metrics
        assert counted.value(metrics.DRAFTED) > 0
        if at_once > 1 and len(work.prompts) > 50:  # of few, whether one is preempted depends on when they come
            assert counted.value(metrics.PREEMPTIONS, role="verify") > 0, "the pool is too small for eight"
