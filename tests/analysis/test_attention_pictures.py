"""Attention in the style of the authors' figures: row 49 of docs/fidelity.md."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from scipy import ndimage

from muse.analysis.attention_pictures import largest_region, looked_at, release_sheet
from tests.helpers import random_images

GRID = (6, 7)
N = 42


def attention_on(weights: torch.Tensor, self_weight: float = 0.3) -> torch.Tensor:
    """(N, N): every query gives `self_weight` to itself and shares the rest by `weights` (h, w)."""
    rows = weights.flatten().expand(N, N).clone()
    rows.fill_diagonal_(0)
    rows = (1 - self_weight) * rows / rows.sum(1, keepdim=True)
    return rows + self_weight * torch.eye(N)


def planted(strength: float) -> torch.Tensor:
    """An object in the middle, a smaller one beside it that does not touch it."""
    weights = torch.ones(GRID)
    weights[2:4, 1:4] += strength
    weights[4, 5] += strength
    return weights


def hold_object(one: torch.Tensor) -> None:
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[2:4, 1:4] = True
    assert torch.equal(one > 0, expected)
    assert one.max() == 1


def test_the_object_stands_out_whether_it_is_looked_at_or_avoided():
    avoided = 1 / planted(9.0)  # the background, border included, is looked at: to be inverted
    maps = looked_at(torch.stack([attention_on(planted(9.0)), attention_on(avoided)]), GRID)
    assert maps.shape == (2, *GRID) and maps.dtype == torch.float32
    for one in maps:
        hold_object(one)


def test_what_a_cell_gives_to_itself_counts_for_nothing():
    """A diagonal that is large outside of the object, as in a head that looks at itself."""
    attention = attention_on(planted(3.0), self_weight=0.0)
    maps = looked_at(attention[None], GRID)
    changed = attention + torch.diag(5 * torch.rand(N))
    assert torch.equal(looked_at(changed[None], GRID), maps)
    hold_object(maps[0])


def test_three_heads_of_the_largest_variance_in_order():
    strengths = [0.5, 4.0, 1.0, 8.0, 2.0]
    attention = torch.stack([attention_on(planted(one)) for one in strengths])
    maps = looked_at(attention, GRID)
    alone = [looked_at(attention[index, None], GRID)[0] for index in (3, 1, 4)]
    assert torch.equal(maps, torch.stack(alone))


def test_values_against_numpy_and_scipy():
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(3, N, N, generator=generator).mul(2).softmax(-1)
    ours = looked_at(attention, GRID).numpy()
    theirs = []
    for head in attention.double().numpy():
        column = (head * (1 - np.eye(N))).mean(0).reshape(GRID)
        value = (column - column.min()) / np.ptp(column)
        edge = np.concatenate([value[0], value[-1], value[1:-1, 0], value[1:-1, -1]])
        value = 1 - value if edge.mean() > value.mean() else value
        regions, count = ndimage.label(value > value.mean())
        sizes = ndimage.sum_labels(np.ones(GRID), regions, range(1, count + 1))
        value = np.where(regions == 1 + sizes.argmax(), value, 0)
        theirs.append((column.var(), value / value.max()))
    theirs = np.stack([value for _, value in sorted(theirs, key=lambda pair: -pair[0])])
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_region_is_scipys(seed):
    mask = torch.rand(9, 11, generator=torch.Generator().manual_seed(seed)) > 0.5
    regions, count = ndimage.label(mask.numpy())
    sizes = ndimage.sum_labels(np.ones((9, 11)), regions, range(1, count + 1))
    assert largest_region(mask).sum() == sizes.max()
    kept = set(np.unique(regions[largest_region(mask).numpy()]))
    assert len(kept) == 1 and sizes[kept.pop() - 1] == sizes.max()
    assert not largest_region(torch.zeros(3, 3, dtype=torch.bool)).any()


def test_equal_attention_is_a_map_of_zeros_not_of_nan():
    assert torch.equal(looked_at(torch.full((4, N, N), 1 / N), GRID), torch.zeros(3, *GRID))


def test_the_sheet_is_the_picture_and_45_to_55_of_jet():
    images = random_images(2, 12, 14)
    attention = torch.stack([attention_on(planted(4.0)), attention_on(planted(9.0))]).unsqueeze(1)
    sheet = release_sheet(images, attention.expand(-1, 3, -1, -1), GRID)
    height, width, gap, margin = 12, 14, 4, 110
    assert sheet.shape == (3, 4 * (height + gap) + gap, margin + 2 * (width + gap) + gap)
    left = margin + gap + width + gap  # the second picture
    maps = looked_at(attention[1], GRID)[None]
    large = torch.nn.functional.interpolate(maps, size=(height, width), mode="bilinear")[0, 0]
    jet = torch.from_numpy(colormaps["jet"](large.numpy())[..., :3]).permute(2, 0, 1)
    top = gap + height + gap
    seen = sheet[:, top : top + height, left : left + width]
    assert (seen - (0.45 * images[1] + 0.55 * jet)).abs().max() < 1.5 / 255  # the sheet has bytes
