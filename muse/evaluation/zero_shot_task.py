"""What is asked of zero-shot's pictures: classes, captions, or both."""

from dataclasses import dataclass

from muse.data.records import Source
from muse.data.sources import open_source
from muse.errors import ConfigError
from muse.evaluation.caption_files import CaptionedPictures
from muse.evaluation.measurement import Setup
from muse.evaluation.recipes import ZeroShotRecipe
from muse.evaluation.retrieval import ALL_RECALLS, RECALLS

ALL = "all"  # candidates of retrieval


def check_candidates(count: int | str) -> None:
    """ConfigError unless retrieval among `count` captions is none (0), a choice, or `all`."""
    if count != ALL and (isinstance(count, str) or count < 0 or count == 1):
        raise ConfigError(
            f"--retrieval must be 0 (none) or at least 2 candidates, not {count}; `{ALL}` takes all"
        )


@dataclass(frozen=True)
class ZeroShotTask:
    """What is asked of the pictures.

    Args:
        classnames: file of names in the order of the labels, or `imagenet`; see `class_names`.
        templates: file of templates; None is open_clip's 80.
        retrieval: caption retrieval among so many, 0 for none, or among `all`.
        captions: file with the captions of a folder of pictures, see caption_files.py; there is
            then no classification, nor where `all` are asked of data without labels, nor under a
            protocol of retrieval.
    """

    classnames: str | None = None
    templates: str | None = None
    retrieval: int | str = 0
    captions: str | None = None

    def __post_init__(self) -> None:
        check_candidates(self.retrieval)
        if self.captions is not None and self.retrieval == 0:
            raise ConfigError(f"--captions is for --retrieval {ALL} or a number")

    def changes(self, recipe: ZeroShotRecipe) -> dict:
        """Fields of a protocol's recipe that are another here."""
        asked = None if self.retrieval == 0 else str(self.retrieval)
        changes = {"retrieval": asked} if asked != recipe.retrieval else {}
        if changes:
            changes["recalls"] = ALL_RECALLS if asked == ALL else RECALLS
        return changes | ({"templates": self.templates} if self.templates else {})

    def source(self, setup: Setup) -> Source:
        """The data that is measured."""
        if self.captions is None:
            return open_source(setup.source("val"))
        return CaptionedPictures(str(setup.source("val")), self.captions)

    def classifies(self, setup: Setup, source: Source) -> bool:
        """Whether labels are predicted."""
        recipe = setup.protocol.recipe if setup.protocol else None
        standard = setup.protocol.standard if setup.protocol else recipe
        if self.captions is not None or (standard is not None and standard.retrieval):
            return False
        return self.retrieval != ALL or not source.local or _has_labels(source)


def _has_labels(source: Source) -> bool:
    """Whether the first sample of a local source has one."""
    if getattr(source, "classes", ()):
        return True
    first = next(iter(source.read(source.shards[0])), None)
    return first is not None and "cls" in first.members
