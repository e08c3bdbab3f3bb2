"""The demo of the multimodal model, small: its figures are what their definitions say."""

import json
import math

import pytest
import torch
from PIL import Image

from muse.experiments import demo_multimodal, multimodal_measuring, multimodal_report
from muse.experiments.generation_judge import LinearClassifier
from muse.experiments.multimodal_data import (
    EditPairs,
    read_captioned,
    read_choices,
    read_edits,
    training_texts,
)
from muse.experiments.multimodal_judge import (
    EditJudge,
    by_change,
    choice_scores,
    majority_share,
    masked_psnr,
    shuffled_accuracy,
    with_others_pictures,
)
from muse.experiments.multimodal_stages import UMM_DEMO_STAGES, MultimodalDemoPlan
from muse.experiments.multimodal_text import train_text_tokenizer
from muse.multimodal.benchmarks import Question
from muse.multimodal.chat_prompts import ChatPrompts
from muse.utils.weights import read_state_dict
from scripts import demo_multimodal as script
from tests.helpers import one_error, tiny_model

PLAN = MultimodalDemoPlan(
    (2, 2, 1, 1, 1),
    images=16,
    held_out=10,
    judged=16,
    prompts=10,
    edits=10,
    sampler_steps=2,
    batch=4,
)
_TEXT, _SANA = "model.language_model.config.text_config", "model.generator.config"
SMALL = [
    f"{_TEXT}.hidden_size=16",
    f"{_TEXT}.intermediate_size=24",
    f"{_TEXT}.num_hidden_layers=2",
    f"{_TEXT}.num_attention_heads=2",
    f"{_TEXT}.num_key_value_heads=1",
    f"{_TEXT}.vocab_size=400",
    "model.language_model.config.vision_config.hidden_size=16",
    f"{_SANA}.in_channels=8",
    f"{_SANA}.out_channels=8",
    f"{_SANA}.num_attention_heads=2",
    f"{_SANA}.attention_head_dim=8",
    f"{_SANA}.num_layers=1",
    f"{_SANA}.num_cross_attention_heads=2",
    f"{_SANA}.cross_attention_head_dim=8",
    f"{_SANA}.cross_attention_dim=16",
    f"{_SANA}.caption_channels=16",
    "model.num_queries=3",
    "model.connector_layers=1",
    "model.connector_heads=2",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimodal") / "muse"
    tiny_model(0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    results = demo_multimodal.run_multimodal_demo(output, PLAN, tokenizer, "shapes", SMALL)
    return output, results


def test_everything_that_is_promised_is_there(run):
    output, results = run
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(results))
    table, printed = (output / "table.md").read_text(), multimodal_report.multimodal_text(results)
    for title, heads, rows in multimodal_report.multimodal_tables(results):
        assert f"**{title}**" in table and title in printed
        for cells in [heads, *rows]:
            assert all(cell in table and cell in printed for cell in cells)
    sheet = Image.open(output / "edits.png")
    assert sheet.size == (110 + 10 * 132 + 4, 4 * 132 + 4)
    assert Image.open(output / "prompts.png").size[0] > 128
    report = (output / "report.md").read_text()
    asked = read_choices(f"{output}/data/questions-shapes/val-*.tar")
    assert report.count("without the picture: ") == len(asked) == 10
    for text in read_edits(output / "data/edits-shapes", "val").texts:
        assert text in report


def test_baselines_are_those_of_the_data(run):
    output, results = run
    prompts, edits, asked = (results[name] for name in ("prompts", "edits", "questions"))
    assert prompts["chance"] == 1 / 8 and asked["chance"] == 0.25
    # Of ten edits five replace (eight classes), three move, two remove; backgrounds by name.
    grounds = {
        json.loads(line)["background"]
        for line in (output / "data/edits-shapes/index.jsonl").read_text().splitlines()
        if json.loads(line)["split"] == "train"
    }
    wanted = (5 / 8 + 3 / len(grounds) + 2 / 2) / 10
    assert edits["chance"]["asked"] == pytest.approx(wanted)
    # Only compression separates source and result where nothing changes.
    assert edits["copy"]["stays"] > 30 > edits["copy"]["changes"]
    assert edits["real"]["stays"] == edits["real"]["changes"] == pytest.approx(60)
    assert edits["copy"]["replace"] < edits["real"]["replace"]
    letters = [q.answer for q in read_choices(f"{output}/data/questions-shapes/train-*.tar")]
    common = max(sorted(set(letters), key=letters.index), key=letters.count)
    held = [q.answer for q in read_choices(f"{output}/data/questions-shapes/val-*.tar")]
    assert asked["majority"] == pytest.approx(held.count(common) / 10)


def test_each_stage_trains_its_own_parts(run):
    output, _ = run
    folders = ("language", "projector_start", "projector", "stage1", "stage2", "stage3")
    states = {
        name: read_state_dict(
            (output / name / "final" if name != "projector_start" else output / name)
            / "model.safetensors"
        )
        for name in folders
    }

    def changed(before, after):
        old, new = states[before], states[after]
        assert old.keys() == new.keys()
        names = [name for name in old if not torch.equal(old[name], new[name])]
        return {name.replace("internvl.model.", "").split(".")[0] for name in names}

    assert changed("language", "projector_start") == {"multi_modal_projector"}
    assert changed("projector_start", "projector") == {"multi_modal_projector"}
    connector = {"queries", "connector", "to_caption", "latent_tokens"}
    assert "connector" in changed("projector", "stage1") <= connector
    for before, after in (("stage1", "stage2"), ("stage2", "stage3")):
        assert {"connector", "generator"} <= changed(before, after) <= connector | {"generator"}


def test_a_second_run_trains_and_measures_nothing(run, tokenizer, monkeypatch):
    output, results = run
    monkeypatch.setattr(
        "muse.experiments.multimodal_stages.train_umm", lambda *_: pytest.fail("trained")
    )
    monkeypatch.setattr(
        multimodal_measuring.DemoMeasuring, "generate", lambda *_: pytest.fail("sampled")
    )
    monkeypatch.setattr(multimodal_measuring, "choice_scores", lambda *_: pytest.fail("asked"))
    again = demo_multimodal.run_multimodal_demo(output, PLAN, tokenizer, "shapes", SMALL)
    assert json.dumps({**again, "seconds": 0}) == json.dumps({**results, "seconds": 0})


def test_other_settings_of_a_stage_start_it_and_the_later_ones_again(run, tokenizer, monkeypatch):
    output, _ = run
    started = []

    def train(cfg):
        started.append(cfg.experiment.output_dir.rpartition("/")[2])
        assert not list(output.glob("stage[23]/final"))
        raise KeyboardInterrupt

    monkeypatch.setattr("muse.experiments.multimodal_stages.train_umm", train)
    plan = MultimodalDemoPlan(**{**vars(PLAN), "steps": (2, 2, 1, 2, 1)})
    kept = {stage: output / stage for stage in UMM_DEMO_STAGES[3:]}
    moved = {stage: folder.rename(f"{folder}.kept") for stage, folder in kept.items()}
    for stage, folder in moved.items():  # what is thrown away is a copy
        kept[stage].mkdir()
        (kept[stage] / "config.yaml").write_text((folder / "config.yaml").read_text())
        (kept[stage] / "final").mkdir()
    with pytest.raises(KeyboardInterrupt):
        demo_multimodal.run_multimodal_demo(output, plan, tokenizer, "shapes", SMALL)
    assert started == ["stage2"] and (output / "stage1/final").is_dir()
    for stage, folder in moved.items():
        folder.rename(kept[stage])


# -------------------------------------------------------------------------------------- measures
def test_psnr_inside_and_outside_a_mask_by_hand():
    targets = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images = targets.clone()
    images[0, :, 0, 0] = 51  # a fifth of the range, in one pixel of the three that stay
    images[0, :, 1, 1] = 255  # where it changes
    images[1, 1] = 255  # one channel of three, everywhere
    stays = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]).bool()
    found = masked_psnr(images, targets, stays)
    assert found[0].item() == pytest.approx(-10 * math.log10(0.2**2 / 3))
    assert found[1].item() == pytest.approx(10 * math.log10(3))
    assert found[2].isnan()
    assert masked_psnr(images, targets, ~stays)[0].item() == pytest.approx(0)
    assert masked_psnr(images, targets, ~stays)[2].item() == pytest.approx(60)  # equal


