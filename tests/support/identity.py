"""Work of which it is known what tokens plain decoding makes of it, and sending it through a cluster."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.engines import bundled_engine, one_by_one
from tidemill import AsyncClient, Completion, SamplingParams
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.core.text import load_tokenizer


@dataclass(frozen=True)
class Work:
    """Prompts, each greedy and at temperature 0.8, and what plain decoding makes of them."""

    prompts: list[tuple[int, ...]]
    params: list[SamplingParams]
    plain: list[tuple[int, ...]]


def work_of(models: Path, prompts: Sequence[str], dtype: str, tokens: int, longest: int | None = None) -> Work:
    """`tokens` of output each; prompts are cut to their `longest` last tokens."""
    tokenizer = load_tokenizer(models / "target")
    ids = [tuple(tokenizer.encode(prompt).ids)[-(longest or 0) :] for prompt in prompts for _ in range(2)]
    params = [
        SamplingParams(max_tokens=tokens, temperature=0.8 * (index % 2), seed=index, ignore_eos=True)
        for index in range(len(ids))
    ]
    engine = bundled_engine(models, EngineSettings(dtype=dtype, prefix_cache=False))  # type: ignore[arg-type]
    requests = [Request(str(i), prompt, params[i]) for i, prompt in enumerate(ids)]
    plain = one_by_one(engine, requests)
    return Work(ids, params, [plain[str(i)] for i in range(len(ids))])


async def send(client: AsyncClient, work: Work, at_once: int) -> list[Completion]:
    gate = asyncio.Semaphore(at_once)

    async def one(index: int) -> Completion:
        async with gate:
            return await client.generate(work.prompts[index], work.params[index])

    return list(await asyncio.gather(*(one(index) for index in range(len(work.prompts)))))


def compare(answers: list[Completion], work: Work) -> None:
    different = [i for i, answer in enumerate(answers) if answer.tokens != work.plain[i]]
    assert not different, f"{len(different)} of {len(answers)} requests got other tokens: {different}"
