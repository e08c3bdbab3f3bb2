"""The core's commands as a user calls them; a mistake is one line, exit code 2, nothing written."""

import errno
import hashlib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from muse import MUSE_ViT, cli, load_config
from muse.errors import MuseError
from muse.models.release_weights import to_release, write_release_file
from muse.utils.io import atomic_file, write_json
from scripts import (
    inference,
    linear_probe,
    segment_probe,
    train_stage1,
    train_stage2,
    train_stage3,
    visualize_attention,
)
from tests.data.helpers import picture, write_tar
from tests.helpers import ROOT, one_error, run_config

TRAIN = {
    "topology_warmup": train_stage1,
    "semantic_injection": train_stage2,
    "synergistic_tuning": train_stage3,
}


@pytest.fixture
def flags(trained_run):
    config, run = trained_run
    return ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]


@pytest.fixture
def photo(tmp_path):
    picture(3, 53, 37).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


# ---------------------------------------------------------------------------------------- inference
@pytest.mark.parametrize(
    ("name", "size"),
    [("a.png", (32, 32)), ("b.jpg", (53, 37)), ("c.webp", (1, 1)), ("d.bmp", (90, 7))],
)
def test_inference_keeps_the_picture_s_size(name, size, flags, tmp_path, capsys):
    picture(1, *size).save(tmp_path / name)
    code = inference.main(
        [*flags, "--image_path", str(tmp_path / name), "--output_dir", str(tmp_path / "out")]
    )
    assert code == 0
    target = tmp_path / "out" / f"{name[0]}.png"
    assert Image.open(target).size == size and Image.open(target).mode == "RGB"
    line = capsys.readouterr().out
    assert f"{size[0]}x{size[1]}" in line and str(target) in line and "PSNR" in line