def test_shuffled_prompts_by_hand():
    labels, guesses = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    # By one place: prompts 1 0 1, one of class 0 wrong, class 1: none of two. By two: 1 1 0,
    # class 0 right, class 1: one of two.
    assert shuffled_accuracy(guesses, labels, 2) == pytest.approx((0 + 0.75) / 2)
    perfect = torch.arange(8).repeat(30)
    assert shuffled_accuracy(perfect, perfect, 8) == pytest.approx(29 / 239)


class Colours:
    """Features of a picture: its mean colours, so that classes are colours."""

    def __call__(self, images):
        return images.mean((2, 3))


def painted(*colours):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2)


RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def pairs_of(sources, targets, labels, changes, grounds, becomes):
    count = len(changes)
    stays = torch.ones(count, 2, 2, dtype=torch.bool)
    stays[:, 0, 0] = False
    return EditPairs(
        painted(*sources),
        painted(*targets),
        stays,
        torch.tensor(labels),
        [""] * count,
        changes,
        grounds,
        becomes,
    )


def test_an_edit_is_judged_by_what_it_asked_for():
    rows = painted(RED, GREEN).float().mean((2, 3)) / 255
    objects = LinearClassifier(rows.repeat(4, 1), torch.tensor([0, 1] * 4), 2)
    train = pairs_of(
        [RED, GREEN, BLUE, RED],
        [BLACK, RED, RED, BLACK],
        [0, 0, 0, 0],
        ["remove", "replace", "replace", "remove"],
        ["red", "green", "blue", "red"],
        ["", "", "", ""],
    )
    judge = EditJudge(Colours(), objects, 2, train)
    pairs = pairs_of(
        [RED, RED, RED, RED],
        [GREEN, BLUE, BLACK, GREEN],
        [1, 0, 0, 1],
        ["replace", "background", "remove", "replace"],
        ["red"] * 4,
        ["", "blue", "", ""],
    )
    found = judge.measure(pairs.targets, pairs)
    assert found["stays"] == found["changes"] == pytest.approx(60)
    assert found["asked"] == found["replace"] == found["background"] == found["remove"] == 1
    copied = judge.measure(pairs.sources, pairs)
    assert copied["asked"] == 0
    # red on green, on blue, on green: two channels of three; on black one.
    psnr = (3 * -10 * math.log10(2 / 3) - 10 * math.log10(1 / 3)) / 4
    assert copied["stays"] == copied["changes"] == pytest.approx(psnr)
    half = judge.measure(painted(GREEN, GREEN, BLACK, RED), pairs)
    assert (half["asked"], half["replace"], half["background"]) == (0.5, 0.5, 0)
    chance = judge.chance(pairs)
    assert chance["asked"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert chance["background"] == pytest.approx(1 / 3)


def test_by_change_averages_each_kind():
    assert by_change(torch.tensor([1.0, 0.0, 0.5]), ["a", "b", "a"]) == {"a": 0.75, "b": 0.0}


def question(number, answer, picture="p"):
    options = {"A": "an animal", "B": "food"}
    return Question(number, "What is in the picture?", options, answer, picture)


def test_questions_without_or_with_others_pictures(monkeypatch):
    asked = [question(0, "A", "cat"), question(1, "A", "dog"), question(2, "B", "bread")]
    moved = with_others_pictures(asked)
    assert [q.picture for q in moved] == ["bread", "bread", "cat"]
    assert [q.answer for q in moved] == ["A", "A", "B"]
    # The answer of two of the three trained questions is right for one of these.
    assert majority_share([question(0, "B"), question(1, "B"), question(2, "A")], asked) == 1 / 3

    calls = []

    def answers(umm, questions, batch, pictures, tokens):
        calls.append(pictures)
        return ["A", "B. food", "B"] if pictures else ["A", "", "A"]

    monkeypatch.setattr("muse.experiments.multimodal_judge.ask_benchmark", answers)
    assert choice_scores(None, asked)[0] == {"accuracy": 2 / 3, "unmatched": 0}
    blind, said = choice_scores(None, asked, pictures=False)
    assert blind == {"accuracy": 1 / 3, "unmatched": 1 / 3} and said == ["A", "", "A"]
    assert calls == [True, False]


# ------------------------------------------------------------------------------------------ parts
def test_data_are_read_as_they_were_made(run):
    output, _ = run
    data = output / "data"
    pairs = read_edits(data / "edits-shapes", "val", 7)
    assert pairs.sources.shape == pairs.targets.shape == (7, 3, 128, 128)
    assert pairs.changes == ["replace"] * 5 + ["background"] * 2
    far = (pairs.sources.int() - pairs.targets.int()).abs().amax(1).double()
    assert far[~pairs.stays].mean() > 5 * far[pairs.stays].mean()
    seen = read_captioned(f"{data}/pictures-shapes/seen-*.tar", 4)
    assert len(seen.texts) == len(seen.labels) == len(seen.images) == 4
    texts = list(training_texts(data, "shapes"))
    # A caption, an instruction, three pairs of a question, one of a caption.
    assert len(texts) == 16 * (1 + 1 + 2 * 3 + 2)
    assert texts.count("Describe the picture.") == 16


def test_the_text_tokenizer_spells_everything_and_keeps_turns():
    texts = ["Replace the apple by a red car.", "What is in the picture?"] * 20
    chat = ChatPrompts(train_text_tokenizer(texts, 300), 4, 300)
    ids = chat.editing("Replace the apple by a zebra – ü.")
    told = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert told == (
        "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
        "Edit the image: Replace the apple by a zebra – ü.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.words(chat.answer("a red car")) == "a red car"
    assert len(chat.answer("a red car")) < len("a red car")  # pairs were learnt


# ----------------------------------------------------------------------------------- the command
def test_the_command_prints_the_tables(run, tokenizer, capsys, monkeypatch):
    output, results = run
    monkeypatch.setitem(demo_multimodal.MULTIMODAL_PLANS, "fast", PLAN)
    words = ["--fast", "--kind", "shapes", "--tokenizer", tokenizer, "--output", str(output)]
    assert script.main([*words, *SMALL]) == 0
    printed = capsys.readouterr().out
    for title in ("(a) prompts to pictures", "(b) edits", "(c) questions with four choices"):
        assert title in printed
    assert f"{results['prompts']['generated']:.3f}" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "3,4"], "--steps must be five whole numbers above 0, got '3,4'"),
        (["--steps", "3,4,0,1,1"], "--steps must be five whole numbers above 0"),
        (["--images", "4"], "--images must be at least 16, not 4"),
        (["--tokenizer", "nowhere"], "nowhere: no such checkpoint"),
    ],
)
def test_a_mistake_of_the_multimodal_demo_is_one_line(words, message, tmp_path, capsys):
    code = script.main(["--fast", "--output", str(tmp_path / "out"), *words])
    assert message in one_error(capsys, code)


def test_other_data_in_the_same_folder_are_refused(run, tokenizer, capsys):
    output, _ = run
    words = ["--fast", "--kind", "shapes", "--tokenizer", tokenizer, "--output", str(output)]
    code = script.main([*words, "--images", "40"])
    assert "holds demo data made with other arguments (images 16 -> 40" in one_error(capsys, code)
