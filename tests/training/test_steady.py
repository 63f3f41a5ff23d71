"""The steady teacher: answers over the eight symmetries of the square."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from training.steady import (  # noqa: E402
    MOST_TEACHERS,
    SYMMETRIES,
    dealt,
    divergence,
    shared_logits,
    steady_logits,
    unsteady,
)


def first_pixel(image):
    batch, _, height, width = image.shape
    logits = torch.full((batch, 65, height // 8, width // 8), -30.0)
    logits[:, 0] = 30.0
    return logits


def test_what_a_detector_prefers_is_shared_by_all_symmetries():
    """A detector that always says the first pixel of each cell: the mean says all four corners."""
    share = steady_logits(first_pixel, torch.zeros(2, 1, 16, 24)).exp()
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


@pytest.mark.parametrize("teachers", range(1, MOST_TEACHERS + 1))
def test_the_symmetries_are_dealt_out_completely(teachers):
    hands = dealt(teachers)
    assert sorted(each for hand in hands for each in hand) == sorted(SYMMETRIES)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_of_two_teachers_each_sees_every_quarter():
    assert dealt(2)[0] == [(False, 0), (False, 2), (True, 1), (True, 3)]
    assert dealt(2)[1] == [(False, 1), (False, 3), (True, 0), (True, 2)]


def test_some_symmetries_alone():
    """A detector that always says the first pixel: by half a turn the last one."""
    logits = steady_logits(first_pixel, torch.zeros(1, 1, 16, 24), [(False, 0), (False, 2)])
    share = logits.exp()[0, :, 1, 2]
    assert share[[0, 63]].tolist() == pytest.approx([0.5, 0.5]) and share[[7, 56]].max() < 1e-6


def test_teachers_share_one_mean():
    """One teacher says the first pixel, the other that there is no point: each answers half of the symmetries."""

    def nothing(image):
        return torch.cat([first_pixel(image)[:, 1:], first_pixel(image)[:, :1]], dim=1)

    share = shared_logits([first_pixel, nothing], torch.zeros(1, 1, 16, 24)).exp()[0, :, 0, 1]
    expected = torch.zeros(65)
    expected[[0, 63]] = 0.25  # its half are half a turn and both diagonals
    expected[64] = 0.5
    torch.testing.assert_close(share, expected, atol=1e-6, rtol=0)
    alone = shared_logits([first_pixel], torch.zeros(1, 1, 16, 24))
    torch.testing.assert_close(alone, steady_logits(first_pixel, torch.zeros(1, 1, 16, 24)), atol=1e-5, rtol=0)


def test_views_that_lost_their_detail_do_not_count():
    told = torch.randn(2, 65, 2, 3)
    said = told.clone()
    said[1] = torch.randn(65, 2, 3)
    assert unsteady(told, said, torch.tensor([0.0, 1.0])).item() == pytest.approx(0, abs=1e-6)
    away = unsteady(told, said, torch.tensor([0.0, 0.0])).item()
    assert away == pytest.approx(divergence(told[1:], said[1:]).mean().item() / 2, rel=1e-5) and away > 0.1
    assert unsteady(told, said, torch.tensor([1.0, 1.0])).item() == 0
