"""Heads of torch in, results to torch out, without a copy. Needs a GPU and torch, no TensorRT."""

from __future__ import annotations

import numpy as np
import pytest
from heads import logits_of

from superpoint_trt.core.types import DecodeOptions, Sampling, SuperPointError
from superpoint_trt.gpu.kernels.decode import decode_heads

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", list(Sampling))
def test_torch_heads_equal_the_torch_reference(dtype, sampling):
    from superpoint_trt.checkpoint.reference import decode, dense

    logits = torch.from_numpy(logits_of("image-like", 3, (2, 65, 30, 40))).cuda().to(dtype)
    coarse = torch.randn(2, 256, 30, 40, device="cuda").to(dtype)
    options = DecodeOptions(max_keypoints=500)
    stream = torch.cuda.current_stream().cuda_stream
    found = decode_heads(logits, coarse, options, sampling=sampling, stream=stream)
    counts = torch.from_dlpack(found.num_keypoints).tolist()
    reference = decode(*dense(logits.float(), coarse.float()), options, sampling)
    for image, (xy, scores, descriptors) in enumerate(reference):
        n = counts[image]
        assert n == len(xy) > 50
        ours = torch.from_dlpack(found.keypoints)[image, :n]
        # torch's softmax rounds in its own way: scores within 1e-6 may change places.
        torch.testing.assert_close(torch.from_dlpack(found.scores)[image, :n], scores, rtol=2e-6, atol=0)
        same = {tuple(p) for p in ours.tolist()} & {tuple(p) for p in xy.tolist()}
        assert len(same) >= n - 2
        rows = (ours == xy).all(dim=1)
        assert rows.float().mean() > 0.95
        torch.testing.assert_close(
            torch.as_tensor(found.descriptors, device="cuda")[image, :n][rows], descriptors[rows], rtol=0, atol=1e-5
        )


def test_on_a_stream_of_its_own():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        logits = torch.randn(1, 65, 60, 80, device="cuda")
        coarse = torch.randn(1, 256, 60, 80, device="cuda")
        found = decode_heads(logits, coarse, DecodeOptions(max_keypoints=64), half=True, stream=stream.cuda_stream)
        lengths = torch.from_dlpack(found.descriptors)[0].float().norm(dim=1)
    stream.synchronize()
    assert int(torch.from_dlpack(found.num_keypoints)) == 64
    np.testing.assert_allclose(lengths.cpu().numpy(), 1, atol=2e-3)


def test_transposed_heads_are_refused():
    logits = torch.randn(1, 65, 80, 60, device="cuda").transpose(2, 3)
    with pytest.raises(SuperPointError, match="not contiguous"):
        decode_heads(logits, torch.randn(1, 256, 60, 80, device="cuda"))


def test_channels_last_heads_are_taken_as_they_are():
    logits = torch.randn(2, 65, 60, 80, device="cuda")
    coarse = torch.randn(2, 256, 60, 80, device="cuda")
    options = DecodeOptions(max_keypoints=200)
    one = decode_heads(logits, coarse, options)
    other = decode_heads(*(head.to(memory_format=torch.channels_last) for head in (logits, coarse)), options)
    for name in ("num_keypoints", "keypoints", "scores"):
        assert torch.equal(*(torch.from_dlpack(getattr(found, name)) for found in (one, other)))
    torch.testing.assert_close(*(torch.from_dlpack(found.descriptors) for found in (one, other)), rtol=0, atol=2e-6)
