"""The data card: what is in a demo data folder, where it comes from, under which licences, how it is split."""

from collections import Counter

from muse.experiments.demo_data import everything
from muse.experiments.demo_data.stamps import EXTRA_SHARE

FILES = """\
Shards `train-*.tar` and `val-*.tar` with, per picture, `.jpg` (RGB, quality 95, no chroma subsampling), `.txt`
(caption), `.cls` (class index, line of `classes.txt` from 0), `.seg.png` (8-bit grey, no palette: 0 is background,
1 + class index is object). `index.jsonl` names the object and the background of every picture."""
LICENCES = """## Sources and licences
- Cut-outs: Debian package `tuxpaint-stamps-default` (GPL-2 as a whole, which is all its copyright file names;
  by many authors, several pictures are under the GFDL, CC-BY, CC-BY-SA or in the public domain).
- Photographs: Debian packages `lomiri-wallpapers-20.04` (CC-BY-SA 3.0) and `lomiri-wallpapers-16.04` (CC-BY 4.0,
  CC-BY-SA 4.0, CC0; the author is part of each file's name), pictures of `scikit-image` (BSD-3 package; public
  domain and CC0 pictures) and `china.jpg` of `scikit-learn` (CC-BY 2.0, danielbuechele).
- Nothing of this is part of muse: it is downloaded from package registries into a cache folder. Composites made from
  CC-BY-SA and GPL pictures carry those terms; do not publish them without.
"""
DRAWN = """## Sources and licences
Drawn by muse itself (Apache-2.0); no picture of anybody else is in it.
"""


def write_card(manifest: dict, records: list[dict]) -> str:
    """Markdown text of the card of a finished folder."""
    kind, classes = manifest["kind"], manifest["classes"]
    lines = [
        f"# Demo data: {kind}",
        "",
        f"{manifest['images']} training and {manifest['val_images']} validation pictures of "
        f"{manifest['size']}x{manifest['size']} pixels, seed {manifest['seed']}"
        + (f", objects `{manifest['objects']}`." if kind == "stamps" else "."),
        "",
        "| class | train pictures | val pictures | train objects | val objects |",
        "|---|---|---|---|---|",
    ]
    for label, name in enumerate(classes):
        cells = [_of(records, split, label) for split in ("train", "val")]
        lines.append(
            f"| {name} | {len(cells[0])} | {len(cells[1])} | {_objects(cells[0])} | {_objects(cells[1])} |"
        )
    lines += [
        "",
        "## Files",
        FILES,
        "",
        "## Split",
        *_split(kind, manifest["objects"], records),
        "",
        {"stamps": LICENCES, "everything": LICENCES + everything.LICENCES, "shapes": DRAWN}[kind],
    ]
    return "\n".join(lines)


def _split(kind: str, objects: str | None, records: list[dict]) -> list[str]:
    if kind == "shapes":
        return ["Val shows only colour + shape pairs and backgrounds that train never shows."]
    if kind == "everything":
        return everything.describe(records)
    shown = {
        split: Counter(record["background"] for record in records if record["split"] == split)
        for split in ("train", "val")
    }
    photos = {split: sorted(set(names) - {"gradient"}) for split, names in shown.items()}
    share = shown["val"]["gradient"] / max(sum(shown["val"].values()), 1)
    return [
        "By object and by background: no object (nor another picture or drawing of the same subject) and no "
        "photograph of val is in train. The split does not depend on the seed.",
        f"Photographs: {len(photos['train'])} in train, {len(photos['val'])} in val ({', '.join(photos['val'])}); "
        f"{share:.0%} of the val pictures have a freshly drawn colour gradient behind the object instead.",
        'Half of the captions name the class ("A zebra, a kind of animal.").',
        *(
            [
                f"{EXTRA_SHARE:.0%} of the training pictures show cartoons, drawings and objects of the package's other "
                "folders, under the nearest of the six classes; letters, planets and people are left out."
            ]
            if objects == "all"
            else []
        ),
    ]


def _of(records: list[dict], split: str, label: int) -> list[dict]:
    return [record for record in records if record["split"] == split and record["label"] == label]


def _objects(records: list[dict]) -> int:
    return len({record["object"] for record in records})
