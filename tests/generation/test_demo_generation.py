"""The demo of generation, small: its rows are what their definitions say, and it goes on."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from muse.errors import CheckpointError, DataError
from muse.evaluation.metrics.frechet import frechet_distance
from muse.experiments import demo_generation, generation_report
from muse.experiments.demo_data import make_demo_data
from muse.experiments.generation_judge import ClassifiedSet, Judge, LinearClassifier, classified_set
from muse.experiments.latent_spaces import (
    GenerationDemoPlan,
    LatentSpace,
    PixelGrid,
    find_tokenizer,
)
from scripts import compare_tokenizers as compare_script
from scripts import demo_generation as script
from tests.helpers import one_error, tiny_model

PLAN = GenerationDemoPlan(steps=3, samples=16, sampler_steps=2, images=64)
SMALL = ["generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(data, tokenizer) at 128 px."""
    folder = tmp_path_factory.mktemp("generation")
    make_demo_data(kind="shapes", output=folder / "data", images=64, val_images=16, workers=1)
    tiny_model(0).save_pretrained(folder / "muse")
    return folder / "data", folder / "muse"


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    data, tokenizer = parts
    results = demo_generation.run_generation_demo(
        output, PLAN, str(tokenizer), data, overrides=SMALL
    )
    return output, results


def test_everything_that_is_promised_is_there(run):
    output, results = run
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(results))
    table = (output / "table.md").read_text()
    printed = generation_report.generation_table(results)
    for name, cells in generation_report.generation_rows(results):
        assert name in table and name in printed
        assert all(cell in table and cell in printed for cell in cells)
    assert Image.open(output / "samples.png").size[1] > 8 * 128  # a row a class
    for name in ("guided", "spaces", "neighbours-samples", "neighbours-guided"):
        assert Image.open(output / f"{name}.png").size[0] > 128


def test_figures_lie_where_their_definitions_put_them(run):
    _, results = run
    assert results["chance"] == 1 / 8
    shapes = [results[space]["shape"] for space in ("muse", "untrained", "pixels")]
    assert [list(shape) for shape in shapes] == [[8, 8, 8], [8, 8, 8], [3, 8, 8]]
    for space in ("muse", "untrained", "pixels"):
        for row in ("reconstructions", "samples", "guided", "noise", "mean"):
            assert results[space][row]["fd"] > 0
        for row in ("reconstructions", "samples", "guided", "noise"):
            assert 0 <= results[space][row]["accuracy"] <= 1
    assert results["real"]["fd"] < results["pixels"]["reconstructions"]["fd"]


