"""Generated pictures: what image i depends on, forms of output, and refusals in one line."""

import json
import os
import sys

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from muse.errors import CheckpointError, ConfigError
from muse.generation import noise_for, sample
from muse.generation.generator import Generator
from muse.generation.generator_config import load_generator_config
from muse.generation.generator_task import train_generator
from muse.generation.image_sampler import ImageSampler, blocks, labels_for
from muse.generation.latent_tokenizer import open_tokenizer
from scripts import generate as script
from tests.generation.conftest import CLASSES, SIDE, generator_settings, save_tokenizer
from tests.helpers import one_error
from tests.training.processes import Forked, free_port

OPTIONS = {"steps": 3, "cfg_interval": [0.0, 1.0], "cfg_scale": 1.5}


@pytest.fixture(scope="module")
def generator_dir(latents_dir, tmp_path_factory):
    """A generator of a few steps, with outputs that are not zero."""
    folder = tmp_path_factory.mktemp("generator")
    file = folder / "run.yaml"
    file.write_text(json.dumps(generator_settings(latents_dir, folder / "run")))
    return train_generator(load_generator_config(file))


@pytest.fixture
def sampler(generator_dir, tokenizer_dir):
    generator = Generator.from_pretrained(generator_dir)
    return ImageSampler(generator, open_tokenizer(tokenizer_dir), OPTIONS, seed=3, size=SIDE)


# ------------------------------------------------------------------------------ images by number
def test_a_picture_is_noise_sample_denormalise_decode(sampler):
    labels = torch.tensor([1, 4])
    net = sampler.generator.net
    made = sample(net, noise_for(3, [7, 2], net.latent_shape), labels, steps=3, cfg_scale=1.5)
    statistics = sampler.generator.statistics
    latents = made * statistics.std.float() + statistics.mean.float()
    torch.testing.assert_close(sampler.latents([7, 2], labels), latents)
    images = sampler.images([7, 2], labels)
    wanted = sampler.tokenizer.model.decode(latents, size=(SIDE, SIDE)).clamp(0, 1)
    torch.testing.assert_close(images, wanted.detach())
    assert images.shape == (2, 3, SIDE, SIDE)


def test_a_picture_does_not_depend_on_its_batch(sampler):
    numbers = list(range(9))
    labels = labels_for(3, numbers, "random", CLASSES)
    together = sampler.images(numbers, labels)
    for chosen in ([4], [8, 0, 5]):
        alone = sampler.images(chosen, labels_for(3, chosen, "random", CLASSES))
        torch.testing.assert_close(alone, together[chosen], atol=1e-5, rtol=1e-5)
    other = ImageSampler(sampler.generator, sampler.tokenizer, OPTIONS, seed=4, size=SIDE)
    assert (other.images([4], labels[4:5]) - together[4:5]).abs().max() > 1e-3


def test_without_a_size_the_decoder_gives_its_own(sampler):
    sampler.size = None
    assert sampler.images([0], torch.tensor([0])).shape == (1, 3, 16, 16)


def test_labels_go_round_or_are_drawn():
    assert labels_for(0, range(10), "all", 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert labels_for(0, [5, 2], (3, 1, 2), 4).tolist() == [2, 2]
    drawn = labels_for(5, range(4000), "random", 4)
    counts = drawn.bincount(minlength=4)
    assert counts.sum() == 4000 and (counts - 1000).abs().max() < 150  # 5 standard deviations
    assert labels_for(5, [17, 99], "random", 4).tolist() == drawn[[17, 99]].tolist()
    assert labels_for(6, range(50), "random", 4).tolist() != drawn[:50].tolist()
    with pytest.raises(ConfigError, match="label 4: this generator's classes are 0 to 3"):
        labels_for(0, [0], (1, 4), 4)


def test_a_label_does_not_tell_the_noise():
    """The drawn labels do not follow the first number of the same image's noise."""
    numbers = range(2000)
    labels = labels_for(1, numbers, "random", 2).double()
    first = noise_for(1, numbers, (1, 1, 1)).flatten().double()
    assert abs(numpy.corrcoef(labels, first)[0, 1]) < 0.12  # 5 / sqrt(2000)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_are_shared_out_whole(world):
    parts = [list(blocks(23, 4, rank, world)) for rank in range(world)]
    everything = sorted((part for own in parts for part in own), key=lambda part: part[0])
    assert everything == [range(i, min(i + 4, 23)) for i in range(0, 23, 4)]


# ----------------------------------------------------------------------------------- the command
def words(generator_dir, output, *more):
    flags = ["--checkpoint", str(generator_dir), "--num_images", "11", "--output", str(output)]
    return [*flags, "--batch_size", "4", "--device", "cpu", *more]


def pixels(folder):
    files = sorted(folder.glob("*.png"))
    return numpy.stack([numpy.asarray(Image.open(file)) for file in files])


def test_folder_npz_and_grid_hold_the_same_bytes(generator_dir, sampler, tmp_path):
    sampling = ["--cfg_scale", "1.5", "--seed", "3", "--steps", "3"]
    grid = ["--grid", str(tmp_path / "grid.png"), "--grid_images", "9"]
    assert script.main(words(generator_dir, tmp_path / "folder", *sampling, *grid)) == 0
    assert script.main(words(generator_dir, tmp_path / "all.npz", *sampling)) == 0
    array = numpy.load(tmp_path / "all.npz")["arr_0"]
    assert array.shape == (11, SIDE, SIDE, 3) and array.dtype == numpy.uint8
    assert numpy.array_equal(pixels(tmp_path / "folder"), array)
    images = sampler.images(range(4), labels_for(3, range(4), "all", CLASSES))
    rounded = (images * 255).round().permute(0, 2, 3, 1).numpy().astype(numpy.uint8)
    assert numpy.array_equal(array[:4], rounded)  # rounded to bytes, not cut off
    sheet = numpy.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * (SIDE + 4) + 4, 8 * (SIDE + 4) + 4, 3)
    assert numpy.array_equal(sheet[4 : 4 + SIDE, 4 : 4 + SIDE], array[0])
    assert numpy.array_equal(sheet[4 + SIDE + 4 :][:SIDE, 4 : 4 + SIDE], array[8])
    protocol = json.loads((tmp_path / "all.npz.json").read_text())["protocol"]
    assert protocol["sampling"]["cfg_scale"] == 1.5 and protocol["seed"] == 3


