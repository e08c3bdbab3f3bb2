import lpips
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import convnext_small
from torchvision.models.vgg import cfgs, make_layers

from muse.errors import CheckpointError, ConfigError
from muse.losses.perceptual import PerceptualLoss, parse_perceptual_name
from muse.losses.perceptual_parts import PARTS, LPIPSDistance
from muse.teachers.efficientnet_lite import load_efficientnet_lite0


def pair(batch: int = 2, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, side, side, generator=generator), torch.rand(
        batch, 3, side, side, generator=generator
    )


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights of VGG-16's convolutions, named as torchvision's, which need the network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(
        {f"features.{k}": v for k, v in make_layers(cfgs["D"], False).state_dict().items()}, path
    )
    return path


# ---- names


def test_names():
    assert parse_perceptual_name("lpips-convnext_s-1.0-0.1") == {"lpips": 1.0, "convnext_s": 0.1}
    assert parse_perceptual_name("random") == {"random": 1.0}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "lpips-1.0-0.1",
        "lpips-convnext_s-1.0",
        "random--1",
        "random-0.0",
        "random-random-1-1",
        "lpips-convnext_s",
        "random-x",
        "random-nan",
        "random-inf",
    ],
)
def test_bad_names_are_one_line(name):
    with pytest.raises(ConfigError, match="losses.perceptual.name=") as caught:
        PerceptualLoss(name)
    assert "\n" not in str(caught.value)


# ---- the whole


def test_weighted_sum_over_sum_of_weights():
    images, target = pair()
    loss = PerceptualLoss("random-efficientnet_lite0-3.0-1.0", blocks=[0, 2])
    parts = [loss.parts[name](images, target) for name in ("random", "efficientnet_lite0")]
    expected = ((3 * parts[0] + parts[1]) / 4).mean().item()
    assert parts[0].shape == (2,) and loss(images, target).item() == pytest.approx(
        expected, rel=1e-6
    )
    assert loss(target, target).item() == pytest.approx(0, abs=1e-9)


def test_a_part_of_weight_zero_is_not_built(monkeypatch):
    def never(*args):
        raise AssertionError("built")

    monkeypatch.setitem(PARTS, "lpips", never)
    assert list(PerceptualLoss("random-lpips-1.0-0.0").parts) == ["random"]


@pytest.mark.parametrize("name", ["random", "efficientnet_lite0", "lpips"])
def test_frozen_float32_and_gradient_to_the_input_alone(name, vgg_file):
    loss = PerceptualLoss(name, weights={"lpips": vgg_file})
    loss.train()
    assert not any(module.training for module in loss.modules())
    images, target = (side.requires_grad_() for side in pair())
    plain = loss(images, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(images, target)
    assert cast.dtype == torch.float32 and cast.item() == plain.item()
    cast.backward()
    assert target.grad is None and images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in loss.parameters())


def test_gradient_is_finite_where_a_picture_is_flat(vgg_file):
    images, target = torch.zeros(1, 3, 32, 32, requires_grad=True), torch.zeros(1, 3, 32, 32)
    PerceptualLoss("lpips-random-1-1", weights={"lpips": vgg_file})(images, target).backward()
    assert images.grad.isfinite().all()


def test_the_same_random_network_every_time_and_no_random_number_spent():
    images, target = pair()
    before = torch.get_rng_state()
    values = {PerceptualLoss("random")(images, target).item() for _ in range(2)}
    assert len(values) == 1 and torch.equal(before, torch.get_rng_state())


# ---- the parts, each against another implementation


