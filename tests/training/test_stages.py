"""What each stage trains, and that all of it learns: FIDELITY rows 1 and 10."""

import pytest
import torch
from safetensors.torch import load_file

from muse.losses.contrastive import itc_loss
from muse.losses.muse_loss import TERMS, MuseLoss
from muse.models.muse_vit import MUSE_ViT
from muse.stages import STAGES, select_trainable
from muse.teachers import build
from scripts import train as train_script
from tests.helpers import random_images, run_config, run_settings, tiny_model

PAPER_STAGES = ("topology_warmup", "semantic_injection", "synergistic_tuning")


def modules(names) -> set[str]:
    """Top-level modules, and the parts of blocks by their own name."""
    return {
        name.split(".")[2] if name.startswith("muse_blocks.") else name.split(".")[0]
        for name in names
    }


BODY = {
    "adapter_mlp",
    "norm1",
    "q_topo",
    "k_topo",
    "q_norm",
    "k_norm",
    "v_sem",
    "proj",
    "norm2",
    "mlp",
    "to_latent",
    "decoder",
}
SEMANTIC = {"v_itc", "semantic_projector", "logit_scale"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("encoder_distillation", {"encoder"}),
        ("topology_warmup", BODY),
        ("semantic_injection", BODY | SEMANTIC),
        ("synergistic_tuning", BODY | SEMANTIC | {"encoder"}),
    ],
)
def test_what_a_stage_trains(stage, expected):
    model = tiny_model()
    names = select_trainable(model, STAGES[stage].trainable)
    assert modules(names) == expected
    # A module learns whole: no tensor of it is left out in one block or another.
    assert names == [name for name, _ in model.named_parameters() if modules([name]) <= expected]
    assert modules(name for name, _ in model.named_parameters()) == BODY | SEMANTIC | {"encoder"}


def stage_gradients(settings, stage, changes=()):
    """Names that the stage trains, and name -> gradient of its whole loss (adversary aside) on one
    batch.
    """
    cfg = settings(stage, *changes)
    torch.manual_seed(0)
    model = MUSE_ViT(cfg.model)
    with torch.no_grad():  # away from the start, where residual branches rest at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = select_trainable(model, STAGES[stage].trainable)
    loss = MuseLoss.from_config(cfg, model)
    batch = {
        "images": random_images(4, 32, 32),
        "text": ["a cat", "a dog", "a cup", "a tree"],
        "keys": list("abcd"),
    }
    total, _ = loss(model(batch["images"], **loss.needs), batch)
    total.backward()
    return names, {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("stage", PAPER_STAGES)
def test_every_tensor_a_stage_trains_gets_a_gradient_under_paper(stage, settings):
    names, gradients = stage_gradients(settings, stage)
    assert sorted(gradients) == sorted(names)  # DDP needs no find_unused_parameters
    # A key's bias moves no softmax: its gradient is zero but for rounding.
    still = [
        name
        for name in names
        if not gradients[name].abs().max() > 0 and not name.endswith("k_proj.bias")
    ]
    assert not still


def test_release_leaves_the_first_blocks_structure_and_semantics_untouched(settings):
    names, gradients = stage_gradients(
        settings, "synergistic_tuning", [{"model": {"routing": "release", "isolate_streams": None}}]
    )
    dead = sorted(
        name for name in names if name not in gradients or not gradients[name].abs().max() > 0
    )
    assert dead == sorted(
        f"muse_blocks.0.{part}.weight" for part in ("q_topo", "k_topo", "q_norm", "k_norm", "v_itc")
    )


def test_terms_without_weight_are_not_built(settings, monkeypatch):
    def refuse(*args):
        raise AssertionError("a term without weight was built")

    for name in ("perceptual", "topology", "itc", "distillation"):
        monkeypatch.setitem(TERMS, name, refuse)
    off = {name: {"weight": 0.0} for name in ("perceptual", "topology", "itc", "adversarial")}
    cfg = settings(
        "synergistic_tuning",
        {
            "losses": off,
            "teacher": {
                "topology": {"kind": "dinov3", "source": "/nowhere"},
                "text": {"kind": "open_clip", "source": "/nowhere"},
            },
        },
    )
    loss = MuseLoss.from_config(cfg, tiny_model(unshuffle=1))
    assert list(loss.terms) == ["reconstruction"]
    assert loss.needs == {
        "topology": False,
        "semantics": False,
        "reconstruction": True,
        "encoder_only": False,
    }


def test_teachers_neither_read_nor_move_the_run_s_generator(settings):
    """A process that holds a teacher already, and one that must build it, draw the same numbers
    afterwards, from the same teacher.
    """
    cfg, built = settings("semantic_injection"), []
    for seed in (1, 2):
        build._teacher.cache_clear()
        torch.manual_seed(seed)
        built.append(build.shared_topology_teacher(cfg, (4, 4)))
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), drawn)
        assert build.shared_topology_teacher(cfg, (4, 4)) is built[-1]
    assert built[0] is not built[1]
    assert all(
        torch.equal(a, b) for a, b in zip(built[0].parameters(), built[1].parameters(), strict=True)
    )


