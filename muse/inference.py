"""Picture files: which ones a user means, how they are read, how results are named."""

import glob
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from muse.data.decode import BadSample, decode_image
from muse.data.transforms import to_float, to_pixels
from muse.errors import DataError

ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def find_images(pattern: str) -> list[Path]:
    """A file, the pictures of a directory (not deeper), or what a glob matches; `DataError` if
    none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{path}: holds no picture ({', '.join(sorted(SUFFIXES))})")
        return found
    found = sorted(
        Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
    )
    if not found:
        raise DataError(f"{pattern}: no such picture, directory or glob")
    return found


def read_image(file: str | Path) -> Tensor:
    """RGB (3, H, W) in [0, 1], upright, transparency on white; `DataError` if it is no picture."""
    try:
        return to_float(to_pixels(decode_image(Path(file).read_bytes())))
    except BadSample as error:
        raise DataError(f"{file}: not a readable picture ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def has_transparency(file: str | Path) -> bool:
    """Whether a readable picture has transparent pixels, which `read_image` lays on white."""
    with Image.open(file) as image:  # the header alone, unless there is an alpha channel
        if image.mode not in ALPHA_MODES and "transparency" not in image.info:
            return False
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def name_results(files: Sequence[Path], folder: Path) -> list[tuple[Path, Path, Path]]:
    """(input, reconstruction, comparison) for each file: no name twice, none over an input."""
    named, taken, inputs = [], set(), {file.resolve() for file in files}
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in range(2, len(files) + 2))
        for stem in (file.stem, file.name.replace(".", "_"), *numbered):
            targets = folder / f"{stem}.png", folder / f"{stem}_compare.png"
            if taken.isdisjoint(targets):
                break
        clash = inputs & {target.resolve() for target in targets}
        if clash:
            raise DataError(
                f"{clash.pop()}: would be overwritten by a reconstruction; "
                "choose another output directory"
            )
        taken.update(targets)
        named.append((file, *targets))
    return named
