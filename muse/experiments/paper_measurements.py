"""What measures the numbers of the paper: commands, and the weights and data that they need.

`paper_tables.py` puts the paper's numbers beside them, `reproduce.py` runs them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Weights or data that a command needs and that do not come with muse."""

    title: str
    places: tuple[str, ...]  # the first that exists is taken; $VARIABLES and patterns are expanded
    source: str  # how one gets it


@dataclass(frozen=True)
class Measurement:
    """Commands that write one JSON file of numbers.

    In a command `{NAME}` is the place of a need and `{output}` the directory of the measurement.
    """

    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    takes: str = "minutes"
    long: bool = False  # hours or more, or several GPUs: only with --long
    results: str = "{output}/metrics.json"
    judged: str = ""  # by which program, where the numbers come from another one


NEEDS = {
    "muse_1b": Need(
        "MUSE-1B's weights",
        ("$CHECKPOINT_DIR/MUSE-1B", "outputs/muse_1b/stage3/final"),
        "the authors' published checkpoint (a directory with pytorch_model.bin), or your own run "
        "of the three stages",
    ),
    "imagenet_val": Need(
        "ImageNet's 50,000 validation pictures",
        ("$DATA_DIR/imagenet-val", "$DATA_DIR/imagenet/val"),
        "image-net.org; class folders, or shards by tools/make_shards.py imagenet",
    ),
    "imagenet_train": Need(
        "ImageNet's training pictures",
        ("$DATA_DIR/imagenet-train", "$DATA_DIR/imagenet/train"),
        "image-net.org; class folders, or shards by tools/make_shards.py imagenet",
    ),
    "ade20k": Need(
        "ADE20K (SceneParsing, 150 classes)",
        ("$DATA_DIR/ade20k",),
        "its authors' page ADEChallengeData2016; images/ and masks/ as training/ and validation/",
    ),
    "inception": Need(
        "Inception's weights in torch-fidelity's file",
        (
            "$CHECKPOINT_DIR/weights-inception-2015-12-05-6726825d.pth",
            "~/.cache/torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth",
        ),
        "torch-fidelity's release page",
    ),
    "vgg16": Need(
        "VGG-16 of torchvision, for lpips_vgg",
        (
            "$CHECKPOINT_DIR/vgg16-397923af.pth",
            "~/.cache/torch/hub/checkpoints/vgg16-397923af.pth",
        ),
        "torchvision.models.vgg16 downloads it",
    ),
    "clip": Need(
        "the text tower, CLIP ViT-L/14 of LAION-2B",
        (
            "$CHECKPOINT_DIR/CLIP-ViT-L-14-laion2B-s32B-b82K",
            "~/.cache/huggingface/hub/models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K",
        ),
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K on the hub",
    ),
    "internvit": Need(
        "InternVL3-1B, whose InternViT is the baseline",
        (
            "$CHECKPOINT_DIR/InternVL3-1B",
            "$CHECKPOINT_DIR/InternVL3-1B-hf",
            "~/.cache/huggingface/hub/models--OpenGVLab--InternVL3-1B-hf",
        ),
        "OpenGVLab/InternVL3-1B-hf on the hub",
    ),
    "adm_reference": Need(
        "ADM's reference statistics of ImageNet at 256 px",
        ("$DATA_DIR/VIRTUAL_imagenet256_labeled.npz",),
        "the README of guided-diffusion's evaluations/ folder",
    ),
    "umm_1b": Need(
        "weights of the multimodal model (1B)",
        ("$CHECKPOINT_DIR/umm_1b/stage3/final", "outputs/umm_1b/stage3/final"),
        "nobody has published them: train with tools/train_umm.sh umm_1b, stages 1 to 3",
    ),
    "mmbench": Need(
        "MMBench as a TSV",
        ("$DATA_DIR/MMBench_DEV_EN.tsv",),
        "VLMEvalKit's list of data sets",
    ),
    "mmvp": Need("MMVP as a TSV", ("$DATA_DIR/MMVP.tsv",), "VLMEvalKit's list of data sets"),
    "geneval": Need(
        "GenEval's prompts",
        ("$DATA_DIR/geneval/evaluation_metadata.jsonl",),
        "the repository of GenEval, prompts/",
    ),
    "wise": Need("WISE's prompts", ("$DATA_DIR/wise/prompts.json",), "the repository of WISE"),
    "imgedit": Need(
        "ImgEdit's prompts and source pictures",
        ("$DATA_DIR/imgedit/basic_edit.json",),
        "the repository of ImgEdit-Bench",
    ),
    "demo_pictures": Need(
        "the demo's pictures",
        ("$MUSE_DATA", "outputs/demo/data-everything"),
        "python tools/make_demo_data.py --kind everything --images 6000 "
        "--output outputs/demo/data-everything",
    ),
}

