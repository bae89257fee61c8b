"""The README's Python examples run as they stand, but for the address."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.support.local import local_cluster, settings_for

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)


def test_there_are_a_sync_and_an_async_example() -> None:
    assert len(BLOCKS) == 2
    assert "AsyncClient" in BLOCKS[1]
    assert all(len(block.strip().splitlines()) <= 12 for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
async def test_example(block: str) -> None:
    async with local_cluster(settings_for("native")) as cluster:
        assert "127.0.0.1:7071" in block
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            block.replace("127.0.0.1:7071", cluster.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        assert out.strip()


async def test_the_client_needs_neither_torch_nor_ray() -> None:
    code = "import sys, tidemill; sys.exit(', '.join({'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules)) or 0)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
