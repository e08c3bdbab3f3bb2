"""What a word of `muse report` is: a training run, a model, a record; and what lies in it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from muse.config import load_config, nearest, shipped_config
from muse.errors import ConfigError, DataError
from muse.models.loading import latest_checkpoint
from muse.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_model_config
from muse.utils.curves import METRICS
from muse.utils.weights import PACKAGED, packaged

RUN_CONFIG = "config.yaml"
METRIC_FILES = ("metrics.json", "measured.json", "*/metrics.json")
PICTURES = ("images/**/*.png", "images/**/*.jpg", "*.png", "*/*.png")
MAX_PICTURES = 12


class ReportedRun(NamedTuple):
    """One run or model of the page."""

    name: str
    folder: Path | None  # None for a packaged model
    config: DictConfig | None  # a tokenizer's whole configuration
    model: dict[str, Any] | None  # its model section: all that a saved model has
    checkpoint: str | Path | None  # what can be opened, if anything
    records: list[dict[str, Any]]  # of metrics.jsonl, steps ascending
    replaced: int  # records that a resumed run has written again
    measured: list[tuple[str, dict[str, Any]]]  # name and content of every metrics.json
    pictures: list[Path]  # that the run has written, newest step last
    kind: str  # tokenizer, or what the configuration seems to be
    recorded_config: dict[str, Any] | None = None  # config.yaml as it stands


def open_run(word: str, config: str | None = None, checkpoint: str | None = None) -> ReportedRun:
    """Read what a word names.

    Args:
        word: a training run's directory, a `save_pretrained` directory, or a packaged model.
        config: a configuration in place of the run's own.
        checkpoint: in place of the run's `final` or newest checkpoint.

    Raises:
        DataError: it is none of them, or its metrics.jsonl is broken.
    """
    inside = packaged(word)
    folder = inside or Path(word).expanduser()
    if not folder.exists():
        known = [path.name for path in PACKAGED.iterdir() if path.is_dir()]
        raise DataError(f"{word}: no such run or model{nearest(word, known)}")
    if not folder.is_dir():
        raise DataError(f"{word}: a file; name the directory of a training run or of a saved model")
    is_model = (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()
    has_records = (folder / METRICS).is_file()
    if not (is_model or has_records or (folder / RUN_CONFIG).is_file()):
        _refuse_directory(word, folder)
    records, replaced = read_records(folder / METRICS) if has_records else ([], 0)
    kind, cfg, recorded = _configuration(word, folder, config)
    if is_model:
        checkpoint = checkpoint or (word if inside else folder)
    elif checkpoint is None and kind == "tokenizer":
        final = folder / "final"
        checkpoint = final if final.is_dir() else latest_checkpoint(folder)
    model = None
    if is_model and kind in ("tokenizer", "unknown"):
        model, kind = read_model_config(folder), "tokenizer"
    elif cfg is not None:
        model = OmegaConf.to_container(cfg.model, resolve=False)
    return ReportedRun(
        folder.resolve().name if not inside else word,
        None if inside else folder,
        cfg,
        model,
        checkpoint if kind == "tokenizer" else None,
        records,
        replaced,
        list(_measurements(folder)),
        _pictures(folder),
        kind,
        recorded,
    )


def _refuse_directory(word: str, folder: Path) -> None:
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RUN_CONFIG}"))
    if runs:
        raise DataError(f"{word}: holds the runs {', '.join(runs)}; name one or more of them")
    raise DataError(
        f"{word}: not a run ({RUN_CONFIG}, {METRICS}) and not a saved model "
        f"({CONFIG_FILE}, {WEIGHTS_FILE})"
    )


def _configuration(
    word: str, folder: Path, config: str | None
) -> tuple[str, DictConfig | None, dict[str, Any] | None]:
    """Kind, a tokenizer's configuration, and the recorded one as it stands."""
    file = Path(config) if config else folder / RUN_CONFIG
    if not config and not file.is_file():
        beside = folder.parent / RUN_CONFIG  # of a run's final/ or checkpoint-N/
        if packaged(word):
            file = shipped_config(f"{word}/pretrain_stage3.yaml")
        elif (folder / CONFIG_FILE).is_file() and beside.is_file():
            file = beside
        else:
            return "unknown", None, None
    if config is None:
        try:
            raw = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        except Exception as error:  # any YAML error: its class depends on the parser in use
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"{file}: not readable as YAML ({reason})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: a configuration must be a mapping of sections")
        if file.parent in (folder, folder.parent) and "routing" not in (raw.get("model") or {}):
            return _other_kind(raw), None, raw
    cfg = load_config(file)
    return "tokenizer", cfg, None


def _other_kind(raw: dict[str, Any]) -> str:
    return "generator" if {"network", "generator", "transport"} & set(raw) else "another model"


# ---------------------------------------------------------------------------------------- records
def read_records(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a metrics.jsonl in the order of their steps, and how many were written again.

    A run that was killed and resumed writes some steps twice; the later ones hold. The last line
    may be incomplete.

    Raises:
        DataError: another line is not a record, or there is none.
    """
    kept: list[dict[str, Any]] = []
    replaced = 0
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record = {**record, "step": int(record["step"])}
        except (ValueError, KeyError, TypeError):
            if number == len(lines) or not line.strip():
                continue  # of a run that was killed while it wrote
            raise DataError(f"{file}: line {number} is no JSON object with a step") from None
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
            replaced += 1
        if kept and kept[-1]["step"] == record["step"]:
            before = kept.pop()
            if before.keys() & record.keys() - {"step"}:
                replaced += 1
            else:  # such as losses, then an evaluation
                record = {**before, **record}
        kept.append(record)
    if not kept:
        raise DataError(f"{file}: holds no records")
    return kept, replaced


def flat_numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a nested object under a name such as `eval/psnr`; booleans are none."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flat_numbers(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def finite(value: float | None) -> float | None:
    """The number, or None where it is missing, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


# ----------------------------------------------------------------------------- files beside them
def _measurements(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for pattern in METRIC_FILES:
        for file in sorted(folder.glob(pattern)):
            name = file.parent.name if file.parent != folder else file.stem
            yield name, read_metrics(file)


def read_metrics(file: str | Path) -> dict[str, Any]:
    """The object of a metrics.json; `DataError` where it is none."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no object of metrics")
    return content


def _pictures(folder: Path) -> list[Path]:
    found = dict.fromkeys(file for pattern in PICTURES for file in folder.glob(pattern))
    return sorted(found, key=lambda file: file.stat().st_mtime)[-MAX_PICTURES:]
