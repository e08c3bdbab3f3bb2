"""The tables of the paper as data: each cell, and the measurement that gives it.

`reproduce.py` makes docs/reproduce.md of them. A new measurement is an entry of `MEASUREMENTS`
(paper_measurements.py); a number of the paper beside it is a `Cell` of a table.
"""

from dataclasses import dataclass, field


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
        Cell(_TINY_ROW, "PSNR, dB ↑", "demo_evaluate_native", ("psnr",)),
        Cell(_TINY_ROW, "SSIM ↑", "demo_evaluate_native", ("ssim",)),
        Cell(
            _TINY_ROW,
            "Fréchet distance (EfficientNet-Lite0) ↓",
            "demo_evaluate_native",
            ("fd_efficientnet_lite0",),
            digits=0,
        ),
        Cell(_TINY_ROW, "zero-shot, macro, % ↑", "demo_zero_shot", ("top1_macro",), "–", 100, 1),
    )


def _probe_cells() -> tuple[Cell, ...]:
    last, top = ("reported", "micro"), "linear probe, % ↑"
    return (
        Cell("MUSE-1B (`release`)", top, "probe_release", ("reported", "micro"), "85.2", 100, 1),
        Cell("MUSE-1B (`mae`)", top, "probe_mae", last, "–", 100, 1),
        Cell("MUSE-1B (`dinov2`)", top, "probe_dinov2", last, "–", 100, 1),
        Cell(
            "InternViT-300M, the encoder alone (`release`)",
            top,
            "probe_encoder",
            ("reported", "micro"),
            "82.5",
            100,
            1,
        ),
        Cell("MUSE-1B", "k-NN, k = 20, % ↑", "knn", ("by_k", "20", "top1"), "–", 100, 1),
        Cell(
            _TINY_ROW,
            "linear probe, macro, % ↑",
            "demo_probe_native",
            ("last", "macro"),
            "–",
            100,
            1,
        ),
    )


def _segmentation_cells() -> tuple[Cell, ...]:
    def cell(row: str, measurement: str, paper: str = "–") -> Cell:
        return Cell(row, "mIoU, % ↑", measurement, ("miou",), paper, 100, 1)

    return (
        cell("MUSE-1B (`release`)", "segmentation_release", "46.5"),
        cell("MUSE-1B (`dinov2`)", "segmentation_dinov2"),
        cell("InternViT-300M, the encoder alone (`release`)", "segmentation_encoder", "40.2"),
        cell(_TINY_ROW, "demo_segment_native"),
    )


def _demo_cells() -> tuple[Cell, ...]:
    """Every command and protocol that fits pictures of 128 pixels."""
    cells = []
    for protocol in ("native", "release", "unilip256", "adm256"):
        row, name = f"`evaluate` (`{protocol}`)", f"demo_evaluate_{protocol}"
        cells.append(Cell(row, "PSNR, dB ↑", name, ("psnr",)))
        cells.append(Cell(row, "SSIM ↑", name, ("ssim",), digits=4))
    for name in ("native", "release", "mae", "dinov2", "encoder"):
        label = "native, the encoder alone" if name == "encoder" else name
        for column, kind in (("macro, % ↑", "macro"), ("micro, % ↑", "micro")):
            key = ("reported", kind)
            row = f"`linear_probe` ({label})"
            cells.append(Cell(row, column, f"demo_probe_{name}", key, "–", 100, 1))
    for k in ("10", "20", "100", "200"):
        key = ("by_k", k, "top1_macro")
        cells.append(Cell(f"`knn`, k = {k}", "macro, % ↑", "demo_knn", key, "–", 100, 1))
    cells.append(Cell("`zero_shot`", "macro, % ↑", "demo_zero_shot", ("top1_macro",), "–", 100, 1))
    for way in ("image_to_text", "text_to_image"):
        row, key = f"`zero_shot --retrieval all`, {way.replace('_', ' ')}", f"retrieval_{way}_r5"
        cells.append(Cell(row, "R@5 of all, % ↑", "demo_zero_shot", (key,), "–", 100, 1))
    for name in ("native", "release", "dinov2", "encoder"):
        label = "native, the encoder alone" if name == "encoder" else name
        row, measurement = f"`segment_probe` ({label})", f"demo_segment_{name}"
        cells.append(Cell(row, "mIoU, % ↑", measurement, ("miou",), "–", 100, 1))
        key = ("oracle", "miou_upsampled")
        cells.append(Cell(row, "bound of the grid, % ↑", measurement, key, "–", 100, 1))
    return tuple(cells)


