"""A saved model in 32, 16 and 8 bits: the same numbers, or near ones, from tensors held once."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from muse import MUSE_ViT
from muse.errors import CheckpointError, ConfigError
from muse.models import low_precision
from muse.models.loading import load_model
from muse.models.low_precision import RoundedLayer, computing, lower_precision, round_weight
from scripts import inference
from tests.data.helpers import encode, picture
from tests.helpers import ROOT, random_images, tiny_model


@pytest.fixture
def saved(tmp_path):
    """(a model, its directory)"""
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@torch.inference_mode()
def reconstruct(model, images):
    with computing(model):
        return model.reconstruct(images).float()


def psnr(image, reference) -> float:
    return float(-10 * (image - reference).square().mean().log10())


def test_a_model_is_read_without_drawing_weights(saved, monkeypatch):
    model, folder = saved
    before = torch.get_rng_state()
    opened = MUSE_ViT.from_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.is_meta for p in (*opened.parameters(), *opened.buffers()))
    assert {p.dtype for p in opened.parameters()} == {torch.float32} and not opened.training
    assert [n for n, _ in opened.named_buffers()] == [n for n, _ in model.named_buffers()]
    images = random_images(1, 64, 48)
    assert torch.equal(reconstruct(opened, images), reconstruct(model, images))
    assert all(p.requires_grad for p in opened.parameters())


def test_a_file_in_half_precision_is_read_as_float32(saved):
    model, folder = saved
    file = folder / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(file).items()}, file)
    opened = MUSE_ViT.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert opened[name].dtype == torch.float32
        assert torch.equal(opened[name], tensor.half().float())


@pytest.mark.parametrize(("precision", "least"), [("bf16", 30), ("int8", 30)])
def test_lower_precisions_are_near_float32(precision, least, saved):
    model, folder = saved
    opened = load_model(folder, model.config, precision=precision)
    images = random_images(1, 64, 48)
    exact, near = reconstruct(model, images), reconstruct(opened, images)
    assert not torch.equal(exact, near) and psnr(near, exact) > least


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_reading_gives_what_lowering_gives(precision, saved):
    """Tensor by tensor from the file, or at once in memory: the same tensors of the same types."""
    model, folder = saved
    read = MUSE_ViT.from_pretrained(folder, precision=precision).state_dict()
    lowered = lower_precision(model, precision).state_dict()
    assert read.keys() == lowered.keys()
    for name, tensor in lowered.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_bytes_of_the_weights(saved):
    model, folder = saved
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    inside = {id(p) for m in layers for p in m.parameters()}
    outside = sum(4 * p.numel() for p in model.parameters() if id(p) not in inside)
    expected = {
        "bf16": outside + sum(2 * p.numel() for m in layers for p in m.parameters()),
        "int8": outside
        + sum(m.weight.numel() + 4 * len(m.weight) for m in layers)
        + sum(4 * m.bias.numel() for m in layers if m.bias is not None),
    }
    for precision, wanted in expected.items():
        opened = MUSE_ViT.from_pretrained(folder, precision=precision)
        tensors = opened.state_dict().values()
        assert sum(t.numel() * t.element_size() for t in tensors) == wanted


def test_no_more_than_one_tensor_is_there_in_float32(saved, monkeypatch):
    """Reading goes tensor by tensor: each is made smaller before the next is read."""
    _, folder = saved
    events, real = [], low_precision._converted
    tensors = low_precision._tensors

    def reading(file):
        for name, tensor in tensors(file):
            events.append(("read", name))
            yield name, tensor

    def converting(name, *words):
        events.append(("kept", name))
        return real(name, *words)

    monkeypatch.setattr(low_precision, "_tensors", reading)
    monkeypatch.setattr(low_precision, "_converted", converting)
    MUSE_ViT.from_pretrained(folder, precision="int8")
    assert len(events) > 20 and [kind for kind, _ in events] == ["read", "kept"] * (
        len(events) // 2
    )


# Large temporaries with small tensors between them that stay: a third of a gigabyte is freed.
FREEING = """
import torch
from muse.utils.memory import return_freed_memory

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

