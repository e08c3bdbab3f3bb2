"""Edits and questions out of shards, and what is wrong with those that cannot be used."""

import json
import random

import pytest
import torch

from muse.data.decode import BadSample
from muse.data.records import Record
from muse.data.tar import TarSource
from muse.data.transforms import Transform, to_float, to_pixels
from muse.multimodal.umm_samples import (
    MAKERS,
    EditMaker,
    QuestionMaker,
    decode_questions,
    kind_of_batch,
)
from tests.data.helpers import encode, picture, write_tar
from tests.multimodal.runs import members

FIELDS = ("images", "text")


def record(**parts) -> Record:
    return Record("k", "shard", {name.replace("__", "."): data for name, data in parts.items()})


def json_bytes(value) -> bytes:
    return json.dumps(value).encode()


def test_an_edit_holds_its_two_pictures_and_its_instruction(tmp_path):
    file = str(write_tar(tmp_path / "a.tar", {"0": members("edit", 7), "1": members("edit", 8)}))
    maker = EditMaker(Transform(32, 32), FIELDS)
    batch = maker.collate([maker.finish(maker.prepare(r)) for r in TarSource(file).read(file)])
    assert batch["text"] == ["change 7", "change 8"] and batch["keys"] == ["0", "1"]
    assert torch.equal(batch["sources"][1], to_float(to_pixels(picture(8, 32, 32))))
    assert torch.equal(batch["images"][1], to_float(to_pixels(picture(1008, 32, 32))))
    assert batch["images"].is_contiguous() and kind_of_batch(batch) == "edit"


def test_both_pictures_of_an_edit_are_cropped_and_mirrored_alike():
    image = encode(picture(1, 64, 48))
    maker = EditMaker(Transform(40, 32, random_crop=True, random_flip=True), FIELDS)
    prepared = maker.prepare(record(input__png=image, output__png=image, txt=b"keep it"))
    rng, seen = random.Random(0), set()
    for _ in range(20):
        pixels = maker.finish(prepared, rng).pixels
        assert torch.equal(pixels[:3], pixels[3:])
        seen.add(pixels.sum().item())
    assert len(seen) > 10


def test_an_edited_picture_of_another_size_is_brought_to_the_sources():
    small, large = picture(1, 32, 32), picture(1, 32, 32).resize((96, 97))
    maker = EditMaker(Transform(32, 32), FIELDS)
    prepared = maker.prepare(record(input__png=encode(small), output__png=encode(large), txt=b"x"))
    assert prepared.pixels.shape == (6, 32, 32)
    wide = encode(picture(1, 64, 32))
    with pytest.raises(BadSample, match="pair_shape"):
        maker.prepare(record(input__png=encode(small), output__png=wide, txt=b"x"))


@pytest.mark.parametrize("missing", ["input__png", "output__png"])
def test_an_edit_needs_both_pictures(missing):
    parts = {"input__png": encode(picture(1)), "output__png": encode(picture(2)), "txt": b"x"}
    parts.pop(missing)
    with pytest.raises(BadSample, match="missing_image"):
        EditMaker(Transform(16, 16), FIELDS).prepare(record(**parts))


def test_a_question_is_drawn_with_its_answer():
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": " a cat "},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "on grass"},
    ]
    maker = QuestionMaker(Transform(16, 16), FIELDS)
    prepared = maker.prepare(
        record(png=encode(picture(1)), json=json_bytes({"conversations": turns}))
    )
    assert prepared.captions == (("What is it?", "a cat"), ("Where?", "on grass"))
    batch = maker.collate([maker.finish(prepared)])
    assert batch["text"] == ["What is it?"] and batch["answers"] == ["a cat"]
    assert kind_of_batch(batch) == "question"
    rng = random.Random(0)
    drawn = {maker.finish(prepared, rng).captions[0] for _ in range(20)}
    assert drawn == set(prepared.captions)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "bad_json"),
        (b"\xff\xfe{", "caption_not_utf8"),
        (json_bytes(["what?"]), "bad_json"),
        (json_bytes({"question": "what?"}), "missing_question"),
        (json_bytes({"question": "what?", "answer": " "}), "missing_question"),
        (json_bytes({"question": "<image>", "answer": "a cat"}), "missing_question"),
        (json_bytes({"question": 3, "answer": "a cat"}), "missing_question"),
        (json_bytes({"conversations": [{"from": "human", "value": "what?"}]}), "missing_question"),
        (json_bytes({"conversations": ["what?", None]}), "missing_question"),
    ],
)
def test_what_is_no_question(content, fault):
    with pytest.raises(BadSample) as caught:
        decode_questions({"json": content})
    assert caught.value.kind == fault
    with pytest.raises(BadSample, match="missing_question"):
        decode_questions({"txt": b"what?"})


def test_a_plain_picture_is_the_third_kind():
    maker = MAKERS["image"](Transform(16, 16), FIELDS)
    batch = maker.collate([maker.finish(maker.prepare(record(png=encode(picture(1)), txt=b"x")))])
    assert kind_of_batch(batch) == "image"
