"""`muse download` against a hub that is faked: what is asked for, verified, refused."""

import hashlib
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file

from muse import load_config
from muse.commands import download_weights as download
from muse.errors import CheckpointError
from muse.models.internvit import build_encoder
from muse.utils.io import file_sha256
from scripts import download as script
from tests.helpers import one_error, tiny_model

ENCODER, DECODER = "OpenGVLab/InternVL3-1B-hf", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
TEACHER = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
TEXT = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"


def parts(**changes):
    cfg = load_config("muse_1b/stage1", [f"{k}={v}" for k, v in changes.items()])
    return download.needed_weights(cfg, lambda source: TEXT if source.startswith("ViT-L") else "")


def test_what_a_configuration_needs():
    named = {part.repo_id: part for part in parts()}
    assert list(named) == [ENCODER, DECODER, TEACHER, TEXT]
    assert named[ENCODER].key == "model.encoder.source"
    assert named[TEACHER].key == "teacher.topology.source"
    forbidden = (".bin", ".py", ".pt", "*.*", ".pkl")
    assert not [one for part in parts() for one in part.patterns if one.endswith(forbidden)]
    own = {p.repo_id: p for p in parts(**{"teacher.topology.source": f"internvit:{ENCODER}"})}
    assert own[ENCODER].key == "model.encoder.source, teacher.topology.source"
    assert TEACHER not in own
    tiny = load_config("muse_tiny/stage1", ["model.encoder.source=muse_tiny"])
    assert download.needed_weights(tiny, lambda source: "") == []


def test_open_clip_s_own_table_says_where_its_weights_are():
    pytest.importorskip("open_clip")
    assert download.open_clip_hub_id("ViT-L-14/laion2b_s32b_b82k") == TEXT


class FakeHub:
    """Repositories as folders; counts what was fetched."""

    def __init__(self, repos):
        self.repos, self.fetched, self.token = repos, [], None

    def __call__(self, token=None):
        self.token = token
        return self

    def repo_info(self, repo_id, files_metadata):
        assert files_metadata
        if repo_id not in self.repos:
            response = SimpleNamespace(headers={}, request=None, status_code=403)
            raise GatedRepoError("403 Client Error", response=response)
        rows = []
        for name, data in self.repos[repo_id].items():
            lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            lfs = lfs if name.endswith("safetensors") else None
            rows.append(SimpleNamespace(rfilename=name, size=len(data), lfs=lfs))
        return SimpleNamespace(sha="abc", siblings=rows)

    def snapshot(self, repo_id, revision, allow_patterns, local_dir, token):
        assert revision == "abc"
        self.fetched.append(repo_id)
        local_dir.mkdir(parents=True)
        for name, data in self.repos[repo_id].items():
            if any(name == one or name.endswith(one.lstrip("*")) for one in allow_patterns):
                (local_dir / name).write_bytes(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path / "source")
    files = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    fake = FakeHub({ENCODER: {**files, "modeling.py": b"import os", "old.bin": b"x"}})
    monkeypatch.setattr(download, "HfApi", fake)
    monkeypatch.setattr(download, "snapshot_download", fake.snapshot)
    return fake


ENCODER_PART = [download.NeededWeights("model.encoder.source", ENCODER, download.SOURCE_FILES)]


def test_a_part_is_fetched_once_and_used_without_the_hub(hub, tmp_path, monkeypatch):
    root = tmp_path / "all"
    (first,), (second,) = (download.fetch_weights(ENCODER_PART, root) for _ in range(2))
    assert first == second and not first.problem and hub.fetched == [ENCODER]
    names = {file.name for file in first.folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "muse_download.json"}  # no code, no pickle
    stored = sum(file.stat().st_size for file in first.folder.iterdir() if "muse_" not in file.name)
    assert first.bytes == stored
    monkeypatch.setenv("CHECKPOINT_DIR", str(root))
    encoder = build_encoder(ENCODER, {})
    weights = load_file(tmp_path / "source/model.safetensors")
    assert encoder.state_dict()["embeddings.cls_token"].equal(
        weights["encoder.embeddings.cls_token"]
    )


def test_a_damaged_file_is_named(hub, tmp_path):
    (done,) = download.fetch_weights(ENCODER_PART, tmp_path)
    file = done.folder / "model.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    (again,) = download.fetch_weights(ENCODER_PART, tmp_path)
    assert f"{file}: its sha256 is not the hub's" in again.problem
    file.write_bytes(right[:-1])
    with pytest.raises(CheckpointError, match=f"in place of {len(right)} bytes"):
        download.verify(done.folder, ENCODER)
    file.write_bytes(right)
    assert download.verify(done.folder, ENCODER) == done.bytes
    with pytest.raises(CheckpointError, match="choose another --output"):
        download.verify(done.folder, "other/InternVL3-1B-hf")


def test_a_transfer_that_ends_early_is_no_complete_folder(hub, tmp_path, monkeypatch):
    def cut(repo_id, revision, allow_patterns, local_dir, token):
        hub.snapshot(repo_id, revision, allow_patterns, local_dir, token)
        (local_dir / "model.safetensors").write_bytes(b"half")

    monkeypatch.setattr(download, "snapshot_download", cut)
    (done,) = download.fetch_weights(ENCODER_PART, tmp_path)
    assert "4 bytes in place of" in done.problem
    assert not (done.folder / download.MANIFEST).exists()


def test_the_command_says_what_is_gated_and_fetches_the_rest(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "open_clip_hub_id", lambda source: "")
    words = ["--config", "muse_1b/stage1", "--output", str(tmp_path / "all")]
    hub.repos[DECODER] = {"config.json": b"{}", "diffusion.safetensors": b"0" * 9}
    line_count = 1
    code = script.main(words)
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == line_count
    assert TEACHER in errors[0] and f"https://huggingface.co/{TEACHER}" in errors[0]
    assert "hf auth login" in errors[0]
    assert f"{DECODER} -> {tmp_path}/all/dc-ae-f32c32-sana-1.1-diffusers (11 bytes)" in shown.out
    assert f"export CHECKPOINT_DIR={tmp_path}/all" in shown.out
    file = tmp_path / "all/dc-ae-f32c32-sana-1.1-diffusers/diffusion.safetensors"
    assert file_sha256(file) == hashlib.sha256(b"0" * 9).hexdigest()


def test_listing_fetches_nothing(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "open_clip_hub_id", lambda source: TEXT)
    monkeypatch.chdir(tmp_path)
    assert script.main(["--config", "muse_1b/stage1", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (ENCODER, DECODER, TEACHER, TEXT))
    assert not hub.fetched and not (tmp_path / "checkpoints").exists()
    assert "no such configuration" in one_error(capsys, script.main(["--config", "nothing"]))
