"""The cost of a run against closed formulas, torch's own counter, public figures, a real run."""

import json
import math
import socket

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights

from muse import load_config
from muse.analysis.cost import run_cost
from muse.analysis.counters import FlopCounter, MovedBytes, SavedTensors
from muse.analysis.step_count import build_parts, count_step
from muse.models.layers import SwiGLU
from muse.teachers.hub import DINOV3
from muse.training.tokenizer_task import TokenizerTask
from muse.training.trainer import Trainer
from scripts import cost
from tests import helpers
from tests.helpers import ROOT, one_error, random_images, run_config

STAGE3 = ROOT / "configs/muse_1b/stage3.yaml"
GIGA = 1e9


@pytest.fixture(scope="module")
def full_size():
    """One step of MUSE-1B, stage 3, without weights and without a socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket.socket, "connect", lambda *_: pytest.fail("the cost of a run asked the network")
        )
        return count_step(load_config(STAGE3), batch=2)


def transformer(tokens, width, hidden, depth, matrices):
    """FLOPs of `depth` layers: four projections, `matrices` of the MLP, attention."""
    return depth * (
        4 * 2 * tokens * width**2
        + matrices * 2 * tokens * width * hidden
        + 2 * 2 * tokens**2 * width
    )


# ------------------------------------------------------------------------------------------ MUSE-1B
def test_full_size_parameters_by_module(full_size):
    student = full_size["parameters"]["student"]
    block = 5 * 512**2 + 3 * 512 * 1365 + 2 * 512 + 2 * 64
    assert student["total"] == full_size["parameters"]["learning"]["total"] == 486_459_556
    assert sum(count for name, count in student.items() if name != "total") == student["total"]
    assert (
        student["adapter"] == 4096 + 4096 * 512
        and student["blocks"] == 6 * block
        and student["latent"] == 512 * 32 + 32
    )
    assert student["projector"] == 512 * 512 + 512 * 768 + 1


def test_full_size_forward_by_module_is_the_closed_formula(full_size):
    forward = full_size["flops_forward"]
    block = 5 * 2 * 64 * 512**2 + 3 * 2 * 64 * 512 * 1365 + 2 * 2 * 64**2 * 512
    assert forward["encoder"] == 2 * 256 * (3 * 14 * 14) * 1024 + transformer(
        257, 1024, 4096, 24, 2
    )
    assert (
        forward["adapter"] == 2 * 64 * 4096 * 512
        and forward["blocks"] == 6 * block
        and forward["latent"] == 2 * 64 * 512 * 32
    )
    assert forward["projector"] == 6 * 2 * (512 * 512 + 512 * 768)
    assert forward["total"] == pytest.approx(
        sum(count for name, count in forward.items() if name != "total"), rel=1e-9
    )


def test_full_size_decoder_is_the_sum_over_its_layers(full_size):
    """Two operations a weight and a place of each layer. Linear attention adds less than 1%."""
    decoder = build_parts(load_config(STAGE3)).student.decoder
    total = 0

    def count(module, inputs, output):
        nonlocal total
        places = (
            output.numel() // module.weight.shape[0]
            if isinstance(module, nn.Conv2d)
            else output.numel() // module.out_features
        )
        total += 2 * places * module.weight.numel()

    for module in decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    decoder(torch.empty(1, 32, 8, 8, device="meta"))
    assert full_size["flops_forward"]["decoder"] == pytest.approx(total, rel=0.01)


def test_full_size_backward_is_twice_the_forward(full_size):
    """Everything learns in stage 3: each product has a gradient for its input and its weight."""
    training = full_size["flops_training"]
    assert training["student forward"] == full_size["flops_forward"]["total"]
    assert training["student backward"] == pytest.approx(2 * training["student forward"], rel=0.01)


def test_frozen_and_detached_parts_have_no_backward():
    """Stage 1: nothing for encoder and W_ITC, weights alone for W_Q and W_K, values alone by A."""
    step = count_step(
        load_config(ROOT / "configs/muse_tiny/stage1.yaml", ["teacher.topology.kind=random"]),
        batch=1,
    )
    forward, tokens, width, hidden = step["flops_forward"], 64, 192, 512
    square, attention = 2 * tokens * width**2, 2 * tokens**2 * width
    block = (
        2 * square
        + 2 * 2 * square
        + 3 * 2 * 2 * tokens * width * hidden
        + 2 * attention
        + attention
    )
    wanted = 4 * block + 2 * (forward["adapter"] + forward["latent"] + forward["decoder"])
    assert step["flops_training"]["student backward"] == pytest.approx(wanted, rel=0.01)
    learning = step["parameters"]["learning"]
    assert (
        learning["encoder"] == learning["projector"] == 0
        and step["memory"]["optimizer"] == 8 * learning["total"]
    )


def test_teachers_and_perceptual_networks_against_public_definitions(full_size):
    beside, training = full_size["parameters"]["beside"], full_size["flops_training"]
    with torch.device("meta"):
        public = timm.create_model(
            "vit_huge_plus_patch16_dinov3_qkvb", pretrained=False, num_classes=0
        )
    fields = next(iter(DINOV3.values()))
    # transformers has a token for masked patches beside what timm has.
    assert beside["topology teacher"] == sum(p.numel() for p in public.parameters()) + 1280
    assert (len(public.blocks), public.embed_dim) == (
        fields["num_hidden_layers"],
        fields["hidden_size"],
    )
    assert public.num_prefix_tokens == 1 + fields["num_register_tokens"]
    patches = 2 * 196 * (3 * 16 * 16) * 1280
    assert training["topology teacher"] == pytest.approx(
        patches + transformer(201, 1280, 5120, 32, 3), rel=0.01
    )
    assert training["text teacher"] == pytest.approx(transformer(77, 768, 3072, 12, 2), rel=0.01)
    # torchvision states multiply-adds in 10^9; LPIPS stops before VGG's three linear layers. Two
    # pictures forward, one back to its pixels.
    classifier = (25088 * 4096 + 4096 * 4096 + 4096 * 1000) / GIGA
    network = (
        2
        * GIGA
        * (
            VGG16_Weights.IMAGENET1K_V1.meta["_ops"]
            - classifier
            + ConvNeXt_Small_Weights.IMAGENET1K_V1.meta["_ops"]
        )
    )
    assert training["losses forward"] == pytest.approx(2 * network, rel=0.01)
    assert training["losses backward"] == pytest.approx(network, rel=0.01)


def test_discriminator_is_run_three_times_and_pulled_back_three_times(full_size):
    """Generator's term: forward, back to the pixels. Its own: two pictures, not to the pixels."""

    def conv(side, before, after, kernel):
        return 2 * side**2 * before * after * kernel**2

    first = conv(224, 3, 128, 5)
    inner = (
        conv(224, 128, 128, 3)
        + conv(112, 128, 256, 3)
        + conv(56, 256, 512, 3)
        + conv(16, 512, 512, 1)
        + conv(16, 512, 1, 5)
    )
    blur = sum(2 * side**2 * width * 16 for side, width in ((112, 128), (56, 256), (28, 512)))
    once = first + inner + blur
    wanted = 3 * once + once + 2 * (2 * inner + first + blur)
    assert full_size["flops_training"]["discriminator"] == pytest.approx(wanted, rel=0.01)