def test_the_composite_is_the_weighted_sum_written_by_hand(settings):
    """Every term by its formula on fixed inputs; weights as in the configuration."""
    cfg = settings(
        "semantic_injection",
        {
            "losses": {
                "reconstruction": {"type": "l1", "weight": 0.7},
                "topology": {"weight": 2.0},
                "itc": {"weight": 0.3},
                "perceptual": {"weight": 0.0},
            }
        },
    )
    model = tiny_model(unshuffle=1)
    loss = MuseLoss.from_config(cfg, model)
    batch = {
        "images": random_images(3, 32, 32),
        "text": ["one", "two", "three"],
        "keys": list("abc"),
    }
    with torch.no_grad():
        out = model(batch["images"])
        total, numbers = loss(out, batch)
        pixels = (out.reconstruction - batch["images"]).abs().mean()
        targets = loss.terms["topology"].targets(batch, out.grid)
        kl = torch.stack(
            [
                (target.mean(1) * (target.mean(1).log() - maps.exp().mean(1).log())).sum(-1).mean()
                for target, maps in zip(targets, out.log_topology)
            ]
        ).mean()
        text = loss.terms["itc"].teacher(batch["text"])
        labels, ce = torch.arange(3), torch.nn.functional.cross_entropy
        logits = [out.logit_scale * embeds @ text.T for embeds in out.image_embeds]
        contrast = torch.stack([(ce(one, labels) + ce(one.T, labels)) / 2 for one in logits]).mean()
    assert torch.allclose(
        contrast, itc_loss(out.image_embeds, text, out.logit_scale, gather=False), atol=1e-5
    )
    assert torch.allclose(total, 0.7 * pixels + 2.0 * kl + 0.3 * contrast, atol=1e-4)
    assert {
        name: float(numbers[name]) for name in ("reconstruction", "topology", "itc")
    } == pytest.approx(
        {"reconstruction": float(pixels), "topology": float(kl), "itc": float(contrast)}, abs=1e-4
    )


@pytest.mark.parametrize("stage", ["topology_warmup", "synergistic_tuning"])
def test_one_script_trains_the_stage_that_is_configured(stage, shapes_data, tmp_path):
    config = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", stage)
    assert train_script.main(["--config", str(config), "--device", "cpu"]) == 0
    trained = load_file(tmp_path / "run/checkpoint-2/ema.safetensors")
    expected = select_trainable(tiny_model(unshuffle=1), STAGES[stage].trainable)
    assert sorted(trained) == sorted(expected)


def test_settings_of_the_tests_name_real_stages(shapes_data, tmp_path):
    assert all(
        run_settings(shapes_data, tmp_path, stage)["training"]["stage"] in STAGES
        for stage in PAPER_STAGES
    )
