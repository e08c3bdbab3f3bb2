"""MMBench and MMVP from a TSV in VLMEvalKit's layout: questions, chosen letters, scores.

An answer counts by exact matching of a letter or an option's words; no language model judges.

- MMBench: rows whose index differs by a multiple of 10^6 are one question with rotated options, and
  right only if every row is (circular evaluation).
- MMVP: rows 2k-1 and 2k are a pair, right only if both are.
"""

import base64
import binascii
import csv
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from muse.data.decode import BadSample, decode_image
from muse.errors import DataError
from muse.multimodal.umm import MUSE_UMM
from muse.utils.io import atomic_file

CIRCLE = 1_000_000
# The sentence of LLaVA-1.5's data, on which InternVL learnt to answer with a letter alone.
_REQUEST = "Answer with the option's letter from the given choices directly."
_REFERENCE_LENGTH = 64  # a shorter `image` is not a picture but the index of the row that has it


@dataclass(frozen=True)
class Question:
    """One row."""

    index: int
    text: str
    options: dict[str, str]  # letter -> words
    answer: str | None  # letter; None in a test split, which others score
    picture: str  # base64
    hint: str = ""
    category: str = ""
    l2_category: str = ""

    def prompt(self) -> str:
        """What the model is asked."""
        options = [f"{letter}. {words}" for letter, words in self.options.items()]
        return "\n".join([part for part in (self.hint, self.text) if part] + options + [_REQUEST])

    def image(self) -> Tensor:
        """The picture (3, H, W) in [0, 1]; `DataError` where it cannot be decoded."""
        try:
            return to_tensor(decode_image(base64.b64decode(self.picture, validate=True)))
        except (binascii.Error, BadSample) as error:
            said = " ".join(str(error).split())
            raise DataError(f"question {self.index}: its picture is unreadable ({said})") from None


# ---------------------------------------------------------------------------------------- reading
def read_questions(path: str | Path) -> list[Question]:
    """All rows of a TSV in their order; `DataError` names the file and the first row at fault."""
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path}: holds no questions")
    pictures: dict[int, str] = {}
    for where, row in rows:
        index = _index(row["index"], f"{where}: index")
        if index in pictures:
            raise DataError(f"{where}: index {index} stands twice")
        pictures[index] = row["image"]
    return [_question(where, row, pictures) for where, row in rows]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, column -> text) of every row."""
    csv.field_size_limit(2**31 - 1)  # pictures are fields of megabytes
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = {"index", "question", "image", "A", "B"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path}: no benchmark's TSV, it has no column {min(missing)!r}")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise DataError(f"{path}, row {number}: has not as many fields as the header")
                yield f"{path}, row {number}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def _question(where: str, row: dict[str, str], pictures: dict[int, str]) -> Question:
    options = {
        letter: row[letter].strip()
        for letter in string.ascii_uppercase
        if row.get(letter, "").strip() not in ("", "nan")
    }
    if len(options) < 2 or list(options) != list(string.ascii_uppercase[: len(options)]):
        raise DataError(f"{where}: needs options from A on, has {', '.join(options) or 'none'}")
    answer = row.get("answer", "").strip().strip("()").upper() or None  # MMVP writes (a)
    if answer is not None and answer not in options:
        raise DataError(f"{where}: its answer {answer!r} is none of {', '.join(options)}")
    picture = row["image"].strip()
    if len(picture) <= _REFERENCE_LENGTH:
        other = _index(picture, f"{where}: image")
        picture = pictures.get(other, "").strip()
        if len(picture) <= _REFERENCE_LENGTH:
            raise DataError(f"{where}: takes its picture from row {other}, which has none")
    hint = row.get("hint", "").strip()
    return Question(
        index=int(row["index"]),
        text=row["question"].strip(),
        options=options,
        answer=answer,
        picture=picture,
        hint="" if hint == "nan" else hint,
        category=row.get("category", "").strip(),
        l2_category=row.get("l2-category", "").strip(),
    )


def _index(text: str, where: str) -> int:
    if not re.fullmatch(r"\d+", text.strip()):
        raise DataError(f"{where} must be a whole number, got {text.strip()[:40]!r}")
    return int(text)


def rotated(questions: Sequence[Question]) -> list[Question]:
    """Every question with its options in each rotation, for a set that holds each question once."""
    if any(question.index >= CIRCLE for question in questions):
        raise DataError("these questions are rotated already: some index is 1000000 or more")
    rows = []
    for question in questions:
        letters, words = list(question.options), list(question.options.values())
        for turn in range(len(letters)):
            options = dict(zip(letters, words[turn:] + words[:turn]))
            answer = question.answer
            if answer is not None:
                answer = letters[(letters.index(answer) - turn) % len(letters)]
            index = question.index + turn * CIRCLE
            rows.append(replace(question, index=index, options=options, answer=answer))
    return rows


# ----------------------------------------------------------------------------------------- asking
def ask_benchmark(
    umm: MUSE_UMM,
    questions: Sequence[Question],
    batch_size: int = 16,
    pictures: bool = True,
    max_new_tokens: int = 16,
) -> list[str]:
    """The model's answer to every question, in order.

    Args:
        umm: the model.
        questions: rows of a benchmark.
        batch_size: questions that are asked at once.
        pictures: False asks without them: what the text alone gives away.
        max_new_tokens: of an answer; a letter needs few.
    """
    answers: list[str] = []
    device = umm.queries.device
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = None
        if pictures:  # of all sizes, so each is brought to the size in which it is read
            images = torch.cat([umm.resize(question.image()[None]) for question in batch])
            images = images.to(device)
        prompts = [question.prompt() for question in batch]
        answers += umm.answer(images, prompts, max_new_tokens)
    return answers


def write_predictions(
    path: str | Path, questions: Sequence[Question], answers: Sequence[str]
) -> None:
    """A TSV of the questions with the column `prediction`, without their pictures."""
    letters = sorted({letter for question in questions for letter in question.options})
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        columns = ["category", "l2-category", "hint", "question", *letters, "answer"]
        writer.writerow(["index", *columns, "prediction"])
        for asked, said in zip(questions, answers, strict=True):
            options = [asked.options.get(letter, "") for letter in letters]
            about = [asked.category, asked.l2_category, asked.hint, asked.text]
            writer.writerow([asked.index, *about, *options, asked.answer or "", said])


# --------------------------------------------------------------------------------------- matching
def chosen_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer in words names, or None.

    It counts if the answer is an option's letter ("B", "(B).", "B: a cat"), an option's words, or
    says "answer is B" of one letter alone. Anything else is no choice, and wrong.
    """
    text = answer.strip()
    letters = "".join(options)
    if len(_bare(text).strip("()")) == 1:
        text = text.upper()  # "a" alone is no article
    if found := re.match(rf"[\s(\[\"'*]*([{letters}])(?:[.):,\]\"'*\s]*$|[.):\]])", text):
        return found[1]
    said = [letter for letter, words in options.items() if _bare(words) == _bare(text)]
    if len(said) == 1:
        return said[0]
    pattern = rf"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(\"'*]*([{letters}])\b"
    named = set(re.findall(pattern, text, re.IGNORECASE)) & set(letters)
    return named.pop() if len(named) == 1 else None


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .\"'")


