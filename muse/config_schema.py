"""A tokenizer's configuration `Config`; the sections of its teachers and losses.

Every fact about a key stands at its field; tools/make_default_config.py writes
`configs/default.yaml` from them.
"""

from dataclasses import dataclass
from typing import Any

from muse.config_fields import key, section
from muse.config_model import ModelConfig, by_routing
from muse.config_run import (
    DatasetConfig,
    ExperimentConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)


# ---------------------------------------------------------------------------------------- teachers
# A kind is also a row of its table in muse/teachers/build.py; a test holds the two equal.
@dataclass
class TopologyTeacherConfig:
    kind: str = key("dinov3", choices=("dinov3", "affinity", "random", "none"))
    source: str = key(
        "facebook/dinov3-vith16plus-pretrain-lvd1689m",
        "dinov3: hub id, local directory, timm:NAME, internvit:SOURCE; affinity: "
        "efficientnet_lite0, timm name, local directory, internvit:SOURCE",
    )
    config: dict[str, Any] = key(
        {}, "further arguments of the library's constructor; random (tests): the network's fields"
    )
    layers: list[Any] | None = key(
        None,
        "null: evenly spaced onto the student's blocks; dinov3: numbers; affinity: "
        "[{block: 4, size: 128}, ...]",
    )
    image_size: Any = key(
        None,
        "side or [height, width] that pictures are resized to for the teacher, pixels; dinov3 "
        "also: grid, as many patches as the student has tokens; null: as they are",
    )
    temperature: float = key(0.1, "affinity: of the softmax over cosines", above=0)
    order: int = key(
        2,
        "affinity: cosines of features (1), or of how places relate to the whole picture (2)",
        choices=(1, 2),
    )
    spread: bool = key(
        False, "affinity: one layer a block, evenly spaced, instead of the mean of all layers"
    )
    cache: Any = key(
        False,
        "keep maps by sample key, on the host, up to 2048 MiB (true) or a number of MiB; only "
        "right where pictures are not augmented",
    )


@dataclass
class TextTeacherConfig:
    kind: str = key("open_clip", choices=("open_clip", "sentence", "random", "none"))
    source: str = key(
        "ViT-L-14/laion2b_s32b_b82k",
        "open_clip: MODEL/TAG, hf-hub:ID, directory; sentence: hub id, directory, package:NAME",
    )
    config: dict[str, Any] = key(
        {}, "further arguments of the library's constructor; random (tests): {dim: 64}"
    )
    cache: int = key(
        32768, "embeddings of this many captions are kept, on the teacher's device", least=0
    )


@dataclass
class FeatureTeacherConfig:
    kind: str = key(
        "none",
        "for losses.distillation (a stand-in for a pretrained encoder)",
        choices=("none", "backbone"),
    )
    source: str = key("", "efficientnet_lite0, timm name, local directory")
    config: dict[str, Any] = key(
        {}, "further arguments of the library's constructor; random (tests): {channels, seed}"
    )
    layers: list[Any] | None = key(
        None, "[{block: 4, size: 128}, ...]; their features are concatenated"
    )
    image_size: Any = key(None, "pixels; null: as they are")
    normalize: bool = key(False, "unit length for each layer's vectors, so that all count alike")
    cache: Any = key(False, "as teacher.topology.cache")


# How a frozen network computes.
PRECISIONS = ("float32", "tf32", "bf16")


@dataclass
class TeacherConfig:
    precision: str | None = key(
        None,
        "float32 | tf32 | bf16; of the teachers' networks, while softmax and divergence stay in "
        "float32; null: bf16 where training.mixed_precision is, else float32",
        choices=PRECISIONS,
    )
    topology: TopologyTeacherConfig = section(TopologyTeacherConfig)
    text: TextTeacherConfig = section(TextTeacherConfig)
    feature: FeatureTeacherConfig = section(FeatureTeacherConfig)


# ------------------------------------------------------------------------------------------ losses
@dataclass
class ReconstructionLossConfig:
    type: str = key("l2", "mean over all elements of [0,1] pixels", choices=("l1", "l2"))
    weight: float = key(1.0, "0: not built, as all losses", least=0)