_1B = "--config configs/muse_1b/stage3.yaml --checkpoint {muse_1b}"
_TINY = "--config configs/muse_tiny/stage3.yaml --checkpoint muse_tiny"
_DEMO = "--train_url {demo_pictures}/train-*.tar --val_url {demo_pictures}/val-*.tar"
_IMAGENET = "--train_url {imagenet_train} --val_url {imagenet_val}"
_ADE = "--train-url {ade20k}/training --val-url {ade20k}/validation"


def _reconstruction(protocol: str, *extra: str, flags: str = "") -> Measurement:
    command = (
        "bash tools/evaluate.sh configs/muse_1b/stage3.yaml {muse_1b} {output} "
        f"--protocol {protocol} --val_url {{imagenet_val}} --inception_weights {{inception}}{flags}"
    )
    return Measurement((command,), ("muse_1b", "imagenet_val", "inception", *extra), "a GPU: ~1 h")


def _probe(flags: str, needs: tuple[str, ...] = ("muse_1b",), model: str = _1B) -> Measurement:
    command = f"python scripts/linear_probe.py {model} {_IMAGENET} --output_dir {{output}} {flags}"
    return Measurement((command,), (*needs, "imagenet_train", "imagenet_val"), "a GPU: hours", True)


def _segment(flags: str, mode: str = "muse") -> Measurement:
    command = f"bash tools/segment_probe.sh {mode} {_1B} {_ADE} --output_dir {{output}} {flags}"
    needs = ("muse_1b", "ade20k") if mode == "muse" else ("internvit", "muse_1b", "ade20k")
    return Measurement((command,), needs, "a GPU: hours", True)


def _generator(name: str) -> Measurement:
    """Latents, generator, 50,000 samples, gFID: docs/generation.md."""
    return Measurement(
        (
            f"python scripts/extract_latents.py {_1B} --train_url {{imagenet_train}} --output "
            "{output}/latents --flip --mixed_precision bf16 --batch_size 128",
            f"bash tools/train_generator.sh {name} latents.path={{output}}/latents "
            "experiment.output_dir={output}/generator",
            "python scripts/generate.py --checkpoint {output}/generator/final --tokenizer "
            "{muse_1b} --num_images 50000 --mixed_precision bf16 --output {output}/samples.npz",
            "python scripts/evaluate_images.py --protocol adm256 --real {adm_reference} --fake "
            "{output}/samples.npz --inception_weights {inception} --output_dir {output}",
        ),
        ("muse_1b", "imagenet_train", "adm_reference", "inception"),
        f"8 GPUs: cost in the header of configs/generation/{name}.yaml",
        True,
    )


def _pictures(script: str, prompts: str, judge: str, flags: str = "") -> Measurement:
    command = (
        f"python scripts/{script} --checkpoint {{umm_1b}} --prompts {{{prompts}}} "
        f"--output {{output}}/pictures{flags}"
    )
    return Measurement((command,), ("umm_1b", prompts), "a GPU: hours", True, judged=judge)


def _understanding(name: str, flags: str = "") -> Measurement:
    command = (
        f"python scripts/evaluate_understanding.py --checkpoint {{umm_1b}} --benchmark {name} "
        f"--tsv {{{name}}} --output_dir {{output}}{flags}"
    )
    return Measurement((command,), ("umm_1b", name), "a GPU: ~1 h", True)


def _demo_reconstruction(flags: str) -> Measurement:
    command = (
        "bash tools/evaluate.sh configs/muse_tiny/stage3.yaml muse_tiny {output} --val_url "
        f"{{demo_pictures}}/val-*.tar {flags}"
    )
    return Measurement((command,), ("demo_pictures",), "a minute on two cores")


def _demo_probe(flags: str, script: str = "linear_probe") -> Measurement:
    command = (
        f"python scripts/{script}.py {_TINY} {_DEMO} --max_images 2000 --cache_dir "
        f"{{output}}/../features --output_dir {{output}}{flags}"
    )
    return Measurement((command,), ("demo_pictures",), "a minute on two cores")


def _demo_segmentation(flags: str, mode: str = "muse") -> Measurement:
    command = (
        f"bash tools/segment_probe.sh {mode} {_TINY} {_DEMO} --labels plain --max_images 1000 "
        f"--output_dir {{output}}{flags}"
    )
    return Measurement((command,), ("demo_pictures",), "minutes on two cores")


