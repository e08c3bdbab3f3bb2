"""Answers of single pictures against similarities that were made by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from muse.errors import DataError
from muse.evaluation.suite import Pictures
from muse.experiments import demo_answers
from muse.experiments.demo_answers import answer_pictures, answers_line, caption_text, class_text
from muse.experiments.demo_data.kept_out import check_kept_out, read_kept_out

CAPTIONS = ["A fox.", "A rose.", "A car.", "A fox."]


@pytest.fixture
def yardstick():
    """Four pictures; the embedding of a picture is that of the caption that it will choose."""
    text = torch.eye(4)[[0, 1, 2, 0]]
    val = Pictures(torch.rand(4, 3, 8, 8), CAPTIONS, torch.tensor([0, 1, 1, 0]), torch.zeros(4))
    return SimpleNamespace(val=val, text=text, classes=["animal", "other"], class_text=text[:2])


class Model:
    logit_scale = torch.tensor(3.0).log()

    def embed_image(self, images):
        # The fox is right, the rose looks most like a car, then like a rose; the car is right.
        return torch.tensor([[0.8, 0.0, 0.6, 0.0], [0.0, 0.6, 0.8, 0.0], [0.0, 0.0, 1.0, 0.0]])


def test_answers_are_the_nearest_embeddings(yardstick):
    fox, rose, car = answer_pictures(Model(), yardstick, count=3)
    assert [fox.picture, rose.picture, car.picture] == [0, 1, 2]
    assert {fox.group, rose.group, car.group} == {3}  # distinct captions
    assert (fox.chosen, fox.rank, fox.caption_is_right) == ("A fox.", 1, True)
    assert (rose.chosen, rose.rank, rose.caption_is_right) == ("A car.", 2, False)
    # softmax of 3 * (.8, 0), 3 * (0, .6), 3 * (0, 0)
    assert (fox.answer, fox.probability) == ("animal", pytest.approx(1 / (1 + 2.718281828**-2.4)))
    assert (rose.answer, rose.truth_probability) == (
        "other",
        pytest.approx(1 / (1 + 2.718281828**-1.8)),
    )
    assert car.probability == pytest.approx(0.5)
    assert answers_line([fox, rose, car]).startswith("2 of 3 chose their own caption of 3")
    assert "place 2 of 3" in caption_text(rose) and "right" in caption_text(fox)


def test_a_wrong_class_is_shown_with_the_truth(yardstick):
    yardstick.val.labels[0] = 1
    fox = answer_pictures(Model(), yardstick, count=3)[0]
    assert not fox.class_is_right
    assert class_text(fox) == "animal: 0.92\nis: other: 0.08"  # 1 / (1 + e^-2.4)


def test_the_sheet_shows_every_picture(yardstick, tmp_path):
    answers = answer_pictures(Model(), yardstick, count=3)
    file = demo_answers.draw_answers(answers, yardstick, tmp_path / "sheet.png")
    assert Image.open(file).size[0] > 1000


# --- what the packaged encoder has never seen
def test_objects_of_the_packaged_encoders_validation_are_known():
    kept = read_kept_out()
    stamps = {name for name in kept["object"] if not name.startswith("openclipart/")}
    assert (len(stamps), len(kept["object"]), len(kept["photograph"])) == (57, 171, 6)


@pytest.mark.parametrize("what", ["object", "background"])
def test_an_object_that_the_packaged_encoder_may_have_seen_is_refused(what, tmp_path):
    kept = read_kept_out()
    fine = {"split": "val", "object": sorted(kept["object"])[0], "background": "gradient"}
    known = {"split": "seen", "object": "anything", "background": sorted(kept["photograph"])[0]}
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps(one) + "\n" for one in (fine, known)))
    check_kept_out(tmp_path)
    index.write_text(json.dumps(fine | {what: "animals/strange"}) + "\n")
    with pytest.raises(DataError, match="animals/strange of part val"):
        check_kept_out(tmp_path)
