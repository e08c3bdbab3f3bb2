import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from muse.data import decode
from muse.data.records import Record
from muse.data.samples import SampleMaker, floats
from muse.data.transforms import Transform, to_float, to_pixels
from tests.data.helpers import encode, picture


# ------------------------------------------------------------------------ JPEGs decoded smaller
def photograph(name: str, width: int, height: int, **options) -> bytes:
    """A photograph as a camera or the web has it, as JPEG."""
    picture = Image.fromarray(getattr(skimage.data, name)())
    return encode(picture.resize((width, height), Image.Resampling.LANCZOS), "JPEG", **options)


def both_ways(data: bytes, edge: int):
    """The resized picture of the plain way and of the draft, uint8."""
    makers = [SampleMaker(Transform(edge, edge, jpeg_draft=d), ("images",)) for d in (False, True)]
    return [maker.prepare(Record("a", "s", {"jpg": data})) for maker in makers]


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
@pytest.mark.parametrize(
    "size, reduced",
    [((500, 375), 1), ((512, 512), 2), ((1024, 768), 2), ((1500, 1024), 4), ((2048, 2048), 8)],
)
def test_a_draft_is_the_plain_picture_to_2_of_255(name, size, reduced):
    data = photograph(name, *size, quality=90)
    whole, (width, height) = decode._open_reduced(data, decode.MAX_PIXELS, Transform(256).target)
    assert (width, height) == size
    assert whole.size == tuple(-(-side // reduced) for side in size)
    plain, draft = both_ways(data, 256)
    assert plain.pixels.shape == draft.pixels.shape and draft.pixels.dtype == torch.uint8
    apart = (plain.pixels.int() - draft.pixels.int()).abs().float()
    assert apart.mean() < (2 if reduced > 1 else 0.02)
    assert reduced > 1 or apart.max() <= 1
    # The plain way is Pillow's own resize.
    wanted = Image.open(io.BytesIO(data)).resize(Transform(256).target(*size), Image.BICUBIC)
    assert torch.equal(plain.pixels, to_pixels(wanted))


def test_where_no_draft_applies_nothing_changes():
    picture = Image.fromarray(skimage.data.coffee())
    png = both_ways(encode(picture), 256)
    assert torch.equal(png[0].pixels, png[1].pixels)
    same_size = both_ways(photograph("coffee", 341, 256), 256)  # no resize
    assert torch.equal(same_size[0].pixels, same_size[1].pixels)


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
@pytest.mark.parametrize("size", [(1023, 767), (1281, 1027), (2051, 3333)])
def test_a_reduction_that_does_not_divide_the_size_shifts_nothing(name, size):
    plain, draft = both_ways(photograph(name, *size, quality=90), 256)
    assert plain.pixels.shape == draft.pixels.shape
    apart = (plain.pixels.int() - draft.pixels.int()).abs().float().mean(0)  # (h, w)
    # A shift grows from the top left to the bottom right.
    high, wide = (side // 2 for side in apart.shape)
    assert apart.mean() < 2
    assert apart[high:, wide:].mean() < 2 and apart[:high, :wide].mean() < 2


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("size", [(1023, 767), (1024, 768)])
def test_a_draft_keeps_size_turn_and_mask_of_the_picture(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photograph("astronaut", *size, quality=95, exif=exif)
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, 500:] = 3
    made = []
    for draft in (False, True):
        maker = SampleMaker(Transform(250, 250, jpeg_draft=draft), ("images", "masks"))
        members = {"jpg": data, "seg.png": encode(Image.fromarray(mask))}
        made.append(maker.prepare(Record("a", "s", members)))
    plain, drafted = made
    turned = orientation >= 5
    assert (
        plain.pixels.shape == drafted.pixels.shape == ((3, 333, 250) if turned else (3, 250, 333))
    )
    assert torch.equal(plain.mask, drafted.mask) and set(plain.mask.unique().tolist()) == {0, 3}
    assert (plain.pixels.int() - drafted.pixels.int()).abs().float().mean() < 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_draft_of_other_colours(mode):
    picture = Image.fromarray(skimage.data.coffee()).resize((1200, 800)).convert(mode)
    plain, draft = both_ways(encode(picture, "JPEG", quality=92), 256)
    assert (plain.pixels.int() - draft.pixels.int()).abs().float().mean() < 2


def test_a_broken_jpeg_is_broken_as_a_draft_too():
    data = photograph("coffee", 1200, 800)
    maker = SampleMaker(Transform(256, 256, jpeg_draft=True), ("images",))
    with pytest.raises(decode.BadSample, match="truncated_image"):
        maker.prepare(Record("a", "s", {"jpg": data[: len(data) // 2]}))


# --------------------------------------------------------------------------------- bytes to floats
def test_bytes_become_the_floats_of_a_division():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    wanted = np.arange(256, dtype=np.float32) / np.float32(255)
    assert np.array_equal(to_float(every).numpy().ravel(), wanted)
    maker = {"transform": Transform(16, 16), "fields": ("images",)}
    prepared = SampleMaker(**maker).prepare(Record("a", "s", {"png": encode(picture(1))}))
    one = [SampleMaker(**maker).finish(prepared)]
    plain = SampleMaker(**maker).collate(one)
    as_bytes = SampleMaker(**maker, as_bytes=True).collate(one)
    assert as_bytes["images"].dtype == torch.uint8 and plain["images"].dtype == torch.float32
    made = floats(as_bytes, torch.device("cpu"))
    assert torch.equal(made["images"], plain["images"]) and made["keys"] == plain["keys"]
