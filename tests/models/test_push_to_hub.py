"""The card that is written with a model, and its way to the hub, which is faked here."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from muse import MUSE_ViT
from muse.errors import MuseError
from muse.models import pretrained
from tests.helpers import random_images, tiny_model


def test_a_saved_model_has_a_card(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["license"] == "apache-2.0" and fields["library_name"] == "muse-tokenizer"
    lines = [line.strip("| ").split(" | ") for line in body.splitlines() if line.count("|") == 3]
    rows = dict(line for line in lines if len(line) == 2)
    assert int(rows["parameters"].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert rows["latent_dim"] == "8" and rows["encoder initialised from"] == "random"
    assert "MUSE_ViT.from_pretrained(" in body and "Licence" in body


class FakeHub:
    """Keeps what `upload_folder` is given."""

    def __init__(self, kept, error=None):
        self.kept, self.error = kept, error

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if self.error:
            raise self.error
        assert exist_ok
        self.private = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, commit_message):
        for file in folder_path.iterdir():
            (self.kept / file.name).write_bytes(file.read_bytes())
        return f"https://hub/{repo_id}/commit/1"


def test_what_is_uploaded_is_the_model(tmp_path, monkeypatch):
    hub, model, images = FakeHub(tmp_path), tiny_model(), random_images()
    monkeypatch.setattr(pretrained, "HfApi", hub)
    assert model.push_to_hub("me/tiny", private=True, token="t").startswith("https://hub/me/tiny")
    assert (hub.private, hub.token) == (True, "t")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    again = MUSE_ViT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.reconstruct(images), model.reconstruct(images))


def test_a_refusal_of_the_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "HfApi", FakeHub(tmp_path, OSError("no\nnetwork")))
    with pytest.raises(MuseError, match=r"^me/tiny: cannot be uploaded \(no network\)$"):
        tiny_model().push_to_hub("me/tiny")