def _multimodal_cells() -> tuple[Cell, ...]:
    row = "MUSE-UMM 1B"
    return (
        Cell(row, "MMB, % ↑", "mmbench", ("overall",), "73.4", 100, 1),
        Cell(row, "MMVP, pairs, % ↑", "mmvp", ("pairs",), "74.8", 100, 1),
        Cell(row, "GenEval ↑", "geneval", (), "0.82"),
        Cell(row, "WISE ↑", "wise", (), "0.65"),
        Cell(row, "editing, background ↑", "imgedit", (), "0.87"),
        *_tiny_multimodal_cells(),
    )


def _tiny_multimodal_cells() -> tuple[Cell, ...]:
    """Each number of the demo's model behind its name, its baselines under it."""
    seen, asked = "class accuracy of pictures from prompts, % ↑", "four choices, right, % ↑"
    stays, changed = "edits: PSNR of what stays, dB ↑", "edits: shows what was asked, % ↑"
    rows = [
        ("", seen, ("prompts", "generated")),
        ("shuffled prompts", seen, ("prompts", "shuffled")),
        ("chance", seen, ("prompts", "chance")),
        ("real pictures, there and back", seen, ("prompts", "reconstructions")),
        ("", stays, ("edits", "edited", "stays")),
        ("without the source", stays, ("edits", "no_source", "stays")),
        ("the source as it is", stays, ("edits", "copy", "stays")),
        ("the exact result, there and back", stays, ("edits", "reconstruction", "stays")),
        ("", changed, ("edits", "edited", "asked")),
        ("the source as it is", changed, ("edits", "copy", "asked")),
        ("the exact result", changed, ("edits", "real", "asked")),
        ("", asked, ("questions", "after", "accuracy")),
        ("before the projector's stage", asked, ("questions", "before", "accuracy")),
        ("without the picture", asked, ("questions", "text_only", "accuracy")),
        ("the commonest letter", asked, ("questions", "majority")),
    ]
    return tuple(
        Cell(
            f"the demo's model: {name}" if name else "the demo's model",
            column,
            "tiny_multimodal",
            key,
            factor=1.0 if column == stays else 100,
            digits=1,
        )
        for name, column, key in rows
    )


def _ablation_cells() -> tuple[Cell, ...]:
    rows = {
        "paper": "MUSE",
        "baseline": "shared W_QKV, objectives summed from the start",
        "shared": "shared W_QKV, same curriculum",
        "no_stop_gradient": "without stop-gradients",
        "no_nce": "without NCE",
    }
    columns = tuple(
        (column, 2 if "PSNR" in column else 3)
        for column in (
            "PSNR, dB ↑",
            "zero-shot ↑",
            "R@5 of 32 ↑",
            "linear probe ↑",
            "mIoU ↑",
            "topology KL ↓",
        )
    )
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
    "demo": PaperTable(
        "Every command on the demo's pictures",
        "`muse_tiny` on the 240 pictures of unseen objects; probes learn from 2000 pictures of the "
        "training, segmentation from 1000. Protocols are cut to the 128 pixels of the pictures, "
        "and the two long segmentation recipes to 60 steps: these numbers show that the commands "
        "run and how far protocols lie apart, not what the protocols give at full size.",
        _demo_cells(),
    ),
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
