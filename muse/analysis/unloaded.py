"""Every network of a training run without its weights, on the meta device: architectures out of the libraries, nothing downloaded.

Teachers are given as the function that runs their network, because what surrounds it (hashing of captions, the check of pixel
ranges) needs values.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain
from muse.losses.contrastive import ITCTerm
from muse.losses.distillation import DistillationTerm
from muse.losses.muse_loss import TERMS, MuseLoss
from muse.losses.perceptual import (
    LPIPS,
    PARTS,
    ConvNeXtS,
    PerceptualLoss,
    PerceptualPart,
    PerceptualTerm,
    parse_perceptual_name,
)
from muse.losses.topology import TopologyTerm
from muse.models.discriminator import PatchDiscriminator
from muse.models.muse_vit import MUSE_ViT
from muse.teachers.base import TopologyTarget
from muse.teachers.build import build_feature_teacher, build_topology_teacher
from muse.teachers.features import layer_features
from muse.teachers.hub import PACKAGE, is_timm_directory, loading, package_directory

# Fields of the gated model, as transformers' DINOv3ViTConfig wants them; checked against timm's own definition by a test.
DINOV3 = {
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "patch_size": 16,
        "num_register_tokens": 4,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    }
}
SENTENCE_TOKENS = 32  # of a caption, for encoders whose cost follows its length
VGG_TAPS = (64, 128, 256, 512, 512)  # channels of the five layers LPIPS compares


class Teacher(NamedTuple):
    """A frozen network, how it is run on a batch (B, 3, H, W), and what the loss then gets of it, with its shape alone."""

    network: nn.Module
    run: Callable[[Tensor], Any]
    answer: Callable[[Tensor], Any]


class Parts(NamedTuple):
    """All networks of a run on the meta device; the loss's terms have the teachers' answers in place of the teachers."""

    student: MUSE_ViT
    loss: MuseLoss
    teachers: dict[str, Teacher]
    discriminator: PatchDiscriminator | None


def build_parts(cfg: DictConfig) -> Parts:
    """What `Trainer` builds for this configuration. `ConfigError` or `CheckpointError` where an architecture cannot be known."""
    with _quiet():
        return _build_parts(cfg)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Builders tell which weights they read, and libraries warn where there are none: here that is the point."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _build_parts(cfg: DictConfig) -> Parts:
    with torch.device("meta"):
        student = MUSE_ViT(cfg.model, load_backbones=False)
    side = cfg.dataset.preprocessing.crop_size // student.cell
    teachers = {
        name: make(cfg, (side, side))
        for name, make in TEACHERS.items()
        if cfg.losses[{"text": "itc", "feature": "distillation"}.get(name, name)].weight > 0
    }
    with torch.device("meta"):
        terms = [
            _term(name, cfg, student, teachers) for name in TERMS if cfg.losses[name].weight > 0
        ]
        section, discriminator = cfg.losses.adversarial, None
        if section.weight > 0:
            width = section.base_channels
            discriminator = PatchDiscriminator(
                width=width, stages=section.num_stages, groups=math.gcd(32, width)
            )
    return Parts(student, MuseLoss(terms), teachers, discriminator)


class _Answer(nn.Module):
    """Stands in a term for its teacher."""

    def __init__(self, teacher: Teacher, dim: int = 0):
        super().__init__()
        self.answer, self.dim = teacher.answer, dim

    def forward(self, images: Any) -> Any:
        return self.answer(images)


def _term(name: str, cfg: DictConfig, student: MUSE_ViT, teachers: dict[str, Teacher]) -> nn.Module:
    section = cfg.losses[name]
    if name == "perceptual":
        return PerceptualTerm(
            section.weight,
            _UnloadedPerceptual(parse_perceptual_name(section.name), plain(section.blocks)),
        )
    if name == "topology":
        return TopologyTerm(
            section.weight,
            _Answer(teachers[name]),
            section.blocks,
            section.heads,
            section.transpose,
        )
    if name == "itc":
        return ITCTerm(
            section.weight, _Answer(teachers["text"]), section.blocks, False, section.objective
        )
    if name == "distillation":
        dim = teachers["feature"].answer(torch.empty(1, 3, 64, 64, device="meta")).shape[1]
        return DistillationTerm(
            section.weight, _Answer(teachers["feature"], dim), section.pixel_weight, student
        )
    return TERMS[name](cfg, student, (0, 0))


# ----------------------------------------------------------------------------------------------------- perceptual
class _UnloadedLPIPS(LPIPS):
    def __init__(self, weights: Any = None):
        from torchvision.models.vgg import cfgs, make_layers

        PerceptualPart.__init__(self)
        self.layers = make_layers(cfgs["D"], batch_norm=False)[: self.TAPS[-1] + 1]
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.linears = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in VGG_TAPS)
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))
        self.freeze()


class _UnloadedConvNeXtS(ConvNeXtS):
    def __init__(self, weights: Any = None):
        from torchvision.models import convnext_small

        PerceptualPart.__init__(self)
        self.network = convnext_small()
        self.register_buffer("mean", torch.empty(1, 3, 1, 1))
        self.register_buffer("std", torch.empty(1, 3, 1, 1))
        self.freeze()


class _UnloadedPerceptual(PerceptualLoss):
    def __init__(self, part_weights: dict[str, float], blocks: list[int] | None):
        nn.Module.__init__(self)
        unloaded = {"lpips": _UnloadedLPIPS, "convnext_s": _UnloadedConvNeXtS}
        options = {"efficientnet_lite0": {"blocks": blocks}} if blocks is not None else {}
        self.part_weights = {part: weight for part, weight in part_weights.items() if weight > 0}
        self.parts = nn.ModuleDict()
        for part in self.part_weights:
            with torch.device(
                "meta" if part in unloaded else "cpu"
            ):  # the others carry their few weights with them
                self.parts[part] = unloaded.get(part, PARTS[part])(**options.get(part, {}))


# ------------------------------------------------------------------------------------------------------- teachers
def _without_weights(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a teacher whose builder then makes the same architecture with random weights."""
    source, config = str(options["source"]), dict(options["config"] or {})
    if source.startswith("timm:") or is_timm_directory(source):
        return {**options, "config": {"pretrained": False, **config}}
    if source.startswith("torchvision:"):
        return {**options, "config": {**config, "weights": "none"}}
    if options["kind"] != "dinov3":
        return options
    fields = DINOV3.get(source)
    if Path(source).is_dir() or fields is None and source != "random":
        fields = _stored_fields(source)
    return {**options, "kind": "random", "source": "random", "config": {**(fields or {}), **config}}


