"""Pictures with all their captions, for retrieval: shards, folders, the files of COCO and Flickr.

A caption file beside a folder of pictures has one of these forms:

    dataset_coco.json, dataset_flickr30k.json   Karpathy's splits; the pictures of `test` count
    captions_val2014.json                       COCO's own: images, annotations
    results_20130124.token                      Flickr30k's own: NAME#0, a tab, a caption
    captions.csv                                image,caption under a line with these words
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from muse.data.decode import IMAGE_EXTENSIONS
from muse.data.records import Record, Span
from muse.data.samples import Prepared, SampleMaker
from muse.errors import DataError

SPLIT = "test"


class CaptionMaker(SampleMaker):
    """Keeps all captions of a picture: a batch has `captions`, a tuple of texts for each.

    A caption file of one picture holds one caption a line.
    """

    def _captions(self, members: dict[str, bytes]) -> tuple[str, ...]:
        lines = (line for text in super()._captions(members) for line in text.splitlines())
        return tuple(line.strip() for line in lines if line.strip()) or ("",)

    def finish(self, prepared: Prepared, rng=None) -> Prepared:
        """Cut the picture."""
        pixels, mask = self.transform.crop(prepared.pixels, prepared.mask, rng)
        return prepared._replace(pixels=pixels, mask=mask)

    def collate(self, samples: Sequence[Prepared]) -> dict:
        """A batch with `captions`."""
        return {**super().collate(samples), "captions": [one.captions for one in samples]}


class CaptionedPictures:
    """A source of pictures in a folder, with the captions of one file.

    A file with splits names its pictures, and all of `test` must be there; of other files those
    count that lie in the folder, and all that lie there must be in it. DataError otherwise.
    """

    local = True
    one_per_shard = True

    def __init__(self, root: str | os.PathLike, file: str | os.PathLike):
        self.root, self.file = Path(root), Path(file)
        self.name = f"{root} with {file}"
        if not self.root.is_dir():
            raise DataError(f"--captions needs a folder of pictures, and {root} is none")
        captions, whole = read_caption_file(self.file)
        if whole:
            names = {self._place(name): texts for name, texts in captions.items()}
        else:
            names = {}
            for name in self._inside():
                names[name] = captions.get(name) or captions.get(os.path.basename(name), ())
        empty = [name for name, texts in names.items() if not texts]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(names)} pictures of {root} have no caption in {file}, "
                f"such as {empty[0]}"
            )
        if not names:
            raise DataError(f"{root} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")
        self.captions = names
        self.shards = tuple(sorted(names))

    def _place(self, name: str) -> str:
        """Where a picture of the file lies, relative to the folder."""
        for place in (name, os.path.basename(name)):
            if (self.root / place).is_file():
                return place
        raise DataError(f"{self.file} names {name}, which is not in {self.root}")

    def _inside(self) -> list[str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        kept = (path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        return sorted(str(path.relative_to(self.root)) for path in kept)

    def read(self, shard: str) -> Iterator[Record]:
        """The one picture of that name, its captions as a `.json` member holds them."""
        text = json.dumps({"caption": list(self.captions[shard])}).encode()
        extension = os.path.splitext(shard)[1][1:].lower()
        picture = Span(str(self.root / shard), 0, -1)
        yield Record(shard, self.name, {extension: picture, "json": text})


def read_caption_file(file: str | os.PathLike) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Captions by picture, and whether these pictures are a whole split.

    DataError for a file of none of the forms above.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"caption file {file} cannot be read ({error})") from error
    found: dict[str, list[str]] = {}
    whole = False
    try:
        if path.suffix == ".json":
            whole = _read_json(json.loads(text), found)
        elif path.suffix == ".csv":
            for row in csv.DictReader(text.splitlines()):
                found.setdefault(row["image"], []).append(row["caption"])
        else:
            for line in filter(None, text.splitlines()):
                name, caption = line.split("\t", 1)
                found.setdefault(name.rpartition("#")[0], []).append(caption)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"caption file {file} is of no form that is known here: Karpathy's or COCO's json, "
            "Flickr30k's token file, or a csv with image,caption"
        ) from error
    if not found:
        raise DataError(f"caption file {file} names no pictures" + f" of `{SPLIT}`" * whole)
    kept = {name: tuple(one.strip() for one in texts) for name, texts in found.items()}
    return {name: tuple(filter(None, texts)) for name, texts in kept.items()}, whole


def _read_json(content: dict, found: dict[str, list[str]]) -> bool:
    """Fill `found`; True for Karpathy's file."""
    if "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for name in names.values():
            found[name] = []
        for one in content["annotations"]:
            found[names[one["image_id"]]].append(one["caption"])
        return False
    for image in content["images"]:
        if image["split"] == SPLIT:
            place = os.path.join(image.get("filepath", ""), image["filename"])
            found[place] = [sentence["raw"] for sentence in image["sentences"]]
    return True