@pytest.mark.filterwarnings(
    "ignore:.*deprecated:UserWarning"
)  # the package's own call of torchvision
def test_lpips_equals_the_lpips_package(vgg_file):
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = torch.load(vgg_file, weights_only=True)
    for key in reference.net.state_dict():  # sliceK.N.weight: N counts vgg16's features
        reference.net.get_parameter(key).data.copy_(state["features." + key.split(".", 1)[1]])
    images, target = pair(side=48)
    with torch.no_grad():
        expected = reference(images, target, normalize=True).flatten()
    part = LPIPSDistance(vgg_file)
    torch.testing.assert_close(part(images, target), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(part(target, images), expected, atol=1e-6, rtol=1e-5)


def test_convnext_equals_torchvision(tmp_path):
    with torch.device("meta"):
        reference = convnext_small()
    generator = torch.Generator().manual_seed(0)
    state = {
        key: (
            key.endswith(("layer_scale", "weight")) + torch.zeros(value.shape)
            if value.ndim in (1, 3)
            else 0.02 * torch.randn(value.shape, generator=generator)
        )
        for key, value in reference.state_dict().items()
    }
    reference.load_state_dict(state, assign=True)
    torch.save(state, tmp_path / "convnext.pth")
    images, target = pair(batch=1, side=40)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def logits(x):
        x = F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        return reference.eval()((x - mean[:, None, None]) / std[:, None, None])

    loss = PerceptualLoss("convnext_s", weights={"convnext_s": tmp_path / "convnext.pth"})
    (tmp_path / "convnext.pth").unlink()  # 200 MB that pytest would keep
    with torch.no_grad():
        expected = F.mse_loss(logits(images), logits(target)).item()
        ours = loss(images, target).item()
    assert expected > 0 and ours == pytest.approx(expected, rel=1e-4)


def test_efficientnet_is_the_chord_between_unit_vectors():
    """|a/|a| - b/|b||^2 = 2 - 2 cos(a, b), mean over positions and blocks."""
    images, target = pair()
    network = load_efficientnet_lite0()
    layers = zip(network(images, (1, 4)), network(target, (1, 4)))
    expected = torch.stack(
        [2 - 2 * F.cosine_similarity(a, b, dim=1).mean(dim=(1, 2)) for a, b in layers]
    ).mean(dim=0)
    loss = PerceptualLoss("efficientnet_lite0", blocks=(1, 4))
    torch.testing.assert_close(loss.per_image(images, target), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="losses.perceptual.blocks"):
        PerceptualLoss("efficientnet_lite0", blocks=(16,))


@pytest.mark.parametrize("name", PARTS)
def test_without_weights_it_is_the_architecture(name, vgg_file, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    before = torch.get_rng_state()
    with torch.device("meta"):
        made = PerceptualLoss(name, pretrained=False)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.requires_grad for p in made.parameters())
    found = {key: value.shape for key, value in made.state_dict().items()}
    if name == "convnext_s":  # its weights are 200 MB
        reference = convnext_small().state_dict()
        expected = {f"network.{key}": value.shape for key, value in reference.items()}
        expected |= {key: (1, 3, 1, 1) for key in ("mean", "std")}
        expected = {f"parts.convnext_s.{key}": shape for key, shape in expected.items()}
    else:
        loaded = PerceptualLoss(name, weights={"lpips": vgg_file})
        expected = {key: value.shape for key, value in loaded.state_dict().items()}
    assert found == expected


# ---- weights that are not there


@pytest.mark.parametrize(
    "part, file", [("lpips", "vgg16-397923af.pth"), ("convnext_s", "convnext_small-0c510722.pth")]
)
def test_without_network_it_names_the_file_and_the_key(part, file, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        CheckpointError, match=f"needs {file}.*losses.perceptual.weights.{part}="
    ) as caught:
        PerceptualLoss(part)
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path, vgg_file):
    with pytest.raises(CheckpointError, match="not found: .*none.pth"):
        PerceptualLoss("lpips", weights={"lpips": tmp_path / "none.pth"})
    with pytest.raises(
        CheckpointError, match="does not hold the weights of perceptual part 'convnext_s'"
    ):
        PerceptualLoss("convnext_s", weights={"convnext_s": vgg_file})
    with pytest.raises(ConfigError, match="unknown part 'vgg'"):
        PerceptualLoss("random", weights={"vgg": vgg_file})