def test_a_second_run_trains_and_encodes_nothing(run, parts, monkeypatch):
    output, results = run
    data, tokenizer = parts
    monkeypatch.setattr("muse.experiments.latent_spaces.Trainer", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("muse.generation.extraction._write", lambda *_: pytest.fail("encoded"))
    again = demo_generation.run_generation_demo(output, PLAN, str(tokenizer), data, overrides=SMALL)
    without_time = [{**one, "seconds": 0} for one in (again, results)]
    assert json.dumps(without_time[0]) == json.dumps(without_time[1])


def test_too_few_pictures_are_named(parts, tmp_path):
    data, tokenizer = parts
    plan = GenerationDemoPlan(steps=1, samples=40, sampler_steps=1)
    with pytest.raises(DataError, match="64 training pictures are too few for halves of 40"):
        demo_generation.run_generation_demo(tmp_path, plan, str(tokenizer), data)


# -------------------------------------------------------------------------- several tokenizers
def test_tokenizers_are_compared_seed_by_seed_and_once(run, parts, tmp_path, monkeypatch, capsys):
    _, results = run
    data, tokenizer = parts
    other = tmp_path / "other"
    tiny_model(1).save_pretrained(other)
    study = {"variants": {"shared": {"runs": {"0": ["runs/1", "runs/2"]}}}}
    (tmp_path / "ablation.json").write_text(json.dumps(study))
    shutil.copytree(other, tmp_path / "runs" / "2" / "final")
    monkeypatch.setitem(demo_generation.GENERATION_PLANS, "default", PLAN)
    words = ["--run", f"a={tokenizer},{other}", "--study", str(tmp_path), "--variants", "shared"]
    words += ["--data", str(data), "--output", str(tmp_path / "out"), *SMALL]
    assert compare_script.main(words) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.md").read_text() in printed
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["tokenizers"]
    # The demo's own figures for the same tokenizer and seed; other weights give others.
    assert rows["a"]["seeds"][0] == json.loads(json.dumps(results["muse"]))
    assert rows["a"]["seeds"][1] != rows["shared"]["seeds"][0]  # seeds 1 and 0
    distances = [one["samples"]["fd"] for one in rows["a"]["seeds"]]
    column = rows["a"]["columns"]["samples: distance ↓"]
    assert column["mean"] == pytest.approx(sum(distances) / 2)
    assert column["std"] == pytest.approx(abs(distances[0] - distances[1]) / 2**0.5)
    assert rows["shared"]["columns"]["samples: distance ↓"]["std"] is None

    monkeypatch.setattr("muse.experiments.latent_spaces.Trainer", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(LatentSpace, "samples", lambda *_: pytest.fail("sampled"))
    assert compare_script.main(words) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no tokenizers: give --run NAME=DIR,DIR or --study DIR"),
        (["--run", "a"], "--run a: not of the form NAME=DIR,DIR"),
        (["--run", "a=nowhere"], "nowhere"),
        (["--study", "nowhere"], "nowhere/ablation.json"),
        (["--run", "a=muse_tiny", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_tokenizers_are_one_line(words, said, tmp_path, capsys):
    code = compare_script.main([*words, "--output", str(tmp_path / "out")])
    assert said in one_error(capsys, code)


# ------------------------------------------------------------------------------------- the judge
def clouds(count, spread=0.3, seed=0):
    """Three classes, each a Gaussian in four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(4)[:3] * 2
    features = centres[labels] + spread * torch.randn(count, 4, generator=generator)
    return ClassifiedSet(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), labels, features)


def test_the_classifier_finds_classes_and_the_optimum():
    train, val = clouds(300), clouds(150, seed=1)
    classifier = LinearClassifier(train.features, train.labels, 3, decay=0.1)
    assert (classifier.predict(val.features) == val.labels).double().mean() > 0.99
    weight = classifier.weight.clone().requires_grad_()
    rows = (train.features - train.features.mean(0)) / train.features.std(0)
    loss = F.cross_entropy(F.linear(rows, weight, classifier.bias), train.labels)
    (loss + 0.1 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3  # of a convex problem: it is the minimum


def test_the_judge_measures_what_it_says():
    train = clouds(400)
    judge = Judge(lambda images: images, train, 3)
    same = train.first(200)
    assert judge.distance(same.features) == pytest.approx(0, abs=1e-6)
    assert judge.nearest(same.features)[1].tolist() == list(range(200))
    assert float(judge.nearest(same.features)[0].abs().max()) < 1e-5
    other = clouds(200, seed=2)
    double = other.features.double()
    half = train.features[:200].double()
    wanted = frechet_distance(half.mean(0), half.T.cov(), double.mean(0), double.T.cov())
    assert judge.distance(other.features) == pytest.approx(wanted, rel=1e-6)
    wrong = other._replace(labels=(other.labels + 1) % 3)
    assert judge.class_accuracy(other) > 0.99 and judge.class_accuracy(wrong) < 0.01


def test_pictures_are_rounded_before_they_are_measured():
    images = torch.tensor([0.1, 0.5, 1.2, -0.3]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    made = classified_set([(images, torch.zeros(4))], lambda x: x.flatten(1))
    assert made.images[:, 0, 0, 0].tolist() == [26, 128, 255, 0]
    assert torch.equal(made.features[:, 0], torch.tensor([26.0, 128.0, 255.0, 0.0]) / 255)


def test_pixels_are_shrunk_by_area_and_come_back():
    grid = PixelGrid(4, 8)
    images = torch.rand(2, 3, 32, 32)
    latents = grid.encode(images)
    assert torch.allclose(latents[0, 1, 2, 3], images[0, 1, 16:24, 24:32].mean())
    flat = torch.full((1, 3, 32, 32), 0.25)
    assert torch.allclose(grid.decode(grid.encode(flat)), flat)
    assert grid.sha256 != PixelGrid(8, 8).sha256


# ----------------------------------------------------------------------------------- the command
def test_the_command_prints_the_table(parts, tmp_path, capsys):
    data, tokenizer = parts
    words = ["--data", str(data), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    size = ["--fast", "--steps", "2", "--samples", "16", "--spaces", "muse,pixels"]
    assert script.main([*words, *size, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "MUSE's latents, 8x8x8" in printed and "pixels shrunk" in printed
    assert "untrained" not in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["--spaces", "pixels"], "--spaces must begin with muse"),
        (["--tokenizer", "nowhere"], "nowhere: no such checkpoint"),
        (["--samples", "1"], "--samples must be at least 2"),
    ],
)
def test_a_mistake_of_the_demo_is_one_line(words, message, tmp_path, capsys):
    code = script.main(["--fast", "--output", str(tmp_path / "out"), *words])
    assert message in one_error(capsys, code)


def test_without_a_tokenizer_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("muse.experiments.latent_spaces.DEFAULTS", ("nowhere", "neither"))
    with pytest.raises(CheckpointError, match=r"run tools/demo\.sh first"):
        find_tokenizer(None)
