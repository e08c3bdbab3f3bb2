"""Make a demo data folder: a complete one or none, and none twice."""

import json
import logging
from pathlib import Path

from muse.errors import CheckpointError, ConfigError, DataError
from muse.experiments.demo_data import edits, everything, questions, shapes, stamps
from muse.experiments.demo_data.datacard import write_card
from muse.experiments.demo_data.sample import Kind
from muse.experiments.demo_data.shapes import CLASSES as SHAPE_CLASSES
from muse.experiments.demo_data.shards_writer import plan_shards, write_shards
from muse.experiments.demo_data.stamp_tables import CLASSES as STAMP_CLASSES
from muse.utils.io import atomic_directory, write_json

logger = logging.getLogger(__name__)

KINDS = {
    "stamps": Kind(stamps.VERSION, STAMP_CLASSES, stamps.prepare_stamps, stamps.EXTRA_SPLITS),
    "everything": Kind(
        everything.VERSION,
        STAMP_CLASSES,
        everything.prepare_everything,
        everything.EXTRA_SPLITS,
    ),
    "shapes": Kind(shapes.VERSION, shapes.CLASSES, shapes.prepare_shapes, shapes.EXTRA_SPLITS),
    "edits": Kind(edits.VERSION, STAMP_CLASSES, edits.prepare_edits),
    "questions": Kind(questions.VERSION, STAMP_CLASSES, questions.prepare_questions),
}
DEFAULT_IMAGES = {
    "stamps": 3000,
    "everything": 24000,
    "shapes": 512,
    "edits": 3000,
    "questions": 3000,
}
# What is shown, by kind, the default first; `shapes` has no choice.
OBJECTS = {
    "stamps": ("photo", "all"),
    "edits": ("photo", "drawn"),
    "questions": ("photo", "drawn"),
}
TRAIN_SHARDS, VAL_SHARDS = 8, 2  # at least: every data worker of every process needs a shard
MAX_PER_SHARD = 1000
MANIFEST = "manifest.json"


def make_demo_data(
    kind: str = "stamps",
    output: str | Path = "",
    images: int | None = None,
    size: int = 128,
    seed: int = 0,
    objects: str | None = None,
    val_images: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> dict:
    """Write WebDataset shards of demo pictures to `output`, or reuse what the same arguments wrote.

    Args:
        kind: stamps (cut-outs on photographs, from Debian packages), everything (drawings too),
            shapes (drawn, needs nothing), edits (pairs with an instruction) or questions.
        output: the folder.
        images: training pictures; DEFAULT_IMAGES when None.
        size: side in pixels.
        seed: of every random choice.
        objects: photo (when None), or all to add cartoons and other domains to the training part
            of stamps, or drawn for edits and questions of drawn shapes.
        val_images: an eighth of `images` for shapes, else 240 when None.
        overwrite: make it anew, also in place of demo data of other arguments.
        workers: processes, all cores when None.

    Returns:
        The manifest (arguments, version, classes, counts, shard names).

    Raises:
        ConfigError: an argument is out of range, or `output` holds demo data of other arguments.
        DataError: `output` cannot be written or holds something else, or the packages cannot be
            downloaded.
    """
    manifest = _checked(kind, images, size, seed, objects, val_images)
    if not str(output):
        raise ConfigError("no output folder given")
    target = Path(output).expanduser().resolve()
    found = _existing(target)
    if found is None or overwrite:
        return _build(target, manifest, workers)
    changed = [key for key in manifest if found.get(key) != manifest[key]]
    if changed:
        changes = ", ".join(f"{key} {found.get(key)} -> {manifest[key]}" for key in changed)
        raise ConfigError(
            f"{target} holds demo data made with other arguments ({changes}); choose another "
            "folder or add --overwrite"
        )
    logger.info("%s holds this data already: reused", target)
    return found


def _checked(
    kind: str,
    images: int | None,
    size: int,
    seed: int,
    objects: str | None,
    val_images: int | None,
) -> dict:
    """The arguments as the manifest holds them. ConfigError with the allowed range."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
    choices = OBJECTS.get(kind, ("photo",))
    objects = choices[0] if objects is None else objects
    if objects not in choices:
        raise ConfigError(f"objects is {objects!r}; of {kind} it is one of {', '.join(choices)}")
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
        "version": KINDS[kind].version,
        "images": images,
        "val_images": val_images,
        "size": size,
        "seed": seed,
        "objects": objects if kind in OBJECTS else None,
    }


def _existing(target: Path) -> dict | None:
    """The manifest of a finished folder, None where nothing is; DataError for anything else."""
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
        found = json.loads((target / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "kind" not in found:
        raise DataError(
            f"{target} exists and is no folder of demo data (no readable {MANIFEST}); "
            "choose another one"
        )
    return found


def _build(target: Path, manifest: dict, workers: int | None) -> dict:
    try:
        with atomic_directory(target) as folder:
            manifest = _fill(folder, manifest, workers)
    except CheckpointError as error:  # what a folder that cannot be written raises
        raise DataError(str(error)) from error
    logger.info("wrote %s", target)
    return manifest


def _fill(folder: Path, manifest: dict, workers: int | None) -> dict:
    """All files of the data, in `folder`. Returns the full manifest."""
    kind, classes = KINDS[manifest["kind"]], KINDS[manifest["kind"]].classes
    if manifest["objects"] == "drawn":
        classes = SHAPE_CLASSES
    make = kind.prepare(manifest["size"], manifest["seed"], manifest["objects"])
    shards = []
    for split, images, fewest in (
        ("train", manifest["images"], TRAIN_SHARDS),
        *((name, manifest["val_images"], VAL_SHARDS) for name in ("val", *kind.extra_splits)),
    ):
        count = max(fewest, -(-images // MAX_PER_SHARD))
        shards += plan_shards(folder, split, images, count)
    records = write_shards(shards, make, workers)
    manifest = {
        **manifest,
        "classes": list(classes),
        "shards": [shard.path.name for shard in shards],
    }
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "index.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "datacard.md").write_text(write_card(manifest, records))
    write_json(folder / MANIFEST, manifest)
    return manifest
