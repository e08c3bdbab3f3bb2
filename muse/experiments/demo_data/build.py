"""Make a demo data folder: all of it or nothing, and nothing twice."""

import json
import logging
import os
import shutil
from pathlib import Path

from muse.errors import ConfigError, DataError
from muse.experiments.demo_data import everything, shapes, shards_writer, stamps
from muse.experiments.demo_data.datacard import write_card

logger = logging.getLogger(__name__)

KINDS = {"stamps": stamps, "everything": everything, "shapes": shapes}
DEFAULT_IMAGES = {"stamps": 3000, "everything": 24000, "shapes": 512}
OBJECTS = ("photo", "all")
TRAIN_SHARDS, VAL_SHARDS = 8, 2  # several ranks times workers have one each
MAX_PER_SHARD = 1000
MANIFEST = "manifest.json"


def make_demo_data(
    kind: str = "stamps",
    output: str | Path = "",
    images: int | None = None,
    size: int = 128,
    seed: int = 0,
    objects: str = "photo",
    val_images: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> dict:
    """Write WebDataset shards of demo pictures to `output`, or reuse what the same arguments wrote there.

    Args:
        kind: stamps (cut-outs on photographs, from Debian packages) or shapes (drawn, needs nothing).
        images: training pictures; DEFAULT_IMAGES when None.
        val_images: 240 for stamps, an eighth of `images` for shapes when None.
        size: side in pixels. objects: photo, or all to add cartoons and other domains to the training part of stamps.
        overwrite: make it anew, also in place of demo data of other arguments. workers: processes, all cores when None.

    Returns:
        The manifest (arguments, version, classes, counts, shard names).

    Raises:
        ConfigError: an argument is out of range, or `output` holds demo data of other arguments.
        DataError: `output` cannot be written or holds something else, or the packages cannot be had.
    """
    manifest = _checked(kind, images, size, seed, objects, val_images)
    if not str(output):
        raise ConfigError("no output folder given")
    target = Path(output).expanduser().resolve()
    found = _existing(target)
    if (
        found is not None
        and not overwrite
        and all(found.get(key) == value for key, value in manifest.items())
    ):
        logger.info("%s holds this data already: reused", target)
        return found
    if found is not None and not overwrite:
        changed = ", ".join(
            f"{key} {found.get(key)} -> {manifest[key]}"
            for key in manifest
            if found.get(key) != manifest[key]
        )
        raise ConfigError(
            f"{target} holds demo data made with other arguments ({changed}); choose another folder "
            "or add --overwrite"
        )
    return _build(target, manifest, workers)


def _checked(
    kind: str, images: int | None, size: int, seed: int, objects: str, val_images: int | None
) -> dict:
    """The arguments as the manifest holds them. ConfigError with the allowed range."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
    if objects not in OBJECTS:
        raise ConfigError(f"objects is {objects!r}; it is one of {', '.join(OBJECTS)}")
    images = DEFAULT_IMAGES[kind] if images is None else images
    if val_images is None:
        val_images = max(2 * VAL_SHARDS, images // 8) if kind == "shapes" else 240
    ranges = {
        "images": (images, TRAIN_SHARDS, 10**6),
        "val_images": (val_images, VAL_SHARDS, 10**6),
        "size": (size, 32, 1024),
        "seed": (seed, 0, 2**32 - 1),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}; it lies between {low} and {high}")
    return {
        "kind": kind,
        "version": KINDS[kind].VERSION,
        "images": images,
        "val_images": val_images,
        "size": size,
        "seed": seed,
        "objects": objects if kind == "stamps" else None,
    }


def _existing(target: Path) -> dict | None:
    """The manifest of a finished folder, None where there is nothing. DataError for any other folder or file."""
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
        found = json.loads((target / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "kind" not in found:
        raise DataError(
            f"{target} exists and is no folder of demo data (no readable {MANIFEST}); choose another one"
        )
    return found


def _build(target: Path, manifest: dict, workers: int | None) -> dict:
    scratch = target.parent / f".{target.name}.making-{os.getpid()}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write {target} ({error.strerror})") from error
    try:
        manifest = _fill(scratch, manifest, workers)
        _replace(target, scratch)
    except OSError as error:
        raise DataError(f"cannot write {target} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("wrote %s", target)
    return manifest


def _fill(folder: Path, manifest: dict, workers: int | None) -> dict:
    """All files of the data, in `folder`. Returns the full manifest."""
    source = KINDS[manifest["kind"]]
    make = source.prepare(manifest["size"], manifest["seed"], manifest["objects"])
    train_shards = max(TRAIN_SHARDS, -(-manifest["images"] // MAX_PER_SHARD))
    val_shards = max(VAL_SHARDS, -(-manifest["val_images"] // MAX_PER_SHARD))
    shards = shards_writer.plan(folder, "train", manifest["images"], train_shards)
    for split in ("val", *getattr(source, "EXTRA_SPLITS", ())):
        shards += shards_writer.plan(folder, split, manifest["val_images"], val_shards)
    records = shards_writer.write(shards, make, workers)
    manifest = {
        **manifest,
        "classes": list(source.CLASSES),
        "shards": [shard.path.name for shard in shards],
    }
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in source.CLASSES))
    (folder / "index.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "datacard.md").write_text(write_card(manifest, records))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _replace(target: Path, scratch: Path) -> None:
    """Put the finished folder under its name; the one it replaces is gone only afterwards."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
