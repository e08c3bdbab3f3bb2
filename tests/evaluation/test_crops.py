"""Cuts of pictures on real photographs: equal to the pixel to torchvision and to ADM's formula."""

import math
import random
from pathlib import Path

import foolbox
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from muse.data.crops import (
    PictureCrop,
    RandomCrop,
    adm_sizes,
    reflect_pad,
    shorter_edge_size,
    unpad,
)
from muse.data.decode import BadSample
from muse.data.records import Record
from muse.data.samples import SampleMaker
from muse.errors import ConfigError

MODES = {
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "bilinear": transforms.InterpolationMode.BILINEAR,
}


def photographs():
    """Seven pictures, wide, high and square, also one of odd sides and one of four times 224."""
    pictures = {
        "coffee": Image.fromarray(skimage.data.coffee()),  # 600 x 400
        "chelsea": Image.fromarray(skimage.data.chelsea()),  # 451 x 300
        "astronaut": Image.fromarray(skimage.data.astronaut()),  # 512 x 512
        "rocket": Image.fromarray(skimage.data.rocket()),  # 640 x 427
    }
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
    pictures["imagenet"] = Image.open(files[0]).convert("RGB")
    pictures["high"] = pictures["coffee"].rotate(90, expand=True).crop((0, 3, 373, 500))
    pictures["odd"] = pictures["rocket"].resize((1375, 1031), Image.Resampling.BICUBIC)
    return pictures


PICTURES = photographs()
every_picture = pytest.mark.parametrize("name", PICTURES)