# ---------------------------------------------------------------------------------------- scoring
def mmbench_scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Shares of questions that are right.

    `overall` is circular where rows are rotations of each other, `vanilla` counts the unrotated
    rows alone, `category/NAME` is `overall` within one of the TSV's categories (of either level),
    and `unmatched` is the share of answers that name no option.
    """
    right, unmatched = _right(questions, answers)
    groups: dict[int, list[bool]] = defaultdict(list)
    categories: dict[str, set[int]] = defaultdict(set)
    for question, good in zip(questions, right):
        groups[question.index % CIRCLE].append(good)
        for name in (question.category, question.l2_category):
            categories[name].add(question.index % CIRCLE)
    circular = {index: all(group) for index, group in groups.items()}
    first = [good for question, good in zip(questions, right) if question.index < CIRCLE]
    if len(first) != len(groups):
        raise DataError(f"{len(groups)} questions, but {len(first)} of them unrotated")
    scores = {"overall": _mean(circular.values()), "vanilla": _mean(first), "unmatched": unmatched}
    for name, indices in sorted(categories.items()):
        if name:
            scores[f"category/{name}"] = _mean(circular[index] for index in sorted(indices))
    return scores


def mmvp_scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """`pairs` (both rows right, MMVP's own score), `single` (each row), and `unmatched`."""
    if len(questions) % 2:
        raise DataError(f"MMVP's rows are pairs, but there are {len(questions)}")
    right, unmatched = _right(questions, answers)
    order = sorted(range(len(questions)), key=lambda row: questions[row].index)
    pairs = [right[one] and right[other] for one, other in zip(order[::2], order[1::2])]
    return {"pairs": _mean(pairs), "single": _mean(right), "unmatched": unmatched}


BENCHMARKS: dict[str, Callable[[Sequence[Question], Sequence[str]], dict[str, float]]] = {
    "mmbench": mmbench_scores,
    "mmvp": mmvp_scores,
}


def require_answers(questions: Sequence[Question]) -> None:
    """`DataError` where a question's answer is not known."""
    for question in questions:
        if question.answer is None:
            raise DataError(f"question {question.index} has no answer: a test split is not scored")


def _right(questions: Sequence[Question], answers: Sequence[str]) -> tuple[list[bool], float]:
    """Whether each answer chose the right letter, and the share that chose none."""
    if not questions or len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions, but {len(answers)} answers")
    require_answers(questions)
    chosen = [chosen_letter(text, q.options) for q, text in zip(questions, answers)]
    right = [choice == q.answer for q, choice in zip(questions, chosen)]
    return right, _mean(choice is None for choice in chosen)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
