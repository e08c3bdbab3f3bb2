"""Files of prompts in the layouts of GenEval, WISE and ImgEdit, and where their pictures go."""

import json
from pathlib import Path

import pytest

from muse.errors import DataError
from muse.multimodal.prompt_files import (
    grid_path,
    noise_indices,
    picture_paths,
    read_prompts,
    source_path,
    write_metadata,
)
from tests.golden.fill import GOLDEN

GENEVAL = GOLDEN / "prompts" / "geneval_sample.jsonl"
WISE = [
    {"Prompt": "the national flower of Japan", "Category": "culture", "prompt_id": 1},
    {"Prompt": "a lake at minus ten degrees", "Category": "physics", "prompt_id": 700},
]
IMGEDIT = {
    "1082": {"id": "animal/000.jpg", "prompt": "remove the cat", "edit_type": "remove"},
    "7": {"id": "human/3.jpg", "prompt": "add a hat", "edit_type": "add"},
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="prompts.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_geneval_as_it_is_published(tmp_path):
    file = read_prompts(GENEVAL)
    lines = GENEVAL.read_text().splitlines()
    assert file.layout == "geneval"
    assert len(file.prompts) == 20
    assert [prompt.text for prompt in file.prompts] == [json.loads(n)["prompt"] for n in lines]
    third = file.prompts[2]
    assert (third.number, third.text, third.record["tag"]) == (
        2, "a photo of a stop sign", "single_object",
    )  # fmt: skip
    assert picture_paths("geneval", "OUT", third, samples=4) == [
        Path(f"OUT/00002/samples/000{sample}.png") for sample in range(4)
    ]
    assert grid_path("OUT", third) == Path("OUT/00002/grid.png")
    write_metadata(tmp_path, third)
    assert (tmp_path / "00002" / "metadata.jsonl").read_text() == lines[2] + "\n"


def test_no_two_pictures_share_their_noise():
    prompts = read_prompts(GENEVAL).prompts
    indices = [index for prompt in prompts for index in noise_indices(prompt, samples=4)]
    assert indices == list(range(80))
    assert noise_indices(prompts[3]) == [3]


def test_wise(write):
    file = read_prompts(write(WISE))
    assert file.layout == "wise"
    assert [(p.number, p.name, p.text) for p in file.prompts] == [
        (0, "1", "the national flower of Japan"),
        (1, "700", "a lake at minus ten degrees"),
    ]
    assert picture_paths("wise", "OUT", file.prompts[1]) == [Path("OUT/700.png")]


def test_imgedit(write, tmp_path):
    file = read_prompts(write(IMGEDIT))
    assert file.layout == "imgedit"
    first = file.prompts[0]
    assert (first.name, first.text, first.source) == ("1082", "remove the cat", "animal/000.jpg")
    assert picture_paths("imgedit", "OUT", first) == [Path("OUT/1082.png")]
    with pytest.raises(DataError, match="animal/000.jpg: the source picture of '1082' does not"):
        source_path(tmp_path, first)
    (tmp_path / "animal").mkdir()
    (tmp_path / "animal" / "000.jpg").touch()
    assert source_path(tmp_path, first) == tmp_path / "animal" / "000.jpg"


def test_plain_text(write):
    file = read_prompts(write("a cat\n\n  a dog \n", "prompts.txt"))
    assert file.layout == "plain"
    assert [(p.number, p.text) for p in file.prompts] == [(0, "a cat"), (1, "a dog")]
    assert picture_paths("plain", "OUT", file.prompts[1]) == [Path("OUT/00001.png")]
    # A layout that is named wins over the file's ending.
    named = read_prompts(write("a cat\n", "p.jsonl"), "plain")
    assert named.prompts[0].text == "a cat"


def test_one_picture_a_prompt_where_one_is_read(write):
    file = read_prompts(write(WISE))
    with pytest.raises(DataError, match="layout wise holds one picture a prompt, not 4"):
        picture_paths("wise", "OUT", file.prompts[0], samples=4)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "p.txt", "p.txt: holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl", "p.jsonl, line 2: not JSON"),
        ('{"tag": "x"}\n', "p.jsonl", "line 1: 'prompt' must be a text, got None"),
        ("[1]\n", "p.jsonl", "line 1: must be an object with 'prompt', this is a list"),
        ("[", "p.json", "p.json: not JSON"),
        ("3", "p.json", "ImgEdit's prompts are a JSON object, this is a int"),
        ([{"Prompt": "a"}], "p.json", "entry 1: prompt_id must be a whole number, got None"),
        ([{"Prompt": " ", "prompt_id": 1}], "p.json", "entry 1: 'Prompt' must be a text, got ' '"),
        ([WISE[0], WISE[0]], "p.json", "2 entries are named 1"),
        ({"a": {"prompt": "x"}}, "p.json", "entry 'a': 'id' must be a text, got None"),
        ({"a": {"prompt": "x", "id": "../b.jpg"}}, "p.json", "would lead out of its folder"),
        ({"a": {"prompt": "x", "id": "/b.jpg"}}, "p.json", "would lead out of its folder"),
        ({"a/b": {"prompt": "x", "id": "b.jpg"}}, "p.json", "its key 'a/b' would lead out"),
        ({"..": {"prompt": "x", "id": "b.jpg"}}, "p.json", "its key '..' would lead out"),
    ],
)
def test_bad_files_are_one_clear_line(write, content, name, message):
    with pytest.raises(DataError) as error:
        read_prompts(write(content, name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(DataError, match="missing.txt: cannot be read"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="bytes.txt: cannot be read"):
        read_prompts(tmp_path / "bytes.txt")
    with pytest.raises(DataError, match="must be one of plain, geneval, wise, imgedit, got 'dpg'"):
        read_prompts(write(WISE), "dpg")
    with pytest.raises(DataError, match="WISE's prompts are a JSON list, this is an object"):
        read_prompts(write(IMGEDIT), "wise")
