"""evaluate.py by protocol: what the model gets, what the metrics see, which pictures are kept."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from muse import load_config
from muse.data.crops import PictureCrop
from muse.data.dataloader import eval_loader
from muse.evaluation.metrics import inception
from muse.evaluation.metrics.dinov2 import DinoV2, load_dinov2
from muse.evaluation.metrics.frechet import frechet_distance
from muse.evaluation.metrics.lpips import Lpips
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from scripts import evaluate
from tests.helpers import one_error


@pytest.fixture
def run(trained_run, tmp_path):
    """run(further flags) into tmp_path/out: its exit code."""
    config, folder = trained_run
    flags = ["--config", str(config), "--checkpoint", str(folder / "final"), "--device", "cpu"]

    def command(*extra):
        words = ["--output_dir", str(tmp_path / "out"), "--num_pictures", "0", *map(str, extra)]
        return evaluate.main([*flags, *words])

    return command


def read(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.fixture
def model(trained_run):
    config, folder = trained_run
    return load_model(folder / "final", load_config(config).model)


def pictures(shapes_data, *cut):
    cut = PictureCrop(*cut) if cut else PictureCrop("center", 32, 32)
    (batch,) = eval_loader(f"{shapes_data}/val-*.tar", batch_size=8, transform=cut)
    return batch["images"]


def to_bytes(images):
    """(B,3,H,W) in [0,1] -> (B,H,W,3) uint8, rounded."""
    return np.rint(images.permute(0, 2, 3, 1).double().numpy() * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- the protocols
@torch.no_grad()
def test_unilip_pads_256_to_280_by_reflection(run, model, shapes_data, tmp_path):
    """By torch's padding, which does not repeat the edge either."""
    assert run("--protocol", "unilip256", "--metrics", "psnr") == 0
    real = pictures(shapes_data, "center", 256, 256)
    padded = F.pad(real, (12, 12, 12, 12), mode="reflect")
    assert padded.shape[-2:] == (280, 280)
    fake = model.reconstruct(padded)[..., 12:-12, 12:-12]
    got = read(tmp_path)
    pairs = zip(real.numpy(), fake.numpy(), strict=True)
    want = np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs])
    assert got["psnr"] == pytest.approx(want, rel=1e-5)
    assert got["protocol"]["recipe"]["pad_multiple"] == 28
    assert got["protocol"]["changed"] == ["images"]  # 8, not 50,000


@torch.no_grad()
def test_the_release_measures_rounded_pictures(run, model, shapes_data, tmp_path):
    flags = ["--protocol", "release", "--crop", "32", "--resize", "32", "--precision", "float32"]
    assert run(*flags, "--metrics", "psnr,ssim") == 0
    real = pictures(shapes_data)
    fake = model.reconstruct(real)
    bytes_of = [(to_bytes(a[None])[0], to_bytes(b[None])[0]) for a, b in zip(real, fake)]
    got = read(tmp_path)
    want = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in bytes_of])
    exact = np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(real, fake)])
    assert got["psnr"] == pytest.approx(want, rel=1e-6) and abs(want - exact) > 1e-5 * exact
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    want = np.mean(
        [
            structural_similarity(a, b, channel_axis=2, data_range=255, **options)
            for a, b in bytes_of
        ]
    )
    assert got["ssim"] == pytest.approx(want, abs=5e-6)
    assert got["protocol"]["precision"] == "float32"
    assert set(got["protocol"]["changed"]) == {"crop", "precision"}


class SmallInception(torch.nn.Module):
    """In the place of Inception: colours of the four quarters, and logits out of them."""

    name, weights_sha256 = "inception", "none"

    def __init__(self, weights=None):
        super().__init__()
        self.mix = torch.randn(12, 6, generator=torch.Generator().manual_seed(3)) * 150

    def forward(self, images):
        pooled = F.adaptive_avg_pool2d(inception.rounded_bytes(images).float() / 255, 2).flatten(1)
        return pooled, (pooled - 0.5) @ self.mix


def score(logits):
    shares = torch.softmax(logits.double(), 1).clamp(min=1e-30)
    return float((shares * (shares / shares.mean(0)).log()).sum(1).mean().exp())


@torch.no_grad()
@pytest.mark.parametrize("name", ["release", "native", "adm256"])
def test_the_parts_of_the_inception_score(name, run, model, monkeypatch, shapes_data, tmp_path):
    """One in the release; ten, here one a picture, in `native`; ADM's 5,000 at a time."""
    monkeypatch.setattr(inception, "Inception", SmallInception)
    sizes = ["--resize", "32", "--crop", "32", "--precision", "float32"]
    assert run("--protocol", name, "--metrics", "is,rfid", *sizes) == 0
    real = pictures(shapes_data)
    network = SmallInception()
    (a, _), (b, logits) = network(real), network(model.reconstruct(real))
    got = read(tmp_path)
    whole = score(logits)
    assert whole > 1.01
    assert got["is"] == pytest.approx(1 if name == "native" else whole, rel=1e-3)
    want = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert got["rfid"] == pytest.approx(want, rel=1e-3)