@dataclass
class PerceptualLossConfig:
    name: str = key(
        "lpips-convnext_s-1.0-0.1",
        "parts and their weights; the sum is divided by the weights' sum. Parts: lpips, "
        "convnext_s, efficientnet_lite0, random",
    )
    weight: float = key(1.1, "of the weighted mean of the parts", least=0)
    precision: str | None = key(
        None,
        "as teacher.precision, of the parts' networks; distances stay in float32",
        choices=PRECISIONS,
    )
    blocks: list[int] | None = key(None, "efficientnet_lite0: which blocks (0-15); null: 2, 4, 10")
    weights: dict[str, str] = key(
        {}, "part: file with its backbone's weights, where it cannot be downloaded"
    )


@dataclass
class TopologyLossConfig:
    weight: float = key(0.0, "KL(teacher ‖ student) of attention, nats", least=0)
    blocks: str | None = key(
        None, f"null: as the routing says ({by_routing('topology')})", choices=("all", "last")
    )
    heads: str = key(
        "mean", "head-averaged attention, or head by head", choices=("mean", "per_head")
    )
    transpose: bool = key(
        False,
        "true: the release's resize, which leaves the teacher's queries and keys exchanged where "
        "the grids differ",
    )


@dataclass
class ITCLossConfig:
    weight: float = key(0.0, "image-text contrast", least=0)
    blocks: str | None = key(
        None, f"null: as the routing says ({by_routing('itc')})", choices=("all", "last")
    )
    gather: bool = key(True, "negatives from every process, with gradient")
    across_accumulation: bool = key(
        False,
        "negatives from all micro-batches of a step, not from one, by a first pass without the "
        "decoder",
    )
    objective: str = key(
        "nce",
        "distillation: passive regression on the text embedding (ablation)",
        choices=("nce", "distillation"),
    )


@dataclass
class AdversarialLossConfig:
    weight: float = key(0.0, "hinge PatchGAN; 0: no discriminator is built", least=0)
    start: int = key(0, "optimizer step at which the discriminator begins")
    lecam_weight: float = key(0.001, "of the LeCam regulariser, in the discriminator's loss")
    lecam_decay: float = key(0.999, "of the moving means of the logits that LeCam compares with")
    precision: str = key(
        "mixed",
        "mixed: the discriminator follows training.mixed_precision; float32: as the release's",
        choices=("mixed", "float32"),
    )
    base_channels: int = key(128, "PatchGAN width")
    num_stages: int = key(3, "PatchGAN halvings")


@dataclass
class DistillationLossConfig:
    weight: float = key(
        0.0, "1 - cosine of encoder tokens and a frozen network's features", least=0
    )
    pixel_weight: float = key(0.5, "of the linear pixel head beside it")


@dataclass
class RecognitionLossConfig:
    weight: float = key(
        0.0, "an EfficientNet's features and classes, and the pixels (muse_tiny's encoder)", least=0
    )
    pixel_weight: float = key(5.0, "of the linear pixel head")
    class_weight: float = key(0.3, "of the divergence over ImageNet's classes")


@dataclass
class LossesConfig:
    clamp_reconstruction: bool = key(
        False,
        "the pixel, perceptual and adversarial terms see reconstructions clamped to [0,1], so that "
        "no gradient comes from outside (as the release)",
    )
    reconstruction: ReconstructionLossConfig = section(ReconstructionLossConfig)
    perceptual: PerceptualLossConfig = section(PerceptualLossConfig)
    topology: TopologyLossConfig = section(TopologyLossConfig)
    itc: ITCLossConfig = section(ITCLossConfig)
    adversarial: AdversarialLossConfig = section(AdversarialLossConfig)
    distillation: DistillationLossConfig = section(DistillationLossConfig)
    recognition: RecognitionLossConfig = section(RecognitionLossConfig)


# --------------------------------------------------------------------------------------- the whole
@dataclass
class Config:
    model: ModelConfig = section(ModelConfig)
    teacher: TeacherConfig = section(
        TeacherConfig, "each is built only where its loss has a weight"
    )
    losses: LossesConfig = section(LossesConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    training: TrainingConfig = section(TrainingConfig)
    experiment: ExperimentConfig = section(ExperimentConfig)
