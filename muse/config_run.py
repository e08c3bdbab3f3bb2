"""The sections that every training run has: data, optimizer, schedule, training, experiment."""

from dataclasses import dataclass
from typing import Any

from muse.config_fields import key, section
from muse.stages import STAGES


@dataclass
class DatasetParamsConfig:
    train_shards_path_or_url: Any = key(
        "${oc.env:DATA_DIR}/train-{000000..000007}.tar",
        "braces, globs, ::, pipe:, a directory of shards, an image folder, or a list of "
        "{urls: ..., weight: ...} mixed in these proportions",
    )
    eval_shards_path_or_url: Any = key(
        "${oc.env:DATA_DIR}/val-{000000..000001}.tar", "the same forms, without weights"
    )
    num_workers_per_gpu: int = key(8, "loader processes of each process; 0: none", least=0)
    shuffle_buffer: int = key(
        1000, "samples a reader shuffles among, after the shards themselves are shuffled"
    )
    resampled: bool = key(
        False,
        "draw shards with replacement: for remote shards on many processes; a resume is then "
        "approximate",
    )
    mix: str = key(
        "sample",
        "what a draw from the mixture gives; batch: whole batches of one source, which decides "
        "the negatives of the contrast",
        choices=("sample", "batch"),
    )
    cache_in_memory: bool = key(False, "keep decoded pictures (small sets, num_workers_per_gpu 0)")
    eval_batch_size: int = key(32, "changes no result", least=1)
    max_eval_images: int | None = key(None, "null: all")


@dataclass
class PreprocessingConfig:
    resize_shorter_edge: int = key(224, "pixels", least=1)
    crop_size: int = key(
        224, "pixels; in training a multiple of encoder patch x model.unshuffle", least=1
    )
    random_crop: bool = key(True, "false: the middle")
    random_flip: bool = key(True, "left-right, half of the time")
    jpeg_draft: bool = key(
        True,
        "in training decode large JPEGs at 1/2, 1/4 or 1/8, not below the resized picture, and "
        "resize JPEGs with torch: faster, within 2/255 of Pillow's pixels on average",
    )


@dataclass
class DatasetConfig:
    params: DatasetParamsConfig = section(DatasetParamsConfig)
    preprocessing: PreprocessingConfig = section(PreprocessingConfig)
    max_bad_fraction: float = key(
        0.01,
        "unreadable samples are counted and skipped; above this share the run stops",
        least=0,
    )


@dataclass
class OptimizerParamsConfig:
    learning_rate: float = key(4e-4, "of the student, before lr_multipliers", least=0)
    discriminator_learning_rate: float = key(1e-4, "follows the same schedule")
    beta1: float = key(0.9, "AdamW's, of both optimizers")
    beta2: float = key(0.999, "AdamW's, of both optimizers")
    weight_decay: float = key(1e-4, "matrices and kernels only")


@dataclass
class OptimizerConfig:
    name: str = key("adamw", choices=("adamw",))
    params: OptimizerParamsConfig = section(OptimizerParamsConfig)
    no_decay: list[str] = key(
        [],
        "regular expressions of parameter names that are not decayed, beside vectors and scalars",
    )
    lr_multipliers: dict[str, float] = key(
        {}, r'regular expression in parameter names: factor, such as {"^encoder\\.": 0.5}'
    )


@dataclass
class SchedulerParamsConfig:
    warmup_steps: int = key(2000, "optimizer steps", least=0)
    end_lr: float = key(1e-5, "rate at the last step")
    discriminator_end_lr: float | None = key(
        None, "the discriminator's rate at the last step; null: end_lr"
    )
    hold_fraction: float = key(
        0.0, "share of the steps after the warm-up that stay at the full rate before the cosine"
    )


@dataclass
class SchedulerConfig:
    scheduler: str = key("cosine", choices=("cosine", "constant"))
    params: SchedulerParamsConfig = section(SchedulerParamsConfig)


@dataclass
class TrainingConfig:
    stage: str = key("topology_warmup", choices=STAGES)
    trainable: list[str] | None = key(
        None, "regular expressions of parameter names that learn; null: the stage's own"
    )
    seed: int = key(42, "of weights, of the order of samples, of crops and flips")
    max_train_steps: int = key(50000, "optimizer steps", least=1)
    per_gpu_batch_size: int = key(48, "images of one process in one forward pass", least=1)
    global_batch_size: int | None = key(
        None, "if set, per-process batch x accumulation x processes must equal it"
    )
    total_images: int | None = key(
        None,
        "if set, that batch x max_train_steps must equal it, so that a recipe sees as many images "
        "on other machines",
    )
    gradient_accumulation_steps: int = key(1, "forward passes an optimizer step", least=1)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: not clipped", least=0)
    mixed_precision: str = key("bf16", choices=("no", "bf16", "fp16"))
    compile: bool = key(
        False,
        "torch.compile of decoder, blocks and discriminator, each by itself: the first step takes "
        "minutes, those after it less time and memory",
    )
    use_ema: bool = key(
        True, "keep running means of the trained tensors; evaluation and `final` use them"
    )
    ema_decay: float = key(0.999, "of the running means, once warmed up")
    max_skipped_steps: int = key(
        0,
        "steps with a loss or gradient that is not finite that may be skipped before the run stops",
        least=0,
    )
    find_unused_parameters: bool | None = key(
        None, "DDP; null: only where a tensor that learns gets no gradient"
    )


@dataclass
class ExperimentConfig:
    name: str = key("muse", "of the progress bar and of the tracker's run")
    output_dir: str = key(
        "outputs/muse", "config.yaml, metrics.jsonl, checkpoint-N/, final/, images/"
    )
    init_from: str | None = key(
        None, "another run's directory, or any checkpoint: the stage before this one"
    )
    resume: bool = key(
        True,
        "go on from the newest checkpoint in output_dir; false: refuse a directory that holds one",
    )
    log_every: int = key(50, "optimizer steps, as all below", least=1)
    save_every: int = key(5000, "writes checkpoint-N", least=0)
    keep_last: int = key(2, "this many checkpoints stay", least=0)
    keep_every: int | None = key(None, "checkpoints at multiples of this stay")
    eval_every: int = key(5000, "0: never", least=0)
    generate_every: int = key(5000, "0: never", least=0)
    num_pictures: int = key(8, "in the sheets that generate_every draws")
    log_grad_every: int = key(
        0,
        "gradient norms by module, and cosines and energy of the objectives' gradients; 0: never",
    )
    tracker: str = key("none", choices=("none", "tensorboard", "wandb"))
