"""Extraction: every picture once, counts exact, stopped and resumed, one or several processes."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file

from muse.data.dataloader import eval_loader
from muse.errors import CheckpointError, DataError
from muse.evaluation.measurement import Crop
from muse.generation import LatentShards, LatentStatistics
from muse.generation.extraction import ExtractionPlan, extract_latents
from muse.generation.latent_tokenizer import open_tokenizer, tokenizer_sha256
from muse.utils.io import file_sha256
from scripts import extract_latents as script
from tests.data.helpers import encode, picture, write_tar
from tests.generation.conftest import save_tokenizer
from tests.helpers import one_error
from tests.training.processes import Forked

PLAN = ExtractionPlan(Crop(32, 32), flip=True, batch_size=5)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return open_tokenizer(tokenizer_dir)


def test_latents_are_those_of_the_model(latents_dir, tokenizer, shapes_data):
    """Half precision of `encode`, of the picture and of its mirror image, with label and key."""
    read = {record.key: record for record in LatentShards(latents_dir)}
    seen = 0
    for batch in eval_loader(
        f"{shapes_data}/train-*.tar",
        batch_size=8,
        fields=("images", "labels"),
        resize_shorter_edge=32,
        crop_size=32,
    ):
        plain = tokenizer.model.encode(batch["images"]).latent
        mirrored = tokenizer.model.encode(batch["images"].flip(-1)).latent
        for i, key in enumerate(batch["keys"]):
            assert read[key].label == int(batch["labels"][i])
            stored = read[key].latents.float()
            torch.testing.assert_close(stored[0], plain[i].detach(), atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(stored[1], mirrored[i].detach(), atol=2e-3, rtol=2e-3)
            seen += 1
    assert seen == len(read) == 64


def test_the_index_names_tokenizer_counts_and_settings(latents_dir, tokenizer_dir):
    index = json.loads((latents_dir / "latents.json").read_text())
    assert index["tokenizer_sha256"] == file_sha256(tokenizer_dir / "model.safetensors")
    assert (index["count"], index["skipped"], index["views"]) == (64, 0, 2)
    assert index["shape"] == [8, 4, 4] and len(index["shards"]) == 8
    assert index["notes"]["checkpoint"]["path"] == str(tokenizer_dir)
    assert (index["notes"]["crop"], index["notes"]["flip"]) == (32, True)


def test_statistics_are_those_of_all_stored_latents(latents_dir, tokenizer_dir):
    latents = torch.cat([record.latents for record in LatentShards(latents_dir)]).double()
    statistics = LatentStatistics.load(
        latents_dir / "statistics.safetensors", tokenizer_sha256(tokenizer_dir)
    )
    assert statistics.count == len(latents) == 128
    torch.testing.assert_close(statistics.mean.flatten(), latents.mean((0, 2, 3)))
    std = latents.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(statistics.std.flatten(), std)


def contents(folder):
    """Bytes of every file; tensors of the statistics, whose metadata have no order."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    statistics = load(files.pop("statistics.safetensors"))
    return files | {name: tensor.tolist() for name, tensor in statistics.items()}


def test_it_goes_on_where_it_stopped(latents_dir, tokenizer, shapes_data, tmp_path, monkeypatch):
    source, whole = [f"{shapes_data}/train-*.tar"], tmp_path / "latents"
    calls = []
    encode_all = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda x: calls.append(len(x)) or encode_all(x))
    extract_latents(tokenizer, source, whole, PLAN)
    assert sum(calls) == 128
    before = contents(whole)

    for name in ("latents-000002.tar", "latents-000005.tar", "latents.json"):
        (whole / name).unlink()
    calls.clear()
    extract_latents(tokenizer, source, whole, PLAN)
    assert sum(calls) == 2 * 2 * 8  # two shards of eight pictures, twice each
    assert contents(whole) == before

    calls.clear()
    assert extract_latents(tokenizer, source, whole, PLAN)["count"] == 64
    assert calls == []


