"""The kind `shapes`: drawn scenes with exact masks; needs only numpy and Pillow."""

from dataclasses import dataclass

import numpy
from PIL import Image, ImageDraw

from muse.experiments.demo_data.sample import Sample

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "crescent")
VERSION = 1
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 215, 50),
    "green": (50, 160, 70),
    "cyan": (60, 190, 210),
    "blue": (40, 80, 200),
    "purple": (130, 60, 170),
    "white": (240, 240, 240),
}
# Background name -> base colour; the texture depends on the name. The last four are val's alone.
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "sand": (205, 180, 130),
    "sky": (150, 190, 230),
    "grass": (90, 130, 70),
    "night": (25, 30, 60),
    "brick": (150, 80, 60),
    "snow": (215, 222, 228),
    "water": (60, 110, 130),
    "slate": (75, 85, 95),
    "moss": (110, 120, 60),
    "clay": (170, 120, 90),
    "dusk": (110, 80, 120),
}
_HELD = 4
_MIN_DISTANCE = 110  # of the base colours of shape and background, in 8-bit RGB
_OVERSAMPLE = 3
_PLACES = 6  # tried for a further shape
_SPLITS = {"train": 0, "val": 1, "seen": 2}
EXTRA_SPLITS = ("seen",)


@dataclass(frozen=True)
class Shapes:
    """Callable (split, index) -> Sample.

    Val shows pairs of colour and shape, and backgrounds, that train never shows; `seen` shows the
    pairs of train on val's backgrounds.
    """

    size: int
    seed: int

    def __call__(self, split: str, index: int) -> Sample:
        rng = numpy.random.default_rng([self.seed, _SPLITS[split], index])
        ground = str(rng.choice(grounds_of(split)))
        image = draw_ground(ground, self.size, rng)
        mask = numpy.zeros((self.size, self.size), numpy.uint8)
        owner = numpy.full(mask.shape, -1)
        main = CLASSES[index % len(CLASSES)]
        pairs = _draw_pairs(main, split, ground, rng)
        for number, (colour, shape) in enumerate(pairs):
            alpha = _free_shape(shape, mask > 0, rng)
            surface = draw_surface(COLOURS[colour], self.size, rng)
            image = image * (1 - alpha[..., None]) + surface * alpha[..., None]
            inside = alpha >= 0.5
            mask[inside], owner[inside] = 1 + CLASSES.index(shape), number
        seen = [
            pair for number, pair in enumerate(pairs) if (owner == number).sum() >= mask.size * 0.01
        ]
        return Sample(
            (image.clip(0, 1) * 255).round().astype(numpy.uint8),
            mask,
            _caption(seen, ground),
            CLASSES.index(main),
            {"object": " ".join("-".join(pair) for pair in pairs), "background": ground},
        )


def prepare_shapes(size: int, seed: int, objects: str = "photo") -> Shapes:
    """Makes drawn scenes; `objects` is not used."""
    return Shapes(size, seed)


def grounds_of(split: str) -> list[str]:
    """Names of the backgrounds of a split."""
    names = list(BACKGROUNDS)
    return names[:-_HELD] if split == "train" else names[-_HELD:]


def held_out(colour: str, shape: str) -> bool:
    """Whether this pair is shown in val only: two of the eight colours of each shape."""
    return (list(COLOURS).index(colour) + CLASSES.index(shape)) % _HELD == 0


def _draw_pairs(
    main: str, split: str, ground: str, rng: numpy.random.Generator
) -> list[tuple[str, str]]:
    """One to three different (colour, shape) pairs of this split, visible on the background."""

    def allowed(shape: str) -> list[str]:
        base = numpy.array(BACKGROUNDS[ground], float)
        return [
            name
            for name, rgb in COLOURS.items()
            if held_out(name, shape) == (split == "val")
            and numpy.linalg.norm(base - rgb) >= _MIN_DISTANCE
        ]

    shapes = [
        main,
        *(str(name) for name in rng.permutation([name for name in CLASSES if name != main])[:2]),
    ]
    count = 1 + int(rng.integers(3))
    return [(str(rng.choice(allowed(shape))), shape) for shape in shapes if allowed(shape)][:count]


def noun(colour: str, shape: str) -> str:
    """Such as "an orange ring"."""
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def _caption(pairs: list[tuple[str, str]], ground: str) -> str:
    nouns = [noun(*pair) for pair in pairs]
    text = nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"
    return f"{text[0].upper()}{text[1:]} on {ground}."