def test_another_batch_size_gives_the_same_pictures(generator_dir, tmp_path):
    for size in ("4", "11"):
        output = tmp_path / f"{size}.npz"
        assert script.main(words(generator_dir, output, "--batch_size", size)) == 0
    one, other = (numpy.load(tmp_path / f"{size}.npz")["arr_0"].astype(int) for size in ("4", "11"))
    assert abs(one - other).max() <= 1


def _one_of_two(rank, port, argv):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **where)
    torch.set_num_threads(1)
    sys.exit(script.main(argv))


def test_two_processes_make_what_one_makes(generator_dir, tmp_path):
    more = ["--labels", "random", "--cfg_scale", "1.5"]
    assert script.main(words(generator_dir, tmp_path / "one.npz", *more)) == 0
    argv = words(generator_dir, tmp_path / "two.npz", *more, "--grid", str(tmp_path / "grid.png"))
    port = free_port()
    both = [Forked(_one_of_two, rank, port, argv) for rank in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    one, two = (numpy.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert numpy.array_equal(one, two)
    assert (tmp_path / "grid.png").is_file()


def test_flags_win_over_the_configuration_and_that_over_the_saved(
    generator_dir, latents_dir, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(script, "generate_images", lambda sampler, plan: seen.append(sampler))
    script.main(words(generator_dir, tmp_path / "a"))
    file = tmp_path / "g.yaml"
    settings = generator_settings(latents_dir, tmp_path, {"sampling": {"steps": 7, "shift": 0.3}})
    file.write_text(json.dumps(settings))
    script.main(words(generator_dir, tmp_path / "a", "--config", str(file), "sampling.steps=8"))
    script.main(words(generator_dir, tmp_path / "a", "--config", str(file), "--steps", "9"))
    assert [(one.options["steps"], one.options["shift"]) for one in seen] == [
        (3, 1.0),
        (8, 0.3),
        (9, 0.3),
    ]


# ------------------------------------------------------------------------ saved and published
def test_it_is_saved_and_loaded(generator_dir, tmp_path):
    generator = Generator.from_pretrained(generator_dir)
    generator.save_pretrained(tmp_path / "saved")
    again = Generator.from_pretrained(tmp_path / "saved")
    assert again.facts == generator.facts and not again.net.training
    mine, theirs = generator.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(again.statistics.mean, generator.statistics.mean)


@pytest.mark.parametrize("kind", ["ema", "model", "ddp", "safetensors"])
def test_published_weights_open_with_a_configuration(kind, generator_dir, latents_dir, tmp_path):
    state = load_file(generator_dir / "model.safetensors")
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "ema":
        wrong = {name: torch.zeros_like(value) for name, value in state.items()}
        torch.save({"ema": state, "model": wrong, "opt": {}, "config": {"a": 1}}, file)
    else:
        prefix = "module." if kind == "ddp" else ""
        torch.save({"model": {f"{prefix}{name}": value for name, value in state.items()}}, file)
    config = tmp_path / "g.yaml"
    config.write_text(json.dumps(generator_settings(latents_dir, tmp_path)))
    for checkpoint, name in ((generator_dir, "a.npz"), (file, "b.npz")):
        assert script.main(words(checkpoint, tmp_path / name, "--config", str(config))) == 0
    one, two = (numpy.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert numpy.array_equal(one, two)


def test_another_tokenizer_is_refused(generator_dir, tmp_path, capsys):
    other = save_tokenizer(tmp_path / "other", seed=1)
    code = script.main(words(generator_dir, tmp_path / "out", "--tokenizer", str(other)))
    assert "other: another tokenizer" in one_error(capsys, code)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_tokenizer_are_refused(generator_dir, tmp_path):
    generator = Generator.from_pretrained(generator_dir)
    generator.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["tokenizer"]["sha256"] = "0" * 64
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="latents of another tokenizer"):
        Generator.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--labels", "8"], "label 8: this generator's classes are 0 to 7"),
        (["--labels", "cat"], "--labels must be numbers with commas between them"),
        (["--num_images", "0"], "--num_images must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--cfg_interval", "0.9,0.1"], "--cfg_interval must be LOW,HIGH"),
        (["--cfg_channels", "99", "--cfg_scale", "2"], "cfg_channels must be 1 to 8"),
        (["--tokenizer", "nowhere"], "nowhere: no such checkpoint"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["sampling.steps=2"], "an override needs --config"),
    ],
)
def test_a_mistake_is_one_line(generator_dir, tmp_path, capsys, more, message):
    code = script.main(words(generator_dir, tmp_path / "out", *more))
    assert message in one_error(capsys, code)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_no_generator(tokenizer_dir, tmp_path, capsys):
    code = script.main(words(tokenizer_dir, tmp_path / "out"))
    assert "not a generator but 'muse'" in one_error(capsys, code)
