"""English captions of the cut-outs, as short noun phrases ("A zebu.")."""

import re

# Path below the stamps folder (no extension) -> noun phrase. Replaces captions that give orders,
# advertise, explain or do not say what is shown, and corrects a few wrong articles.
NOUNS = {
    "animals/birds/gander": "a gray goose",
    "animals/birds/drake": "a drake, a male duck",
    "animals/fish/bluegroper": "a blue groper fish",
    "animals/fish/lionfish": "a lionfish",
    "animals/fish/lobster": "a spiny lobster",
    "animals/fish/coraltrout": "a coral trout fish",
    "animals/fish/moonwrasse": "a moon wrasse fish",
    "animals/insects/hoverfly": "a hoverfly",
    "animals/insects/xanthia": "a moth",
    "animals/mammals/bears/toys/edward_bear": "a teddy bear",
    "animals/mammals/bears/european-bear": "a European bear",
    "animals/mammals/bovines/gnu-baby": "a baby gnu",
    "animals/mammals/bovines/gnu-baby-stand": "a baby gnu",
    "animals/mammals/bovines/mountaingoat": "a mountain goat",
    "animals/mammals/bovines/sheep_lamb": "a lamb, a baby sheep",
    "animals/mammals/dogs/dog": "a dog",
    "animals/mammals/hippopotamus": "a hippopotamus",
    "animals/mammals/wildboar": "a wild boar",
    "animals/birds/silver-gull": "a silver gull",
    "animals/mammals/bears/cartoon/teddy_bear": "a teddy bear",
    "animals/birds/cartoon/pengwin": "a penguin",
    "animals/birds/cartoon/tux": "a penguin",
    "animals/birds/cartoon/penguin_with_spider": "a penguin and a spider",
    "animals/insects/cartoon/wings": "a pair of butterfly wings",
    "animals/insects/cartoon/spider_fly": "a spider and a fly",
    "food/fruit/avocado": "an avocado",
    "food/fruit/cherimoya": "a cherimoya fruit",
    "food/fruit/orange_seville": "a Seville orange",
    "food/pizza": "a slice of pizza",
    "food/spices/ginger": "a ginger root",
    "food/vegetables/broccoli": "broccoli",
    "food/vegetables/corn": "yellow corn",
    "food/vegetables/pumpkin_small": "a small pumpkin",
    "food/vegetables/tomato": "a red tomato",
    "household/arttools/highlighter": "a highlighter pen",
    "household/arttools/pen_dryerase": "a marker pen",
    "household/dishes/pitcher_small": "a small pitcher",
    "household/garbagecan": "a silver garbage can",
    "household/toilet": "a toilet",
    "household/tools/measuring_tape": "a measuring tape",
    "household/wheelie_bin": "a green wheelie bin",
    "plants/eggplant": "an eggplant plant",
    "plants/flowers/adeenia": "a desert rose flower",
    "plants/flowers/anthoorium": "an anthurium flower",
    "plants/flowers/appooppanthady": "a white milkweed flower",
    "plants/flowers/bolsom": "a white balsam flower",
    "plants/flowers/chemparathi": "a hibiscus flower",
    "plants/flowers/daffodil": "a daffodil flower",
    "plants/flowers/flower1": "a purple flower",
    "plants/flowers/flower2": "a yellow flower",
    "plants/flowers/flower3": "a yellow flower",
    "plants/flowers/flower4": "two blue flowers",
    "plants/flowers/flower5": "a yellow flower",
    "plants/flowers/flower6": "a pink flower",
    "plants/flowers/flower7": "orange flowers",
    "plants/flowers/flower8": "a pink flower",
    "plants/flowers/flower9": "a pink flower",
    "plants/flowers/iris": "an iris flower",
    "plants/flowers/marigold": "a marigold flower",
    "plants/flowers/red-gazania": "a red gazania flower",
    "plants/flowers/rose": "a red rose",
    "plants/flowers/whitestar-petunia": "a petunia flower",
    "plants/flowers/plastic/chuvanna_plastic_poo": "a red plastic flower",
    "plants/lavender": "a lavender plant",
    "plants/lettuce_bolted": "a lettuce plant",
    "plants/mushrooms/cep": "a cep mushroom",
    "plants/mushrooms/cep-1": "a cep mushroom",
    "plants/mushrooms/cep-2": "two cep mushrooms",
    "plants/trees/birch": "a bare birch tree",
    "plants/trees/holly_leaves": "holly leaves",
    "plants/trees/holm_oak": "an oak tree",
    "plants/trees/rambutan": "a red rambutan tree",
    "town/monuments/inukshuk-photo": "an inukshuk, a landmark made of stones",
    "town/monuments/inukshuk-outline": "an inukshuk, a landmark made of stones",
    "town/roadsigns/arrow": "an arrow sign",
    "town/roadsigns/crossroads": "a crossroads sign",
    "town/roadsigns/dead_end_sign": "a dead end sign",
    "town/roadsigns/give_way_sign": "a give way sign",
    "town/roadsigns/hospital": "a hospital sign",
    "town/roadsigns/no_entry_sign": "a no entry sign",
    "town/roadsigns/no_uturn": "a no U-turn sign",
    "town/roadsigns/railroad_crossing": "a railroad crossing sign",
    "town/roadsigns/roundabout": "a roundabout sign",
    "town/roadsigns/school_sign": "a school sign",
    "town/roadsigns/stop": "a stop sign",
    "town/roadsigns/stoplight_01_red": "a red traffic light",
    "town/roadsigns/stoplight_02_yellow": "a yellow traffic light",
    "town/roadsigns/stoplight_03_green": "a green traffic light",
    "town/roadsigns/t-junction": "a T-junction sign",
    "town/roadsigns/toilets": "a toilets sign",
    "town/roadsigns/xing_ped": "a pedestrian crossing sign",
    "town/roadsigns/xing_school": "a school crossing sign",
    "town/roadsigns/yield": "a yield sign",
    "town/uk_post_box": "a red post box",
    "town/usps_mailbox": "a blue mailbox",
    "town/cartoon/docks": "docks",
    "town/cartoon/fountain": "a fountain",
    "town/houses/cartoon/blacksmith": "a blacksmith shop",
    "town/houses/cartoon/cathedral": "a cathedral",
    "town/houses/cartoon/cave_entrance": "a cave",
    "town/houses/cartoon/circus": "a circus tent",
    "town/houses/cartoon/hunter": "a hunter's house",
    "town/houses/cartoon/townhall": "a town hall",
    "town/monuments/cartoon/eiffel_tower": "the Eiffel tower",
    "vehicles/7spoke256": "a car wheel",
    "vehicles/auto/beetle": "a red car",
    "vehicles/auto/sedan": "a blue sedan car",
    "vehicles/auto/sportscar2": "a red sports car",
    "vehicles/auto/truck": "a pickup truck",
    "vehicles/construction/dumper": "a dumper truck",
    "vehicles/cycle/pink_tricycle": "a pink tricycle",
    "vehicles/farming/cartoon/tux_tractor": "a penguin in a tractor",
    "vehicles/flight/cartoon/eddieCopter": "a helicopter",
    "vehicles/flight/planes/cartoon/plane": "an airplane",
    "vehicles/locomotive/cartoon/boxcar": "a train boxcar",
    "vehicles/locomotive/cartoon/caboose": "a train caboose",
    "vehicles/locomotive/cartoon/carriage": "a train carriage",
    "vehicles/locomotive/cartoon/tanker": "a train tanker",
    "vehicles/locomotive/cartoon/tender": "a train coal car",
    "vehicles/ship/cartoon/bathyscape": "a submarine",
    "vehicles/ship/walnutBoat": "a sailing boat",
    "vehicles/ship/chineseJunk": "an old Chinese sailing ship",
    "medical/stethoscope": "a stethoscope",
    "military/vehicles/bradley": "a tank",
    "military/vehicles/infantry-stryker": "an armoured vehicle",
    "military/vehicles/ww2_german_gun": "an old tank",
    "military/vehicles/f22_raptor": "a fighter jet",
    "seasonal/candle": "a lit candle",
    "seasonal/christmas/Candy_cane_photo_1": "a candy cane",
    "seasonal/christmas/Candy_cane_photo_2": "a candy cane",
    "seasonal/christmas/Christmas_pudding": "a Christmas pudding",
    "seasonal/christmas/German_Christmas_toy": "a wooden Christmas toy",
    "seasonal/christmas/Mince_Pie": "a mince pie",
    "seasonal/christmas/Roast_turkey": "a roast turkey",
    "seasonal/hanukkah/menorah": "a menorah",
    "space/apollo_lander": "a lunar lander",
    "sports/australian_rules_football": "a red football",
    "sports/cartoon/football_helmet_front": "a football helmet",
    "sports/cartoon/football_helmet_side": "a football helmet",
}
_QUOTES = str.maketrans({"“": "", "”": "", '"': "", "’": "'"})


def first_line(text: str) -> str:
    """The English line of a stamp's `.txt` file: its first; later lines are `xx=translation`."""
    for line in text.splitlines():
        if line.strip():
            return line.strip()
    return ""


def noun_phrase(path: str, line: str) -> str:
    """From a stamp's path and English caption: no full stop, first letter in lower case."""
    if path in NOUNS:
        return NOUNS[path]
    phrase = re.sub(r"\s*\([^)]*\)", "", line.translate(_QUOTES))
    phrase = re.split(r"[.!?;—]", phrase, maxsplit=1)[0].strip()
    if not phrase:
        return ""
    head, _, rest = phrase.partition(" ")
    return f"{head.lower()} {rest}".strip()


def sentence(phrase: str, style: str = "photo", category: str | None = None) -> str:
    """The caption of one picture.

    Args:
        phrase: what is shown, such as "a zebra".
        style: photo | cartoon | drawing; the last two are named ("a cartoon of a zebra").
        category: adds ", a kind of …".
    """
    text = phrase if style == "photo" else f"a {style} of {phrase}"
    if category:
        text = f"{text}, a kind of {category}"
    return f"{text[0].upper()}{text[1:]}."