def pil_to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@every_picture
@pytest.mark.parametrize("edge, crop", [(256, 224), (224, 224), (256, 256), (257, 100)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_center_is_torchvisions_resize_and_center_crop(name, edge, crop, filter):
    want = transforms.Compose(
        [transforms.Resize(edge, MODES[filter]), transforms.CenterCrop(crop)]
    )(PICTURES[name])
    got = PictureCrop("center", edge, crop, filter)(PICTURES[name])
    assert torch.equal(got, pil_to_tensor(want))


@every_picture
def test_without_a_crop_it_is_torchvisions_resize(name):
    want = transforms.Resize(512, MODES["bicubic"])(PICTURES[name])
    assert torch.equal(PictureCrop("center", 512, None)(PICTURES[name]), pil_to_tensor(want))
    assert torch.equal(
        PictureCrop("center", None, None)(PICTURES[name]), pil_to_tensor(PICTURES[name])
    )


def test_the_long_side_is_truncated():
    """500 x 375 at 224: 298.67 becomes 298, where rounding gave 299."""
    assert shorter_edge_size(500, 375, 224) == (298, 224)
    assert shorter_edge_size(375, 500, 224) == (224, 298)


@every_picture
def test_squash_is_torchvisions_resize_to_a_square(name):
    want = transforms.Resize((512, 512), MODES["bicubic"])(PICTURES[name])
    got = PictureCrop("squash", None, 512)(PICTURES[name])
    assert torch.equal(got, pil_to_tensor(want))


# -------------------------------------------------------------------------------------- ADM's crop
def adm_by_torchvision(image, side):
    """ADM's steps with torchvision's resize and numpy's slice in place of ours."""
    while min(image.size) >= 2 * side:
        half = [image.height // 2, image.width // 2]
        image = TF.resize(image, half, transforms.InterpolationMode.BOX)
    scale = side / min(image.size)
    size = [round(image.height * scale), round(image.width * scale)]
    array = np.array(TF.resize(image, size, MODES["bicubic"]))
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return torch.from_numpy(array[top : top + side, left : left + side]).permute(2, 0, 1)


@every_picture
@pytest.mark.parametrize("side", [64, 96, 256])
def test_adm_is_its_formula(name, side):
    got = PictureCrop("adm", None, side)(PICTURES[name])
    assert torch.equal(got, adm_by_torchvision(PICTURES[name], side))


def kernel(x, kind):
    """Pillow's filters: the box of width one, and the bicubic one with a = -1/2."""
    x = np.abs(x)
    if kind == "box":
        return (x <= 0.5).astype(float)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample(array, length, kind):
    """One axis (the first) of a float array by the antialiased filter, rounded to bytes."""
    scale = array.shape[0] / length
    width = max(scale, 1.0)
    support = {"box": 0.5, "bicubic": 2.0}[kind] * width
    rows = []
    for i in range(length):
        centre = (i + 0.5) * scale
        low, high = (
            max(0, int(centre - support + 0.5)),
            min(len(array), int(centre + support + 0.5)),
        )
        weights = kernel((np.arange(low, high) + 0.5 - centre) / width, kind)
        rows.append(np.tensordot(weights / weights.sum(), array[low:high], 1))
    return np.clip(np.floor(np.stack(rows) + 0.5), 0, 255)


def numpy_resize(array, size, kind):
    """(h,w,3) -> (size[1], size[0], 3): columns first, as Pillow does."""
    if array.shape[1] != size[0]:
        array = resample(array.transpose(1, 0, 2), size[0], kind).transpose(1, 0, 2)
    return array if array.shape[0] == size[1] else resample(array, size[1], kind)


@pytest.mark.parametrize("name, side", [("astronaut", 96), ("odd", 256), ("chelsea", 64)])
def test_adm_is_a_numpy_resampling_without_pillow(name, side):
    """The filters written out: the box of each halving, then the bicubic one."""
    picture = PICTURES[name]
    array = np.asarray(picture).astype(float)
    while min(array.shape[:2]) >= 2 * side:
        array = numpy_resize(array, (array.shape[1] // 2, array.shape[0] // 2), "box")
    scale = side / min(array.shape[:2])
    size = round(array.shape[1] * scale), round(array.shape[0] * scale)
    array = numpy_resize(array, size, "bicubic")
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    want = array[top : top + side, left : left + side].astype(np.uint8)
    got = PictureCrop("adm", None, side)(picture).permute(1, 2, 0).numpy()
    different = np.abs(got.astype(int) - want.astype(int))
    # Pillow's fixed-point weights may round a value that lies on a half the other way
    assert different.max() <= 1
    assert (different > 0).mean() < 1e-3


def test_adm_sizes_of_a_large_picture():
    """2048 x 1600 at 256: two halvings (512 x 400 is below twice 256), then 328 x 256."""
    assert adm_sizes(2048, 1600, 256) == [(1024, 800), (512, 400), (328, 256)]
    assert adm_sizes(300, 200, 256) == [(384, 256)]


def test_adm_differs_from_torchvisions_crop_on_a_large_picture():
    """They are two protocols: a picture of 1375 x 1031 at 256 is not the same in both."""
    one = PictureCrop("adm", None, 256)(PICTURES["odd"]).float()
    other = PictureCrop("center", 256, 256)(PICTURES["odd"]).float()
    assert (one - other).abs().mean() > 0.5


# ------------------------------------------------------------------------------------------- masks
def numbered_mask(picture):
    rows, columns = np.mgrid[: picture.height, : picture.width]
    return Image.fromarray(
        (rows * 4 // picture.height * 4 + columns * 4 // picture.width).astype(np.int32)
    )


@pytest.mark.parametrize(
    "crop",
    [PictureCrop("center", 64, 48), PictureCrop("squash", None, 64), PictureCrop("adm", None, 64)],
)
def test_a_mask_follows_its_picture(crop):
    """A picture that is its own mask, drawn flat, gives the same regions in both."""
    mask = numbered_mask(PICTURES["coffee"])
    labels = np.asarray(mask)
    picture = Image.fromarray(np.repeat((labels * 16).astype(np.uint8)[..., None], 3, 2))
    pixels, got = crop.crop(*crop.resize(picture, mask))
    assert got.shape == pixels.shape[-2:]
    # the filter blurs the borders of regions, and nothing else
    inside = (pixels[0].int() - 16 * got).abs() < 4
    assert inside.float().mean() > 0.75
    assert set(got.unique().tolist()) <= set(range(16))


def test_a_mask_of_its_own_size_stays():
    picture, mask = PICTURES["coffee"], numbered_mask(PICTURES["coffee"])
    pixels, got = PictureCrop("center", 64, None, resize_mask=False).resize(picture, mask)
    assert pixels.shape == (3, 64, 96)
    assert np.array_equal(got.numpy(), np.asarray(mask))
    squashed, got = PictureCrop("squash", None, 64, resize_mask=False).resize(picture, mask)
    assert squashed.shape == (3, 64, 64)
    assert got.shape == (400, 600)


def test_a_mask_of_another_size_is_a_bad_sample():
    with pytest.raises(BadSample, match="mask_size"):
        PictureCrop().resize(PICTURES["coffee"], numbered_mask(PICTURES["chelsea"]))


# ------------------------------------------------------------------------------------------ random
@every_picture
@pytest.mark.parametrize("attempts", [1, 10])
def test_random_crop_is_torchvisions_resized_crop_of_its_box(name, attempts):
    crop = RandomCrop(64, flip=0.5, attempts=attempts)
    for seed in range(4):
        left, top, width, height = crop.box(*PICTURES[name].size, random.Random(seed))
        want = pil_to_tensor(
            TF.resized_crop(PICTURES[name], top, left, height, width, [64, 64], MODES["bicubic"])
        )
        got = crop.crop(crop.resize(PICTURES[name])[0], rng=random.Random(seed))[0]
        assert torch.equal(got, want) or torch.equal(got, want.flip(-1))


def test_random_boxes_have_torchvisions_law():
    """Mean and spread of share and shape of 4000 boxes: torchvision's own, within four errors."""
    picture, count = torch.zeros(3, 300, 400), 4000
    torch.manual_seed(0)
    theirs, ours = [], []
    rng = random.Random(0)
    for _ in range(count):
        _, _, h, w = transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((w * h / 120000, math.log(w / h)))
        _, _, w, h = RandomCrop().box(400, 300, rng)
        ours.append((w * h / 120000, math.log(w / h)))
    theirs, ours = np.array(theirs), np.array(ours)
    error = np.sqrt((theirs.var(0) + ours.var(0)) / count)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 4 * error).all()
    assert np.allclose(theirs.std(0), ours.std(0), rtol=0.06)


def test_one_attempt_cuts_the_box_to_the_picture():
    """A strip of 1000 x 10: no box of an area above .9 and of a ratio below 4/3 fits."""
    for seed in range(20):
        box = RandomCrop(scale=(0.9, 1.0), attempts=1).box(1000, 10, random.Random(seed))
        assert box[3] == 10 and box[2] < 140
    assert RandomCrop(scale=(0.9, 1.0)).box(1000, 10, random.Random(0)) == (493, 0, 13, 10)


# ----------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize("shape", [(2, 3, 256, 256), (3, 37, 20), (1, 3, 5, 4), (1, 1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_reflect_pad_is_numpys_and_unpad_gives_it_back(shape, dtype):
    images = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    padded, padding = reflect_pad(images, 28)
    sides = [(0, 0)] * (len(shape) - 2)
    for length in shape[-2:]:
        extra = math.ceil(length / 28) * 28 - length
        sides.append((extra // 2, extra - extra // 2))
    want = np.pad(images.numpy(), sides, mode="reflect")
    assert np.array_equal(padded.numpy(), want)
    assert torch.equal(unpad(padded, padding), images)


def test_256_is_padded_by_twelve_on_every_side():
    padded, padding = reflect_pad(torch.rand(1, 3, 256, 256), 28)
    assert padded.shape[-2:] == (280, 280)
    assert padding == (12, 12, 256, 256)
    same, padding = reflect_pad(torch.rand(1, 3, 280, 560), 28)
    assert same.shape[-2:] == (280, 560) and padding[:2] == (0, 0)


# ----------------------------------------------------------------------------------------- plugging
def test_it_stands_in_the_place_of_a_transform():
    """`SampleMaker` takes one as it takes `Transform`."""
    file = Path(skimage.data.__file__).parent / "coffee.png"
    record = Record("coffee", "", {"png": file.read_bytes()})
    crop = PictureCrop("adm", None, 64)
    maker = SampleMaker(transform=crop, fields=("images",))
    batch = maker.collate([maker.finish(maker.prepare(record))])
    assert torch.equal((batch["images"][0] * 255).round().byte(), crop(PICTURES["coffee"]))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"method": "middle"}, "unknown way to crop 'middle': one of center, squash, adm"),
        ({"filter": "nearest"}, "unknown resize filter 'nearest'"),
        ({"crop_size": 300}, "crop_size 300 does not fit into resize_shorter_edge 256"),
        ({"crop_size": 0}, "crop_size must be positive, not 0"),
        ({"method": "adm"}, "takes a crop_size and no other resize"),
        ({"method": "squash", "resize_shorter_edge": None, "crop_size": None}, "takes a crop_size"),
        ({"resize_mask": False}, "a mask of its own size does not fit a cropped picture"),
        (
            {"method": "adm", "resize_shorter_edge": None, "filter": "bilinear"},
            "ADM's crop is bicubic",
        ),
    ],
)
def test_impossible_crops_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        PictureCrop(**wrong)
