"""Which cut-outs and photographs the `stamps` data is made of, their categories, and the split of both."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy

from muse.errors import DataError
from muse.experiments.demo_data import captions

logger = logging.getLogger(__name__)

STAMPS_PACKAGE = "tuxpaint-stamps-default"
PACKAGES = (STAMPS_PACKAGE, "lomiri-wallpapers-20.04", "lomiri-wallpapers-16.04")
FOLDERS = ("animals", "food", "plants", "household", "town", "vehicles")
CLASSES = ("animal", "food", "plant", "household object", "street object", "vehicle")
VAL_OBJECTS = 57
VAL_SUBJECT = 2  # objects of one subject in val at most: 57 objects should be many subjects
# The split is the same whatever --seed is, so that figures of several seeds can be compared. Of ten splits the one
# whose val holds the most different and best-known subjects, taken before anything was trained.
SPLIT_SEED = 2029

# Inside the six folders, but drawings or silhouettes: they belong to the second domain.
DRAWINGS = {
    "animals/insects/bee",
    "animals/mammals/echidna",
    "animals/mammals/hedgehog",
    "food/pizza",
    "town/monuments/inukshuk-outline",
}
# Nothing to be seen (transparent, 20 pixels wide) or not an object (emblems to be put on a car).
SKIPPED = {
    "household/dishes/glass",
    "food/nuts/walnut_shelled",
    "vehicles/emergency/sedan_police",
    "vehicles/locomotive/cartoon/trainSign",
    "seasonal/hanukkah/dreydl-gimmel",
    "seasonal/hanukkah/dreydl-hay",
    "seasonal/hanukkah/dreydl-nun",
    "seasonal/hanukkah/dreydl-shin",
}
# Folders outside the six whose objects are of one of the six categories; the longest prefix counts.
EXTRA = {
    "clothes": 3,
    "hobbies": 3,
    "medical": 3,
    "sports": 3,
    "seasonal/candle": 3,
    "seasonal/hanukkah": 3,
    "seasonal/christmas/German_Christmas_toy": 3,
    "seasonal/christmas/stocking": 3,
    "seasonal/christmas/Candy_cane_photo_1": 1,
    "seasonal/christmas/Candy_cane_photo_2": 1,
    "seasonal/christmas/Christmas_pudding": 1,
    "seasonal/christmas/Mince_Pie": 1,
    "seasonal/christmas/Roast_turkey": 1,
    "seasonal/christmas/Christmas_Tree_photo": 2,
    "seasonal/christmas/tree": 2,
    "seasonal/christmas/xmaswreath": 2,
    "seasonal/easter/bluebird": 0,
    "seasonal/easter/bunny": 0,
    "seasonal/easter/butterfly": 0,
    "seasonal/easter/chick": 0,
    "seasonal/easter/daffodil": 2,
    "seasonal/halloween/grave-a": 4,
    "seasonal/halloween/grave-c": 4,
    "seasonal/halloween/grave-e": 4,
    "seasonal/halloween/grave-i": 4,
    "military/vehicles": 5,
    "space/apollo_lander": 5,
}
# Photo-like folders among EXTRA; everything else there is a cartoon.
EXTRA_PHOTO = (
    "hobbies",
    "medical",
    "sports",
    "military",
    "space",
    "seasonal/candle",
    "seasonal/christmas/Ca",
    "seasonal/christmas/Ch",
    "seasonal/christmas/G",
    "seasonal/christmas/M",
    "seasonal/christmas/R",
    "seasonal/christmas/xmasw",
    "seasonal/halloween/grave",
    "clothes/clothespin",
)
# Objects with letters that the package does not mark as such.
LETTERED = (
    "town/roadsigns/",
    "household/arttools/",
    "household/tools/toolbox",
    "household/tools/measuring_tape",
    "sports/australian",
    "vehicles/garbagetruck",
    "vehicles/flight/planes/747",
    "vehicles/emergency/firetruck",
)
# Objects of one subject stay on one side of the split; beside these sets, objects of one caption do.
SAME_SUBJECT = (
    "chicken_profile hen rooster chick chick-hatched chick-in-egg",
    "drake duck",
    "guineafowl helmeted_guineafowl",
    "heron_greatblue heron_greatblue_flying",
    "little-penguin magellanic_penguin penguin pengwin tux penguin_with_spider tux_tractor",
    "silver-gull seagull",
    "albino_peahen peacock",
    "nandou ostrich",
    "cow cow_white",
    "gnu-baby gnu-baby-stand gnu-sitting gnu-stand",
    "sheep sheep_lamb ram",
    "camel dromedary",
    "lion lion-2",
    "tiger tiger_sumatran",
    "deer doe",
    "bear european-bear",
    "edward_bear teddy_bear",
    "donkey donkey_eating",
    "pig pig_golden pig_golden2",
    "hornet hoverfly bee",
    "rabbit rabbit-2 rabbit_little bunny bunny-egg bunny-head",
    "mouse rat",
    "frog frog-1",
    "fly spider_fly",
    "kangaroo kangaroo-silo",
    "apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty apple apple_core",
    "Apricot_whole apricot",
    "Strawberry2 strawberry",
    "Cherry_Stella cherries",
    "orange orange_seville mandarine sliced_orange",
    "lemon sliced_lime lemon_slice",
    "walnut pecan",
    "garlic garlics",
    "lettuce redlettuce lettuce_bolted",
    "pepper yellowpepper",
    "eggplant",
    "mushroom cep cep-1 cep-2",
    "flower1 flower4",
    "flower2 flower3 flower5 yellow-flower",
    "flower6 flower8 flower9",
    "flower10 chemparathi",
    "daffodil",
    "scissors_small_closed scissors_small_open",
    "wrench wrench_adjustable wrench_plumbers",
    "hammer mallet_metal",
    "garbagecan wheelie_bin home_compost_bin",
    "stoplight_01_red stoplight_02_yellow stoplight_03_green",
    "greenflag redflag whiteflag yellowflag checkeredflag blue-and-yellowflag",
    "inukshuk-photo inukshuk-outline",
    "give_way_sign yield",
    "crossroads t-junction",
    "dead_end_sign no_entry_sign",
    "school_sign xing_school xing_ped",
    "uk_post_box usps_mailbox",
    "7spoke256 wheel_tractor",
    "beetle sedan sportscar2",
    "firetruck fire_engine",
    "747 plane",
    "chineseJunk walnutBoat",
    "garbagetruck dumper terex",
    "green_korean_bus double_decker_bus",
    "pitcher_small",
    "teapot kettle",
    "plyers nutcracker",
    "pen_dryerase highlighter",
    "birch",
    "tree tree336",
)
# Photograph -> the part (left, top, right, bottom as fractions) that holds no object of the six categories.
PARTS = {
    "friends_by_Aitzol_Berasategi": (0.0, 0.62, 1.0, 1.0),
    "Kleiber_by_Lukas_Baubkus": (0.0, 0.0, 0.34, 1.0),
    "Picture_0B_by_freespace": (0.0, 0.55, 0.3, 1.0),
    "Dragonfly_by_Bolly": (0.0, 0.0, 0.5, 1.0),
    "free_by_Peter_Nerlich": (0.0, 0.35, 0.28, 1.0),
    "sunset_by_Aitzol_Berasategi": (0.0, 0.0, 0.68, 1.0),
    "seeding_by_Clements_Engelhardt": (0.4, 0.0, 1.0, 1.0),
    "Picture_1A_by_freespace": (0.0, 0.5, 0.3, 1.0),
    "greentock_by_Peter_Nerlich": (0.0, 0.5, 0.45, 1.0),
    "china": (0.62, 0.0, 1.0, 1.0),
}
NO_BACKGROUNDS = {"Wine_by_Jakkub_Mede"}  # a table full of household objects
SKIMAGE = ("brick.png", "gravel.png", "grass.png", "hubble_deep_field.jpg")
SKLEARN = ("china.jpg",)
VAL_BACKGROUNDS = {
    "picosdeeuropa_by_Aitzol_Berasategi",
    "Dragonfly_by_Bolly",
    "gravel",
    "china",
    "friends_by_Aitzol_Berasategi",
    "Infinite-Sea_by_Aury88",
}


@dataclass(frozen=True)
class Cutout:
    """One cut-out with alpha: `name` is its path below the stamps folder, `label` an index of CLASSES."""

    name: str
    path: Path
    phrase: str
    label: int
    style: str  # photo | cartoon | drawing
    flip: bool  # may be mirrored (no letters on it)


@dataclass(frozen=True)
class Background:
    """One photograph; `part` is the box (fractions) crops are taken from, None for all of it."""

    name: str
    path: Path
    part: tuple[float, float, float, float] | None


def find_cutouts(root: Path) -> list[Cutout]:
    """All usable cut-outs of the unpacked stamps package, sorted by name. DataError if there are none."""
    stamps = root / "usr/share/tuxpaint/stamps"
    found = [item for path in sorted(stamps.rglob("*.png")) if (item := _cutout(stamps, path))]
    if not found:
        raise DataError(f"no cut-outs under {stamps}; delete {root} and run again")
    return found


def _cutout(stamps: Path, path: Path) -> Cutout | None:
    name = path.relative_to(stamps).with_suffix("").as_posix()
    text = path.with_suffix(".txt")
    label, style = _kind(name)
    if label is None or name in SKIPPED or not text.is_file():
        return None
    phrase = captions.clean(
        name, captions.first_line(text.read_text(encoding="utf-8", errors="replace"))
    )
    return Cutout(name, path, phrase, label, style, _may_flip(name, path)) if phrase else None


def _may_flip(name: str, path: Path) -> bool:
    """Whether the mirrored picture is as good: no letters on it."""
    notes = path.with_suffix(".dat")
    marked = (
        notes.is_file()
        and "nomirror" in notes.read_text(encoding="utf-8", errors="replace").split()
    )
    return not (
        marked or name.startswith(LETTERED) or path.with_name(f"{path.stem}_mirror.png").exists()
    )


def _kind(name: str) -> tuple[int | None, str]:
    """(category index or None, style) of a cut-out by its path."""
    top = name.split("/")[0]
    if top in FOLDERS:
        style = "cartoon" if "/cartoon/" in name else "drawing" if name in DRAWINGS else "photo"
        return FOLDERS.index(top), style
    prefixes = [prefix for prefix in EXTRA if name.startswith(prefix)]
    if not prefixes:
        return None, "photo"
    photo = "/cartoon/" not in name and name.startswith(EXTRA_PHOTO)
    return EXTRA[max(prefixes, key=len)], "photo" if photo else "cartoon"


def is_main(item: Cutout) -> bool:
    """Photo-like and of the six folders: the domain that is evaluated."""
    return item.style == "photo" and item.name.split("/")[0] in FOLDERS


def names_category(item: Cutout) -> bool:
    """Whether ", a kind of ..." is true of it: the castles and graves of the second domain are no street objects."""
    return is_main(item) or CLASSES[item.label] != "street object"


def subjects(items: list[Cutout]) -> dict[str, str]:
    """Name -> subject key; objects of one key show the same thing (SAME_SUBJECT, or the same caption)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    known = {stem: f"subject:{line.split()[0]}" for line in SAME_SUBJECT for stem in line.split()}
    for item in items:
        stem = item.name.rsplit("/", 1)[-1]
        for key in (f"caption:{item.phrase}", known.get(stem)):
            if key:
                parent[root(item.name)] = root(key)
    return {item.name: root(item.name) for item in items}