def _ramp(size: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """A linear shade (H,W) in about [-.5,.5] in a random direction."""
    angle = rng.uniform(0, 2 * numpy.pi)
    y, x = numpy.mgrid[0:size, 0:size] / size - 0.5
    return numpy.cos(angle) * x + numpy.sin(angle) * y


def draw_ground(name: str, size: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """Background (H,W,3) in [0,1]: base colour, shade, and a grain that depends on the name."""
    kind = list(BACKGROUNDS).index(name)
    cells = [max(2, round(size / step)) for step in ((4, 4), (2, 16), (16, 2))[kind % 3]]
    grain = Image.fromarray(rng.normal(0, 1, cells).astype(numpy.float32), "F")
    grain = numpy.asarray(grain.resize((size, size), Image.Resampling.BICUBIC))
    light = rng.uniform(0.9, 1.1) + 0.25 * _ramp(size, rng) + 0.06 * grain
    return (numpy.array(BACKGROUNDS[name]) / 255 * light[..., None]).clip(0, 1)


def draw_surface(
    colour: tuple[int, int, int], size: int, rng: numpy.random.Generator
) -> numpy.ndarray:
    """The surface of a shape (H,W,3) in [0,1]: shaded, plain or striped."""
    light = rng.uniform(0.85, 1.05) + 0.5 * _ramp(size, rng)
    if rng.random() < 0.4:
        light = light + 0.1 * numpy.sign(numpy.sin(_ramp(size, rng) * rng.uniform(40, 80)))
    return (numpy.array(colour) / 255 * light[..., None]).clip(0, 1)


def _free_shape(name: str, taken: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """Alpha (H,W) of a shape where it covers least of `taken`; the first one is the main shape."""
    main = not taken.any()
    places = []
    for _ in range(1 if main else _PLACES):
        places.append(_shape(name, len(taken), main, rng))
        if not places[-1][taken].any():
            break
    return min(places, key=lambda alpha: alpha[taken].sum())


def _shape(name: str, size: int, main: bool, rng: numpy.random.Generator) -> numpy.ndarray:
    """Alpha (H,W) in [0,1] of one shape at a random place; the main one is larger."""
    wide = size * _OVERSAMPLE
    radius = rng.uniform(0.2, 0.32) * wide if main else rng.uniform(0.1, 0.18) * wide
    centre = rng.uniform(radius, wide - radius, 2)
    return outline(name, size, centre / _OVERSAMPLE, radius / _OVERSAMPLE, rng.uniform(-20, 20))


def outline(
    name: str, size: int, centre: numpy.ndarray, radius: float, degrees: float
) -> numpy.ndarray:
    """Alpha (H,W) in [0,1] of a shape at (x, y) pixels, turned."""
    wide = size * _OVERSAMPLE
    picture = Image.new("L", (wide, wide))
    draw, turn = ImageDraw.Draw(picture), numpy.deg2rad(degrees)
    _OUTLINES[name](draw, centre * _OVERSAMPLE, radius * _OVERSAMPLE, turn)
    return numpy.asarray(picture.resize((size, size), Image.Resampling.BOX), numpy.float64) / 255


def _polygon(draw: ImageDraw.ImageDraw, centre, radius: float, turn: float, angles, radii) -> None:
    angles = numpy.asarray(angles) + turn - numpy.pi / 2
    points = centre + radius * numpy.asarray(radii)[:, None] * numpy.stack(
        [numpy.cos(angles), numpy.sin(angles)], -1
    )
    draw.polygon([tuple(point) for point in points], fill=255)


def _disc(draw: ImageDraw.ImageDraw, centre, radius: float, fill: int = 255) -> None:
    draw.ellipse([*(centre - radius), *(centre + radius)], fill=fill)


def _regular(corners: int, first: float = 0.0):
    angles = first + 2 * numpy.pi * numpy.arange(corners) / corners
    return lambda draw, centre, radius, turn: _polygon(
        draw, centre, radius, turn, angles, numpy.ones(corners)
    )


def _ring(draw, centre, radius, turn) -> None:
    _disc(draw, centre, radius)
    _disc(draw, centre, 0.55 * radius, 0)


def _crescent(draw, centre, radius, turn) -> None:
    _disc(draw, centre, radius)
    _disc(
        draw,
        centre + radius * 0.5 * numpy.array([numpy.cos(turn), numpy.sin(turn)]),
        0.8 * radius,
        0,
    )


def _cross(draw, centre, radius, turn) -> None:
    arm = 0.33
    corners = (
        numpy.array(
            [
                (arm, -1),
                (arm, -arm),
                (1, -arm),
                (1, arm),
                (arm, arm),
                (arm, 1),
                (-arm, 1),
                (-arm, arm),
                (-1, arm),
                (-1, -arm),
                (-arm, -arm),
                (-arm, -1),
            ]
        )
        * 0.95
    )
    rotation = numpy.array(
        [[numpy.cos(turn), numpy.sin(turn)], [-numpy.sin(turn), numpy.cos(turn)]]
    )
    draw.polygon([tuple(point) for point in centre + radius * corners @ rotation], fill=255)


_OUTLINES = {
    "circle": lambda draw, centre, radius, turn: _disc(draw, centre, radius),
    "square": _regular(4, numpy.pi / 4),
    "triangle": _regular(3),
    "star": lambda draw, centre, radius, turn: _polygon(
        draw,
        centre,
        radius,
        turn,
        numpy.pi * numpy.arange(10) / 5,
        numpy.where(numpy.arange(10) % 2, 0.42, 1.0),
    ),
    "ring": _ring,
    "cross": _cross,
    "diamond": lambda draw, centre, radius, turn: _polygon(
        draw, centre, radius, turn, numpy.pi * numpy.arange(4) / 2, (1, 0.6, 1, 0.6)
    ),
    "crescent": _crescent,
}
