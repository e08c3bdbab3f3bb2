"""Demo edits and questions: exact pairs, known answers, a val that training never shows."""

import io
import json
import tarfile
from collections import Counter

import numpy
import pytest
from PIL import Image

from muse.errors import ConfigError
from muse.experiments.demo_data import make_demo_data, shapes
from muse.experiments.demo_data.edits import CHANGES, prepare_edits
from muse.experiments.demo_data.picture_layers import ShapeLayers, balanced_object, the
from muse.experiments.demo_data.questions import prepare_questions
from muse.multimodal.benchmarks import Question, chosen_letter
from tools import make_demo_data as tool


@pytest.fixture(scope="module")
def edits():
    return prepare_edits(48, 0, "drawn")


@pytest.fixture(scope="module")
def questions():
    return prepare_questions(48, 0, "drawn")


def test_a_pair_differs_where_its_mask_says_and_nowhere_else(edits):
    for index in range(30):
        sample = edits("train", index)
        same = (sample.source == sample.image).all(-1)
        assert numpy.array_equal(same, sample.mask == 0)
        change = sample.names["change"]
        assert change == CHANGES[index % len(CHANGES)]
        if change == "background":  # the object is what stays
            assert 0.01 < same.mean() < 0.6
        else:  # the rest is
            assert 0.3 < same.mean() < 0.99


def test_the_instruction_names_what_changes(edits):
    for index in range(40):
        sample = edits("val", index)
        text, names = sample.caption, sample.names
        if names["change"] == "replace":
            assert the(names["object"]) in text and names["becomes"] in text
            assert shapes.CLASSES[sample.label] in names["becomes"]
        elif names["change"] == "background":
            assert names["becomes"] in text and names["becomes"] != names["background"]
        else:
            assert the(names["object"]) in text and shapes.CLASSES[sample.label] in text


def test_val_asks_for_known_things_of_unknown_pictures(edits):
    known = ShapeLayers("train", 48)
    seen = [edits("val", index) for index in range(60)]
    assert not {sample.names["object"] for sample in seen} & set(known.phrases)
    assert not {sample.names["background"] for sample in seen} & set(known.grounds)
    asked = {sample.names["becomes"] for sample in seen} - {""}
    assert asked <= {*known.phrases, *known.grounds}


def test_removing_gives_the_background_and_replacing_another_class(edits):
    for index in range(40):
        sample = edits("train", index)
        shown = sample.names["object"].split()[-1]
        if sample.names["change"] == "replace":
            assert shown != shapes.CLASSES[sample.label]
        else:
            assert shown == shapes.CLASSES[sample.label]


def test_classes_are_shown_equally_often():
    layers = ShapeLayers("train", 32)
    rng = numpy.random.default_rng(0)
    drawn = [layers.labels[balanced_object(layers, rng, but=3)] for _ in range(1400)]
    counts = Counter(drawn)
    assert 3 not in counts and len(counts) == 7
    assert all(150 < count < 250 for count in counts.values())


def test_questions_have_four_options_of_which_one_is_right(questions):
    letters = Counter()
    for index in range(200):
        sample = questions("train", index)
        assert list(sample.options) == ["A", "B", "C", "D"]
        assert len(set(sample.options.values())) == 4
        assert sample.options[sample.answer] == f"a {shapes.CLASSES[sample.label]}"
        (asked, said), (_, kind), (_, name) = sample.pairs
        assert asked == Question(0, "What is in the picture?", sample.options, None, "").prompt()
        assert chosen_letter(said, sample.options) == sample.answer
        assert kind == sample.options[sample.answer]
        assert name == sample.caption and shapes.CLASSES[sample.label] in name
        letters[sample.answer] += 1
    assert min(letters.values()) > 30


def test_a_picture_depends_on_its_number_alone(edits, questions):
    for make in (edits, questions):
        one, other = make("val", 7), make("val", 7)
        assert one.members() == other.members() != make("val", 8).members()


@pytest.mark.parametrize("kind", ["edits", "questions"])
def test_shards_and_their_card(kind, tmp_path, capsys):
    words = ["--kind", kind, "--objects", "drawn", "--images", "16", "--val-images", "4"]
    words += ["--size", "32", "--workers", "1", "--output", str(tmp_path / "data")]
    assert tool.main(words) == 0
    card = capsys.readouterr().out
    assert f"# Demo data: {kind}" in card and "Drawn by muse itself" in card
    assert (tmp_path / "data/classes.txt").read_text().split() == list(shapes.CLASSES)
    with tarfile.open(tmp_path / "data/train-000000.tar") as tar:
        members = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}
    expected = {
        "edits": {"input.jpg", "output.jpg", "txt", "cls", "seg.png"},
        "questions": {"jpg", "json", "cls", "seg.png"},
    }
    assert set(members) == expected[kind]
    if kind == "edits":
        sides = [
            numpy.asarray(Image.open(io.BytesIO(members[f"{s}.jpg"]))) for s in ("input", "output")
        ]
        changed = numpy.asarray(Image.open(io.BytesIO(members["seg.png"]))) > 0
        far = numpy.abs(sides[0].astype(int) - sides[1]).max(-1)
        assert far[changed].mean() > 5 * far[~changed].mean()
    else:
        turns = json.loads(members["json"])["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 3


def test_objects_that_a_kind_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match="objects is 'all'; of edits it is one of photo, drawn"):
        make_demo_data(kind="edits", output=tmp_path / "a", objects="all")
    with pytest.raises(ConfigError, match="objects is 'drawn'; of stamps it is one of photo, all"):
        make_demo_data(kind="stamps", output=tmp_path / "b", objects="drawn")
