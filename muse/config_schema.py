"""Names, types and defaults of every configuration key; `configs/default.yaml` shows them with comments."""

from dataclasses import dataclass, field
from typing import Any


def _dict() -> Any:
    return field(default_factory=dict)


@dataclass
class SourceConfig:
    source: str = "random"
    config: dict[str, Any] = _dict()


@dataclass
class EncoderConfig(SourceConfig):
    source: str = "OpenGVLab/InternVL3-1B-hf"


@dataclass
class DecoderConfig(SourceConfig):
    source: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


@dataclass
class ModelConfig:
    routing: str = "paper"
    isolate_streams: bool | None = None
    shield_attention: bool | None = None
    join_semantics: bool | None = None
    shield_semantics: bool | None = None
    dim: int = 512
    num_heads: int = 8
    num_blocks: int = 6
    unshuffle: int = 2
    latent_dim: int = 32
    semantic_dim: int = 768
    grad_scale: float = 1.0
    gradient_checkpointing: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class TopologyTeacherConfig:
    kind: str = "dinov3"
    source: str = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
    config: dict[str, Any] = _dict()
    layers: list[Any] | None = None
    image_size: Any = None
    temperature: float = 0.1
    order: int = 2
    spread: bool = False
    cache: Any = False


@dataclass
class TextTeacherConfig:
    kind: str = "open_clip"
    source: str = "ViT-L-14/laion2b_s32b_b82k"
    config: dict[str, Any] = _dict()


@dataclass
class FeatureTeacherConfig:
    kind: str = "none"
    source: str = ""
    config: dict[str, Any] = _dict()
    layers: list[Any] | None = None
    image_size: Any = None
    normalize: bool = False
    cache: Any = False


@dataclass
class TeacherConfig:
    topology: TopologyTeacherConfig = field(default_factory=TopologyTeacherConfig)
    text: TextTeacherConfig = field(default_factory=TextTeacherConfig)
    feature: FeatureTeacherConfig = field(default_factory=FeatureTeacherConfig)


@dataclass
class ReconstructionLossConfig:
    type: str = "l2"
    weight: float = 1.0


@dataclass
class PerceptualLossConfig:
    name: str = "lpips-convnext_s-1.0-0.1"
    weight: float = 1.1
    blocks: list[int] | None = None
    weights: dict[str, str] = _dict()


@dataclass
class TopologyLossConfig:
    weight: float = 0.0
    blocks: str | None = None
    heads: str = "mean"
    transpose: bool = False


@dataclass
class ITCLossConfig:
    weight: float = 0.0
    blocks: str | None = None
    gather: bool = True
    objective: str = "nce"


@dataclass
class AdversarialLossConfig:
    weight: float = 0.0
    start: int = 0
    lecam_weight: float = 0.001
    lecam_decay: float = 0.999
    base_channels: int = 128
    num_stages: int = 3


@dataclass
class DistillationLossConfig:
    weight: float = 0.0
    pixel_weight: float = 0.5


@dataclass
class RecognitionLossConfig:
    weight: float = 0.0
    pixel_weight: float = 5.0
    class_weight: float = 0.3


@dataclass
class LossesConfig:
    reconstruction: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    perceptual: PerceptualLossConfig = field(default_factory=PerceptualLossConfig)
    topology: TopologyLossConfig = field(default_factory=TopologyLossConfig)
    itc: ITCLossConfig = field(default_factory=ITCLossConfig)
    adversarial: AdversarialLossConfig = field(default_factory=AdversarialLossConfig)
    distillation: DistillationLossConfig = field(default_factory=DistillationLossConfig)
    recognition: RecognitionLossConfig = field(default_factory=RecognitionLossConfig)


@dataclass
class DatasetParamsConfig:
    train_shards_path_or_url: Any = "${oc.env:DATA_DIR}/train-{000000..000007}.tar"
    eval_shards_path_or_url: Any = "${oc.env:DATA_DIR}/val-{000000..000001}.tar"
    num_workers_per_gpu: int = 8
    shuffle_buffer: int = 1000
    resampled: bool = False
    cache_in_memory: bool = False
    eval_batch_size: int = 32
    max_eval_images: int | None = None


@dataclass
class PreprocessingConfig:
    resize_shorter_edge: int = 224
    crop_size: int = 224
    random_crop: bool = True
    random_flip: bool = True


@dataclass
class DatasetConfig:
    params: DatasetParamsConfig = field(default_factory=DatasetParamsConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    max_bad_fraction: float = 0.01


@dataclass
class OptimizerParamsConfig:
    learning_rate: float = 4e-4
    discriminator_learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    params: OptimizerParamsConfig = field(default_factory=OptimizerParamsConfig)
    lr_multipliers: dict[str, float] = _dict()


@dataclass
class SchedulerParamsConfig:
    warmup_steps: int = 2000
    end_lr: float = 1e-5
    hold_fraction: float = 0.0


@dataclass
class SchedulerConfig:
    scheduler: str = "cosine"
    params: SchedulerParamsConfig = field(default_factory=SchedulerParamsConfig)


@dataclass
class TrainingConfig:
    stage: str = "topology_warmup"
    trainable: list[str] | None = None
    seed: int = 42
    max_train_steps: int = 50000
    per_gpu_batch_size: int = 48
    global_batch_size: int | None = None
    total_images: int | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    mixed_precision: str = "bf16"
    use_ema: bool = True
    ema_decay: float = 0.999
    max_skipped_steps: int = 0
    find_unused_parameters: bool | None = None


@dataclass
class ExperimentConfig:
    name: str = "muse"
    output_dir: str = "outputs/muse"
    init_from: str | None = None
    resume: bool = True
    log_every: int = 50
    save_every: int = 5000
    keep_last: int = 2
    keep_every: int | None = None
    eval_every: int = 5000
    generate_every: int = 5000
    num_pictures: int = 8
    log_grad_every: int = 0
    tracker: str = "none"


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
