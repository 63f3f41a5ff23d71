"""A state_dict of tensors that have no float32 values, or too many, is refused before a value is copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_state

from superpoint_trt import SuperPointError
from superpoint_trt.checkpoint.layouts import from_arrays, state_arrays


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (lambda: torch.zeros(1).expand(1 << 40), "1099511627776 values"),
        (lambda: torch.ones(2, device="meta"), "meta tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested tensor"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "bits8"),
    ],
)
def test_strange_tensors_are_named(tensor, says):
    with pytest.raises(SuperPointError, match=says) as error:
        state_arrays({**random_state("magicleap"), "conv1a.weight": tensor()}, "odd.pth")
    assert str(error.value).startswith("odd.pth") and "conv1a.weight" in str(error.value)


def test_shapes_are_checked_before_values_are_copied():
    arrays = {key: value.numpy() for key, value in random_state("magicleap").items()}
    wide = np.broadcast_to(np.float16(0), (1 << 30, 1, 3, 3))
    with pytest.raises(SuperPointError, match=r"conv1a.bias is .* expected \(1073741824,\)"):
        from_arrays({**arrays, "conv1a.weight": wide})


def test_arrays_that_hold_no_numbers_are_refused():
    arrays = {key: value.numpy() for key, value in random_state("magicleap").items()}
    words = np.full(arrays["conv1a.weight"].shape, "x")
    with pytest.raises(SuperPointError, match=r"conv1a.weight holds no float32 values"):
        from_arrays({**arrays, "conv1a.weight": words})
