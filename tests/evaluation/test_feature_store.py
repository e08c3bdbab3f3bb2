"""The store puts rows of several processes in order, is read back, outlives no change of data."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from muse import __version__
from muse.data.sources import open_source
from muse.errors import DataError
from muse.evaluation import frozen_features
from muse.evaluation.frozen_features import source_facts, store_key, stored_features
from scripts import segment_probe

FEATURES = np.arange(60, dtype=np.float32).reshape(20, 3)


def batches(indices, size):
    for start in range(0, len(indices), size):
        index = np.array(indices[start : start + size])
        yield {"features": FEATURES[index], "labels": index % 4, "indices": index}


def test_rows_come_back_in_order_and_are_extracted_once(tmp_path):
    calls = []

    def extract():
        calls.append(1)
        return batches([7, 3, 5, 0, 11], 2)

    for _ in range(2):
        arrays, notes = stored_features(tmp_path, {"a": 1}, extract, lambda: {"skipped": 2})
        np.testing.assert_array_equal(arrays["features"], FEATURES[[0, 3, 5, 7, 11]])
        assert arrays["labels"].tolist() == [0, 3, 1, 3, 3] and notes == {"skipped": 2}
        assert isinstance(arrays["features"], np.memmap)
    assert len(calls) == 1
    stored_features(tmp_path, {"a": 2}, extract)
    assert len(calls) == 2


def test_parts_of_two_processes_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_features, "COPY_ROWS", 3)
    odd, even = list(range(1, 20, 2)), list(range(0, 20, 2))
    parts = [
        frozen_features._write_rows(tmp_path, rank, batches(own, 4))
        for rank, own in enumerate((odd, even))
    ]
    frozen_features._merge(tmp_path, parts)
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), FEATURES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features.npy", "labels.npy"]


def test_nothing_half_done_is_left(tmp_path):
    def broken():
        yield from batches([0, 1], 1)
        raise DataError("shard broke off")

    with pytest.raises(DataError, match="broke off"):
        stored_features(tmp_path, {}, broken)
    with pytest.raises(DataError, match="no samples"):
        stored_features(tmp_path, {}, lambda: batches([], 1))
    with pytest.raises(DataError, match="read twice"):
        stored_features(tmp_path, {}, lambda: batches([1, 1], 1))
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_the_data(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(b"12")
    source = open_source(str(file))
    before = store_key({"data": source_facts(source)})
    assert before == store_key({"data": source_facts(source)})
    file.write_bytes(b"123")
    assert before != store_key({"data": source_facts(source)})


def write_picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


@pytest.mark.parametrize("masks", ["root/masks/a.png", "root/images/a.seg.png", "apart/a.png"])
def test_the_key_follows_the_masks(tmp_path, masks):
    """In a folder beside the pictures, in the same folder, or in one that is named apart."""
    write_picture(tmp_path / "root" / "images" / "a.png", 1)
    write_picture(tmp_path / masks, 2)
    folders = {
        "root/masks/a.png": str(tmp_path / "root"),
        "root/images/a.seg.png": str(tmp_path / "root" / "images"),
        "apart/a.png": {"images": f"{tmp_path}/root/images", "masks": f"{tmp_path}/apart"},
    }
    before = store_key({"data": source_facts(open_source(folders[masks]))})
    assert before == store_key({"data": source_facts(open_source(folders[masks]))})
    write_picture(tmp_path / masks, 3)
    os.utime(tmp_path / masks, ns=(0, 0))
    assert before != store_key({"data": source_facts(open_source(folders[masks]))})


def test_the_key_follows_labels_and_version(tmp_path, monkeypatch):
    write_picture(tmp_path / "ant" / "a.png", 1)
    write_picture(tmp_path / "bee" / "b.png", 2)
    before = store_key({"data": source_facts(open_source(tmp_path))})
    monkeypatch.setattr(frozen_features, "__version__", f"{__version__}.post1")
    assert before != store_key({"data": source_facts(open_source(tmp_path))})
    monkeypatch.undo()
    (tmp_path / "ant").rename(tmp_path / "cow")
    assert before != store_key({"data": source_facts(open_source(tmp_path))})


def test_changed_masks_give_the_score_of_the_changed_masks(trained_run, tmp_path):
    """The pictures stay; the second run must not read the first one's masks."""
    config, run = trained_run
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{i}.png")
    flags = ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]
    flags += ["--train_url", f"{tmp_path}/data", "--val_url", f"{tmp_path}/data"]
    flags += ["--labels", "plain", "--num_classes", "9", "--steps", "5", "--num_pictures", "0"]

    def score(cache):
        out = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / cache)]
        assert segment_probe.main([*flags, *out]) == 0
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["iou_by_class"]

    scores = []
    for label in (3, 7):
        for i in range(4):
            path = tmp_path / "data" / "masks" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((32, 32), label, np.uint8)).save(path)
        scores.append(score("cache"))
    assert scores[1] == score("fresh")
    assert [row.index(1.0) for row in scores] == [3, 7]
