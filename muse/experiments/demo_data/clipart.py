"""Drawn objects with captions: pictures of `openclipart-png`, titles of `openclipart-svg`."""

import html
import logging
import re
from pathlib import Path

from PIL import Image

from muse.experiments.demo_data.catalogue import Cutout

logger = logging.getLogger(__name__)

PACKAGES = ("openclipart-png", "openclipart-svg")
# Folder (the longest prefix counts) -> class index; what is not listed is no single object.
FOLDERS = {
    "animals": 0,
    "food": 1,
    "plants": 2,
    "tools": 3,
    "office": 3,
    "electronics": 3,
    "containers": 3,
    "education": 3,
    "buildings/furniture": 3,
    "computer/hardware": 3,
    "people/clothing": 3,
    "recreation/music": 3,
    "recreation/sports": 3,
    "recreation/toys": 3,
    "recreation/holiday": 3,
    "recreation/party": 3,
    "science": 3,
    "buildings": 4,
    "buildings/homes": 4,
    "transportation/roadsigns": 4,
    "transportation": 5,
    "transportation/boating": 5,
    "transportation/vehicles": 5,
}
SKIPPED_FOLDERS = ("people/clothing/pantyhose", "transportation/aiga-symbols", "animals/fantasy")
_LETTERED = ("transportation/roadsigns", "education", "computer/hardware")
# Words that say nothing about what is to be seen.
_EMPTY = set(
    "a an the of and with for in on by to unsorted clip art clipart png svg image images media "
    "public domain externalsource openclipart colour color colored icon icons drawing cartoon "
    "simple black white logo etc other misc picture right font ryanlerch lineart new old sig remix "
    "hash contour bw illustration notlit".split()
)
# Words of captions that name no subject of their own: for them no drawing is kept out of train.
_GENERIC = set(
    "a an the of and way give no two pair bunch closed open large small sign flower tree fish root "
    "leave truck car race red blue white purple orange green yellow sleeping mountain wild spiny "
    "rubber duck uturn turn u".split()
)
# Pixels: the longer side, and the area (a few posters take seconds to decode).
_SMALLEST, _LARGEST = 48, 4_000_000


def split_words(text: str) -> list[str]:
    """Lower-case words without digits and plural endings."""
    found = re.findall(r"[a-z]+", text.lower())
    return [_singular(word) for word in found]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def subject_words(items: list[Cutout]) -> set[str]:
    """The words that name the subjects of these cut-outs, by caption and by file name."""
    named = {
        word
        for item in items
        for word in (*split_words(item.phrase), *split_words(item.name.rsplit("/", 1)[-1]))
    }
    return named - _GENERIC


def find_clipart(roots: dict[str, Path], excluded: set[str]) -> list[Cutout]:
    """Usable drawings, sorted by name.

    None whose title, keywords or file name hold a word of `excluded`.
    """
    pictures = roots["openclipart-png"] / "usr/share/openclipart/png"
    notes = roots["openclipart-svg"] / "usr/share/openclipart/svg"
    found, held = [], 0
    for path in sorted(pictures.rglob("*.png")):
        name = path.relative_to(pictures).with_suffix("").as_posix()
        label = _label(name)
        if label is None:
            continue
        title, keywords, creator = _notes(notes / f"{name}.svg")
        phrase = _phrase(title or path.stem, keywords, creator)
        said = set(split_words(" ".join((title, *keywords, path.stem))))
        if said & excluded:
            held += 1
        elif phrase and _is_cutout(path):
            flip = not name.startswith(_LETTERED)
            found.append(Cutout(f"openclipart/{name}", path, phrase, label, "drawing", flip))
    logger.info("%d drawings; %d more show a subject of the validation part", len(found), held)
    return found


def _label(name: str) -> int | None:
    folder = name.rsplit("/", 1)[0]
    if folder.startswith(SKIPPED_FOLDERS):
        return None
    prefixes = [key for key in FOLDERS if folder == key or folder.startswith(f"{key}/")]
    return FOLDERS[max(prefixes, key=len)] if prefixes else None


def _notes(svg: Path) -> tuple[str, list[str], str]:
    """(title, keywords, creator) from a drawing's metadata; empty where it has none."""
    if not svg.is_file():
        return "", [], ""
    text = svg.read_text(encoding="utf-8", errors="replace")
    titles = [html.unescape(t).strip() for t in re.findall(r"<dc:title>([^<]*)</dc:title>", text)]
    keywords = [html.unescape(t).strip() for t in re.findall(r"<rdf:li>([^<]*)</rdf:li>", text)]
    return (titles[0] if titles else ""), keywords, " ".join(titles[1:])


def _phrase(title: str, keywords: list[str], creator: str) -> str:
    """The title, and the first keyword that adds something: "a brush roller, tool".

    The author's name, which many titles hold, is left out.
    """
    by = set(split_words(creator)) | _EMPTY
    name = [word for word in re.findall(r"[a-z]{2,}", title.lower()) if _singular(word) not in by]
    foreign = "rollandin" in by  # his titles are Italian, his keywords English
    further = [
        " ".join(kept)
        for keyword in keywords
        if (
            kept := [w for w in re.findall(r"[a-z]{3,}", keyword.lower()) if _singular(w) not in by]
        )
    ]
    if foreign and further:
        name, further = further[0].split(), further[1:]
    if not name:
        name, further = (further[0].split(), further[1:]) if further else ([], [])
    if not name or len(name) > 6:
        return ""
    text = " ".join(name)
    extra = next((keyword for keyword in further if not set(keyword.split()) & set(name)), "")
    article = "" if name[-1].endswith("s") else "an " if text[0] in "aeiou" else "a "
    return f"{article}{text}{f', {extra}' if extra and len(name) < 3 else ''}"


def _is_cutout(path: Path) -> bool:
    """Whether it is large enough, shows something, and has a transparent ground."""
    try:
        with Image.open(path) as picture:
            area = picture.width * picture.height
            if max(picture.size) < _SMALLEST or min(picture.size) < 12 or area > _LARGEST:
                return False
            if picture.mode not in ("RGBA", "LA", "P"):
                return False
            picture.thumbnail((64, 64))
            alpha = picture.convert("RGBA").getchannel("A")
    except (OSError, SyntaxError, ValueError):
        return False
    share = sum(alpha.point(lambda a: a > 40).get_flattened_data()) / (alpha.width * alpha.height)
    return 0.03 < share < 0.97
