"""A protocol as a command uses it: with the configuration's cut, and what flags have changed.

Name and recipe go into metrics.json. `--resize` and `--crop` win over a protocol's cut, and
`--precision` over its precision; what was changed is said there.
"""

from dataclasses import asdict, dataclass, replace

from omegaconf import DictConfig

from muse.data.crops import PictureCrop
from muse.errors import ConfigError
from muse.evaluation.protocols import Recipe, find_protocol

PRECISIONS = ("float32", "bf16", "fp16")  # of the networks that are measured


def with_cut(
    recipe: Recipe, default: PictureCrop | None, resize: int | None = None, crop: int | None = None
) -> Recipe:
    """The recipe with the cut that is used.

    Args:
        recipe: of a protocol.
        default: the configuration's cut, where the recipe has none; None for pictures as they are.
        resize: --resize, shorter edge in pixels; None where not given, and then at least the crop.
            It makes any cut torchvision's resize and centre crop.
        crop: --crop, side in pixels; None where not given.
    """
    cut = recipe.crop or default
    if resize is None and crop is None:
        return replace(recipe, crop=cut)
    if cut is None:
        cut = PictureCrop("center", None, None)
    side = cut.crop_size if crop is None else crop
    if cut.method == "center":
        edge = cut.resize_shorter_edge if resize is None else resize
        if resize is None and edge is not None:
            edge = max(edge, side)
        return replace(recipe, crop=replace(cut, resize_shorter_edge=edge, crop_size=side))
    if resize is None:
        return replace(recipe, crop=replace(cut, crop_size=side))
    return replace(recipe, crop=PictureCrop("center", resize, side))


@dataclass(frozen=True)
class UsedProtocol:
    """A protocol as a command uses it.

    Args:
        name: of the protocol.
        command: which has it.
        standard: the recipe as the table and the configuration say it.
        recipe: the recipe that is used.
        precision: of the networks that are measured, one of `PRECISIONS`.
    """

    name: str
    command: str
    standard: Recipe
    recipe: Recipe
    precision: str = "float32"

    def with_recipe(self, **changes) -> "UsedProtocol":
        """With other fields of the recipe, as a command's own flags give them."""
        return replace(self, recipe=replace(self.recipe, **changes))

    def facts(self, images: int | None = None) -> dict:
        """For `protocol` in metrics.json: name, cut, recipe, and what is not the protocol's own.

        The name stands alone only where `changed` is empty: it holds `images` where another number
        was measured than the protocol's. Nothing is null: a field of the recipe that has no value
        is left out.
        """
        table, used = asdict(self.standard), asdict(self.recipe)
        changed = [key for key, value in used.items() if value != table[key]]
        if self.precision != table.get("precision", "float32") and "precision" not in changed:
            changed.append("precision")
        if images is not None and table.get("images") not in (None, images):
            changed.append("images")
        aside = ("source", "crop", "precision")
        recipe = {k: v for k, v in used.items() if k not in aside and v is not None}
        return {
            "name": self.name,
            "source": used["source"],
            "changed": changed,
            **cut_facts(self.recipe.crop),
            "precision": self.precision,
            "recipe": recipe,
        }


def use_protocol(
    name: str,
    command: str,
    cfg: DictConfig | None = None,
    *,
    resize: int | None = None,
    crop: int | None = None,
    precision: str | None = None,
) -> UsedProtocol:
    """A command's protocol as it is used. ConfigError for one that the command does not have.

    Args:
        name: of the protocol.
        command: the script's name.
        cfg: the configuration, whose training crop is taken where the protocol has none; None for
            pictures as they are.
        resize: --resize, see `with_cut`.
        crop: --crop, likewise.
        precision: --precision; None is the protocol's.
    """
    recipe = find_protocol(name, command)
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"unknown precision '{precision}': one of {', '.join(PRECISIONS)}")
    default = None if cfg is None else configured_cut(cfg)
    used = with_cut(recipe, default, resize, crop)
    precision = precision or getattr(recipe, "precision", "float32")
    if hasattr(used, "precision"):
        used = replace(used, precision=precision)
    return UsedProtocol(name, command, with_cut(recipe, default), used, precision)


def configured_cut(cfg: DictConfig) -> PictureCrop:
    """The configuration's training crop, its square in the centre."""
    preprocessing = cfg.dataset.preprocessing
    return PictureCrop("center", preprocessing.resize_shorter_edge, preprocessing.crop_size)


def cut_facts(cut: PictureCrop | None) -> dict:
    """For metrics.json: `resize` (method, size, filter, antialias, rounding) and `crop`."""
    if cut is None:
        return {"resize": {"method": "none: pictures as they are"}, "crop": {}}
    sizes = {"resize_shorter_edge": cut.resize_shorter_edge, "center_crop": cut.crop_size}
    resize = {
        "method": {
            "center": "shorter edge" if cut.resize_shorter_edge else "enlarged to the crop alone",
            "squash": "whole picture to a square",
            "adm": "halved by boxes, then the shorter edge to the crop",
        }[cut.method],
        "filter": cut.filter,
        "antialias": True,
        "rounding": "to bytes after each resize",
        "library": "Pillow",
    }
    if cut.method == "squash":
        sizes = {"square": cut.crop_size}
    return {"resize": resize, "crop": {k: v for k, v in sizes.items() if v is not None}}
