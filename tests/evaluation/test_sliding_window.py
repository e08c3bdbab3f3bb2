"""Sliding inference against whole inference and a hand computation; resizing in bands."""

import pytest
import torch
import torch.nn.functional as F

from muse.errors import ConfigError
from muse.evaluation import sliding_window
from muse.evaluation.sliding_window import Inference, best_class, cover_pixels, window_starts


def local(window):
    """Logits of each pixel alone: (1,C,h,w) -> (2,3,h,w)."""
    red, green, blue = window[0].unbind(0)
    return torch.stack([window[0], torch.stack([red * blue, green - red, blue.square()])])


def shifted(window):
    """Logits that depend on where the window begins: its mean colour everywhere."""
    mean = window.mean((2, 3), keepdim=True)
    return mean.expand(-1, -1, *window.shape[-2:])


def picture(height, width):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(12, 12), (12, 9), (5, 11)])
def test_a_window_that_covers_the_picture_is_whole_inference(size):
    one = picture(*size)
    assert torch.equal(Inference(12, 8)(shifted, one), Inference()(shifted, one))


def test_a_network_of_single_pixels_is_the_same_in_windows():
    one = picture(23, 40)
    torch.testing.assert_close(Inference(12, 8)(local, one), Inference()(local, one))


def test_windows_of_mmsegmentation():
    """512 and 341: the last window ends with the picture."""
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(400, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(853, 512, 341) == [0, 341]
    assert window_starts(1200, 512, 341) == [0, 341, 682, 688]


def test_overlaps_are_averaged():
    """Three windows of four columns in eight, at 0, 3 and 4, each with its mean everywhere."""
    columns = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
    one = columns.expand(1, 4, 8)
    means = {0: 1.5, 3: 4.5, 4: 5.5}
    want = [1.5] * 3 + [(1.5 + 4.5) / 2] + [(4.5 + 5.5) / 2] * 3 + [5.5]
    assert window_starts(8, 4, 3) == list(means)
    got = Inference(4, 3)(shifted, one)
    assert got.shape == (1, 1, 4, 8)
    torch.testing.assert_close(got[0, 0], torch.tensor(want).expand(4, 8))


def test_overlaps_in_both_directions():
    """Against a loop over pixels: the mean of the windows that hold it."""
    one = picture(7, 9)
    got = Inference(4, 3)(shifted, one)[0]
    tops, lefts = (0, 3), (0, 3, 5)
    for row in range(7):
        for column in range(9):
            means = [
                one[:, top : top + 4, left : left + 4].mean((1, 2))
                for top in tops
                for left in lefts
                if top <= row < top + 4 and left <= column < left + 4
            ]
            torch.testing.assert_close(got[:, row, column], torch.stack(means).mean(0))


@pytest.mark.parametrize("stride", [None, 0, 13])
def test_a_stride_that_leaves_gaps(stride):
    with pytest.raises(ConfigError, match=f"a stride of {stride} does not fit windows of 12"):
        Inference(12, stride)


@pytest.mark.parametrize("size", [(31, 50), (9, 7), (5, 8), (64, 5)])
@pytest.mark.parametrize("values", [50, 400, 2**25])
def test_bands_are_one_resize(size, values, monkeypatch):
    """Bands of one row, of some, and of all: torch's bilinear resize, then argmax."""
    monkeypatch.setattr(sliding_window, "RESIZED_VALUES", values)
    logits = torch.randn(6, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(best_class(logits, size), want)


def test_logits_cover_the_padding():
    """A grid of 2 x 2 over cells of 8 covers 16 x 16, of which a picture of 12 x 14 is cut."""
    logits = torch.arange(4.0).view(1, 1, 2, 2)
    got = cover_pixels(logits, (12, 14), 8, "nearest")[0, 0]
    assert got.shape == (12, 14)
    assert got[:8, :8].eq(0).all() and got[:8, 8:].eq(1).all()
    assert got[8:, :8].eq(2).all() and got[8:, 8:].eq(3).all()
    stretched = cover_pixels(logits, (12, 14), None, "nearest")[0, 0]
    assert stretched[:6, :7].eq(0).all() and stretched[6:, 7:].eq(3).all()
