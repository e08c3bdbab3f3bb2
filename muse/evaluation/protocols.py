"""What a number of this field is measured by: the table of protocols, as data.

A protocol is a name, and for each command that has it a recipe (recipes.py). What a command makes
of it is in used_protocol.py.
"""

from muse.data.crops import PictureCrop, RandomCrop
from muse.errors import ConfigError
from muse.evaluation.recipes import (
    LinearProbeRecipe,
    NeighbourRecipe,
    PictureRecipe,
    ReconstructionRecipe,
    SceneAugmentation,
    SegmentationRecipe,
    ZeroShotRecipe,
)

Recipe = (
    PictureRecipe
    | ReconstructionRecipe
    | LinearProbeRecipe
    | NeighbourRecipe
    | ZeroShotRecipe
    | SegmentationRecipe
)

EVAL_224 = PictureCrop("center", 256, 224)
PLAIN_224 = PictureCrop("center", 224, 224)
PLAIN_256 = PictureCrop("center", 256, 256)
ADM_256 = PictureCrop("adm", None, 256)

NATIVE = "this project's demo"
RELEASE = "the authors of MUSE"
ADM = "ADM's evaluator; crop of ADM, DiT, SiT and LightningDiT's latents"

PROTOCOLS: dict[str, dict[str, Recipe]] = {
    "native": {
        "evaluate": ReconstructionRecipe(NATIVE),
        "evaluate_images": ReconstructionRecipe(NATIVE, metrics=("fid", "is")),
        "linear_probe": LinearProbeRecipe(
            NATIVE, optimizer="nesterov", learning_rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
        ),
        "knn": NeighbourRecipe(NATIVE),
        "zero_shot": ZeroShotRecipe(NATIVE),
        "segment_probe": SegmentationRecipe(NATIVE),
        "topology": PictureRecipe(NATIVE),
    },
    "release": {
        "evaluate": ReconstructionRecipe(
            f"{RELEASE}; SSIM is Wang's, where theirs has a range of 2 and a uniform window",
            crop=PLAIN_224,
            metrics=("rfid", "is", "psnr", "ssim"),
            rounded_pairs=True,
            precision="bf16",
            is_splits=1,
        ),
        "evaluate_images": ReconstructionRecipe(
            RELEASE, crop=PLAIN_224, metrics=("fid", "is"), is_splits=1
        ),
        "linear_probe": LinearProbeRecipe(
            f"{RELEASE}; momentum, decay and the number of epochs are the field's; they choose the "
            "epoch on the pictures that are reported",
            crop=EVAL_224,
            normalise=True,
            norm_eps=1e-6,
            pooling=("cls",),
            learning_rates=(0.1,),
            rate_batch=None,
            batch_size=4096,
            epochs=90,
            cosine_by="epoch",
            report="best",
            evaluate_every=5,
        ),
        "zero_shot": ZeroShotRecipe(RELEASE, crop=EVAL_224),
        "segment_probe": SegmentationRecipe(
            f"{RELEASE}; as published their file loads no data; it takes the best epoch of the "
            "pictures that are reported",
            crop=PictureCrop("squash", None, 512),
            affine=True,
            optimizer="sgd",
            learning_rates=(0.01,),
            schedule="constant",
            batch_size=64,
            steps=None,
            epochs=10,
            loss="pixels",
            report="best",
            mean_over="all",
            rest="drop",
        ),
    },
    "unilip256": {
        "evaluate": ReconstructionRecipe(
            "UniLIP", PLAIN_256, ("rfid", "psnr", "ssim"), pad_multiple=28, images=50_000
        ),
        "evaluate_images": ReconstructionRecipe(
            "UniLIP", PLAIN_256, ("fid", "psnr", "ssim"), images=50_000
        ),
    },
    "adm256": {
        "evaluate": ReconstructionRecipe(
            ADM,
            crop=ADM_256,
            metrics=("rfid", "psnr", "ssim", "lpips_vgg"),
            is_splits=None,
            is_part=5000,
            images=50_000,
        ),
        "evaluate_images": ReconstructionRecipe(
            ADM,
            crop=ADM_256,
            metrics=("fid", "is", "sfid", "precision", "recall"),
            is_splits=None,
            is_part=5000,
            manifold_dtype="float16",
            manifold_images=10_000,
            images=50_000,
        ),
    },
    "mae": {
        "linear_probe": LinearProbeRecipe(
            "MAE's linear probe (after MoCo v3); batch of its paper",
            crop=EVAL_224,
            augmentation=RandomCrop(224, attempts=1),
            norm_eps=1e-6,
            pooling=("cls",),
            optimizer="lars",
            learning_rates=(0.1,),
            batch_size=16_384,
            epochs=90,
            warmup_epochs=10,
        ),
    },
    "dinov2": {
        "linear_probe": LinearProbeRecipe(
            "DINOv2, VTP; they choose among the probes on the pictures that are reported",
            crop=EVAL_224,
            augmentation=RandomCrop(224),
            norm_eps=None,
            pooling=("cls", "cls+mean"),
            last_blocks=(1, 4),
            learning_rates=(
                *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
                *(2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
            ),
            batch_size=1024,
            epochs=10,
            epoch_steps=1250,
        ),
        "knn": NeighbourRecipe("DINOv2", crop=EVAL_224, pooling=("cls",)),
        "segment_probe": SegmentationRecipe(
            "DINOv2's linear ADE20K probe in mmsegmentation",
            crop=PictureCrop("center", 512, None, filter="bilinear", resize_mask=False),
            augmentation=SceneAugmentation(),
            affine=True,
            learning_rates=(1e-3,),
            schedule="poly",
            warmup_steps=1500,
            batch_size=16,
            steps=40_000,
            loss="pixels",
            inference="slide",
            window=512,
            stride=341,
        ),
    },
    "coco-retrieval": {
        "zero_shot": ZeroShotRecipe(
            "CLIP papers: COCO's 5,000 test pictures of Karpathy's split",
            crop=PLAIN_224,
            retrieval="all",
            recalls=(1, 5, 10),
            captions_per_image=5,
            images=5000,
        ),
    },
    "flickr-retrieval": {
        "zero_shot": ZeroShotRecipe(
            "CLIP papers: Flickr30k's 1,000 test pictures of Karpathy's split",
            crop=PLAIN_224,
            retrieval="all",
            recalls=(1, 5, 10),
            captions_per_image=5,
            images=1000,
        ),
    },
}


def protocol_names(command: str) -> list[str]:
    """The protocols that a command (its script's name) has."""
    return [name for name, recipes in PROTOCOLS.items() if command in recipes]


def find_protocol(name: str, command: str) -> Recipe:
    """A command's recipe. ConfigError with the names that the command knows."""
    if command not in PROTOCOLS.get(name, {}):
        raise ConfigError(
            f"{command} has no protocol '{name}': one of {', '.join(protocol_names(command))}"
        )
    return PROTOCOLS[name][command]
