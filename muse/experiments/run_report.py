"""One self-contained page about training runs and models: `muse report RUN [RUN ...]`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muse.errors import ConfigError, MuseError
from muse.experiments.run_report_config import compare_with_paper
from muse.experiments.run_report_html import ReportedModel
from muse.experiments.run_report_model import ModelView, look_at
from muse.experiments.run_report_page import build_page
from muse.experiments.run_report_pictures import pictures_of
from muse.experiments.run_report_sources import ReportedRun, open_run, read_metrics
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from muse.utils.io import write_text

log = logging.getLogger(__name__)

LARGEST_PAGE = 8 << 20  # bytes; what a phone opens without waiting


@dataclass(frozen=True)
class ReportOptions:
    """Flags of `muse report`."""

    config: str | None = None  # in place of a run's own
    checkpoint: str | None = None
    data: str | None = None  # pictures to show
    images: int = 6
    metrics: tuple[str, ...] = ()  # more metrics.json files
    device: str = "cpu"


def write_run_report(words: Sequence[str], output: str | Path, options: ReportOptions) -> Path:
    """Gather everything about the runs, and write the page.

    Args:
        words: runs and models; see `open_run`.
        output: the page; its directory is made.
        options: flags.

    Returns:
        The page.

    Raises:
        MuseError: one line about what is wrong with a word or a flag.
    """
    if options.images < 1:
        raise ConfigError(f"--images must be at least 1, not {options.images}")
    if len(words) > 1 and (options.config or options.checkpoint):
        raise ConfigError("--config and --checkpoint go with one RUN, not with several")
    extra = [(Path(file).stem, read_metrics(file)) for file in options.metrics]
    runs = [open_run(word, options.config, options.checkpoint) for word in words]
    runs = [run._replace(name=name) for run, name in zip(runs, _unlike_names(runs))]
    models = []
    for run in runs:
        log.info("%s: %s, %d records", run.name, run.kind, len(run.records))
        models.append(ReportedModel(run, compare_with_paper(run), view_of(run, options)))
    output = Path(output).expanduser()
    if output.is_dir():
        raise ConfigError(f"{output}: a directory; name the page, such as {output}/report.html")
    text = build_page(models, extra, _demo_page(runs, output))
    write_text(output, text)
    if len(text) > LARGEST_PAGE:
        log.warning("%s: %.1f MB; fewer --images make it smaller", output, len(text) / 1e6)
    return output


def _unlike_names(runs: Sequence[ReportedRun]) -> list[str]:
    """Names as short as they can be: two runs called `stage3` get their directories' names too."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    longer = [
        f"{run.folder.resolve().parent.name}/{run.name}" if run.folder else run.name for run in runs
    ]
    return [
        name if longer.count(name) == 1 else f"{name} ({place})"
        for place, name in enumerate(longer, start=1)
    ]


def view_of(run: ReportedRun, options: ReportOptions) -> ModelView | str:
    """What the run's model does with pictures, or why there is nothing to see."""
    if run.checkpoint is None:
        if run.kind == "tokenizer":
            return "There are no weights yet: neither final/ nor a checkpoint-N/."
        if run.recorded_config is None:
            return "Neither a configuration nor weights lie beside its records."
        return "Only tokenizers are shown pictures; this is a run of another kind."
    if run.config is not None:
        model = load_model(run.checkpoint, run.config.model, options.device)
        side = run.config.dataset.preprocessing.crop_size
    else:
        model = MUSE_ViT.from_pretrained(run.checkpoint, device=options.device)
        side = model.encoder.config.image_size[0]
    model.eval()
    side = max(side // model.cell, 1) * model.cell
    shown = pictures_of(run.config, side, options.data, options.images)
    try:
        return look_at(model, run.config, shown, min(options.images, len(shown.images)))
    except MuseError:
        raise
    except RuntimeError as error:  # such as out of memory: the rest of the page is worth having
        log.warning("%s: no pictures (%s)", run.name, error)
        return f"The model could not be run: {' '.join(str(error).split())[:200]}"


def _demo_page(runs: Sequence[ReportedRun], output: Path) -> str | None:
    """The demo's own page beside one of its stages, relative to this page."""
    for run in runs:
        page = run.folder and run.folder.resolve().parent / "report.html"
        if page and page.is_file() and page != output.resolve():
            return os.path.relpath(page, output.resolve().parent)
    return None
