"""MMBench and MMVP: TSVs, the letter that was chosen, scores of cases worked out by hand."""

import base64
import csv
import io

import pytest
import torch
from PIL import Image

from muse.errors import DataError
from muse.multimodal.benchmarks import (
    BENCHMARKS,
    Question,
    ask_benchmark,
    chosen_letter,
    mmbench_scores,
    mmvp_scores,
    read_questions,
    rotated,
)

COLUMNS = "index question hint A B C D answer category l2-category split image".split()


def picture(colour: str, size=(20, 12)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


RED = picture("red")
ROW = {"question": "What colour is it?", "A": "red", "B": "blue", "answer": "A", "image": RED}


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a TSV as pandas writes it, with every column of MMBench."""

    def write(rows, columns=COLUMNS):
        path = tmp_path / "set.tsv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({n: v for n, v in row.items() if n in columns} for row in rows)
        return path

    return write


def question(index: int, answer: str, options: int = 2, **fields) -> Question:
    words = ["red", "blue", "green", "white"][:options]
    return Question(index, "?", dict(zip("ABCD", words)), answer, RED, **fields)


# ---------------------------------------------------------------------------------------- reading
def test_rows_and_their_pictures(write):
    rows = [
        {**ROW, "index": 3, "hint": "look\tat\nit", "category": "colour", "l2-category": "fine"},
        {**ROW, "index": 1_000_003, "A": "blue", "B": "red", "answer": "B", "image": "3"},
        {**ROW, "index": 5, "C": "green", "D": "nan", "answer": "C", "hint": "nan"},
    ]
    first, second, third = read_questions(write(rows))
    assert first.hint == "look\tat\nit"
    assert (first.category, first.l2_category) == ("colour", "fine")
    assert second.options == {"A": "blue", "B": "red"}
    assert second.picture == RED  # by the index of the row that has it
    assert third.options == {"A": "red", "B": "blue", "C": "green"}
    assert third.hint == ""
    expected = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 12, 20)
    assert torch.equal(second.image(), expected)


def test_the_question_as_it_is_asked(write):
    (asked,) = read_questions(write([{**ROW, "index": 1, "hint": "a hint"}]))
    assert asked.prompt() == (
        "a hint\nWhat colour is it?\nA. red\nB. blue\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_a_test_split_is_read_but_not_scored(write):
    (asked,) = read_questions(write([{**ROW, "index": 1, "answer": ""}]))
    assert asked.answer is None
    with pytest.raises(DataError, match="question 1 has no answer: a test split is not scored"):
        mmbench_scores([asked], ["A"])


def test_mmvps_columns(write):
    rows = [{**ROW, "index": 1, "answer": "(a)"}, {**ROW, "index": 2, "answer": "B"}]
    columns = ["index", "question", "A", "B", "answer", "image"]
    assert [q.answer for q in read_questions(write(rows, columns))] == ["A", "B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "x"}, "row 1: index must be a whole number, got 'x'"),
        ({"answer": "C"}, "row 1: its answer 'C' is none of A, B"),
        ({"B": ""}, "row 1: needs options from A on, has A"),
        ({"B": "", "C": "green"}, "row 1: needs options from A on, has A, C"),
        ({"image": "9"}, "row 1: takes its picture from row 9, which has none"),
        ({"image": "1"}, "row 1: takes its picture from row 1, which has none"),
        ({"image": ""}, "row 1: image must be a whole number, got ''"),
    ],
)
def test_bad_rows_are_one_clear_line(write, change, message):
    with pytest.raises(DataError) as error:
        read_questions(write([{**ROW, "index": 1, **change}]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_are_one_clear_line(write, tmp_path):
    with pytest.raises(DataError, match="set.tsv: holds no questions"):
        read_questions(write([]))
    with pytest.raises(DataError, match="row 2: index 1 stands twice"):
        read_questions(write([{**ROW, "index": 1}] * 2))
    with pytest.raises(DataError, match="it has no column 'image'"):
        read_questions(write([{**ROW, "index": 1}], ["index", "question", "A", "B"]))
    with pytest.raises(DataError, match="missing.tsv: cannot be read"):
        read_questions(tmp_path / "missing.tsv")
    path = write([{**ROW, "index": 1}])
    path.write_text(path.read_text() + "2\tshort\n")
    with pytest.raises(DataError, match="row 2: has not as many fields as the header"):
        read_questions(path)
    path.write_bytes(b"\xff\x00\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(path)


@pytest.mark.parametrize("data", ["%" * 70, base64.b64encode(b"no picture" * 9).decode()])
def test_unreadable_pictures(data):
    bad = Question(4, "?", {"A": "x", "B": "y"}, "A", data)
    with pytest.raises(DataError, match="question 4: its picture is unreadable"):
        bad.image()


# --------------------------------------------------------------------------------------- matching
@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        (" B.", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("(a).", "A"),
        ("B. a dog", "B"),
        ("C: two of them", "C"),
        ("**A**", "A"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("The answer is C", "C"),
        ("Answer: (B)", "B"),
        ("I choose option A because it fits", "A"),
        ("A photo shows a dog", None),  # an article is no choice
        ("A or B", None),
        ("The answer is A, not option B", None),
        ("D", None),  # not among the options
        ("a cat or a dog", None),
        ("", None),
    ],
)
def test_the_chosen_letter(answer, letter):
    options = {"A": "a cat", "B": "a dog", "C": "two of them"}
    assert chosen_letter(answer, options) == letter


# ---------------------------------------------------------------------------------------- scoring
def test_circular_evaluation_by_hand():
    """Three questions: right in every rotation; in one of two; never."""
    questions = [
        question(0, "A", category="x", l2_category="up"),
        question(1_000_000, "B", category="x", l2_category="up"),
        question(7, "A", category="y", l2_category="up"),
        question(1_000_007, "B", category="y", l2_category="up"),
        question(8, "B", category="y"),
        question(1_000_008, "A", category="y"),
    ]
    scores = mmbench_scores(questions, ["A", "B", "A", "A", "A", "hm"])
    assert scores == {
        "overall": 1 / 3,
        "vanilla": 2 / 3,
        "unmatched": 1 / 6,
        "category/x": 1.0,
        "category/y": 0.0,
        "category/up": 1 / 2,
    }


def test_without_rotations_both_scores_are_one():
    questions = [question(1, "A"), question(2, "B")]
    assert mmbench_scores(questions, ["A", "A"]) == {
        "overall": 0.5,
        "vanilla": 0.5,
        "unmatched": 0.0,
    }


def test_a_rotation_without_its_question():
    with pytest.raises(DataError, match="1 questions, but 0 of them unrotated"):
        mmbench_scores([question(1_000_001, "A")], ["A"])


def test_rotating_by_hand():
    rows = rotated([question(5, "C", options=3)])
    assert [(q.index, list(q.options.values()), q.answer) for q in rows] == [
        (5, ["red", "blue", "green"], "C"),
        (1_000_005, ["blue", "green", "red"], "B"),
        (2_000_005, ["green", "red", "blue"], "A"),
    ]
    # Always "A" is right in one rotation of each question: never in the circular score.
    assert mmbench_scores(rows, ["A"] * 3)["overall"] == 0
    always_green = [next(n for n, w in q.options.items() if w == "green") for q in rows]
    assert mmbench_scores(rows, always_green)["overall"] == 1
    with pytest.raises(DataError, match="rotated already"):
        rotated(rows)


def test_mmvp_pairs_and_singles_by_hand():
    questions = [question(i, answer) for i, answer in enumerate("ABABAB", start=1)]
    scores = mmvp_scores(questions, ["A", "B", "A", "A", "B", "A"])
    assert scores == {"pairs": 1 / 3, "single": 3 / 6, "unmatched": 0.0}
    # Pairs are by index, whatever the order of the rows.
    order = [4, 0, 3, 1, 5, 2]
    answers = ["A", "B", "A", "A", "B", "A"]
    shuffled = mmvp_scores([questions[i] for i in order], [answers[i] for i in order])
    assert shuffled == scores
    with pytest.raises(DataError, match="rows are pairs, but there are 3"):
        mmvp_scores(questions[:3], ["A"] * 3)


def test_answers_and_questions_are_as_many():
    for score in BENCHMARKS.values():
        with pytest.raises(ValueError, match="2 questions, but 1 answers"):
            score([question(1, "A"), question(2, "A")], ["A"])


# ----------------------------------------------------------------------------------------- asking
def test_asking_does_not_depend_on_batches_and_reads_every_picture(umm):
    questions = [
        question(1, "A"),
        Question(2, "which?", {"A": "x", "B": "y"}, "A", picture("blue", (9, 40))),
        Question(3, "and?", {"A": "x", "B": "y"}, "A", picture("green", (32, 32))),
    ]
    together = ask_benchmark(umm, questions, batch_size=3)
    assert ask_benchmark(umm, questions, batch_size=1) == together
    assert together == [
        umm.answer(q.image()[None], [q.prompt()], max_new_tokens=16)[0] for q in questions
    ]
    blind = ask_benchmark(umm, questions, pictures=False)
    assert blind == umm.answer(None, [q.prompt() for q in questions], max_new_tokens=16)
