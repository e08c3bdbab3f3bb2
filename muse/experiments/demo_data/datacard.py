"""The data card of a demo data folder: contents, sources, licences, split."""

from collections import Counter

from muse.experiments.demo_data import everything
from muse.experiments.demo_data.stamps import EXTRA_SHARE

FILES = """\
Shards `train-*.tar`, `val-*.tar` and `seen-*.tar` with, per picture, `.jpg` (RGB, quality 95, no
chroma subsampling), `.txt` (caption), `.cls` (class index, line of `classes.txt` from 0),
`.seg.png` (8-bit grey, no palette: 0 is background, 1 + class index is object). `index.jsonl` names
the object and the background of every picture."""
FILES_OF_KINDS = {
    "edits": """\
Shards `train-*.tar` and `val-*.tar` with, per pair, `.input.jpg` and `.output.jpg` (before and
after the change), `.txt` (the instruction), `.cls` (class of the object that is shown afterwards,
or was removed), `.seg.png` (1 where the two pictures differ). `index.jsonl` names the change.""",
    "questions": """\
Shards `train-*.tar` and `val-*.tar` with, per picture, `.jpg`, `.json` (three questions with their
answers, as `conversations`), `.cls` (class index), `.seg.png` (1 + class index is object).""",
}
LICENCES = """## Sources and licences
- Cut-outs: Debian package `tuxpaint-stamps-default`, by many authors. Its copyright file names
  only the GPL-2, for the package as a whole; several pictures are under the GFDL, CC-BY or
  CC-BY-SA, or in the public domain.
- Photographs: Debian packages `lomiri-wallpapers-20.04` (CC-BY-SA 3.0) and
  `lomiri-wallpapers-16.04` (CC-BY 4.0, CC-BY-SA 4.0, CC0; each file name contains the author),
  pictures of `scikit-image` (BSD-3 package; public domain and CC0 pictures) and `china.jpg` of
  `scikit-learn` (CC-BY 2.0, danielbuechele).
- None of these pictures is part of muse: they are downloaded from package registries into a cache
  folder. Composites of CC-BY-SA and GPL pictures carry those terms; publish them only under them.
"""
DRAWN = """## Sources and licences
Drawn by muse itself (Apache-2.0); no picture of anybody else is in it.
"""


def write_card(manifest: dict, records: list[dict]) -> str:
    """Markdown text of the card of a finished folder."""
    kind, classes = manifest["kind"], manifest["classes"]
    drawn = kind == "shapes" or manifest["objects"] == "drawn"
    lines = [
        f"# Demo data: {kind}",
        "",
        f"{manifest['images']} training and {manifest['val_images']} validation pictures of "
        f"{manifest['size']}x{manifest['size']} pixels, seed {manifest['seed']}"
        + (f", objects `{manifest['objects']}`." if manifest["objects"] else "."),
        "",
        "| class | train pictures | val pictures | train objects | val objects |",
        "|---|---|---|---|---|",
    ]
    for label, name in enumerate(classes):
        cells = [_of(records, split, label) for split in ("train", "val")]
        numbers = [*map(len, cells), *map(_objects, cells)]
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    lines += [
        "",
        "## Files",
        FILES_OF_KINDS.get(kind, FILES),
        "",
        "## Split",
        *_split(kind, drawn, manifest["objects"], records),
        "",
        _licences(kind, drawn),
    ]
    return "\n".join(lines)


def _licences(kind: str, drawn: bool) -> str:
    if drawn:
        return DRAWN
    return LICENCES + everything.LICENCES if kind == "everything" else LICENCES


def _split(kind: str, drawn: bool, objects: str | None, records: list[dict]) -> list[str]:
    """Lines of the card on what val shows that train does not."""
    if kind == "edits":
        return [
            "The pictures before the change are split by object and background; what is asked for "
            "is known from train in both parts. A class is shown as often as any other."
        ]
    if kind == "questions":
        return [
            "By object and by background: val shows none of train's. A class is shown as often as "
            "any other."
        ]
    if drawn:
        return [
            "Val shows only colour + shape pairs and backgrounds that train never shows; seen "
            "shows train's pairs on val's backgrounds."
        ]
    if kind == "everything":
        return everything.describe_parts(records)
    shown = {
        split: Counter(record["background"] for record in records if record["split"] == split)
        for split in ("train", "val")
    }
    photos = {split: sorted(set(names) - {"gradient"}) for split, names in shown.items()}
    share = shown["val"]["gradient"] / max(sum(shown["val"].values()), 1)
    lines = [
        "By object and by background: no object of val (nor another picture or drawing of the same "
        "subject) and no photograph of val is in train; seen shows objects of train in new "
        "pictures, on val's photographs. The split does not depend on the seed.",
        f"Photographs: {len(photos['train'])} in train, {len(photos['val'])} in val "
        f"({', '.join(photos['val'])}); {share:.0%} of the val pictures have a colour gradient "
        "behind the object instead.",
        'Half of the captions name the class ("A zebra, a kind of animal.").',
    ]
    if objects == "all":
        lines.append(
            f"{EXTRA_SHARE:.0%} of the training pictures show cartoons, drawings and objects of "
            "the package's other folders, under the nearest of the six classes; letters, planets "
            "and people are left out."
        )
    return lines


def _of(records: list[dict], split: str, label: int) -> list[dict]:
    return [record for record in records if record["split"] == split and record["label"] == label]


def _objects(records: list[dict]) -> int:
    return len({record["object"] for record in records})