def test_inference_of_a_directory_and_of_a_glob(flags, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.png")):
        picture(number, 20 + number, 18).save(tmp_path / "in" / name)
    assert (
        inference.main(
            [*flags, "--image_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "all")]
        )
        == 0
    )
    assert sorted(os.listdir(tmp_path / "all")) == sorted(
        ["reconstructions.csv"]
        + [f"{stem}{kind}.png" for stem in "abc" for kind in ("", "_compare")]
    )
    assert (
        inference.main(
            [*flags, "--image_path", f"{tmp_path}/in/*.png", "--output_dir", str(tmp_path / "some")]
        )
        == 0
    )
    assert sorted(os.listdir(tmp_path / "some")) == [
        "a.png",
        "a_compare.png",
        "c.png",
        "c_compare.png",
        "reconstructions.csv",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_every_form_of_checkpoint_gives_the_same_picture(trained_run, photo, tmp_path):
    config, run = trained_run
    forms = {
        "final": run / "final",
        "training": run / "checkpoint-2",
        "file": run / "final/model.safetensors",
    }
    pixels = {}
    for form, checkpoint in forms.items():
        words = ["--config", str(config), "--checkpoint", str(checkpoint), "--device", "cpu"]
        assert (
            inference.main([*words, "--image_path", photo, "--output_dir", str(tmp_path / form)])
            == 0
        )
        pixels[form] = (tmp_path / form / "photo.png").read_bytes()
    assert len(set(pixels.values())) == 1  # the averaged weights, whichever way they come
    earlier = [
        "--config",
        str(config),
        "--checkpoint",
        str(run / "checkpoint-1"),
        "--device",
        "cpu",
    ]
    assert (
        inference.main([*earlier, "--image_path", photo, "--output_dir", str(tmp_path / "earlier")])
        == 0
    )
    assert (tmp_path / "earlier/photo.png").read_bytes() != pixels["final"]


def test_bare_config_and_overrides_anywhere(flags, trained_run, photo, tmp_path):
    words = [
        f"config={trained_run[0]}",
        "training.seed=3",
        *flags[2:],
        "--image_path",
        photo,
        "model.grad_scale=0.5",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert inference.main(words) == 0
    made = cli.parser("x", checkpoint=True)
    args = cli.parse(made, ["a.b=1", "config=c.yaml", "--checkpoint", "k", "d=[2,3]"])
    assert (args.config, args.checkpoint, args.overrides) == ("c.yaml", "k", ["a.b=1", "d=[2,3]"])


# -------------------------------------------------------------------------------- a user's mistakes
def broken_directory(trained_run, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(trained_run[1] / "final", folder)
    change(folder / "model.safetensors")
    return str(folder)


def without(words, flag, value=None):
    """`words` with the value of a flag replaced, or the flag removed."""
    at = words.index(flag)
    return words[:at] + ([flag, str(value)] if value is not None else []) + words[at + 2 :]


MISTAKES = {
    "missing image": (
        lambda w, t: without(w, "--image_path", t / "none.jpg"),
        "none.jpg: no such picture",
    ),
    "image directory without pictures": (
        lambda w, t: without(w, "--image_path", t / "empty"),
        "holds no picture",
    ),
    "text named .jpg": (
        lambda w, t: without(w, "--image_path", t / "text.jpg"),
        "text.jpg: not a readable picture",
    ),
    "empty file named .png": (
        lambda w, t: without(w, "--image_path", t / "void.png"),
        "void.png: not a readable picture",
    ),
    "unknown key": (
        lambda w, t: [*w, "model.ruting=paper"],
        "unknown key model.ruting; did you mean model.routing?",
    ),
    "wrong type": (lambda w, t: [*w, "model.dim=wide"], "wrong type for model.dim"),
    "impossible": (lambda w, t: [*w, "model.num_heads=5"], "model.num_heads=5"),
    "not an override": (lambda w, t: [*w, "paper"], "'paper' is not an override"),
    "missing configuration": (
        lambda w, t: without(w, "--config", t / "none.yaml"),
        "none.yaml: no such configuration file",
    ),
    "broken configuration": (lambda w, t: without(w, "--config", t / "text.jpg"), "text.jpg"),
    "missing checkpoint": (
        lambda w, t: without(w, "--checkpoint", t / "none"),
        "none: no such checkpoint",
    ),
    "empty checkpoint": (
        lambda w, t: without(w, "--checkpoint", t / "empty"),
        "so it is no checkpoint of MUSE",
    ),
    "text as checkpoint": (
        lambda w, t: without(w, "--checkpoint", t / "text.jpg"),
        "text.jpg: not a checkpoint",
    ),
    "another size": (
        lambda w, t: [*w, "model.num_blocks=3"],
        "a checkpoint of another size: its model.num_blocks is 2",
    ),
    "another routing": (lambda w, t: [*w, "model.routing=release"], "pass model.routing=paper"),
    "output is a file": (
        lambda w, t: without(w, "--output_dir", t / "text.jpg"),
        "text.jpg: cannot be written",
    ),
    "output below a file": (
        lambda w, t: without(w, "--output_dir", t / "text.jpg/out"),
        "cannot be written",
    ),
    "output over the input": (
        lambda w, t: without(without(w, "--image_path", t / "photo.png"), "--output_dir", t),
        "would be overwritten",
    ),
    "no such device": (
        lambda w, t: without(w, "--device", "tpu"),
        "--device tpu: not available here",
    ),
    "a flag left out": (lambda w, t: without(w, "--image_path"), "no input: name a file"),
    "no side at all": (lambda w, t: [*w, "--max_side", "0"], "--max_side must be at least 1"),
    "no batch at all": (lambda w, t: [*w, "--batch_size", "0"], "--batch_size must be at least"),
    "an unknown flag": (lambda w, t: [*w, "--imge", "x"], "--imge"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, flags, photo, tmp_path, capsys):
    change, words = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("this is: [text")
    (tmp_path / "void.png").write_bytes(b"")
    picture(3, 53, 37).save(tmp_path / "photo.png")
    right = [*flags, "--image_path", photo, "--output_dir", str(tmp_path / "out")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = one_error(capsys, inference.main(change(right, tmp_path)))
    assert words in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "truncated",
            lambda file: file.write_bytes(file.read_bytes()[:-64]),
            "not a readable safetensors file",
        ),
        (
            "a tensor less",
            lambda file: save_file(
                {k: v for k, v in load_file(file).items() if k != "logit_scale"}, file
            ),
            "logit_scale",
        ),
        (
            "a tensor more",
            lambda file: save_file({**load_file(file), "teacher.weight": torch.zeros(1)}, file),
            "teacher.weight",
        ),
        ("gone", lambda file: file.unlink(), "no checkpoint of MUSE"),
    ],
)
def test_broken_weights_are_named(name, change, words, flags, trained_run, photo, tmp_path, capsys):
    words_in = without(flags, "--checkpoint", broken_directory(trained_run, tmp_path, change))
    line = one_error(
        capsys,
        inference.main([*words_in, "--image_path", photo, "--output_dir", str(tmp_path / "out")]),
    )
    assert words in line and not list((tmp_path / "out").glob("*"))


def test_one_unreadable_picture_among_others(flags, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    picture(0, 16, 16).save(tmp_path / "in/a.png")
    (tmp_path / "in/b.jpg").write_text("text")
    code = inference.main(
        [*flags, "--image_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    )
    assert "b.jpg: not a readable picture" in one_error(capsys, code)
    names = ["a.png", "a_compare.png", "reconstructions.csv"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_a_directory_without_permission(flags, photo, tmp_path, monkeypatch, capsys):
    """Tests may run as root, whom no permission stops: the system call itself says no."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    line = one_error(
        capsys,
        inference.main([*flags, "--image_path", photo, "--output_dir", str(tmp_path / "out")]),
    )
    assert "cannot be written (Permission denied)" in line


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("stage", TRAIN)
def test_stage_scripts_train_and_inference_reads_what_they_leave(
    stage, shapes_data, photo, tmp_path
):
    config = run_config(
        tmp_path / "c.yaml",
        shapes_data,
        tmp_path / "unused",
        stage,
        {"training": {"max_train_steps": 1}},
    )
    assert (
        TRAIN[stage].main(
            ["--config", str(config), "--device", "cpu", f"experiment.output_dir={tmp_path}/run"]
        )
        == 0
    )
    assert not (tmp_path / "unused").exists() and (tmp_path / "run/final/config.json").is_file()
    words = ["--config", str(config), "--checkpoint", f"{tmp_path}/run/final", "--device", "cpu"]
    assert (
        inference.main([*words, "--image_path", photo, "--output_dir", str(tmp_path / "out")]) == 0
    )


TRAINING_MISTAKES = {
    "another stage's script": (
        "training.stage=semantic_injection",
        "training.stage=semantic_injection, this script trains topology_warmup",
    ),
    "no such data": (
        "dataset.params.train_shards_path_or_url=/nowhere/train-*.tar",
        "no such shard: /nowhere/train-*.tar",
    ),
    "empty data directory": ("dataset.params.train_shards_path_or_url={folder}/empty", "empty"),
    "unset variable": (
        "dataset.params.train_shards_path_or_url=${{oc.env:MUSE_TEST_UNSET}}/x.tar",
        "MUSE_TEST_UNSET",
    ),
    "unset output": ("experiment.output_dir=${{oc.env:MUSE_TEST_UNSET}}/run", "MUSE_TEST_UNSET"),
    "too many workers": (
        "dataset.params.num_workers_per_gpu=9",
        "has 8 shards for 1 ranks x 9 workers",
    ),
    "missing stage before": (
        "experiment.init_from={folder}/stage0",
        "no such checkpoint; run the stage before this one",
    ),
    "stage before of another size": ("experiment.init_from={other}", "another size"),
    "output is a file": ("experiment.output_dir={folder}/file", "cannot be written"),
    "global batch": ("training.global_batch_size=7", "training.global_batch_size=7"),
    "no weights for a loss": ("losses.perceptual.name=nonsense", "nonsense"),
    "no teacher there": ("teacher.topology.kind=dinov3", "teacher"),
}


@pytest.mark.parametrize("mistake", TRAINING_MISTAKES)
def test_a_mistake_in_training_is_one_line_and_leaves_nothing(
    mistake, shapes_data, trained_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("MUSE_TEST_UNSET", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    override, words = TRAINING_MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    config = run_config(
        tmp_path / "c.yaml",
        shapes_data,
        tmp_path / "run",
        "topology_warmup",
        {"model": {"num_heads": 4}},
    )
    override = override.format(folder=tmp_path, other=trained_run[1] / "final")
    line = one_error(
        capsys, train_stage1.main(["--config", str(config), "--device", "cpu", override])
    )
    assert words in line
    assert not [
        path for name in ("final", "checkpoint-*", "metrics.jsonl") for path in tmp_path.rglob(name)
    ]
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_shipped_configurations_name_the_variable_they_need(monkeypatch, shapes_data, capsys):
    monkeypatch.delenv("CHECKPOINT_DIR", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    words = ["--config", str(ROOT / "configs/muse_1b/stage1.yaml"), "--device", "cpu"]
    line = one_error(capsys, train_stage1.main(words))
    assert "DATA_DIR" in line and "dataset.params.train_shards_path_or_url" in line
    data = f"dataset.params.train_shards_path_or_url={shapes_data}/train-*.tar"
    line = one_error(capsys, train_stage1.main([*words, data]))
    assert "CHECKPOINT_DIR" in line and "experiment.output_dir" in line


def test_all_samples_unreadable_stops_the_run(tmp_path, shapes_data, capsys):
    write_tar(tmp_path / "bad.tar", {f"{n}": {"jpg": b"text", "txt": b"x"} for n in range(4)})
    config = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run")
    words = [
        "--config",
        str(config),
        "--device",
        "cpu",
        f"dataset.params.train_shards_path_or_url={tmp_path}/bad.tar",
    ]
    line = one_error(capsys, train_stage1.main(words))
    assert "bad.tar" in line or "samples" in line
    assert not (tmp_path / "run/final").exists()


# ------------------------------------------------------------------------- flags of the release
REFUSED = [
    ("linear_probe", "--mode zero_shot", "--mode: zero-shot is scripts/zero_shot.py"),
    ("linear_probe", "--num-gpus 8", "--num-gpus: this script is one process; a launcher"),
    ("zero_shot", "--mode both", "--mode: nothing is trained here; the linear probe is"),
    ("zero_shot", "--lp_lr 0.1", "--lp_lr: nothing is trained here"),
    ("zero_shot", "--lp_epochs=90", "--lp_epochs: nothing is trained here"),
    ("segment_probe", "--epochs 10", "--epochs: this probe counts optimizer steps; use --steps"),
    ("segment_probe", "--master-port 29500", "--master-port: this script is one process"),
    ("evaluate", "--num_gpus 8", "--num_gpus: this script is one process"),
    ("train_stage1", "--epochs 3", "--epochs: training counts optimizer steps; use training.max"),
    ("train_stage1", "--lr 1e-4", "--lr: use optimizer.params.learning_rate=X"),
    ("train_stage2", "--master_port 1", "--master_port: this script is one process"),
    ("train_stage1", "checkpoint_path=k", "unknown key checkpoint_path"),
    ("zero_shot", "img_path=i.png", "unknown key img_path"),
]


@pytest.mark.parametrize(("script", "words", "message"), REFUSED)
def test_flags_of_the_release_without_a_meaning_here_are_refused_by_name(
    script, words, message, flags, capsys
):
    given = flags[:2] if script.startswith("train") else flags
    main = importlib.import_module(f"scripts.{script}").main
    assert message in one_error(capsys, main([*given, *words.split()]))


def test_flags_of_the_release_with_a_meaning_here(monkeypatch, flags, photo, tmp_path):
    """`--lp_lr`, `--lp_epochs`, `--lr`, `--max-images` and the bare words reach what they name."""
    seen = {}

    def spy(name, module):
        monkeypatch.setattr(module, name, lambda *args: seen.update({name: args}))

    spy("run_linear_probe", linear_probe)
    spy("run_segment_probe", segment_probe)
    output = ["--output_dir", str(tmp_path / "out"), "--max-images", "3"]
    words = ["--lp_lr", "0.25", "--lp-epochs", "7", *output]
    assert linear_probe.main([*flags, *words]) == 0
    setup, recipe = seen["run_linear_probe"][:2]
    assert (recipe.learning_rates, recipe.epochs, setup.max_images) == ((0.25,), 7, 3)
    assert segment_probe.main([*flags, "--mode", "muse", "--lr", "0.01", *output]) == 0
    assert seen["run_segment_probe"][0].protocol.recipe.learning_rates == (0.01,)
    bare = [f"config={flags[1]}", f"checkpoint_path={flags[3]}", f"img_path={photo}"]
    assert inference.main([*bare, "--device", "cpu", "--output_dir", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/photo.png").is_file()


# -------------------------------------------------------------------------------- the authors' file
@pytest.fixture
def authors_file(trained_run, tmp_path):
    """(configuration under the paper's routing, a file in the authors' layout)."""
    folder = tmp_path / "authors"
    folder.mkdir()
    model = MUSE_ViT.from_pretrained(trained_run[1] / "final")
    write_release_file(folder / "pytorch_model.bin", to_release(model.state_dict()))
    return str(trained_run[0]), str(folder / "pytorch_model.bin")


def test_a_command_runs_the_authors_file_under_their_routing_and_records_it(
    authors_file, photo, tmp_path, caplog
):
    config, file = authors_file
    words = ["--config", config, "--checkpoint", file, "--device", "cpu"]
    args = cli.parse(cli.parser("x", checkpoint=True), [*words, "training.seed=3"])
    cfg = cli.load_cfg(args)
    assert load_config(config).model.routing == "paper"
    assert cfg.model.routing == "release" and cfg.model.join_semantics is False
    assert cfg.training.seed == 3
    assert cli.protocol(args, cfg)["config"]["model"]["routing"] == "release"
    assert f"{file}: the authors' weights, so model.routing=release" in caplog.text
    picture_words = ["--image_path", photo, "--output_dir"]
    assert inference.main([*words, *picture_words, str(tmp_path / "a")]) == 0
    given = [*words, "model.routing=release", *picture_words, str(tmp_path / "b")]
    assert inference.main(given) == 0
    assert (tmp_path / "a/photo.png").read_bytes() == (tmp_path / "b/photo.png").read_bytes()


@pytest.mark.parametrize("override", ["model.routing=paper", "model.join_semantics=true"])
def test_a_command_refuses_the_authors_file_under_a_routing_of_the_user_s(
    override, authors_file, photo, tmp_path, capsys
):
    config, file = authors_file
    words = ["--config", config, "--checkpoint", file, "--device", "cpu", override]
    words += ["--image_path", photo, "--output_dir", str(tmp_path / "out")]
    line = one_error(capsys, inference.main(words))
    assert f"the authors' weights give other outputs with {override}; pass model." in line
    assert not list((tmp_path / "out").glob("*"))


def test_training_from_the_authors_file_under_the_papers_routing_is_refused(
    authors_file, tmp_path, capsys
):
    config, file = authors_file
    words = ["--config", config, "--device", "cpu", f"experiment.init_from={file}"]
    line = one_error(capsys, train_stage2.main([*words, f"experiment.output_dir={tmp_path}/run"]))
    assert "pass model.routing=release" in line and "tools/convert_checkpoint.py" in line


# ------------------------------------------------------------------------------- attention pictures
def test_attention_of_one_picture_and_of_many(flags, photo, tmp_path, capsys):
    assert (
        visualize_attention.main([*flags, "--image", photo, "--output", str(tmp_path / "one")]) == 0
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / "one/photo_attention.png")]
    columns, side, rows = 5, 32, 3  # five queries; the picture and two blocks
    assert Image.open(tmp_path / "one/photo_attention.png").size == (
        110 + columns * (side + 4) + 4,
        rows * (side + 4) + 4,
    )
    assert (
        visualize_attention.main(
            [*flags, "--mode", "batch", "--num_images", "3", "--output", str(tmp_path / "many")]
        )
        == 0
    )
    assert Image.open(tmp_path / "many/attention.png").size == (
        110 + 3 * (side + 4) + 4,
        rows * (side + 4) + 4,
    )


def test_attention_in_the_style_of_the_release(flags, photo, tmp_path):
    """Three heads would be three rows; the tiny model has two."""
    words = [*flags, "--style", "release", "--output"]
    assert visualize_attention.main([*words, str(tmp_path), f"img_path={photo}"]) == 0
    side, rows = 32, 3  # the picture and two heads
    assert Image.open(tmp_path / "photo_attention.png").size == (
        110 + side + 4 + 4,
        rows * (side + 4) + 4,
    )
    batch = [*words, str(tmp_path / "many"), "--mode", "batch", "--max-images", "3"]
    assert visualize_attention.main(batch) == 0
    assert Image.open(tmp_path / "many/attention.png").size[0] == 110 + 3 * (side + 4) + 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "single needs --image"),
        (["--image", "{folder}/none.png"], "no such picture"),
        (["--image", "{photo}", "--query", "0.5", "1.5"], "fractions between 0 and 1, got 1.5"),
        (["--image", "{photo}", "--query", "a", "b"], "--query"),
        (
            ["--image", "{photo}", "--style", "release", "--query", "0.5", "0.5"],
            "--query is for --style query",
        ),
    ],
)
def test_attention_mistakes(words, message, flags, photo, tmp_path, capsys):
    words = [word.format(folder=tmp_path, photo=photo) for word in words]
    line = one_error(
        capsys, visualize_attention.main([*flags, *words, "--output", str(tmp_path / "out")])
    )
    assert message in line and not list(tmp_path.rglob("*.png"))


# ------------------------------------------------------------------------------------ shared pieces
def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "deep/metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "deep/metrics.json", {"a": object()})
    assert json.loads((tmp_path / "deep/metrics.json").read_text()) == {"a": 1} and os.listdir(
        tmp_path / "deep"
    ) == ["metrics.json"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MuseError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_file_is_the_old_one_or_the_new_one(error, raised, tmp_path):
    target = tmp_path / "deep" / "a.png"
    with atomic_file(target, durable=True) as partial:
        partial.write_text("old")
        assert partial.suffix == ".png" and not target.exists()
    assert target.stat().st_mode & 0o777 == 0o644
    with pytest.raises(raised) as caught:
        with atomic_file(target) as partial:
            partial.write_text("half")
            raise error
    if raised is MuseError:
        assert str(caught.value) == f"{target}: cannot be written (No space left on device)"
    assert target.read_text() == "old" and os.listdir(target.parent) == ["a.png"]


def test_bugs_keep_their_traceback():
    @cli.entry
    def main(argv=None):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main([])


@pytest.mark.parametrize("lines", [1, 100_000])  # flushed at the end; in the middle of printing
def test_a_reader_that_has_gone_is_no_error(lines):
    code = (
        f"from muse import cli\nraise SystemExit(cli.entry(lambda _: print('row\\n' * {lines}))())"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_pipe_that_is_not_stdout_is_a_bug():
    def main(_):
        raise BrokenPipeError(errno.EPIPE, "a worker's pipe")

    with pytest.raises(BrokenPipeError):
        cli.entry(main)()


def test_the_log_follows_a_redirected_stderr(capsys):
    for _ in range(2):
        cli.setup_logging()
        logging.getLogger("muse.test").warning("one line")
        written = capsys.readouterr().err
        assert written.count("one line") == 1 and "Traceback" not in written


def test_protocol_names_what_was_used(trained_run):
    config, run = trained_run
    words = ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]
    args = cli.parse(cli.parser("x", checkpoint=True), words)
    facts = cli.protocol(args, load_config(config), images=3)
    digest = hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest()
    assert facts["checkpoint"]["sha256"] == digest and facts["images"] == 3 and facts["seed"] == 42
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0]
        or facts["versions"]["torch"] == torch.__version__
    )
    assert facts["config"]["model"]["dim"] == 32
    json.dumps(facts)


@pytest.mark.parametrize(
    "script",
    sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__"),
)
def test_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"scripts.{script}").main(["--help"])
    assert caught.value.code == 0 and "usage:" in capsys.readouterr().out


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['x', '--help']\nimport muse\nfrom scripts import inference\n"
        "try:\n    inference.main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("False"), done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        "train_stage.sh",
        "visualize_attention.sh",
        "evaluate.sh",
        "segment_probe.sh",
    ],
)
def test_launchers_without_arguments_say_how_they_are_used(launcher):
    environment = {**os.environ, "MUSE_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "tools" / launcher],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: usage: ")
        and len(done.stderr.splitlines()) == 1
    )