torch.ones(2**20)
start, kept, large = held(), [], []
for _ in range(80):
    large.append(torch.ones(2**20))
    kept.append(torch.ones(2**14))
del large
before = held() - start
return_freed_memory()
print(before, held() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the call is GNU's C library's")
def test_freed_memory_goes_back_to_the_system():
    # As after a while of work, when large blocks are no longer mapped one by one.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }
    done = subprocess.run(
        [sys.executable, "-c", FREEING], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 300_000 and after < before / 4  # kB; 5 MB are kept


def test_freed_memory_goes_back_while_a_model_is_read(saved, monkeypatch):
    _, folder = saved
    calls = []
    monkeypatch.setattr(low_precision, "TRIM_EVERY", 2**11)
    monkeypatch.setattr(low_precision, "return_freed_memory", lambda: calls.append(1))
    MUSE_ViT.from_pretrained(folder, precision="int8")
    large = [t for t in load_file(folder / "model.safetensors").values() if t.nbytes > 2**11]
    assert len(calls) > len(large) > 5  # after each of them, and at the end


def test_rounding_is_within_half_a_step_and_exact_for_whole_steps():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-3, 3, 6).view(6, 1, 1, 1)
    weight[2] = 0
    rounded, scale = round_weight(weight)
    largest = weight.flatten(1).abs().amax(1).view(6, 1, 1, 1)
    assert rounded.dtype == torch.int8 and scale.shape == (6, 1, 1, 1)
    assert ((rounded * scale - weight).abs() <= largest / 127 / 2 * 1.0001).all()
    whole = torch.randint(-127, 128, (5, 7)).float()
    whole[:, 0] = 127
    assert torch.equal(round_weight(whole * 0.5)[0].float(), whole)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 7),
        nn.Linear(5, 7, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
        nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    ],
)
def test_a_rounded_layer_is_the_layer_with_rounded_weights(layer):
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 8)
    made = RoundedLayer(layer)
    with torch.no_grad():
        rounded, scale = round_weight(layer.weight)
        layer.weight.copy_(rounded * scale)
    assert torch.equal(made(x), layer(x)) and torch.equal(made.weight, layer.weight)


def test_wrong_precisions_and_layers_are_refused(saved):
    with pytest.raises(ConfigError, match="precision 'int4': one of float32, bf16, int8"):
        MUSE_ViT.from_pretrained(saved[1], precision="int4")
    with pytest.raises(ConfigError, match="padding_mode=circular"):
        RoundedLayer(nn.Conv2d(1, 1, 3, padding_mode="circular"))


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("to_latent.bias"), r"1 missing tensor \(to_latent.bias\)"),
        (lambda state: state.update(more=torch.ones(1)), r"1 unexpected tensor \(more\)"),
        (
            lambda state: state.update({"to_latent.bias": torch.ones(3)}),
            "to_latent.bias has shape .3,., the model makes it .8,.: a checkpoint of another size",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_every_precision(change, message, precision, saved):
    file = saved[1] / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=message):
        MUSE_ViT.from_pretrained(saved[1], precision=precision)


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_a_torn_file_is_refused_in_every_precision(precision, saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MUSE_ViT.from_pretrained(saved[1], precision=precision)


@pytest.mark.parametrize(
    "words", [["--precision", "int8"], ["--precision", "bf16", "--tile", "32"]]
)
def test_the_command_takes_precision_and_tile(words, tmp_path, capsys):

    (tmp_path / "a.png").write_bytes(encode(picture(0, 48, 40), "PNG"))
    base = ["--config", str(ROOT / "configs/muse_tiny/stage3.yaml"), "--checkpoint", "muse_tiny"]
    base += ["--device", "cpu", "--image", str(tmp_path / "a.png")]
    for number, extra in enumerate(([], words)):
        assert inference.main([*base, "--output_dir", str(tmp_path / str(number)), *extra]) == 0
    lines = capsys.readouterr().out.splitlines()
    decibels = [float(line.split("PSNR ")[1].split()[0]) for line in lines]
    assert abs(decibels[0] - decibels[1]) < 1
    assert inference.main([*base, "--output_dir", str(tmp_path / "x"), "--tile", "0"]) == 2
    assert "--tile must be at least 1, not 0" in capsys.readouterr().err