def test_a_folder_of_other_latents_is_refused(tokenizer, shapes_data, tmp_path):
    source = [f"{shapes_data}/val-*.tar"]
    extract_latents(tokenizer, source, tmp_path / "latents", PLAN)
    other = open_tokenizer(save_tokenizer(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="latents of another tokenizer"):
        extract_latents(other, source, tmp_path / "latents", PLAN)
    small = ExtractionPlan(Crop(16, 16), flip=True)
    with pytest.raises(DataError, match="latents of other pictures.*resized to 32"):
        extract_latents(tokenizer, source, tmp_path / "latents", small)
    with pytest.raises(DataError, match="latents of other pictures"):
        extract_latents(tokenizer, [f"{shapes_data}/train-*.tar"], tmp_path / "latents", PLAN)
    (tmp_path / "latents/foreign.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"foreign\.tar"):
        extract_latents(tokenizer, source, tmp_path / "latents", PLAN)


def test_class_folders_and_shards_together(tokenizer, shapes_data, tmp_path):
    """Folders are cut into shards that each mix the classes."""
    for number in range(12):
        folder = tmp_path / "pictures" / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, 32, 32).save(folder / f"{number}.v1.png")
    plan = ExtractionPlan(Crop(32, 32), images_per_shard=5)
    sources = [str(tmp_path / "pictures"), f"{shapes_data}/val-*.tar"]
    index = extract_latents(tokenizer, sources, tmp_path / "latents", plan)
    assert [entry["count"] for entry in index["shards"].values()] == [4, 4, 4, 4, 4]
    shards = LatentShards(tmp_path / "latents")
    for name in list(shards.shards)[:3]:
        assert {record.label for record in shards.read(name)} == {0, 1}
    assert sum(record.key.startswith("dog/") for record in shards) == 6


def test_unreadable_pictures_are_counted(tokenizer, tmp_path):
    def shard(name, bad):
        write_tar(
            tmp_path / name,
            {
                f"{name[0]}{n}": {
                    "png": b"no picture" if n < bad else encode(picture(n, 32, 32)),
                    "cls": b"1",
                }
                for n in range(10)
            },
        )

    shard("a.tar", 0), shard("b.tar", 2)
    plan = ExtractionPlan(Crop(32, 32), max_bad_fraction=0.2)
    index = extract_latents(tokenizer, [f"{tmp_path}/*.tar"], tmp_path / "latents", plan)
    assert (index["count"], index["skipped"]) == (18, 2)
    strict = ExtractionPlan(Crop(32, 32), max_bad_fraction=0.0)
    for _ in range(2):  # also where the shards are there already, by their heads
        with pytest.raises(DataError, match="2 of 20 samples could not be used"):
            extract_latents(tokenizer, [f"{tmp_path}/*.tar"], tmp_path / "strict", strict)
    assert not (tmp_path / "strict/latents.json").exists()


def _extract(rank, folder, tokenizer_dir, source):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    extract_latents(open_tokenizer(tokenizer_dir), [source], folder / "two", PLAN)
    dist.destroy_process_group()


def test_two_processes_write_what_one_writes(tokenizer, tokenizer_dir, shapes_data, tmp_path):
    source = f"{shapes_data}/train-*.tar"
    extract_latents(tokenizer, [source], tmp_path / "one", PLAN)
    both = [Forked(_extract, rank, tmp_path, tokenizer_dir, source) for rank in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    for file in (tmp_path / "one").iterdir():
        if file.name != "statistics.safetensors":
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    one, two = (load_file(tmp_path / run / "statistics.safetensors") for run in ("one", "two"))
    for name in ("mean", "std"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--crop", "64", "--resize", "32"], "--crop 64 is larger than --resize 32"),
        (["--images_per_shard", "0"], "--images_per_shard must be at least 1"),
        (["--train_url", "nothing-*.tar"], "no such shard: nothing-"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line(words, message, tokenizer_config, tokenizer_dir, tmp_path, capsys):
    given = ["--config", str(tokenizer_config), "--checkpoint", str(tokenizer_dir)]
    code = script.main([*given, "--output", str(tmp_path / "latents"), *words])
    assert message in one_error(capsys, code)
