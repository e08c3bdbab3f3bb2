"""encode, decode, embed and info as a user calls them, with the model that comes with muse."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from muse import MUSE_ViT, cli
from muse.commands.embed_pictures import embed_texts
from muse.errors import DataError
from muse.inference import read_image
from muse.models.release_weights import to_release, write_release_file
from muse.utils.io import file_sha256
from muse.utils.weights import packaged
from scripts import decode, embed, encode, inference, info
from tests.data.helpers import picture
from tests.helpers import one_error, tiny_model


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(53, 37), (64, 64), (53, 37)]):
        picture(number, *size).save(tmp_path / f"in/{number}.png")
    return tmp_path


def test_there_and_back_is_the_reconstruction(photos):
    assert encode.main(["in"]) == decode.main(["latents"]) == inference.main(["in"]) == 0
    for number in range(3):
        there, here = (photos / f"{f}/{number}.png" for f in ("decoded", "reconstructions"))
        assert (read_image(there) - read_image(here)).abs().max() < 1.5 / 255
        with safe_open(photos / f"latents/{number}.safetensors", "pt") as file:
            facts, latent = file.metadata(), file.get_tensor("latent")
        image = read_image(photos / f"in/{number}.png")
        assert (int(facts["height"]), int(facts["width"])) == tuple(image.shape[1:])
        assert facts["tokenizer_sha256"] == file_sha256(packaged("muse_tiny") / "model.safetensors")
        assert latent.shape == (64, *(-(-side // 16) for side in image.shape[1:]))


def test_latents_of_another_model_are_refused(photos, capsys):
    tiny_model().save_pretrained(photos / "other")
    assert encode.main(["in/0.png", "--checkpoint", "other", "--dtype", "float16"]) == 0
    line = one_error(capsys, decode.main(["latents"]))
    assert "latents of another tokenizer" in line and not list((photos / "decoded").glob("*"))
    assert decode.main(["latents", "--checkpoint", "other"]) == 0
    (photos / "latents/0.safetensors").write_bytes(b"text")
    assert "not a latent that muse encode wrote" in one_error(capsys, decode.main(["latents"]))
    assert "no latents here" in one_error(capsys, decode.main(["nowhere"]))


def test_embeddings_are_the_model_s_in_either_file(photos):
    assert embed.main(["in", "--output", "e.npy"]) == embed.main(["in/*.png"]) == 0
    stored = np.load("e.npy")
    names = json.loads((photos / "e.names.json").read_text())
    with open("embeddings.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:2] == ["file", "e0"] and [row[0] for row in rows] == names
    model = MUSE_ViT.from_pretrained("muse_tiny")
    for name, values, row in zip(names, stored, rows):
        with torch.no_grad():
            expected = model.embed_image(read_image(name)[None])[0].numpy()
        assert np.allclose(values, expected, atol=1e-5)
        assert np.allclose([float(value) for value in row[1:]], values, atol=1e-7)


def test_texts_against_pictures(photos, capsys):
    words = ["in", "--text", "a cow", "--texts", "labels.txt", "--output", "e.npy"]
    (photos / "labels.txt").write_text("a red car\n\na cow\n")
    assert embed.main(words) == 0
    with open("e_texts.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "a cow", "a red car"]
    texts = embed_texts(head[1:], "muse_tiny", None).numpy()
    found = [[float(value) for value in row[1:]] for row in rows]
    assert np.allclose(found, np.load("e.npy") @ texts.T, atol=1e-5)
    tiny_model().save_pretrained(photos / "other")
    line = one_error(capsys, embed.main([*words, "--checkpoint", "other"]))
    assert "does not say which text tower" in line and "--config" in line


def test_mistakes(photos, capsys):
    for main, words, message in (
        (encode.main, [], "no input: name a file"),
        (encode.main, ["none.png"], "no such picture"),
        (embed.main, ["in", "--output", "e.txt"], "must end in .csv or .npy"),
        (inference.main, ["in", "training.seed=1"], "without --config only keys of model"),
        (inference.main, ["in", "model.num_blocks=3"], "another size"),
        (inference.main, ["in", "--checkpoint", "in"], "no checkpoint of MUSE"),
    ):
        assert message in one_error(capsys, main(words))


# --- info
def shown(capsys, *words):
    assert info.main(list(words)) == 0
    return capsys.readouterr().out


def test_info_of_what_comes_with_the_package(capsys):
    text = shown(capsys)
    model = MUSE_ViT.from_pretrained("muse_tiny")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert file_sha256(packaged("muse_tiny") / "model.safetensors") in text
    assert "tokenizer (comes with the package)" in text and "yes  reconstruct" in text


def test_info_of_every_form_of_a_run(trained_run, capsys, tmp_path):
    _, run = trained_run
    model = MUSE_ViT.from_pretrained(run / "final")
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    assert "tokenizer (training run, its final)" in shown(capsys, str(run))
    training = shown(capsys, str(run / "checkpoint-2"))
    assert "training checkpoint" in training and "yes  resume training" in training
    assert count in training and count in shown(capsys, str(run / "final/model.safetensors"))
    write_release_file(tmp_path / "pytorch_model.bin", to_release(model.state_dict()))
    assert "the authors' weights (one file" in shown(capsys, str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{}", "a configuration, no weights"),
        ("a.jpg", "text", "no file of weights"),
        ("a.bin", "text", "not a file that loads with weights_only=True"),
        ("a.safetensors", "text", "not a readable safetensors file"),
    ],
)
def test_info_says_what_is_no_checkpoint(name, content, words, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert words in one_error(capsys, info.main([str(tmp_path / name)]))
    line = one_error(capsys, info.main([str(tmp_path / "none")]))
    assert "none: no such checkpoint" in line
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in one_error(capsys, info.main([str(tmp_path / "empty")]))


def test_a_json_is_not_the_authors_weights(tmp_path, capsys, caplog):
    (tmp_path / "a.json").write_text("{}")
    words = ["--config", "muse_tiny/stage3", "--checkpoint", str(tmp_path / "a.json")]
    assert cli.load_cfg(cli.parse(cli.parser("x", checkpoint=True), words)).model.routing == "paper"
    assert "the authors' weights" not in caplog.text


def test_a_picture_with_an_equals_sign_is_a_picture(photos):
    picture(0, 20, 20).save(photos / "a=b.png")
    assert inference.main(["a=b.png"]) == 0
    assert (photos / "reconstructions/a=b.png").is_file()
    with pytest.raises(DataError):
        read_image(photos / "none.png")
