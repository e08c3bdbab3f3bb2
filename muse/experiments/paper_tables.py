"""The tables of the paper as data: each cell, the command that measures it, and what that needs.

`reproduce.py` runs them, and makes docs/reproduce.md of them. A new measurement is an entry of
`MEASUREMENTS`; a number of the paper beside it is a `Cell` of a table.
"""

from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Cell:
    """A number of a table."""

    row: str
    column: str
    measurement: str  # name in MEASUREMENTS
    key: tuple[str, ...]  # where the number is in its results
    paper: str = "–"  # the paper's, as quoted in docs/fidelity.md
    factor: float = 1.0  # 100 turns a share into percent
    digits: int = 2


@dataclass(frozen=True)
class PaperTable:
    """Cells that belong together."""

    title: str
    note: str
    cells: tuple[Cell, ...] = field(default=())


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
        ("$MUSE_DATA", "outputs/demo/data-stamps"),
        "python tools/make_demo_data.py --kind stamps --output outputs/demo/data-stamps",
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


MEASUREMENTS = {
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
    "tiny_reconstruction": Measurement(
        (
            "bash tools/evaluate.sh configs/muse_tiny/stage3.yaml muse_tiny {output} --val_url "
            "{demo_pictures}/val-*.tar --metrics psnr,ssim,fd_efficientnet_lite0",
        ),
        ("demo_pictures",),
        "a minute on two cores",
    ),
    "tiny_zero_shot": Measurement(
        (
            f"python scripts/zero_shot.py {_TINY} --val_url {{demo_pictures}}/val-*.tar "
            "--output_dir {output}",
        ),
        ("demo_pictures",),
        "a minute on two cores",
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
    "tiny_probe": Measurement(
        (f"python scripts/linear_probe.py {_TINY} {_DEMO} --output_dir {{output}}",),
        ("demo_pictures",),
        "a minute on two cores",
    ),
    "segmentation_release": _segment("--protocol release"),
    "segmentation_dinov2": _segment("--protocol dinov2"),
    "segmentation_encoder": _segment("--protocol release", "baseline"),
    "tiny_segmentation": Measurement(
        (
            f"bash tools/segment_probe.sh muse {_TINY} {_DEMO} --labels plain "
            "--output_dir {output}",
        ),
        ("demo_pictures",),
        "two minutes on two cores",
    ),
    "imagenet256_xl": _generator("imagenet256_xl"),
    "imagenet256_b": _generator("imagenet256_b"),
    "tiny_generation": Measurement(
        ("bash tools/demo_generation.sh --output {output}",),
        (),
        "about fifteen minutes on two cores",
        True,
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

_TINY_ROW = "muse_tiny, the demo's unseen objects"


def _tokenizer_cells() -> tuple[Cell, ...]:
    cells = [
        Cell("MUSE-1B, 224 px (`release`)", "rFID ↓", "reconstruction_release", ("rfid",), "0.62"),
        Cell(
            "MUSE-1B, 224 px (`release`)", "PSNR, dB ↑", "reconstruction_release", ("psnr",), "24.9"
        ),
        Cell("MUSE-1B, 224 px (`release`)", "SSIM ↑", "reconstruction_release", ("ssim",)),
    ]
    for protocol in ("adm256", "unilip256"):
        row, name = f"MUSE-1B, 256 px (`{protocol}`)", f"reconstruction_{protocol}"
        cells += [
            Cell(row, "rFID ↓", name, ("rfid",)),
            Cell(row, "PSNR, dB ↑", name, ("psnr",)),
            Cell(row, "SSIM ↑", name, ("ssim",)),
        ]
    return (
        *cells,
        Cell("MUSE-1B", "zero-shot, % ↑", "zero_shot", ("top1",), "77.1 / 76.1", 100, 1),
        Cell(_TINY_ROW, "PSNR, dB ↑", "tiny_reconstruction", ("psnr",)),
        Cell(_TINY_ROW, "SSIM ↑", "tiny_reconstruction", ("ssim",)),
        Cell(
            _TINY_ROW,
            "Fréchet distance (EfficientNet-Lite0) ↓",
            "tiny_reconstruction",
            ("fd_efficientnet_lite0",),
            digits=0,
        ),
        Cell(_TINY_ROW, "zero-shot, macro, % ↑", "tiny_zero_shot", ("top1_macro",), "–", 100, 1),
    )


def _probe_cells() -> tuple[Cell, ...]:
    last, top = ("last", "micro"), "linear probe, % ↑"
    return (
        Cell("MUSE-1B (`release`)", top, "probe_release", ("best", "micro"), "85.2", 100, 1),
        Cell("MUSE-1B (`mae`)", top, "probe_mae", last, "–", 100, 1),
        Cell("MUSE-1B (`dinov2`)", top, "probe_dinov2", last, "–", 100, 1),
        Cell(
            "InternViT-300M, the encoder alone (`release`)",
            top,
            "probe_encoder",
            ("best", "micro"),
            "82.5",
            100,
            1,
        ),
        Cell("MUSE-1B", "k-NN, k = 20, % ↑", "knn", ("by_k", "20", "micro"), "–", 100, 1),
        Cell(_TINY_ROW, "linear probe, macro, % ↑", "tiny_probe", ("last", "macro"), "–", 100, 1),
    )


def _segmentation_cells() -> tuple[Cell, ...]:
    def cell(row: str, measurement: str, paper: str = "–") -> Cell:
        return Cell(row, "mIoU, % ↑", measurement, ("miou",), paper, 100, 1)

    return (
        cell("MUSE-1B (`release`)", "segmentation_release", "46.5"),
        cell("MUSE-1B (`dinov2`)", "segmentation_dinov2"),
        cell("InternViT-300M, the encoder alone (`release`)", "segmentation_encoder", "40.2"),
        cell(_TINY_ROW, "tiny_segmentation"),
    )


def _multimodal_cells() -> tuple[Cell, ...]:
    row = "MUSE-UMM 1B"
    return (
        Cell(row, "MMB, % ↑", "mmbench", ("overall",), "73.4", 100, 1),
        Cell(row, "MMVP, pairs, % ↑", "mmvp", ("pairs",), "74.8", 100, 1),
        Cell(row, "GenEval ↑", "geneval", (), "0.82"),
        Cell(row, "WISE ↑", "wise", (), "0.65"),
        Cell(row, "editing, background ↑", "imgedit", (), "0.87"),
    )


def _ablation_cells() -> tuple[Cell, ...]:
    rows = {
        "paper": "MUSE",
        "baseline": "shared W_QKV, objectives summed from the start",
        "shared": "shared W_QKV, same curriculum",
        "no_stop_gradient": "without stop-gradients",
        "no_nce": "without NCE",
    }
    columns = (("PSNR, dB ↑", 2), ("R@5 of 32 ↑", 3), ("linear probe ↑", 3), ("topology KL ↓", 3))
    cells = [
        Cell(
            f"{label}, demo's scale",
            column,
            "ablation",
            ("variants", name, "columns", column, "mean"),
            digits=digits,
        )
        for name, label in rows.items()
        for column, digits in columns
    ]
    for column, claim in (("abs. cosine W_QK", "about 0.26"), ("abs. cosine W_V", "about 0.60")):
        key = ("variants", "baseline", "columns", column, "mean")
        row = "shared W_QKV, objectives summed from the start, demo's scale"
        cells.append(Cell(row, column, "ablation", key, claim, digits=3))
    return tuple(cells)


TABLES = {
    "tokenizer": PaperTable(
        "Reconstruction and zero-shot",
        "The paper's README says 77.1 for zero-shot, its tables 76.1. It names no protocol for "
        "rFID; `release` is what its code does. No training of the full size was run for this "
        "project.",
        _tokenizer_cells(),
    ),
    "probe": PaperTable(
        "Linear probe and k-NN",
        "The release chooses the epoch on the pictures that it reports; here it is chosen on "
        "held-out training pictures.",
        _probe_cells(),
    ),
    "segmentation": PaperTable(
        "Segmentation",
        "As published, the release's probe loads no data, so 46.5 does not come from that file "
        "(docs/fidelity.md, row 40).",
        _segmentation_cells(),
    ),
    "generation": PaperTable(
        "Class-conditional generation",
        "The paper publishes no generator and no protocol; LightningDiT-XL, 80 epochs, no guidance "
        "is our reading of 3.08 (docs/generation.md). B is the cheap proxy, to be compared with "
        "itself alone.",
        (
            Cell("MUSE-1B + LightningDiT-XL/1", "gFID ↓", "imagenet256_xl", ("fid",), "3.08"),
            Cell("MUSE-1B + LightningDiT-B/1", "gFID ↓", "imagenet256_b", ("fid",)),
        ),
    ),
    "multimodal": PaperTable(
        "The multimodal model",
        "Its code and weights are unpublished; what was chosen here is named in docs/fidelity.md. "
        "GenEval, WISE and ImgEdit are judged by their own programs, which read the folders that "
        "these commands write.",
        _multimodal_cells(),
    ),
    "ablation": PaperTable(
        "Ablations and gradients",
        "At the demo's scale (docs/ablation.md). The paper's |cosine| for MUSE is about 0.04.",
        _ablation_cells(),
    ),
}
