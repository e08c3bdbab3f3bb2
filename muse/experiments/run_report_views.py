"""Sections of `muse report`'s page with pictures: what a model makes of them, what a run wrote."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from muse.experiments.run_report_html import (
    PageSection,
    ReportedModel,
    escape,
    looked_at_models,
    section_by_run,
    table,
)
from muse.experiments.run_report_model import FEATURE_NAMES, picture_uri

WIDEST = 900  # pixels of a picture that a run has written


# ----------------------------------------------------------------------------------- reconstruction
def reconstruction_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """A slider a picture; with several runs, all reconstructions of a picture side by side."""
    seen = looked_at_models(models)
    if not seen:
        return None
    figures = []
    for place in range(max(len(one.view.originals) for _, one in seen)):
        group = [_slider(one, place) for _, one in seen if place < len(one.view.originals)]
        row = "".join(group)
        figures.append(f'<div class="together">{row}</div>' if len(seen) > 1 else row)
    words = "<p>Left of the line the original, right of it what the model makes of its latent.</p>"
    kind = "gallery" if len(seen) == 1 else "gallery several"
    return PageSection(
        "reconstruction", "Before and after", f'{words}<div class="{kind}">{"".join(figures)}</div>'
    )


def _slider(one: ReportedModel, place: int) -> str:
    view = one.view
    name, quality = escape(view.names[place]), f"{view.psnr[place]:.2f} dB"
    return (
        '<figure class="compare"><div class="pair">'
        f'<img src="{view.reconstructions[place]}" alt="reconstruction of {name}">'
        f'<img class="before" src="{view.originals[place]}" alt="original {name}">'
        '<input type="range" min="0" max="100" value="50" step="1" '
        f'aria-label="share of the original that is shown of {name}">'
        '<span class="handle" aria-hidden="true"></span></div>'
        f"<figcaption>{escape(one.run.name)}, {name}<br>PSNR {quality}</figcaption></figure>"
    )


# ---------------------------------------------------------------------------------------- attention
def attention_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """Pictures to choose from, and places for the script's maps."""
    parts = [""] * len(models)
    for place, one in looked_at_models(models):
        count = len(one.view.attention)
        buttons = "".join(
            f'<button type="button" aria-pressed="{str(i == 0).lower()}" data-picture="{i}">'
            f'<img src="{one.view.originals[i]}" alt="picture {i + 1}: {escape(name)}"></button>'
            for i, name in enumerate(one.view.names[:count])
        )
        parts[place] = (
            f'<div class="attention" data-run="{place}"><div class="chooser" role="group" '
            f'aria-label="picture">{buttons}</div><div class="maps"></div>'
            '<p class="reading" role="status"></p></div>'
        )
    words = (
        "<p>Click a patch of the first picture, or move with the arrow keys and press Enter. The "
        "maps show what it attends to, mean over heads; each is scaled to its own largest weight, "
        "and the patch's weight on itself is left out.</p>"
    )
    return section_by_run(models, parts, "attention", "What a patch attends to", words)


# ----------------------------------------------------------------------------------------- features
def _named_tile(uri: str, name: str) -> str:
    return f'<img class="tile" src="{uri}" alt=""><span class="name">{name}</span>'


def features_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """The first three principal components of each kind of features as colours."""
    parts = [""] * len(models)
    for place, one in looked_at_models(models):
        rows = []
        for i, colours in enumerate(one.view.features):
            name = escape(one.view.names[i])
            cells = [
                f'<img class="tile cells" src="{colours[kind]}" alt="{title} of {name}, coloured">'
                for kind, title in FEATURE_NAMES.items()
            ]
            rows.append([_named_tile(one.view.originals[i], name), *cells])
        parts[place] = table(["picture", *FEATURE_NAMES.values()], rows, "pictures")
    words = (
        "<p>The three directions in which the cells of all these pictures differ most, as red, "
        "green and blue. Cells of one colour are alike to the model.</p>"
    )
    return section_by_run(models, parts, "features", "Features, coloured", words)


# ----------------------------------------------------------------------------------------- captions
def captions_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """The nearest captions of each picture, right and wrong ones alike."""
    parts = [""] * len(models)
    for place, one in looked_at_models(models):
        view = one.view
        if not view.captions:
            continue
        items = []
        for i, nearest in enumerate(view.captions):
            lines = "".join(
                f'<li class="{"own" if own else "other"}">{"✓" if own else "✗"} {escape(text)} '
                f"<span>{cosine:.3f}</span></li>"
                for text, cosine, own in nearest
            )
            items.append(
                f'<figure class="nearest"><img src="{view.originals[i]}" '
                f'alt="{escape(view.names[i])}"><figcaption>own caption ranks {view.ranks[i]} of '
                f"{view.caption_count}<ul>{lines}</ul></figcaption></figure>"
            )
        first = sum(rank == 1 for rank in view.ranks)
        parts[place] = (
            f"<p>{first} of {len(view.ranks)} pictures have their own caption first, among "
            f"{view.caption_count} different ones.</p>"
            f'<div class="gallery">{"".join(items)}</div>'
        )
    words = (
        "<p>Captions by the cosine of picture and text. ✓ is the picture's own caption, ✗ another "
        "one, however well it may fit.</p>"
    )
    return section_by_run(models, parts, "captions", "Nearest captions", words)


# ------------------------------------------------------------------------------------- segmentation
def foreground_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """Truth and a linear probe's answer, laid over each picture."""
    parts = [""] * len(models)
    for place, one in looked_at_models(models):
        view, rows = one.view, []
        for i, (truth, guess, iou) in enumerate(view.foreground):
            name = escape(view.names[i])
            cells = (
                f'<img class="tile" src="{truth}" alt="objects of {name}">',
                f'<img class="tile" src="{guess}" alt="objects that the probe finds in {name}">',
            )
            rows.append([_named_tile(view.originals[i], name), *cells, f"{iou:.3f}"])
        if rows:
            parts[place] = table(["picture", "objects", "probe", "IoU"], rows, "pictures")
    words = (
        "<p>A linear probe on the frozen features after the last block, trained for a moment on "
        "other pictures of the same set: an impression, not a measurement.</p>"
    )
    return section_by_run(models, parts, "segmentation", "Objects", words)


# --------------------------------------------------------------------------------- written pictures
def written_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """Samples, edits, attention sheets, gradient figures: what the run itself has written."""
    parts = []
    for one in models:
        figures = []
        for file in one.run.pictures:
            uri = _embedded(file)
            if uri:
                name = escape(
                    str(file.relative_to(one.run.folder)) if one.run.folder else file.name
                )
                figures.append(
                    f'<figure><img src="{uri}" alt="{name}" loading="lazy">'
                    f"<figcaption>{name}</figcaption></figure>"
                )
        parts.append(f'<div class="gallery wide">{"".join(figures)}</div>' if figures else "")
    return section_by_run(models, parts, "written", "Pictures that the run has written")


def _embedded(file: Path) -> str | None:
    """The picture at most WIDEST pixels wide; None for a file that is none."""
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            picture.load()
            picture.thumbnail((WIDEST, 2 * WIDEST))
            return picture_uri(picture, "JPEG", 85)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
