"""Every engine, for the suites that all of them pass."""

from collections.abc import Iterator

import pytest

from tests.support.engines import vllm_engines

KINDS = ["emulated", "native-cpu-float32", "native-cpu-bfloat16", "native-torch-float32", "native-torch-bfloat16"]


@pytest.fixture(params=[*KINDS, pytest.param("vllm", marks=pytest.mark.vllm)])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield str(request.param)
    if request.param == "vllm":
        vllm_engines().take_back()
