"""Fixtures of all tests."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it, once a test imports it

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-switches", action="store_true", help="test of changes of role in a row: 60 instead of 6")
    parser.addoption(
        "--all-prompts", action="store_true", help="identity tests: all 50 held-out prompts and longer answers"
    )
    parser.addoption(
        "--hosts",
        choices=("namespaces", "loopback"),
        help="test of `ray up`: what its hosts are made of; without it, namespaces where the sandbox allows them",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """vLLM has an environment of its own, see `make test-vllm`; and it knows no token trees."""
    absent = find_spec("vllm") is None
    left_out = [
        item for item in items if item.get_closest_marker("vllm") and (absent or item.get_closest_marker("trees"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="session")
def models() -> Path:
    """The bundled pair's folder."""
    return MODELS


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """The held-out prompts that come with the models."""
    return [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()]
