"""The steady teacher: answers over the eight symmetries of the square."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from training.steady import divergence, steady_logits, unsteady  # noqa: E402


def test_what_a_detector_prefers_is_shared_by_all_symmetries():
    """A detector that always says the first pixel of each cell: the mean says all four corners."""

    def corner(image):
        batch, _, height, width = image.shape
        logits = torch.full((batch, 65, height // 8, width // 8), -30.0)
        logits[:, 0] = 30.0
        return logits

    share = steady_logits(corner, torch.zeros(2, 1, 16, 24)).exp()
    assert share.shape == (2, 65, 2, 3)
    expected = torch.zeros(65)
    expected[[0, 7, 56, 63]] = 0.25
    torch.testing.assert_close(share[1, :, 1, 2], expected, atol=1e-6, rtol=0)


def test_a_detector_without_preferences_keeps_its_answer():
    """Each pixel by its own brightness: turning and mirroring the picture changes nothing."""

    def bright(image):
        cells = torch.nn.functional.pixel_unshuffle(image, 8)
        return torch.cat([cells * 5, torch.full_like(cells[:, :1], 2.0)], dim=1)

    image = torch.rand(2, 1, 24, 40)
    torch.testing.assert_close(steady_logits(bright, image).softmax(1), bright(image).softmax(1), atol=1e-5, rtol=1e-4)


def test_views_that_lost_their_detail_do_not_count():
    told = torch.randn(2, 65, 2, 3)
    said = told.clone()
    said[1] = torch.randn(65, 2, 3)
    assert unsteady(told, said, torch.tensor([0.0, 1.0])).item() == pytest.approx(0, abs=1e-6)
    away = unsteady(told, said, torch.tensor([0.0, 0.0])).item()
    assert away == pytest.approx(divergence(told[1:], said[1:]).mean().item() / 2, rel=1e-5) and away > 0.1
    assert unsteady(told, said, torch.tensor([1.0, 1.0])).item() == 0
