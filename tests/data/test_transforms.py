import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as torchvision_transforms

from muse.data.decode import BadSample
from muse.data.transforms import Transform, generator_for, to_float
from muse.errors import ConfigError
from tests.data.helpers import picture


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def transformed(transform: Transform, image: Image.Image, rng=None) -> torch.Tensor:
    """RGB picture -> float32 (3, h, w) in [0, 1], through both halves of a transform."""
    return to_float(transform.crop(transform.resize(image)[0], rng=rng)[0])


def test_centre_crop_without_resize_is_the_middle():
    image = ramp(30, 20)
    got = transformed(Transform(resize_shorter_edge=20, crop_size=10), image)
    assert got.dtype == torch.float32 and got.shape == (3, 10, 10)
    expected = torch.from_numpy(np.asarray(image)[5:15, 10:20].copy()).permute(2, 0, 1) / 255
    assert torch.equal(got, expected)


@pytest.mark.parametrize("width, height", [(64, 48), (48, 64), (50, 50), (20, 31)])
def test_resize_agrees_with_torch_antialias(width, height):
    smooth = (
        picture(0, 12, 12)
        .resize((width, height), Image.Resampling.BICUBIC)
        .point(lambda v: 64 + v // 2)
    )
    got = transformed(Transform(resize_shorter_edge=32, crop_size=None), smooth)
    assert min(got.shape[1:]) == 32 and abs(got.shape[2] / got.shape[1] - width / height) < 0.03
    source = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None] / 255
    expected = torch.nn.functional.interpolate(
        source, size=got.shape[1:], mode="bicubic", antialias=True, align_corners=False
    )
    # Pillow's bicubic has a = -0.5 and so has torch's antialiased one; the rest is rounding to 8
    # bits.
    assert (got - expected[0].clamp(0, 1)).abs().max() < 2.5 / 255


@pytest.mark.parametrize(
    "width, height",
    [(500, 375), (375, 500), (640, 427), (333, 500), (224, 301), (1, 3), (257, 224), (300, 229)],
)
@pytest.mark.parametrize("edge, side", [(224, 224), (256, 224), (256, 217)])
def test_resize_and_centre_crop_are_torchvisions_to_the_pixel(width, height, edge, side):
    """Row 50 of docs/fidelity.md: the size that is cut down and the offset that is rounded."""
    image = picture(5, width, height)
    steps = [
        torchvision_transforms.Resize(edge, torchvision_transforms.InterpolationMode.BICUBIC),
        torchvision_transforms.CenterCrop(side),
        torchvision_transforms.PILToTensor(),
    ]
    pixels, _ = Transform(edge, side).resize(image)
    assert tuple(pixels.shape[:0:-1]) == steps[0](image).size
    if (width, height, edge) == (500, 375, 224):
        assert pixels.shape == (3, 224, 298)
    expected = torchvision_transforms.Compose(steps)(image)
    assert torch.equal(Transform(edge, side).crop(pixels)[0], expected)


def test_train_draws_only_from_its_generator():
    image = picture(1, 40, 30)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    train = Transform(24, 16, random_crop=True, random_flip=True)
    draws = [transformed(train, image, generator_for(0, e, "k")) for e in range(40)]
    again = [transformed(train, image, generator_for(0, e, "k")) for e in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({a.numpy().tobytes() for a in draws}) > 30
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()
    # The generator is the same on every machine and Python version: a fixed number.
    assert (
        generator_for("sample", 0, 1, "key").random()
        == generator_for("sample", 0, 1, "key").random()
    )
    assert generator_for(1, 2).random() != generator_for(2, 1).random()


def test_crops_reach_every_place_and_half_are_flipped():
    transform = Transform(20, 16, random_crop=True, random_flip=True)
    pixels, _ = transform.resize(ramp(24, 20))
    lefts, tops, flips = set(), set(), 0
    for i in range(600):
        crop, _ = transform.crop(pixels, rng=generator_for(i))
        columns, rows = crop[0, 0].tolist(), crop[1, :, 0].tolist()
        flips += columns[0] > columns[-1]
        lefts.add(min(columns))
        tops.add(rows[0])
        assert max(columns) - min(columns) == 15
    assert lefts == set(range(9)) and tops == set(range(5))
    assert abs(flips - 300) < 4 * (600 * 0.25) ** 0.5


def test_a_mask_follows_its_picture():
    """The mask repeats the picture's column number; after crop and flip they still agree."""
    image = ramp(30, 20)
    mask = Image.fromarray(np.asarray(image)[..., 0].astype(np.int32))
    transform = Transform(20, 16, random_crop=True, random_flip=True)
    pixels, labels = transform.resize(image, mask)
    for i in range(20):
        crop, cut = transform.crop(pixels, labels, generator_for(i))
        assert torch.equal(crop[0].to(torch.int32), cut)


def test_a_resized_mask_holds_no_new_labels():
    values = np.random.default_rng(0).choice([3, 100, 255], (31, 47)).astype(np.int32)
    pixels, mask = Transform(20, 16).resize(picture(0, 47, 31), Image.fromarray(values))
    assert pixels.shape[1:] == mask.shape and set(mask.unique().tolist()) == {3, 100, 255}
    doubled = np.kron(values[:16, :16], np.ones((2, 2), np.int32))
    _, half = Transform(16, 16).resize(picture(0, 32, 32), Image.fromarray(doubled))
    assert np.array_equal(
        half.numpy(), values[:16, :16]
    )  # nearest: exact where two by two are equal
    with pytest.raises(BadSample, match="mask_size"):
        Transform(20, 16).resize(picture(0, 47, 31), Image.fromarray(values.T.copy()))


def test_sizes_are_checked_and_none_keeps_the_size():
    with pytest.raises(ConfigError, match="crop_size 64 does not fit"):
        Transform(32, 64)
    with pytest.raises(ConfigError, match="positive"):
        Transform(0, None)
    assert transformed(Transform(None, None), picture(0, 31, 17)).shape == (3, 17, 31)
    assert transformed(Transform(None, 24), picture(0, 31, 17)).shape == (3, 24, 24)
    assert transformed(Transform(8, 8), picture(0, 1, 1)).shape == (3, 8, 8)
