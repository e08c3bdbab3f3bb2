"""Training crops of scenes: picture and mask together, to the pixel as torchvision's functions."""

import colorsys
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from skimage.data import astronaut, coffee

from muse.data.decode import BadSample
from muse.data.masks import IGNORE_INDEX
from muse.data.scenes import (
    MEAN_COLOUR,
    SceneCrop,
    change_hsv,
    distort_colours,
    linear_change,
    scale_scene,
)
from muse.errors import ConfigError

PLAIN = {"largest_class": 1.0, "flip": 0.0, "photometric": False}


def photograph(picture=coffee, side=None):
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)
    return pixels if side is None else pixels[:, :side, :side]


def labels_of(pixels, seed=0):
    """Blocks of random labels, some ignored."""
    height, width = pixels.shape[-2:]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 6, (-(-height // 16), -(-width // 16))).astype(np.int32)
    blocks[0, 0] = IGNORE_INDEX
    return torch.from_numpy(np.kron(blocks, np.ones((16, 16), np.int32))[:height, :width].copy())


class Drawn(random.Random):
    """Gives what is listed, in order."""

    def __new__(cls, *values):
        return super().__new__(cls, 0)

    def __init__(self, *values):
        super().__init__(0)
        self.values = list(values)

    def uniform(self, low, high):
        value = self.values.pop(0)
        assert low <= value <= high
        return value

    def randint(self, low, high):
        value = self.values.pop(0)
        assert low <= value <= high, (low, value, high)
        return value

    def random(self):
        return self.values.pop(0)


@pytest.mark.parametrize("edge", [131, 400, 517])
def test_scaling_is_torchvisions_resize(edge):
    """400 x 600: the longer edge rounded, as mmcv's; bilinear, and the mask nearest."""
    pixels = photograph()
    mask = labels_of(pixels)
    got, labels = scale_scene(pixels, mask, edge)
    size = [edge, int(600 * edge / 400 + 0.5)]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    want = tv.pil_to_tensor(tv.resize(image, size, tv.InterpolationMode.BILINEAR))
    want_mask = np.array(
        tv.resize(Image.fromarray(mask.numpy()), size, tv.InterpolationMode.NEAREST)
    )
    assert torch.equal(got, want)
    assert torch.equal(labels, torch.from_numpy(want_mask))


def test_crop_and_flip_are_torchvisions_on_picture_and_mask():
    pixels = photograph()
    mask = labels_of(pixels)
    crop = SceneCrop(200, (0.5, 2.0), 160, largest_class=1.0, flip=0.5, photometric=False)
    got, labels = crop.crop(pixels, mask, Drawn(1.5, 17, 40, 0.49))  # ratio, top, left, flip
    scaled, scaled_mask = scale_scene(pixels, mask, 300)
    assert torch.equal(got, tv.hflip(tv.crop(scaled, 17, 40, 160, 160)))
    assert torch.equal(labels, tv.hflip(tv.crop(scaled_mask, 17, 40, 160, 160)))
    got, labels = crop.crop(pixels, mask, Drawn(1.5, 17, 40, 0.5))
    assert torch.equal(got, tv.crop(scaled, 17, 40, 160, 160))
    assert torch.equal(labels, tv.crop(scaled_mask, 17, 40, 160, 160))


def test_a_picture_smaller_than_the_crop_is_padded_right_and_below():
    """Half of 128 is 64 x 96: as torchvision's pad with the mean colour."""
    pixels = photograph()
    mask = labels_of(pixels)
    got, labels = SceneCrop(128, (0.5, 2.0), 128, **PLAIN).crop(pixels, mask, Drawn(0.5, 0, 0, 0.9))
    scaled, scaled_mask = scale_scene(pixels, mask, 64)
    assert scaled.shape == (3, 64, 96)
    for channel, colour in enumerate(MEAN_COLOUR):
        want = tv.pad(scaled[channel : channel + 1], [0, 0, 32, 64], fill=colour)
        assert torch.equal(got[channel : channel + 1], want)
    assert torch.equal(labels, tv.pad(scaled_mask[None], [0, 0, 32, 64], fill=IGNORE_INDEX)[0])


def test_a_square_of_one_class_is_drawn_anew():
    """Left half of class 1, right half of class 2: a square inside one of them is refused."""
    pixels = photograph(side=200)
    mask = torch.ones(200, 200, dtype=torch.int32)
    mask[:, 100:] = 2
    crop = SceneCrop(200, (1.0, 1.0), 80, largest_class=0.75, flip=0.0, photometric=False)
    draws = Drawn(1.0, 0, 0, 5, 35, 9, 60, 0.9)  # 80 of 80 columns of 1, then 65, then 40
    _, labels = crop.crop(pixels, mask, draws)
    assert labels.eq(1).sum() == labels.eq(2).sum() == 80 * 40
    assert not draws.values
    ten = Drawn(1.0, *[0] * 20, 0.9)  # ten times the same corner: it is taken
    assert crop.crop(pixels, mask, ten)[1].unique().tolist() == [1]
    assert not ten.values


def test_contrast_is_torchvisions_brightness_factor():
    pixels = photograph(astronaut, 128)
    for factor in (0.5, 0.83, 1.5):
        assert torch.equal(linear_change(pixels, factor), tv.adjust_brightness(pixels, factor))


def test_brightness_by_hand():
    pixels = torch.tensor([0, 10, 128, 250], dtype=torch.uint8)
    assert linear_change(pixels, 1.0, 20.7).tolist() == [20, 30, 148, 255]
    assert linear_change(pixels, 1.0, -20.7).tolist() == [0, 0, 107, 229]


@pytest.mark.parametrize("hue", [-0.1, -0.03, 0.05, 0.1])
def test_hue_is_torchvisions(hue):
    pixels = photograph(astronaut, 128)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.equal(change_hsv(pixels, 1.0, hue), tv.pil_to_tensor(tv.adjust_hue(image, hue)))


def test_saturation_against_colorsys():
    """Within what eight bits of hue and saturation lose."""
    pixels = photograph(astronaut, 64)[:, ::8, ::8]
    for factor in (0.5, 1.4):
        got = change_hsv(pixels, factor, 0.0).permute(1, 2, 0).reshape(-1, 3)
        for before, after in zip(pixels.permute(1, 2, 0).reshape(-1, 3).tolist(), got.tolist()):
            hue, saturation, value = colorsys.rgb_to_hsv(*(one / 255 for one in before))
            want = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            assert max(abs(255 * w - a) for w, a in zip(want, after)) < 5


def test_colours_change_in_the_drawn_order():
    """Contrast before or after saturation and hue; half of the draws change nothing."""
    pixels = photograph(astronaut, 32)
    assert torch.equal(distort_colours(pixels, Drawn(0.6, 0.6, 0.6, 0.6, 0.6)), pixels)
    draws = (0.1, 12.0, 0.1, 1.3)
    rest = (0.1, 0.7, 0.1, 0.05)
    first = linear_change(pixels, 1.0, 12.0)
    early = change_hsv(linear_change(first, 1.3), 0.7, 0.05)
    late = linear_change(change_hsv(first, 0.7, 0.05), 1.3)
    assert torch.equal(distort_colours(pixels, Drawn(*draws, 0.1, *rest)), early)
    assert torch.equal(distort_colours(pixels, Drawn(*draws, 0.9, *rest)), late)
    assert not torch.equal(early, late)


def test_draws_depend_on_the_generator_alone():
    pixels = photograph()
    mask = labels_of(pixels)
    crop = SceneCrop(128, (0.5, 2.0), 128)
    once, again, other = (crop.crop(pixels, mask, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert not torch.equal(once[0], other[0])
    assert once[0].shape == (3, 128, 128) and once[1].shape == (128, 128)


def test_what_a_scene_needs():
    image = Image.fromarray(coffee())
    with pytest.raises(BadSample, match="mask_size"):
        SceneCrop().resize(image, Image.new("I", (10, 10)))
    with pytest.raises(ConfigError, match="together with its mask"):
        SceneCrop().resize(image)
    with pytest.raises(ConfigError, match="must be positive"):
        SceneCrop(ratio=(0.0, 1.0))
    with pytest.raises(ValueError, match="needs a generator"):
        SceneCrop().crop(photograph(), labels_of(photograph()))