def test_metrics_are_the_protocols(run, monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "Inception", SmallInception)
    assert run("--protocol", "release", "--resize", "32", "--crop", "32") == 0
    assert {"rfid", "is", "is_std", "psnr", "ssim"} == set(read(tmp_path)) - {"protocol"}
    assert read(tmp_path)["protocol"]["precision"] == "bf16"


# ------------------------------------------------------------------------------- networks by name
def test_lpips_names_its_network(run, model, shapes_data, tmp_path, capsys):
    torch.manual_seed(0)
    state = torchvision.models.alexnet().state_dict()
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    weights = ["--lpips_weights", tmp_path]
    sizes = ["--resize", "64", "--crop", "64"]
    assert run("--metrics", "lpips_alex,lpips", *weights, *sizes) == 0
    got = read(tmp_path)
    real = pictures(shapes_data, "center", 64, 64)
    network = Lpips("alex", tmp_path / "alexnet-owt-7be5be79.pth")
    want = float(network(real, model.reconstruct(real)).mean())
    assert got["lpips_alex"] == got["lpips"] == pytest.approx(want, rel=1e-4) and want > 0
    assert "lpips_alex" in got["protocol"]["feature_networks"]
    said = one_error(capsys, run("--metrics", "lpips_vgg", *weights))
    assert "holds no vgg16*.pth, which lpips_vgg needs" in said
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "unknown LPIPS backbone 'dino'" in one_error(capsys, run("--metrics", "lpips_dino"))


def dinov2_folder(folder, architecture="vit_large_patch14_dinov2"):
    """A folder as timm's hub has it, of a small network under that name."""
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model(architecture, **sizes).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # new layers scale by 1e-5
            torch.nn.init.ones_(parameter)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 0, "model_args": sizes}
    config["pretrained_cfg"] = {"input_size": [3, 518, 518], "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return network


@torch.no_grad()
def test_fd_dinov2_from_a_local_folder(run, model, shapes_data, tmp_path):
    network = DinoV2(dinov2_folder(tmp_path / "hub"))
    assert run("--metrics", "fd_dinov2", "--feature_weights", tmp_path / "hub") == 0
    real = pictures(shapes_data)
    sides = []
    for images in (real, model.reconstruct(real)):
        rows = network.pooled((images * 255).round() / 255).double()
        sides += [rows.mean(0), torch.cov(rows.T)]
    got = read(tmp_path)
    assert got["fd_dinov2"] == pytest.approx(frechet_distance(*sides), rel=1e-3)
    said = got["protocol"]["feature_networks"]["fd_dinov2"]
    assert said["network"] == "timm vit_large_patch14_dinov2.lvd142m at 224"
    assert len(said["weights_sha256"]) == 64


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "is not a folder of timm's hub"),
        ({"architecture": "vit_small_patch14_dinov2"}, "holds vit_small_patch14_dinov2, and fd_di"),
        ({"architecture": "vit_large_patch14_dinov2"}, "no weights of vit_large_patch14_dinov2"),
    ],
)
def test_a_folder_of_another_network_is_one_line(content, says, run, tmp_path, capsys):
    folder = tmp_path / "hub"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(json.dumps(content))
    code = run("--metrics", "fd_dinov2", "--feature_weights", folder)
    assert says in one_error(capsys, code)


def test_the_folder_is_read_by_load_dinov2(tmp_path):
    network = DinoV2(dinov2_folder(tmp_path / "hub"))
    images = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            load_dinov2(tmp_path / "hub").pooled(images), network.pooled(images)
        )


# ------------------------------------------------------------------------------- pictures are kept
@torch.no_grad()
def test_save_images(run, model, shapes_data, tmp_path):
    real = pictures(shapes_data)
    want = to_bytes(model.reconstruct(real))
    assert run("--metrics", "psnr", "--save_images", tmp_path / "fake.npz", "--batch_size", 3) == 0
    assert read(tmp_path)["protocol"]["saved_images"] == str(tmp_path / "fake.npz")
    got = np.load(tmp_path / "fake.npz")["arr_0"]
    assert got.shape == (8, 32, 32, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - want).max() <= 1 and (got == want).mean() > 0.99
    assert run("--metrics", "psnr", "--save_images", tmp_path / "fake", "--batch_size", 3) == 0
    files = sorted((tmp_path / "fake").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(8)]
    assert all(np.array_equal(np.array(Image.open(f)), g) for f, g in zip(files, got, strict=True))


@pytest.mark.parametrize("target", ["fake.npz", "fake"])
def test_a_run_that_fails_saves_nothing(target, run, monkeypatch, tmp_path, capsys):
    """A picture of the second batch is NaN."""

    def broken(self, images):
        return images if len(images) == 5 else images * float("nan")

    monkeypatch.setattr(MUSE_ViT, "reconstruct", broken)
    code = run("--metrics", "psnr", "--save_images", tmp_path / target, "--batch_size", 5)
    assert "nan" in one_error(capsys, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_pictures_of_others_are_not_replaced(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code = run("--metrics", "psnr", "--save_images", tmp_path / "mine")
    assert "'letter.txt', which pictures would replace" in one_error(capsys, code)
    assert (tmp_path / "mine" / "letter.txt").exists()
