"""Pictures in, pictures out: which files, how they are read, what is written."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import metrics

from muse.commands.reconstruct_pictures import reconstruct_files
from muse.errors import DataError
from muse.inference import find_images, has_transparency, name_results, read_image
from tests.data.helpers import picture
from tests.helpers import tiny_model


@pytest.fixture
def pictures(tmp_path):
    """PNG, JPEG, odd sizes, a 1x1 picture, and what is no picture."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0, 53, 37).save(folder / "odd.png")
    picture(1, 40, 24).save(folder / "photo.JPG", "JPEG")
    picture(2, 1, 1).save(folder / "dot.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_file_a_directory_a_glob(pictures):
    assert find_images(str(pictures / "odd.png")) == [pictures / "odd.png"]
    assert find_images(str(pictures)) == [
        pictures / name for name in ("dot.png", "odd.png", "photo.JPG")
    ]
    assert find_images(f"{pictures}/*o*.*") == [
        pictures / name for name in ("dot.png", "notes.txt", "odd.png", "photo.JPG")
    ]
    assert find_images(f"{pictures.parent}/**/*.png") == [
        pictures / "dot.png",
        pictures / "odd.png",
    ]


def test_nothing_found_is_said(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern, words in (
        (tmp_path / "none.png", "no such picture, directory or glob"),
        (tmp_path / "empty", "holds no picture"),
        (f"{pictures}/*.gif", "no such picture"),
    ):
        with pytest.raises(DataError, match=words):
            find_images(str(pattern))


def test_pixels_are_read_as_they_are(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert torch.equal(
        read_image(tmp_path / "a.png"), torch.from_numpy(array).permute(2, 0, 1).float() / 255
    )
    # Transparent parts lie on white; a camera's turned picture stands upright.
    Image.fromarray(np.dstack([array, np.zeros((5, 7), np.uint8)])).save(tmp_path / "clear.png")
    assert torch.equal(read_image(tmp_path / "clear.png"), torch.ones(3, 5, 7))
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(
        read_image(tmp_path / "turned.png"), read_image(tmp_path / "a.png").flip(1).transpose(1, 2)
    )


@pytest.mark.parametrize("content", [b"", b"this is text", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_what_is_no_picture_is_named(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match="a.jpg: not a readable picture") as caught:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_reconstructions_are_the_model_s_and_the_figure_is_theirs(pictures, tmp_path):
    model, out = tiny_model(), tmp_path / "out"
    results, failed = reconstruct_files(model, find_images(str(pictures)), out)
    assert not failed and [result.source.name for result in results] == [
        "dot.png",
        "odd.png",
        "photo.JPG",
    ]
    for result in results:
        image = read_image(result.source)
        with torch.no_grad():
            recon = model.reconstruct(image[None])[0]
        assert (result.height, result.width) == tuple(image.shape[-2:])
        assert torch.equal(read_image(result.reconstruction), (recon * 255).round() / 255)
        assert result.psnr == pytest.approx(
            10 * math.log10(1 / float((recon - image).square().mean())), abs=1e-3
        )
        assert Image.open(result.comparison).size == (
            2 * image.shape[2] + 3 * 4,
            image.shape[1] + 2 * 4,
        )
    assert len(list(out.iterdir())) == 6


def test_large_pictures_are_shrunk_to_the_bound(tmp_path):
    picture(0, 100, 40).save(tmp_path / "wide.png")
    (result,), _ = reconstruct_files(
        tiny_model(), [tmp_path / "wide.png"], tmp_path / "out", max_side=50
    )
    assert (result.height, result.width) == (20, 50)


def test_one_bad_file_does_not_stop_the_others(pictures, tmp_path):
    (pictures / "bad.jpg").write_text("text")
    results, failed = reconstruct_files(tiny_model(), find_images(str(pictures)), tmp_path / "out")
    assert len(results) == 3
    ((file, reason),) = failed
    assert file.name == "bad.jpg" and reason.startswith("not a readable picture")
    assert not [path for path in (tmp_path / "out").iterdir() if "bad" in path.name]


def test_batches_of_one_size_give_each_picture_its_own_result(tmp_path):
    """PSNR and SSIM by scikit-image, from the pictures of a model that saw each one alone."""
    sizes = [(40, 24), (24, 40), (40, 24), (40, 24), (9, 9), (24, 40)]
    for number, size in enumerate(sizes):
        picture(number, *size).save(tmp_path / f"{number}.png")
    files, model = find_images(str(tmp_path)), tiny_model()
    results, failed = reconstruct_files(model, files, tmp_path / "out", batch_size=2)
    assert not failed and [result.source for result in results] == files
    for result in results:
        image = read_image(result.source)
        with torch.no_grad():
            recon = model.reconstruct(image[None])[0]
        real, fake = image.double().numpy(), recon.double().numpy()
        assert (read_image(result.reconstruction) - recon).abs().max() < 1 / 254
        assert result.psnr == pytest.approx(metrics.peak_signal_noise_ratio(real, fake), abs=1e-3)
        if min(real.shape[1:]) < 11:
            assert math.isnan(result.ssim)
            continue
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = metrics.structural_similarity(real, fake, channel_axis=0, data_range=1, **window)
        assert result.ssim == pytest.approx(expected, abs=1e-4)


def test_transparency_is_seen_where_something_is_transparent(tmp_path):
    clear, opaque = (Image.new("RGBA", (4, 4), (9, 9, 9, alpha)) for alpha in (0, 255))
    clear.save(tmp_path / "clear.png")
    opaque.save(tmp_path / "opaque.png")
    palette = Image.new("P", (4, 4), 1)
    palette.info["transparency"] = 1
    palette.save(tmp_path / "palette.gif", transparency=1)
    picture(0, 4, 4).save(tmp_path / "photo.jpg")
    names = ("clear.png", "opaque.png", "palette.gif", "photo.jpg")
    assert [has_transparency(tmp_path / name) for name in names] == [True, False, True, False]
    results, _ = reconstruct_files(tiny_model(), [tmp_path / "clear.png"], tmp_path / "out")
    assert results[0].notes == ("transparency on white",)


def test_results_never_share_a_name_and_never_lie_over_an_input(tmp_path):
    names = ["a.jpg", "a.png", "a_compare.png", "a_png.png", "b.jpg"]
    for name in names:
        picture(0, 8, 8).save(tmp_path / name)
    files = [tmp_path / name for name in names]
    named = name_results(files, tmp_path / "out")
    written = [path for _, *paths in named for path in paths]
    assert [file for file, *_ in named] == files and len(set(written)) == 2 * len(names)
    with pytest.raises(
        DataError,
        match="a.*would be overwritten by a reconstruction; choose another output directory",
    ):
        name_results(files, tmp_path)
    assert (
        name_results([tmp_path / "b.jpg"], tmp_path)[0][1] == tmp_path / "b.png"
    )  # beside its JPEG there is room
