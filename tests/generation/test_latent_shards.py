"""Latent shards: what is written is read, counts are exact, and every damage is one line."""

import json
import tarfile

import pytest
import torch
import webdataset
from safetensors.torch import load

from muse.errors import CheckpointError, DataError
from muse.generation import LatentRecord, LatentShards
from muse.generation.latent_shards import (
    read_latent_shard,
    read_shard_head,
    write_latent_index,
    write_latent_shard,
)

SHA, OTHER = "a" * 64, "b" * 64
SHAPE = (2, 3, 4, 5)  # two views, 3 channels, 4 x 5


def records(first, count, shape=SHAPE):
    return [
        LatentRecord(f"train{i:04d}", torch.randn(shape), i % 7)
        for i in range(first, first + count)
    ]


@pytest.fixture
def folder(tmp_path):
    """7 + 5 images in two shards, with their index; and the records."""
    written = records(0, 7), records(7, 5)
    for k, part in enumerate(written):
        write_latent_shard(tmp_path / "latents" / f"train-{k}.tar", part, SHA, "float32")
    write_latent_index(tmp_path / "latents", notes={"checkpoint": "run/final"})
    return tmp_path / "latents", [*written[0], *written[1]]


def test_what_is_written_is_read(folder):
    path, written = folder
    shards = LatentShards(path, SHA)
    assert (len(shards), shards.views, shards.shape) == (12, 2, (3, 4, 5))
    assert shards.shards == {"train-0.tar": 7, "train-1.tar": 5}
    assert shards.notes == {"checkpoint": "run/final"}
    read = list(shards)
    assert [(r.key, r.label) for r in read] == [(r.key, r.label) for r in written]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(read, written))
    assert [r.key for r in shards.read("train-1.tar")] == [r.key for r in written[7:]]


def test_the_index_is_json_with_exact_counts(folder):
    path, _ = folder
    index = json.loads((path / "latents.json").read_text())
    assert index["tokenizer_sha256"] == SHA and index["count"] == 12
    assert index["shards"]["train-1.tar"] == {
        "count": 5,
        "bytes": (path / "train-1.tar").stat().st_size,
        "origin": "",
    }


def test_webdataset_reads_the_shards(folder):
    path, written = folder
    samples = list(webdataset.WebDataset(str(path / "train-{0..1}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in written]
    assert torch.equal(load(samples[3]["safetensors"])["latents"], written[3].latents)


def test_half_precision_is_the_rounding_of_the_latents(tmp_path):
    part = records(0, 2)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        head = write_latent_shard(tmp_path / "a.tar", part, SHA, name)
        assert head == read_shard_head(tmp_path / "a.tar")
        for record, stored in zip(part, read_latent_shard(tmp_path / "a.tar")):
            assert torch.equal(stored.latents, record.latents.to(dtype))


def test_the_same_records_give_the_same_bytes(tmp_path):
    part = records(0, 3)
    for name in ("a.tar", "b.tar"):
        write_latent_shard(tmp_path / name, part, SHA)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_latents_of_another_tokenizer_are_refused(folder):
    path, _ = folder
    with pytest.raises(CheckpointError, match=f"{path}: latents of another tokenizer.*aaaa.*bbbb"):
        LatentShards(path, OTHER)
    with pytest.raises(CheckpointError, match="train-0.tar: latents of another tokenizer"):
        list(read_latent_shard(path / "train-0.tar", OTHER))
    write_latent_shard(path / "train-2.tar", records(12, 1), OTHER, "float32")
    with pytest.raises(CheckpointError, match="train-2.tar: latents of another tokenizer"):
        write_latent_index(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.55])
def test_a_truncated_shard_is_one_line(folder, share):
    path, written = folder
    shard = path / "train-0.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"train-0\.tar: truncated .* extract it again") as caught:
        LatentShards(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"train-0\.tar: ") as caught:
        list(read_latent_shard(shard))
    assert "\n" not in str(caught.value)


def test_records_before_the_break_are_given(folder):
    path, written = folder
    shard = path / "train-0.tar"
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[3].offset_data  # of the third record: its header is whole
    shard.write_bytes(shard.read_bytes()[:end])
    read = []
    with pytest.raises(DataError, match="damaged after 2 of 7 latents"):
        for record in read_latent_shard(shard):
            read.append(record)
    assert len(read) == 2
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(read, written))


def test_missing_parts_are_named(folder, tmp_path):
    path, _ = folder
    (path / "train-1.tar").unlink()
    with pytest.raises(DataError, match=r"train-1\.tar: is missing"):
        LatentShards(path)
    (path / "latents.json").write_text("{}")
    with pytest.raises(DataError, match=r"latents\.json: cannot be used"):
        LatentShards(path)
    (path / "latents.json").unlink()
    with pytest.raises(DataError, match="not begun or not finished"):
        LatentShards(path)
    with pytest.raises(DataError, match="holds no shards"):
        write_latent_index(tmp_path)
    with pytest.raises(DataError, match="none.tar: not a readable shard"):
        read_shard_head(tmp_path / "none.tar")


def test_shards_that_do_not_belong_together_are_named(folder):
    path, _ = folder
    write_latent_shard(path / "train-2.tar", records(12, 1, (1, 3, 4, 5)), SHA, "float32")
    with pytest.raises(DataError, match=r"train-2\.tar: views 1, but 2 in train-0\.tar"):
        write_latent_index(path)
    write_latent_shard(path / "train-2.tar", records(12, 1), SHA, "float16")
    with pytest.raises(DataError, match=r"train-2\.tar: dtype float16, but float32"):
        write_latent_index(path)


def test_a_tar_of_pictures_is_no_shard_of_latents(shapes_data):
    with pytest.raises(DataError, match="not a shard of latents"):
        read_shard_head(sorted(shapes_data.glob("*.tar"))[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda part: part.clear(), "no latents to write"),
        (lambda part: part.append(part[0]), "two images have the key 'train0000'"),
        (lambda part: part.append(LatentRecord("x", torch.zeros(1, 3, 4, 5), 0)), "x: latents"),
        (lambda part: part.append(LatentRecord("x", torch.full(SHAPE, 1e6), 0)), "float16"),
        (lambda part: part.insert(0, LatentRecord("x", torch.zeros(3, 4, 5), 0)), "views, C, h, w"),
    ],
)
def test_wrong_records_are_named_and_leave_no_file(tmp_path, change, message):
    part = records(0, 2)
    change(part)
    with pytest.raises(DataError, match=message):
        write_latent_shard(tmp_path / "a.tar", part, SHA)
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_named(tmp_path):
    with pytest.raises(DataError, match="not as 'int8'"):
        write_latent_shard(tmp_path / "a.tar", records(0, 1), SHA, "int8")
