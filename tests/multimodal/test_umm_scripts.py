"""The commands: what they write and in whose layout, and one line for each mistake."""

import base64
import csv
import json
import os
import subprocess

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from muse.config import resolved
from muse.multimodal.benchmarks import chosen_letter, read_questions
from muse.multimodal.umm_run_config import load_umm_config
from scripts import answer, edit, evaluate_understanding, text_to_image, train_umm
from tests.data.helpers import encode, picture
from tests.golden.fill import GOLDEN
from tests.helpers import ROOT, one_error, tiny_model
from tests.multimodal.runs import write_kinds, write_umm_config

GENEVAL = GOLDEN / "prompts" / "geneval_sample.jsonl"
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(text_tokenizer_dir, tmp_path_factory, umm):
    folder = tmp_path_factory.mktemp("saved") / "umm"
    umm.save_pretrained(folder)
    return str(folder)


def pixels(path) -> torch.Tensor:
    return to_tensor(Image.open(path))


def close(image, other) -> None:
    torch.testing.assert_close(image, other, atol=1.01 / 255, rtol=0)


# ---------------------------------------------------------------------------------- text to image
def test_one_prompt(saved, umm, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--checkpoint", saved, "--prompt", " a cat ", "--output", str(out), *FAST]
    assert text_to_image.main([*words, "--seed", "3", "--size", "32x64"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "00000.png")
    expected = umm.generate(["a cat"], steps=2, seed=3, size=(32, 64))[0]
    close(pixels(out / "00000.png"), expected)
    facts = json.loads((tmp_path / "out.json").read_text())["protocol"]
    assert facts["seed"] == 3 and len(facts["checkpoint"]["sha256"]) == 64


def test_a_file_of_prompts_whatever_the_batch(saved, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog on grass\nx\n")
    for size in ("1", "3"):
        words = ["--checkpoint", saved, "--prompts", str(tmp_path / "prompts.txt"), *FAST]
        assert (
            text_to_image.main([*words, "--output", f"{tmp_path}/{size}", "--batch_size", size])
            == 0
        )
    assert sorted(os.listdir(tmp_path / "1")) == ["00000.png", "00001.png", "00002.png"]
    for name in os.listdir(tmp_path / "1"):
        close(pixels(tmp_path / "1" / name), pixels(tmp_path / "3" / name))


def test_geneval_is_laid_out_as_its_judge_reads(saved, umm, tmp_path):
    lines = GENEVAL.read_text().splitlines()[:3]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    words = ["--checkpoint", saved, "--prompts", str(tmp_path / "metadata.jsonl"), *FAST]
    words += ["--output", str(tmp_path / "out"), "--samples", "2", "--batch_size", "3"]
    assert text_to_image.main(words) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["00000", "00001", "00002"]
    folder = tmp_path / "out/00001"
    assert sorted(os.listdir(folder)) == ["grid.png", "metadata.jsonl", "samples"]
    assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png"]
    assert (folder / "metadata.jsonl").read_text() == lines[1] + "\n"
    text = json.loads(lines[1])["prompt"]
    expected = umm.generate([text, text], steps=2, indices=[2, 3])
    samples = [pixels(folder / f"samples/000{i}.png") for i in range(2)]
    for image, wanted in zip(samples, expected):
        close(image, wanted)
    assert not torch.equal(*samples)
    grid = pixels(folder / "grid.png")  # both samples side by side
    assert grid.shape == (3, 40, 76)
    close(grid[:, 4:36, 4:36], samples[0])
    close(grid[:, 4:36, 40:72], samples[1])


def test_wise_pictures_are_named_by_their_prompts(saved, tmp_path):
    wise = [{"Prompt": "a lake", "prompt_id": 7}, {"Prompt": "a flower", "prompt_id": 700}]
    (tmp_path / "wise.json").write_text(json.dumps(wise))
    words = ["--checkpoint", saved, "--prompts", str(tmp_path / "wise.json"), *FAST]
    assert text_to_image.main([*words, "--output", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["7.png", "700.png"]


# ----------------------------------------------------------------------------------------- edits
def test_one_edit(saved, umm, tmp_path, capsys):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "in.png")
    words = ["--checkpoint", saved, "--image", str(tmp_path / "in.png"), *FAST]
    words += ["--instruction", "make it blue", "--output", str(tmp_path / "out")]
    assert edit.main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/in.png")
    source = pixels(tmp_path / "in.png")[None]
    close(pixels(tmp_path / "out/in.png"), umm.edit(source, ["make it blue"], steps=2)[0])


def test_imgedit_of_pictures_of_several_sizes(saved, umm, tmp_path):
    sizes = {"a/1.png": (32, 32), "a/2.png": (48, 32), "b.png": (48, 32)}
    for number, (name, size) in enumerate(sizes.items()):
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number, *size)))
    edits = {str(i): {"id": name, "prompt": f"change {i}"} for i, name in enumerate(sizes)}
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    words = ["--checkpoint", saved, "--prompts", str(tmp_path / "edits.json"), *FAST]
    words += ["--sources", str(tmp_path / "sources"), "--output", str(tmp_path / "out")]
    assert edit.main(words) == 0
    for i, name in enumerate(sizes):
        source = pixels(tmp_path / "sources" / name)[None]
        expected = umm.edit(source, [f"change {i}"], steps=2, indices=[i])[0]
        close(pixels(tmp_path / f"out/{i}.png"), expected)


# ------------------------------------------------------------------------------------- questions
@pytest.fixture
def mmvp(tmp_path):
    """Two pairs of questions, as VLMEvalKit writes them."""
    rows = [
        {"index": i, "question": f"is it {i}?", "A": "yes", "B": "no", "answer": "AB"[i % 2],
         "image": base64.b64encode(encode(picture(i, 32, 32))).decode()}
        for i in range(4)
    ]  # fmt: skip
    path = tmp_path / "MMVP.tsv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_questions_about_a_picture(saved, umm, tmp_path, capsys):
    (tmp_path / "in.png").write_bytes(encode(picture(1, 32, 32)))
    words = ["--checkpoint", saved, "--image", str(tmp_path / "in.png"), "--max_new_tokens", "5"]
    assert answer.main([*words, "--question", "what?", "--question", "where is it?"]) == 0
    image = pixels(tmp_path / "in.png")[None].expand(2, -1, -1, -1)
    expected = umm.answer(image, ["what?", "where is it?"], max_new_tokens=5)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_a_benchmark_is_answered_and_scored(saved, umm, mmvp, tmp_path, capsys):
    words = ["--checkpoint", saved, "--tsv", str(mmvp)]
    assert answer.main([*words, "--output", str(tmp_path / "said.tsv")]) == 0
    output = tmp_path / "scores"
    assert (
        evaluate_understanding.main(
            [*words, "--benchmark", "mmvp", "--output_dir", str(output), "--batch_size", "3"]
        )
        == 0
    )
    with (output / "predictions.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    questions = read_questions(mmvp)
    assert [row["question"] for row in rows] == [question.text for question in questions]
    prompts = [question.prompt() for question in questions]
    images = torch.stack([question.image() for question in questions])
    said = umm.answer(images, prompts, max_new_tokens=16)
    assert [row["prediction"] for row in rows] == said
    right = [chosen_letter(s, q.options) == q.answer for s, q in zip(said, questions)]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["single"] == sum(right) / 4
    assert metrics["protocol"]["benchmark"] == "mmvp" and not metrics["protocol"]["text_only"]
    assert f"{metrics['single']:.4f}" in capsys.readouterr().out


def test_options_are_asked_in_every_rotation_and_without_pictures(saved, mmvp, tmp_path):
    words = ["--checkpoint", saved, "--tsv", str(mmvp), "--benchmark", "mmbench"]
    words += ["--rotate", "--text_only", "--output_dir", str(tmp_path / "out")]
    assert evaluate_understanding.main(words) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["protocol"]["questions"] == 8 and {"overall", "vanilla"} <= metrics.keys()


# -------------------------------------------------------------------------------------- training
def test_a_stage_is_trained_and_its_pictures_made(text_tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_kinds(tmp_path / "data")
    config = write_umm_config(
        tmp_path / "c.yaml", tmp_path / "data", tmp_path / "run", text_tokenizer_dir
    )
    words = ["--config", str(config), "--device", "cpu", "training.max_train_steps=2"]
    assert train_umm.main(words) == 0
    words = ["--checkpoint", str(tmp_path / "run"), "--prompt", "x", *FAST]
    assert text_to_image.main([*words, "--output", str(tmp_path / "out")]) == 0
    assert pixels(tmp_path / "out/00000.png").shape == (3, 32, 32)


STAGES = {
    "umm_1b": {"projector": "projector", "1": "connector", "2": "connector_generator"},
    "umm_3b": {"3": "instructions"},
    "umm_tiny": {"language": "projector", "2": "connector_generator", "3": "instructions"},
}


@pytest.mark.parametrize("variant", STAGES)
def test_the_launcher_names_the_stage(variant):
    for word, stage in STAGES[variant].items():
        shown = subprocess.run(
            ["bash", str(ROOT / "tools/train_umm.sh"), variant, word, "training.seed=1"],
            env={**os.environ, "DRY_RUN": "1"},
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        parts = shown.stdout.split()
        assert parts[1].endswith("scripts/train_umm.py") and parts[-1] == "training.seed=1"
        cfg = load_umm_config(parts[parts.index("--config") + 1])
        assert resolved(cfg)["training"]["stage"] == stage
    wrong = subprocess.run(
        ["bash", str(ROOT / "tools/train_umm.sh"), variant, "9"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: usage")


# --------------------------------------------------------------------------------------- mistakes
def test_mistakes_of_text_to_image(saved, tmp_path, capsys):
    base = ["--checkpoint", saved, "--output", str(tmp_path / "out")]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{\n')
    (tmp_path / "edits.json").write_text('{"1": {"id": "a.png", "prompt": "x"}}')
    (tmp_path / "empty.txt").write_text("\n")
    mistakes = {
        "give --prompt or --prompts": [],
        "give --prompt or --prompts, not both": ["--prompt", "a", "--prompts", "b"],
        "--prompt is empty": ["--prompt", " "],
        "bad.jsonl, line 2: not JSON": ["--prompts", str(tmp_path / "bad.jsonl")],
        "empty.txt: holds no prompts": ["--prompts", str(tmp_path / "empty.txt")],
        "nowhere.txt: cannot be read": ["--prompts", str(tmp_path / "nowhere.txt")],
        "holds edits; scripts/edit.py reads it": ["--prompts", str(tmp_path / "edits.json")],
        "--size must be a side or HEIGHTxWIDTH": ["--prompt", "a", "--size", "3x"],
        "--steps must be at least 1": ["--prompt", "a", "--steps", "0"],
        "--samples must be at least 1": ["--prompt", "a", "--samples", "0"],
        "holds one picture a prompt, not 2": ["--prompt", "a", "--samples", "2"],
        "unrecognized arguments": ["--prompt", "a", "--guide", "3"],
    }
    for message, words in mistakes.items():
        assert message in one_error(capsys, text_to_image.main([*base, *words]))
    assert not list(tmp_path.glob("out/**/*.png"))


def test_mistakes_of_edit(saved, tmp_path, capsys):
    base = ["--checkpoint", saved, "--output", str(tmp_path / "out")]
    (tmp_path / "edits.json").write_text('{"1": {"id": "a.png", "prompt": "x"}}')
    (tmp_path / "in.png").write_text("no picture")
    edits, broken = str(tmp_path / "edits.json"), str(tmp_path / "in.png")
    mistakes = {
        "give --image or --prompts": ["--instruction", "x"],
        "--image needs --instruction": ["--image", broken],
        "nowhere.png: no such picture": ["--image", "nowhere.png", "--instruction", "x"],
        "in.png: not a readable picture": ["--image", broken, "--instruction", "x"],
        "--prompts needs --sources": ["--prompts", edits],
        "the source picture of '1' does not exist": ["--prompts", edits, "--sources", "."],
    }
    for message, words in mistakes.items():
        assert message in one_error(capsys, edit.main([*base, *words]))


def test_mistakes_about_questions(saved, mmvp, tmp_path, capsys):
    base = ["--checkpoint", saved]
    (tmp_path / "bad.tsv").write_text("index\tquestion\n1\twhat?\n")
    blind = tmp_path / "test.tsv"
    head, *rows = mmvp.read_text().splitlines()
    hidden = [row.replace("\tA\t", "\t\t").replace("\tB\t", "\t\t") for row in rows]
    blind.write_text("\n".join([head, *hidden]) + "\n")
    bad, no_answers = str(tmp_path / "bad.tsv"), str(blind)
    mistakes = {
        "give --image or --tsv": [],
        "--image needs --question": ["--image", "a.png"],
        "--tsv needs --output": ["--tsv", str(mmvp)],
        "nowhere.png: cannot be read": ["--image", "nowhere.png", "--question", "x"],
        "has no column": ["--tsv", bad, "--output", "x.tsv"],
    }
    for message, words in mistakes.items():
        assert message in one_error(capsys, answer.main([*base, *words]))
    scored = {
        "has no column": ["--tsv", bad, "--benchmark", "mmvp"],
        "has no answer: a test split is not scored": ["--tsv", no_answers, "--benchmark", "mmvp"],
        "--rotate is MMBench's": ["--tsv", str(mmvp), "--benchmark", "mmvp", "--rotate"],
        "invalid choice: 'mme'": ["--tsv", str(mmvp), "--benchmark", "mme"],
    }
    for message, words in scored.items():
        assert message in one_error(capsys, evaluate_understanding.main([*base, *words]))


@pytest.mark.parametrize("script", [text_to_image, edit, answer, evaluate_understanding])
def test_checkpoints_that_are_none(script, mmvp, tmp_path, capsys):
    (tmp_path / "in.png").write_bytes(encode(picture(1, 32, 32)))
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    rest = {
        text_to_image: ["--prompt", "a", "--output", str(tmp_path / "o")],
        edit: [
            *["--image", str(tmp_path / "in.png"), "--instruction", "x"],
            *["--output", str(tmp_path / "o")],
        ],
        answer: ["--image", str(tmp_path / "in.png"), "--question", "x"],
        evaluate_understanding: [
            *["--tsv", str(mmvp), "--benchmark", "mmvp"],
            *["--output_dir", str(tmp_path / "o")],
        ],
    }[script]
    missing = script.main(["--checkpoint", str(tmp_path / "nowhere"), *rest])
    assert "nowhere: no such directory" in one_error(capsys, missing)
    foreign = script.main(["--checkpoint", str(tmp_path / "tokenizer"), *rest])
    assert "a model of type muse, not a multimodal one" in one_error(capsys, foreign)


def test_mistakes_of_training(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {num_query: 3}\n")
    assert "did you mean model.num_queries" in one_error(
        capsys, train_umm.main(["--config", str(tmp_path / "c.yaml")])
    )
    words = ["--config", str(ROOT / "configs/umm_1b/stage1.yaml"), "--device", "cpu"]
    assert "CHECKPOINT_DIR is not set" in one_error(capsys, train_umm.main(words))
