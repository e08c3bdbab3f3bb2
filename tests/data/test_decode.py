import io
import json

import numpy as np
import pytest
from PIL import Image

from muse.data.decode import BadSample, decode_captions, decode_image, decode_label, image_bytes
from muse.data.faults import BadSamples
from muse.data.masks import IGNORE_INDEX, decode_mask, reduce_zero_label
from muse.errors import DataError
from tests.data.helpers import encode, picture, png_header


def kind_of(call, *args, **kwargs) -> str:
    with pytest.raises(BadSample) as caught:
        call(*args, **kwargs)
    return caught.value.kind


def test_faults_have_their_kinds():
    jpeg, png = encode(picture(0, 64, 64), "JPEG"), encode(picture(0, 64, 64))
    assert kind_of(decode_image, b"") == "empty_file"
    assert kind_of(decode_image, b"Not a picture, though named so.jpg") == "not_an_image"
    assert kind_of(decode_image, jpeg[: len(jpeg) // 2]) == "truncated_image"
    assert kind_of(decode_image, png[: len(png) // 2]) in ("truncated_image", "corrupt_image")
    assert kind_of(decode_image, png[:60] + bytes(200) + png[260:]) == "corrupt_image"
    for side in (10_000, 30_000):  # above Pillow's warning, above its error
        assert kind_of(decode_image, png_header(side, side)) == "decompression_bomb"
    assert kind_of(decode_image, png, max_pixels=64 * 64 - 1) == "decompression_bomb"
    assert kind_of(decode_image, encode(picture(0, 201, 4))) == "aspect_ratio"
    assert kind_of(decode_image, encode(Image.new("F", (4, 4)), "TIFF")) == "unsupported_mode"
    assert (
        kind_of(decode_image, encode(Image.new("I", (4, 4), 70_000), "TIFF")) == "unsupported_mode"
    )


def test_a_jpeg_cut_at_any_place_never_passes_and_never_breaks():
    jpeg = encode(picture(1, 48, 48), "JPEG")
    for cut in range(0, len(jpeg) - 2, 37):
        kinds = ("empty_file", "not_an_image", "truncated_image", "corrupt_image")
        assert kind_of(decode_image, jpeg[:cut]) in kinds


def test_random_damage_is_either_decoded_or_named():
    rng = np.random.default_rng(0)
    for fmt in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = np.frombuffer(encode(picture(2, 24, 24), fmt), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode_image(broken.tobytes(), max_pixels=10**6).mode == "RGB"
            except BadSample as error:
                assert error.kind


def test_greyscale_and_cmyk():
    grey = picture(3).convert("L")
    assert np.array_equal(
        np.asarray(decode_image(encode(grey))), np.repeat(np.asarray(grey)[..., None], 3, 2)
    )
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    got = np.asarray(decode_image(encode(cmyk, "JPEG"))).astype(int)
    assert np.abs(got - (255, 0, 0)).max() < 12


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    expected = np.round(values / 257).astype(int)
    for fmt in ("PNG", "TIFF"):
        got = np.asarray(decode_image(encode(Image.fromarray(values), fmt))).astype(int)
        assert np.array_equal(got, np.repeat(expected[..., None], 3, 2))


def test_transparency_lies_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (200, 100, 0, 128)
    got = np.asarray(decode_image(encode(Image.fromarray(rgba)))).astype(int)
    assert np.abs(got[0] - np.array([200, 100, 0]) * 128 / 255 - 255 * 127 / 255).max() <= 1
    assert (got[1] == 255).all()
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    got = np.asarray(decode_image(encode(palette, transparency=1)))
    assert tuple(got[0, 0]) == (10, 20, 30) and tuple(got[1, 1]) == (255, 255, 255)
    got = np.asarray(
        decode_image(
            encode(Image.merge("LA", [Image.new("L", (2, 2), 90), Image.new("L", (2, 2), 0)]))
        )
    )
    assert (got == 255).all()


@pytest.mark.parametrize(
    "orientation, undo",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(orientation, undo):
    stored = picture(4, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = np.asarray(decode_image(encode(stored, "PNG", exif=exif)))
    assert np.array_equal(got, undo(np.asarray(stored)))


def test_captions():
    assert decode_captions({"txt": b" a zebra.\n"}) == ("a zebra.",)
    assert decode_captions({"txt": "\ufeffÄpfel".encode()}) == ("Äpfel",)
    assert decode_captions({"json": json.dumps({"text": "t", "caption": "c"}).encode()}) == ("c",)
    assert decode_captions({"json": b'{"text": ["a", " b ", ""]}'}) == ("a", "b")
    assert kind_of(decode_captions, {"json": b'{"alt": "x"}'}) == "missing_caption"
    assert decode_captions({"txt": b"t", "json": b"broken"}) == ("t",)
    assert kind_of(decode_captions, {}) == "missing_caption"
    assert kind_of(decode_captions, {"txt": b" \n"}) == "missing_caption"
    assert kind_of(decode_captions, {"json": b'{"caption": 3}'}) == "missing_caption"
    assert kind_of(decode_captions, {"txt": "Äpfel".encode("latin-1")}) == "caption_not_utf8"
    assert kind_of(decode_captions, {"json": b'{"caption": "\xc4"}'}) == "caption_not_utf8"
    assert kind_of(decode_captions, {"json": b'{"caption": '}) == "bad_json"
    assert kind_of(decode_captions, {"json": b"[1]"}) == "bad_json"


def test_captions_in_the_release_s_order_and_an_empty_one_falls_to_the_next():
    """Row 51 of docs/fidelity.md."""
    members = {"txt": b"1", "text": b"2", "caption": b"3", "json": b'{"caption": "4", "text": "5"}'}
    for expected in "1234":
        assert decode_captions(members) == (expected,)
        members[list(members)[int(expected) - 1]] = b" \n" if expected != "4" else b"{}"
    assert kind_of(decode_captions, members) == "missing_caption"
    members["json"] = b'{"caption": "", "text": [" ", "5"]}'
    assert decode_captions(members) == ("5",)
    assert decode_captions({"txt": b"\xef\xbb\xbf ", "caption": b"3"}) == ("3",)
    assert kind_of(decode_captions, {"txt": b"", "text": b"\xff\xfe"}) == "caption_not_utf8"


def test_labels_and_members():
    assert decode_label({"cls": b" 12\n"}) == 12
    assert kind_of(decode_label, {}) == "missing_label"
    assert kind_of(decode_label, {"cls": b"zebra"}) == "bad_label"
    assert kind_of(decode_label, {"cls": b"-1"}) == "bad_label"
    assert kind_of(decode_label, {"cls": b"\xff"}) == "bad_label"
    assert kind_of(image_bytes, {"txt": b"x", "seg.png": b"x"}) == "missing_image"


def test_masks_keep_their_numbers():
    values = np.array([[0, 1, 150], [7, 255, 3]], np.uint8)
    in_memory = np.where(values == 255, IGNORE_INDEX, values.astype(np.int32))
    assert np.array_equal(
        np.asarray(decode_mask({"seg.png": encode(Image.fromarray(values))})), in_memory
    )
    palette = Image.fromarray(values % 4).convert("P")
    palette.putdata((values % 4).ravel().tolist())
    assert np.array_equal(np.asarray(decode_mask({"seg.png": encode(palette)})), values % 4)
    wide = np.array(
        [[0, 255, 846], [30000, 65535, 3]], np.uint16
    )  # 255 is a class here, 65535 is ignored
    assert np.array_equal(np.asarray(decode_mask({"seg.png": encode(Image.fromarray(wide))})), wide)
    assert kind_of(decode_mask, {}) == "missing_mask"
    assert kind_of(decode_mask, {"seg.png": encode(picture(0))}) == "bad_mask"
    assert kind_of(decode_mask, {"seg.png": b"text"}) == "bad_mask"


def test_ade20k_mapping():
    assert reduce_zero_label(np.arange(152)).tolist() == [IGNORE_INDEX, *range(150), 150]
    assert reduce_zero_label(np.array([IGNORE_INDEX])).tolist() == [IGNORE_INDEX]


def test_bad_samples_count_and_limit(caplog):
    bad = BadSamples(max_fraction=0.1, min_count=100)
    bad.add(90, [("empty_file", f"k{i}") for i in range(30)])
    bad.check()  # too early to judge
    assert bad.counts == {"empty_file": 30} and bad.keys["empty_file"] == [
        f"k{i}" for i in range(10)
    ]
    assert sum("skipped" in record.message for record in caplog.records) == 10
    again = BadSamples(max_fraction=0.1, min_count=100)
    again.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    assert again.state_dict() == bad.state_dict()
    again.add(10, [("missing_caption", "m")])
    with pytest.raises(
        DataError, match=r"31 of 100 samples .*empty_file 30 \(k0, k1.*missing_caption 1 \(m\)"
    ):
        again.check()


def test_limit_is_exact_at_the_end_and_lenient_on_the_way():
    bad = BadSamples(max_fraction=0.01, min_count=200)
    bad.add(400, [("empty_file", "k")] * 5)  # 4 expected, standard deviation 2
    bad.check()
    with pytest.raises(DataError):
        bad.check(final=True)
    exact = BadSamples(max_fraction=0.01)
    exact.add(100, [("empty_file", "k")])
    exact.check(final=True)
    none = BadSamples(max_fraction=0.0, min_count=1)
    none.add(1000, [("empty_file", "k")])
    with pytest.raises(DataError):
        none.check()


def test_images_stream_only_known_formats():
    assert kind_of(decode_image, encode(picture(0), "EPS")) == "not_an_image"
    assert io.BytesIO(encode(picture(0), "PPM")).read(2) == b"P6"