def split_objects(items: list[Cutout]) -> tuple[list[Cutout], list[Cutout], list[Cutout]]:
    """(train, val, extra): main objects split by subject within each category, about VAL_OBJECTS in val; `extra` are
    the remaining domains without any subject that val holds."""
    subject = subjects(items)
    main = [item for item in items if is_main(item)]
    rng = numpy.random.default_rng(SPLIT_SEED)
    held: set[str] = set()
    for label, quota in enumerate(_quotas(main)):
        groups: dict[str, list[str]] = {}
        for item in main:
            if item.label == label:
                groups.setdefault(subject[item.name], []).append(item.name)
        keys = sorted(groups)
        for index in rng.permutation(len(keys)):
            members = groups[keys[index]]
            crosses = any(subject[i.name] == keys[index] and i.label != label for i in main)
            if len(members) <= min(quota, VAL_SUBJECT) and not crosses:
                held.add(keys[index])
                quota -= len(members)
    train = [item for item in main if subject[item.name] not in held]
    val = [item for item in main if subject[item.name] in held]
    extra = [item for item in items if not is_main(item) and subject[item.name] not in held]
    return train, val, extra


def _quotas(main: list[Cutout]) -> list[int]:
    counts = numpy.bincount([item.label for item in main], minlength=len(CLASSES))
    exact = VAL_OBJECTS * counts / max(counts.sum(), 1)
    quotas = numpy.floor(exact).astype(int)
    quotas[numpy.argsort(quotas - exact, kind="stable")[: VAL_OBJECTS - quotas.sum()]] += 1
    return quotas.tolist()


def find_backgrounds(roots: dict[str, Path]) -> tuple[list[Background], list[Background]]:
    """(train, val) photographs: the wallpapers, and scikit-image's and scikit-learn's where those are installed."""
    paths = [
        path
        for name, root in roots.items()
        if name != STAMPS_PACKAGE
        for path in (root / "usr/share/backgrounds").rglob("*.jpg")
        if path.stem not in NO_BACKGROUNDS
    ]
    for package, folder, files in (
        ("skimage", "data", SKIMAGE),
        ("sklearn", "datasets/images", SKLEARN),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            logger.info("%s is not installed: fewer backgrounds", package)
            continue
        base = Path(spec.origin).parent / folder
        paths += [base / file for file in files if (base / file).is_file()]
    found = sorted(
        (Background(path.stem, path, PARTS.get(path.stem)) for path in paths),
        key=lambda item: item.name,
    )
    val = [item for item in found if item.name in VAL_BACKGROUNDS]
    train = [item for item in found if item.name not in VAL_BACKGROUNDS]
    if not train or not val:
        raise DataError(
            "too few background photographs; delete the package cache (~/.cache/muse) and run again"
        )
    return train, val