def _stored_fields(source: str) -> dict[str, Any]:
    import transformers

    advice = "For its cost without weights name a directory that holds its config.json, or timm:NAME, as the source."
    with loading(f"the architecture of {source!r}", advice):
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).to_dict()


def _topology_teacher(cfg: DictConfig, grid: tuple[int, int]) -> Teacher:
    options = {**plain(cfg.teacher.topology), "cache": False}
    heads = cfg.losses.topology.heads
    with torch.device("meta" if options["kind"] in ("dinov3", "random") else "cpu"):
        teacher = build_topology_teacher(
            {**_without_weights(options), "heads": heads}, cfg.model.num_blocks, grid
        )

    if not hasattr(teacher, "patch"):  # affinity: features, then cosines of a few hundred places

        def target(images: Tensor) -> TopologyTarget:
            maps = tuple(
                torch.empty(len(images), 1, math.prod(grid), math.prod(grid), device=images.device)
                for _ in range(teacher.num_maps if teacher.spread else 1)
            )
            return TopologyTarget(maps if teacher.spread else maps * teacher.num_maps, grid)

        return Teacher(
            teacher,
            lambda images: layer_features(teacher.extractor, images, teacher.layers),
            target,
        )

    def run(images: Tensor) -> Any:
        pixels = torch.empty(
            len(images), 3, *teacher.input_size(images.shape[-2:]), device=images.device
        )
        return getattr(teacher.network, "forward_features", teacher.network)(pixels)

    def answer(images: Tensor) -> TopologyTarget:
        places = tuple(
            side // patch
            for side, patch in zip(teacher.input_size(images.shape[-2:]), teacher.patch)
        )
        count = 1 if heads == "mean" else _num_heads(teacher.network)
        maps = {
            layer: torch.empty(
                len(images), count, math.prod(places), math.prod(places), device=images.device
            )
            for layer in teacher.layers
        }
        return TopologyTarget(tuple(maps[layer] for layer in teacher.layers), places)

    return Teacher(teacher, run, answer)


def _num_heads(network: nn.Module) -> int:
    return (
        network.blocks[0].attn.num_heads
        if hasattr(network, "blocks")
        else network.config.num_attention_heads
    )


def _text_teacher(cfg: DictConfig, grid: tuple[int, int]) -> Teacher:
    options, dim = plain(cfg.teacher.text), cfg.model.semantic_dim
    source, config = str(options["source"]), dict(options["config"] or {})
    if options["kind"] == "open_clip":
        network, length = _clip_text(source, config)
        run = functools.partial(_tokens_through, network.encode_text, length)
    elif options["kind"] == "sentence":
        network = _sentence_encoder(source, config)
        run = functools.partial(_tokens_through, network, SENTENCE_TOKENS)
    else:
        network, run = nn.Identity(), len
    # The answer is asked with captions: as many as there are pictures.
    return Teacher(network, run, lambda captions: torch.empty(len(captions), dim, device="cpu"))


def _tokens_through(call: Callable, length: int, images: Tensor) -> Any:
    return call(torch.zeros(len(images), length, dtype=torch.long, device=images.device))


def _clip_text(source: str, config: dict[str, Any]) -> tuple[nn.Module, int]:
    import open_clip

    name = (
        f"local-dir:{source}"
        if Path(source).is_dir()
        else source
        if ":" in source
        else source.partition("/")[0]
    )
    config.pop("pretrained", None)
    with (
        loading(
            f"text teacher {source!r}",
            "For its cost without weights name an architecture of open_clip, such as ViT-L-14/TAG.",
        ),
        torch.device("meta"),
    ):
        network = open_clip.create_model(
            name, pretrained=None, load_weights=False, device="meta", **config
        )
    network.visual = None
    return network.eval().requires_grad_(False), network.context_length


def _sentence_encoder(source: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    path = (
        str(package_directory(source.removeprefix(PACKAGE)))
        if source.startswith(PACKAGE)
        else source
    )
    with (
        loading(
            f"text teacher {source!r}",
            "For its cost without weights name a directory with its config.json.",
        ),
        torch.device("meta"),
    ):
        settings = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **config)
        return transformers.AutoModel.from_config(settings).eval().requires_grad_(False)


def _feature_teacher(cfg: DictConfig, grid: tuple[int, int]) -> Teacher:
    options = _without_weights({**plain(cfg.teacher.feature), "cache": False})
    teacher = build_feature_teacher(options)
    return Teacher(
        teacher,
        lambda images: layer_features(teacher.extractor, images, teacher.layers),
        lambda images: torch.empty(len(images), teacher.dim, *grid, device=images.device),
    )


TEACHERS = {"topology": _topology_teacher, "text": _text_teacher, "feature": _feature_teacher}