# -------------------------------------------------------------------------------------- the counter
def test_grouped_convolutions_are_counted_once():
    for layer in (
        nn.Conv2d(16, 32, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ConvTranspose2d(16, 32, 2, 2, groups=4),
    ):
        x = torch.rand(2, 16, 8, 8, requires_grad=True)
        once = 2 * 2 * 64 * layer.weight.numel()
        with FlopCounter() as forward:
            out = layer(x)
        with FlopCounter() as backward:
            out.sum().backward()
        assert (forward.get_total_flops(), backward.get_total_flops()) == (once, 2 * once)


@pytest.mark.parametrize("stage", ["topology_warmup", "semantic_injection", "synergistic_tuning"])
def test_a_step_equals_torch_s_counter_over_a_real_step(stage, shapes_data, tmp_path):
    """Real tensors, the real losses with their teachers, torch's own formulas."""
    cfg = load_config(run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", stage))
    one = Trainer(cfg, TokenizerTask(cfg))
    batch = [{"images": random_images(4, 32, 32), "text": list("abcd"), "keys": list("abcd")}]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        one.train_step(batch)
    counts = counter.get_flop_counts()["Global"]
    step = count_step(cfg, batch=4)
    assert 4 * step["flops_training"]["total"] == pytest.approx(sum(counts.values()), rel=0.01)


# ------------------------------------------------------------------------------------------- memory
def test_an_adversary_alone_is_walked_through(shapes_data, tmp_path):
    """Below the reconstruction its backward pass is that of a run with a pixel loss beside it."""
    off = {"perceptual": {"weight": 0.0}, "topology": {"weight": 0.0}, "itc": {"weight": 0.0}}
    flops = []
    for weight in (0.0, 1.0):
        losses = {"losses": {**off, "reconstruction": {"weight": weight}}}
        path = run_config(
            tmp_path / "c.yaml", shapes_data, tmp_path / "run", "synergistic_tuning", losses
        )
        flops.append(count_step(load_config(path), batch=2)["flops_training"])
    assert flops[0] == flops[1]
    assert flops[0]["student backward"] > flops[0]["student forward"] > 0
    assert flops[0]["losses backward"] == 0 < flops[0]["discriminator"]


def test_a_contrast_across_accumulation_runs_all_but_the_decoder_once_more(shapes_data, tmp_path):
    path = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", "semantic_injection")
    twice = ["training.gradient_accumulation_steps=2"]
    across = "losses.itc.across_accumulation=true"
    once, plain, more = (
        count_step(load_config(path, words), batch=2)
        for words in ([across], twice, [*twice, across])
    )
    assert once["flops_training"] == plain["flops_training"]
    added = more["flops_training"].pop("student forward, first pass")
    parts = more["flops_forward"]
    assert added == sum(parts[name] for name in ("encoder", "adapter", "blocks", "projector")) > 0
    extra = more["flops_training"]["total"] - plain["flops_training"]["total"]
    assert extra == pytest.approx(added)


def test_activations_of_a_block_by_hand():
    """SwiGLU keeps its input (once), both hidden maps, the gate and their product; no weight."""
    layer, tokens, hidden = SwiGLU(48), torch.rand(2, 5, 48), 128
    with SavedTensors(layer) as saved:
        out = layer(tokens)
    by_hand = 4 * 10 * (48 + 4 * hidden)
    assert saved.bytes() == by_hand
    with SavedTensors() as everything:
        again = layer(tokens)
    assert (
        everything.bytes() == by_hand + 4 * 48 * hidden
    )  # w3 alone has an input that learns, and needs its weight
    del out, again
    assert (
        saved.bytes() == 4 * 10 * 48
    )  # what is let go no longer counts; the input is the caller's


def test_activations_follow_the_batch_the_precision_and_checkpointing(shapes_data, tmp_path):
    cfg = load_config(run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run"))
    half = load_config(tmp_path / "c.yaml", ["training.mixed_precision=bf16"])
    light = load_config(tmp_path / "c.yaml", ["model.gradient_checkpointing=true"])
    base = count_step(cfg, batch=8)
    weights = 2 * base["parameters"]["student"]["total"]
    assert base["memory"]["activations"] == pytest.approx(
        2 * count_step(cfg, batch=4)["memory"]["activations"], rel=0.01
    )
    assert (
        base["memory"]["activations"] / 2
        < count_step(half, batch=8)["memory"]["activations"]
        < base["memory"]["activations"] + weights
    )
    recomputed = count_step(light, batch=8)
    assert recomputed["memory"]["activations"] < base["memory"]["activations"]
    extra = (
        recomputed["flops_training"]["student backward"]
        - base["flops_training"]["student backward"]
    )
    last = 2 * 2 * 16 * 85 * 32  # w3 of both blocks: nothing behind it is needed again
    assert extra == pytest.approx(base["flops_forward"]["blocks"] - last, rel=0.01)


def test_activations_are_counted_by_the_module_that_keeps_them():
    """A linear layer keeps its input; a tensor that two layers keep counts where it came first."""
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    rows = {first: "first", second: "second"}
    x = torch.rand(5, 8, requires_grad=True)
    with SavedTensors(first, second, rows=rows) as saved:
        hidden = first(x)
        out = second(hidden), second(hidden), hidden.exp()
    kept = {"first": 4 * 5 * 8, "second": 4 * 5 * 16, "other": 4 * 5 * 16}
    assert saved.by_row() == kept and saved.bytes() == sum(kept.values())
    assert not first._forward_hooks and not second._forward_pre_hooks
    del out


def test_bytes_moved_by_hand():
    """Reads and writes of all but products; a view moves nothing, an in-place sum moves three."""
    a, b, weight = torch.rand(6, 4), torch.rand(6, 4), torch.rand(4, 4)
    size = 4 * 24
    for operation, wanted in (
        (lambda: a + b, 3 * size),
        (lambda: a.exp(), 2 * size),
        (lambda: a.clone().add_(b), 5 * size),
        (lambda: a.t().reshape(2, 12).bfloat16(), 2 * size + size + size // 2),
        (lambda: a.view(4, 6)[1:].unsqueeze(0), 0),
        (lambda: a @ weight, 0),
        (lambda: nn.functional.linear(a, weight).relu_(), 2 * size),
    ):
        with MovedBytes() as moved, FlopCounter():
            operation()
        assert moved.total == wanted


@pytest.mark.parametrize("mode", ["none", "blocks", "all"])
def test_activations_are_those_of_a_real_step(mode, shapes_data, tmp_path):
    """The same bytes with real tensors, and what is recomputed is the largest piece's share."""
    path = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", "synergistic_tuning")
    adversarial = ["losses.adversarial.weight=0", f"model.gradient_checkpointing={mode}"]
    cfg = load_config(path, adversarial)
    trainer = Trainer(cfg, TokenizerTask(cfg))
    images, names = random_images(4, 32, 32), list("abcd")
    trainer.model.train()
    with SavedTensors(trainer.model, trainer.task.loss) as saved:
        batch = {"images": images, "text": names, "keys": names}
        loss, _ = trainer.task.compute_loss(trainer.wrapped, batch, 0)
    step = count_step(cfg, batch=4)
    assert step["memory"]["activations"] == pytest.approx(saved.bytes(), rel=0.02)
    del loss
    assert step["activations"]["total"] == step["memory"]["activations"]
    if mode == "none":
        assert "recomputed" not in step["memory"]
        return
    model = trainer.model.eval()
    blocks = list(model.muse_blocks)
    if mode == "all":
        blocks += [
            *model.encoder.encoder.layer,
            *(one for s in model.decoder.up_blocks for one in s),
        ]
    sizes = []
    for block in blocks:
        with SavedTensors(model, rows={block: "it"}) as kept:
            out = model(images)
            sizes.append(kept.by_row()["it"])
        del out
    assert step["memory"]["recomputed"] == max(sizes) > 0


RECIPE = [ROOT / f"configs/muse_1b/stage{stage}.yaml" for stage in (2, 3)]


@pytest.mark.parametrize("file", RECIPE, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_shipped_batches_fit_the_card_they_are_configured_for(file):
    """At the release's batches: 70 GB as configured, 40 GB with everything recomputed."""
    for overrides, limit in (([], 70e9), (["model.gradient_checkpointing=all"], 40e9)):
        cfg = load_config(file, overrides)
        memory = count_step(cfg, batch=cfg.training.per_gpu_batch_size)["memory"]
        assert memory["total"] + memory["buckets"] <= limit


def test_sizes_are_those_of_a_real_run(shapes_data, tmp_path):
    cfg = load_config(
        run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", "synergistic_tuning")
    )
    one = Trainer(cfg, TokenizerTask(cfg))
    one.train_step(
        [{"images": random_images(4, 32, 32), "text": list("abcd"), "keys": list("abcd")}]
    )

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [
        value
        for optimizer in (one.optimizer, one.task.adversary.optimizer)
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    discriminator = list(
        one.accelerator.unwrap_model(one.task.adversary.discriminator).parameters()
    )
    learning = [p for p in one.model.parameters() if p.requires_grad]
    memory = count_step(cfg, batch=4)["memory"]
    assert memory["optimizer"] == size(moments) and memory["ema"] == size(
        one.ema.state_dict().values()
    )
    assert memory["weights"] == size(one.model.parameters()) + size(discriminator)
    assert memory["gradients"] == size(learning) + size(discriminator)
    assert memory["teachers"] == size(one.task.loss.parameters())
    assert memory["total"] == sum(
        value for name, value in memory.items() if name not in ("total", "buckets")
    )


# ---------------------------------------------------------------------------- hours and the command
def test_hours_of_a_stage_by_hand(shapes_data, tmp_path):
    path = run_config(
        tmp_path / "c.yaml",
        shapes_data,
        tmp_path / "run",
        "topology_warmup",
        {"training": {"max_train_steps": 500}},
    )
    precise = ["teacher.precision=float32", "losses.perceptual.precision=float32"]
    found = run_cost(
        load_config(path, ["training.mixed_precision=bf16", *precise]),
        gpus=3,
        utilisation=0.5,
        peak=2e-3,
        peak_float32=1e-3,
    )
    flops = found["flops_training"]
    single = sum(flops[name] for name in ("topology teacher", "losses forward", "losses backward"))
    mixed = flops["student forward"] + flops["student backward"]
    seconds = 500 * 4 * 3 * (mixed / (0.5 * 2e9) + single / (0.5 * 1e9))
    assert found["recipe"]["images"] == 500 * 4 * 3 and found["recipe"][
        "gpu_hours"
    ] == pytest.approx(seconds / 3600)
    assert found["recipe"]["hours"] == pytest.approx(seconds / 3600 / 3)
    fixed = run_cost(
        load_config(path, ["training.global_batch_size=8"]), gpus=2, batch=64
    )  # the batch is for the memory alone
    assert fixed["recipe"]["images"] == 500 * 8 and fixed["batch"] == 64


def test_hours_follow_the_precision_of_each_frozen_network(shapes_data, tmp_path):
    """Peaks of 1, 2 and 4 units: each piece's hours are its operations over its own peak."""
    path = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run")

    def parts(*overrides):
        cfg = load_config(path, ["training.mixed_precision=bf16", *overrides])
        peaks = {"peak": 4e-3, "peak_tf32": 2e-3, "peak_float32": 1e-3}
        found = run_cost(cfg, gpus=1, utilisation=1.0, **peaks)
        seconds = found["recipe"]["gpu_hours"] * 3600 / found["recipe"]["images"] * 1e9
        return found["flops_training"], seconds, found["flops_by_precision"]

    flops, seconds, by_precision = parts()  # null: everything as the run, in 16 bits
    assert seconds == pytest.approx(flops["total"] / 4)
    assert by_precision == {"float32": 0, "tf32": 0, "bf16": pytest.approx(flops["total"])}
    flops, seconds, by_precision = parts(
        "teacher.precision=tf32", "losses.perceptual.precision=float32"
    )
    teacher = flops["topology teacher"]
    losses = flops["losses forward"] + flops["losses backward"]
    rest = flops["total"] - teacher - losses
    assert by_precision == {"float32": losses, "tf32": teacher, "bf16": pytest.approx(rest)}
    assert seconds == pytest.approx(losses + teacher / 2 + rest / 4)


def test_the_command_prints_and_writes_the_recipe(shapes_data, tmp_path, capsys):
    for number, stage in ((1, "topology_warmup"), (2, "semantic_injection")):
        run_config(
            tmp_path / f"stage{number}.yaml",
            shapes_data,
            tmp_path / "run",
            stage,
            {"training": {"max_train_steps": 10**number}},
        )
    words = [
        "--recipe",
        str(tmp_path),
        "--gpus",
        "2",
        "--json",
        str(tmp_path / "cost.json"),
        "training.per_gpu_batch_size=6",
    ]
    assert cost.main(words) == 0
    shown, stages = (
        capsys.readouterr().out,
        json.loads((tmp_path / "cost.json").read_text())["stages"],
    )
    assert [stage["recipe"]["images"] for stage in stages] == [10 * 12, 100 * 12]
    assert (
        "all 2 stages: 1,320 images" in shown
        and "computed, not measured" in shown
        and f"{tmp_path.name}/stage2" in shown
    )
    total = sum(p.numel() for p in helpers.tiny_model(unshuffle=1).parameters())
    assert f"{total:,} parameters" in shown and stages[0]["parameters"]["student"]["total"] == total
    assert cost.main(["--config", str(tmp_path / "stage1.yaml"), "--markdown"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}


MISTAKES = {
    "nothing named": ([], "--config"),
    "both named": (["--config", "a", "--recipe", "b"], "not allowed with"),
    "no such file": (["--config", "{folder}/none.yaml"], "none.yaml: no such configuration file"),
    "no stages": (["--recipe", "{folder}"], "no stage*.yaml"),
    "no batch": (["--config", "x", "--batch_size", "0"], "--batch_size must be above 0"),
    "too good": (["--config", "x", "--utilisation", "1.5"], "at most 1"),
    "not a number": (["--config", "x", "--gpus", "many"], "--gpus"),
    "unknown key": (["--config", str(STAGE3), "model.dimm=3"], "unknown key model.dimm"),
    "unknown teacher": (
        ["--config", str(STAGE3), "teacher.topology.source=someone/thing"],
        "timm:NAME",
    ),
    "unknown decoder": (
        [
            "--config",
            str(STAGE3),
            "model.decoder.source=nowhere/at-all",
            "model.decoder.config=null",
        ],
        "model.decoder",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, capsys):
    words, message = MISTAKES[mistake]
    assert message in one_error(capsys, cost.main([word.format(folder=tmp_path) for word in words]))


def test_math_of_two_teachers_named_by_timm(tmp_path):
    """The same backbone under transformers' and timm's name costs the same within 1%."""
    ours = count_step(
        load_config(
            STAGE3,
            [
                "teacher.topology.source=timm:vit_huge_plus_patch16_dinov3.lvd1689m",
                "losses.itc.weight=0",
                "losses.adversarial.weight=0",
                "losses.perceptual.weight=0",
            ],
        ),
        batch=1,
    )
    assert ours["flops_training"]["topology teacher"] == pytest.approx(
        2 * 196 * 768 * 1280 + transformer(201, 1280, 5120, 32, 3), rel=0.01
    )
    assert math.isclose(ours["flops_training"]["losses forward"], 0, abs_tol=1e6)
