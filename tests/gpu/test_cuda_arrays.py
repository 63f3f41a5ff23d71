"""Arrays of torch and CuPy in and out without a copy. Needs a GPU and torch, no TensorRT."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import arrays, cuda

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)


class OnlyDlpack:
    """A tensor that hides its __cuda_array_interface__."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.fixture()
def tensor():
    return torch.arange(24, dtype=torch.float32, device="cuda").reshape(1, 1, 4, 6)


@pytest.mark.parametrize("wrap", [lambda t: t, OnlyDlpack], ids=["interface", "dlpack"])
def test_views_share_memory(tensor, wrap):
    found = arrays.view(wrap(tensor))
    assert (found.address, found.shape, found.dtype) == (tensor.data_ptr(), (1, 1, 4, 6), np.float32)
    back = torch.from_dlpack(found)
    back[0, 0, 2, 3] = -7
    assert tensor[0, 0, 2, 3] == -7
    assert torch.as_tensor(found, device="cuda").data_ptr() == tensor.data_ptr()


def test_views_of_parts_start_where_the_part_does(tensor):
    part = tensor[0, 0, 1:3]
    for wrapped in (part, OnlyDlpack(part)):
        found = arrays.view(wrapped)
        assert found.address == tensor.data_ptr() + 6 * 4 and found.shape == (2, 6)


@pytest.mark.parametrize("wrap", [lambda t: t, OnlyDlpack], ids=["interface", "dlpack"])
def test_gaps_are_refused(tensor, wrap):
    for gappy in (tensor[..., ::2], tensor.transpose(2, 3)):
        with pytest.raises(SuperPointError, match="not contiguous"):
            arrays.view(wrap(gappy))
        found = arrays.view(wrap(gappy), gaps=True)
        assert found.strides == tuple(4 * step for step in gappy.stride())
        for back in (torch.from_dlpack(found), torch.as_tensor(found, device="cuda")):
            assert back.data_ptr() == gappy.data_ptr() and torch.equal(back, gappy)


def test_what_is_on_the_gpu(tensor):
    assert arrays.is_on_gpu(tensor) and arrays.is_on_gpu(OnlyDlpack(tensor))
    assert not arrays.is_on_gpu(tensor.cpu()) and not arrays.is_on_gpu(np.zeros(3))
    with pytest.raises(SuperPointError, match="expected an array in GPU memory"):
        arrays.view(tensor.cpu())


def test_the_owner_lives_as_long_as_the_consumer(tensor):
    memory = cuda.DeviceMemory(64)
    consumer = torch.from_dlpack(arrays.DeviceArray(memory.address, (16,), np.dtype(np.float32), 0, memory))
    assert any(held[2].owner is memory for held in arrays._exported.values())
    del consumer
    gc.collect()
    assert not any(held[2].owner is memory for held in arrays._exported.values())


def test_cupy(tensor):
    cupy = pytest.importorskip("cupy")
    found = arrays.view(tensor)
    for theirs in (cupy.asarray(found), cupy.from_dlpack(found)):
        assert theirs.data.ptr == tensor.data_ptr()
        np.testing.assert_array_equal(cupy.asnumpy(theirs), tensor.cpu().numpy())
    assert arrays.view(cupy.asarray(found)).address == tensor.data_ptr()
