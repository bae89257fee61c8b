"""Says when workers/engine/vllm/cpu_fix.py is needed no longer."""

import pytest
import torch

VALUES = [torch.tensor([0.5, -1.0, 0.7]), torch.tensor([4, 5, 6], dtype=torch.int32)]
ENDS = torch.tensor([2, 5, 6], dtype=torch.int32)


def expected(values: torch.Tensor) -> list[float]:
    return values[[0, 0, 1, 1, 1, 2]].tolist()


@pytest.mark.vllm
@pytest.mark.parametrize("values", VALUES, ids=["float32", "int32"])
def test_what_stands_in_for_it_is_right(values: torch.Tensor) -> None:
    from workers.engine.vllm.cpu_fix import expand

    assert expand(values, ENDS, 6).tolist() == expected(values)
    replaced = expand(values, ENDS, 6, replace_from=int(values[1]), replace_to=1).tolist()
    assert replaced == [1 if each == values[1] else each for each in expected(values)]


@pytest.mark.vllm
def test_vllm_still_has_the_defect() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    right = []
    for values in VALUES:
        torch.full((6,), 77, dtype=values.dtype)  # what the next allocation of this size finds there
        right.append(expand_batch_to_tokens(values, ENDS, 6).tolist() == expected(values))
    assert not all(right), "vLLM has mended expand_batch_to_tokens: remove workers/engine/vllm/cpu_fix.py and this test"