_DEMO_MEASUREMENTS = {
    "demo_evaluate_native": _demo_reconstruction("--metrics psnr,ssim,fd_efficientnet_lite0"),
    "demo_evaluate_release": _demo_reconstruction(
        "--protocol release --resize 128 --crop 128 --precision float32 --metrics psnr,ssim"
    ),
    "demo_evaluate_unilip256": _demo_reconstruction(
        "--protocol unilip256 --resize 128 --crop 128 --metrics psnr,ssim"
    ),
    "demo_evaluate_adm256": _demo_reconstruction(
        "--protocol adm256 --crop 128 --metrics psnr,ssim,fd_efficientnet_lite0 --save_images "
        "{output}/reconstructions.npz"
    ),
    "demo_probe_native": _demo_probe(""),
    "demo_probe_release": _demo_probe(" --recipe release"),
    "demo_probe_mae": _demo_probe(" --recipe mae --augment no"),
    "demo_probe_dinov2": _demo_probe(" --recipe dinov2 --augment no --epochs 5 --epoch_steps 20"),
    "demo_probe_encoder": _demo_probe(" --baseline --pool cls+mean"),
    "demo_knn": _demo_probe("", "knn"),
    "demo_zero_shot": Measurement(
        (
            f"python scripts/zero_shot.py {_TINY} --val_url {{demo_pictures}}/val-*.tar "
            "--retrieval all --output_dir {output}",
        ),
        ("demo_pictures",),
        "a minute on two cores",
    ),
    "demo_segment_native": _demo_segmentation(""),
    "demo_segment_release": _demo_segmentation(
        " --protocol release --crop 128 --steps 60 --probe_batch_size 16"
    ),
    "demo_segment_dinov2": _demo_segmentation(
        " --protocol dinov2 --resize 128 --crop 128 --steps 60 --probe_batch_size 16 --lr 0.01"
    ),
    "demo_segment_encoder": _demo_segmentation("", "baseline"),
}

MEASUREMENTS = _DEMO_MEASUREMENTS | {
    "reconstruction_release": _reconstruction("release"),
    "reconstruction_adm256": _reconstruction(
        "adm256", "vgg16", flags=" --metrics rfid,psnr,ssim,lpips_vgg --lpips_weights {vgg16}"
    ),
    "reconstruction_unilip256": _reconstruction("unilip256", flags=" --metrics rfid,psnr,ssim"),
    "zero_shot": Measurement(
        (
            f"python scripts/zero_shot.py {_1B} --val_url {{imagenet_val}} --protocol release "
            "--output_dir {output}",
        ),
        ("muse_1b", "imagenet_val", "clip"),
        "a GPU: ~1 h",
    ),
    "probe_release": _probe("--protocol release"),
    "probe_mae": _probe("--protocol mae"),
    "probe_dinov2": _probe("--protocol dinov2"),
    "probe_encoder": _probe(
        "--protocol release --baseline encoder",
        ("internvit",),
        "--config configs/muse_1b/stage3.yaml",
    ),
    "knn": Measurement(
        (f"python scripts/knn.py {_1B} {_IMAGENET} --output_dir {{output}}",),
        ("muse_1b", "imagenet_train", "imagenet_val"),
        "a GPU: hours",
        True,
    ),
    "segmentation_release": _segment("--protocol release"),
    "segmentation_dinov2": _segment("--protocol dinov2"),
    "segmentation_encoder": _segment("--protocol release", "baseline"),
    "imagenet256_xl": _generator("imagenet256_xl"),
    "imagenet256_b": _generator("imagenet256_b"),
    "tiny_generation": Measurement(
        ("bash tools/demo_generation.sh --output {output}",),
        (),
        "about fifteen minutes on two cores",
        True,
    ),
    "tiny_multimodal": Measurement(
        ("bash tools/demo_multimodal.sh --output {output}",), (), "twenty minutes, two cores", True
    ),
    "mmbench": _understanding("mmbench", " --rotate"),
    "mmvp": _understanding("mmvp"),
    "geneval": _pictures("text_to_image.py", "geneval", "GenEval's scorer", " --samples 4"),
    "wise": _pictures("text_to_image.py", "wise", "WISE's judge"),
    "imgedit": _pictures("edit.py", "imgedit", "ImgEdit's judge"),
    "ablation": Measurement(
        ("bash tools/ablate.sh --output {output}",),
        (),
        "about two hours on two cores",
        True,
        "{output}/ablation.json",
    ),
}
