"""What a multimodal model learns from: three kinds of samples in WebDataset's layout.

| kind | members | batch |
|---|---|---|
| image | `jpg`, `txt` | `text`, `images` (the picture to make) |
| edit | `input.jpg`, `output.jpg`, `txt` | `text`, `sources`, `images` (the picture to make) |
| question | `jpg`, `json` | `text` (questions), `images` (the picture asked about), `answers` |

The JSON of a question holds `question` and `answer`, or `conversations` as LLaVA's data: turns
`from` human and gpt with their `value`. Of several questions training draws one each time.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from muse.data.decode import (
    PAIR,
    BadSample,
    decode_captions,
    decode_image,
    image_bytes,
)
from muse.data.records import Record
from muse.data.samples import Prepared, SampleMaker

_PICTURE = "<image>"  # where LLaVA's data says the picture is
_ASPECT_TOLERANCE = 0.02  # an edited picture may be of another size, but hardly of another shape


class EditMaker(SampleMaker):
    """A source picture, the picture it becomes (cropped and mirrored alike), an instruction."""

    def prepare(self, record: Record) -> Prepared:
        """Decode and resize both pictures into one of six channels. Raises BadSample."""
        members = record.load().members
        if record.fault:
            raise BadSample(record.fault)
        captions = decode_captions(members)
        source, target = (
            decode_image(image_bytes(members, side), self.max_pixels) for side in PAIR
        )
        if target.size != source.size:
            wide, high = source.width * target.height, source.height * target.width
            if abs(wide - high) > _ASPECT_TOLERANCE * max(wide, high):
                raise BadSample("pair_shape", f"input {source.size}, output {target.size}")
            target = target.resize(source.size, Image.Resampling.BICUBIC)
        pixels = torch.cat([self.transform.resize(image)[0] for image in (source, target)])
        return Prepared(record.key, pixels, captions, None, None)  # pixels (6, h, w)

    def collate(self, samples: Sequence[Prepared]) -> dict[str, Any]:
        batch = super().collate(samples)
        both = batch["images"]  # (B, 6, H, W)
        return {**batch, "sources": both[:, :3].contiguous(), "images": both[:, 3:].contiguous()}


class QuestionMaker(SampleMaker):
    """A picture with questions about it and their answers."""

    def prepare(self, record: Record) -> Prepared:
        """Decode; `captions` holds (question, answer) pairs. Raises BadSample."""
        members = record.load().members
        if record.fault:
            raise BadSample(record.fault)
        pairs = decode_questions(members)
        image = decode_image(image_bytes(members), self.max_pixels)
        return Prepared(record.key, self.transform.resize(image)[0], pairs, None, None)

    def collate(self, samples: Sequence[Prepared]) -> dict[str, Any]:
        batch = super().collate(samples)
        pairs = batch.pop("text")
        return {
            **batch,
            "text": [question for question, _ in pairs],
            "answers": [answer for _, answer in pairs],
        }


MAKERS: dict[str, type[SampleMaker]] = {
    "image": SampleMaker,
    "edit": EditMaker,
    "question": QuestionMaker,
}


def kind_of_batch(batch: Mapping[str, Any]) -> str:
    """The key of MAKERS under which a batch was made."""
    return "edit" if "sources" in batch else "question" if "answers" in batch else "image"


def decode_questions(members: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a sample's `json`, at least one.

    Raises BadSample missing_question, caption_not_utf8 or bad_json.
    """
    if "json" not in members:
        raise BadSample("missing_question")
    try:
        content = json.loads(members["json"].decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("caption_not_utf8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(content, dict):
        raise BadSample("bad_json", "not an object")
    turns = content.get("conversations")
    found = _turn_pairs(turns) if isinstance(turns, list) else [content]
    pairs = tuple(
        (question.replace(_PICTURE, "").strip(), answer.strip())
        for question, answer in ((pair.get("question"), pair.get("answer")) for pair in found)
        if isinstance(question, str) and isinstance(answer, str)
    )
    pairs = tuple(pair for pair in pairs if all(pair))
    if not pairs:
        raise BadSample("missing_question")
    return pairs


def _turn_pairs(turns: list[Any]) -> list[dict[str, Any]]:
    """Each human turn that an answer of the model follows. Later ones are asked by themselves."""
    turns = [turn for turn in turns if isinstance(turn, dict)]
    return [
        {"question": asked.get("value"), "answer": said.get("value")}
        for asked, said in zip(turns, turns[1:])
        if asked.get("from") == "human" and said.get("from") == "gpt"
    ]
