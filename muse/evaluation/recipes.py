"""What a protocol settles for each command: the fields of the table in protocols.py.

Data alone. A `crop` of None is the configuration's evaluation crop, and pictures as they are in
`evaluate_images`. `source` says who measures so, and what of it is ours.
"""

from dataclasses import dataclass

from muse.data.crops import PictureCrop, RandomCrop


@dataclass(frozen=True)
class PictureRecipe:
    """How pictures are cut, and nothing else."""

    source: str
    crop: PictureCrop | None = None


@dataclass(frozen=True)
class ReconstructionRecipe:
    """Reconstructions against originals (evaluate.py), or two sets (evaluate_images.py)."""

    source: str
    crop: PictureCrop | None = None
    metrics: tuple[str, ...] = ("rfid", "is", "psnr", "ssim", "lpips")
    pad_multiple: int | None = None  # reflection before the model, cut off after it
    rounded_pairs: bool = False  # PSNR and SSIM of pictures rounded to bytes
    precision: str = "float32"  # of the model: float32, bf16 or fp16
    is_splits: int | None = 10  # parts of a seeded shuffle
    is_part: int | None = None  # or parts of so many pictures, in the order of the set
    manifold_k: int = 3  # precision and recall
    manifold_dtype: str = "float64"  # of their distances
    manifold_images: int | None = None  # only the first so many of the reference
    images: int | None = None  # what the source measures on


@dataclass(frozen=True)
class LinearProbeRecipe:
    """A linear layer on frozen features of whole pictures."""

    source: str
    crop: PictureCrop | None = None
    augmentation: RandomCrop | None = None  # of training pictures; None: features are stored once
    normalise: bool = False  # features to length 1
    norm_eps: float | None = 1e-5  # of a batch norm without affine; None: no batch norm
    pooling: tuple[str, ...] = ("mean",)  # of an encoder's tokens; each is a probe of its own
    last_blocks: tuple[int, ...] = (1,)  # of an encoder, concatenated; likewise
    optimizer: str = "sgd"  # sgd, nesterov or lars
    momentum: float = 0.9
    weight_decay: float = 0.0
    learning_rates: tuple[float, ...] = (0.1,)
    rate_batch: int | None = 256  # rates are for so large a batch and scale; None: as they are
    batch_size: int | None = None  # None: sixteen batches an epoch, of 64 to 1024
    epochs: int = 100
    epoch_steps: int | None = None  # None: the whole training set
    warmup_epochs: int = 0
    cosine_by: str = "step"  # step or epoch
    report: str = "last"  # last, or best of the epochs that are evaluated
    evaluate_every: int = 1  # epochs
    trial_epochs: int = 0  # of a first run of all rates, with the whole schedule; 0: none
    trial_keep: int = 1  # rates that go on after it
    chosen_on: str = "held-out training pictures"  # rate, pooling and best epoch


@dataclass(frozen=True)
class NeighbourRecipe:
    """k nearest neighbours on stored features."""

    source: str
    crop: PictureCrop | None = None
    pooling: tuple[str, ...] = ("mean",)
    last_blocks: tuple[int, ...] = (1,)
    normalise: bool = True
    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07


@dataclass(frozen=True)
class ZeroShotRecipe:
    """Pictures against class names or captions."""

    source: str
    crop: PictureCrop | None = None
    templates: str = "open_clip's 80"
    retrieval: str | None = None  # all: every picture against every caption, both ways
    recalls: tuple[int, ...] = (1, 5)
    captions_per_image: int | None = None  # at most so many count, all when None
    images: int | None = None


@dataclass(frozen=True)
class SceneAugmentation:
    """Training pictures and masks of scenes."""

    shorter_edge: int = 512
    ratio: tuple[float, float] = (0.5, 2.0)  # of the edge, drawn evenly
    crop_size: int = 512  # padded where the picture is smaller
    largest_class: float = 0.75  # of a crop's labels; drawn anew up to ten times
    flip: float = 0.5
    photometric: bool = True  # brightness, contrast, saturation, hue as in SSD


@dataclass(frozen=True)
class SegmentationRecipe:
    """A batch norm and a 1x1 convolution on feature maps."""

    source: str
    crop: PictureCrop | None = None
    augmentation: SceneAugmentation | None = None
    affine: bool = False  # of the batch norm, which then is one over all processes
    optimizer: str = "adamw"
    learning_rates: tuple[float, ...] = (3e-3,)  # of several, one is chosen
    momentum: float = 0.9  # adamw: its first beta
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # cosine, constant, or poly (linear to zero)
    warmup_steps: int = 0
    batch_size: int = 32
    steps: int | None = 2000
    epochs: int | None = None  # in place of steps
    loss: str = "cells"  # cells: on the shares of each cell; pixels: on logits resized to the mask
    inference: str = "whole"  # whole, or slide
    window: int | None = None
    stride: int | None = None
    report: str = "last"  # last or best epoch
    mean_over: str = "present"  # classes: present, or all
    encoder_grid: str = "native"  # of the baseline; features of the model have the latent grid
    rest: str = "pad"  # pixels that fill no cell: pad, or drop (the maps stretch over the picture)
    chosen_on: str = "held-out training pictures"  # rate and best epoch
