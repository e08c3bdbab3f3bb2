"""The store puts rows of several processes in order, is read back, outlives no change of data."""

import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from muse import __version__
from muse.data.sources import open_source
from muse.errors import DataError
from muse.evaluation import feature_parts, frozen_features
from muse.evaluation.feature_parts import covered_places, merge_parts, write_parts
from muse.evaluation.frozen_features import source_facts, store_key, stored_features
from scripts import segment_probe
from tests.evaluation.stores import GivenBatches

FEATURES = np.arange(60, dtype=np.float32).reshape(20, 3)


def batches(indices, size):
    for start in range(0, len(indices), size):
        index = np.array(indices[start : start + size])
        yield {"features": FEATURES[index], "labels": index % 4, "indices": index}


def test_rows_come_back_in_order_and_are_extracted_once(tmp_path):
    rows = GivenBatches(batches([7, 3, 5, 0, 11], 2), {"skipped": 2})
    for _ in range(2):
        arrays, notes = stored_features(tmp_path, {"a": 1}, rows)
        np.testing.assert_array_equal(arrays["features"], FEATURES[[0, 3, 5, 7, 11]])
        assert arrays["labels"].tolist() == [0, 3, 1, 3, 3] and notes == {"skipped": 2}
        assert arrays["indices"].tolist() == [0, 3, 5, 7, 11]
        assert isinstance(arrays["features"], np.memmap)
    assert rows.handed == [7, 3, 5, 0, 11]
    stored_features(tmp_path, {"a": 2}, rows)
    assert rows.handed == 2 * [7, 3, 5, 0, 11]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_second_start_extracts_what_is_missing(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(feature_parts, "PART_BYTES", 100)  # two batches of two rows
    given = list(batches([7, 3, 5, 0, 11, 2, 9, 4], 2))
    first = GivenBatches(given, stop=(3, stopped))
    with pytest.raises(type(stopped)):
        stored_features(tmp_path, {}, first)
    assert first.handed == [7, 3, 5, 0, 11, 2]
    (work,) = tmp_path.iterdir()  # nothing under the store's own name
    assert work.name.endswith(".parts") and len(list(work.glob("part-*.npz"))) == 1
    second = GivenBatches(given)
    arrays, _ = stored_features(tmp_path, {}, second)
    assert second.handed == [11, 2, 9, 4]  # the part that was not full is made again
    assert [state["seen"] for state in second.earlier] == [4]
    np.testing.assert_array_equal(arrays["features"], FEATURES[[0, 2, 3, 4, 5, 7, 9, 11]])
    assert arrays["labels"].tolist() == [0, 2, 3, 0, 1, 3, 1, 3]
    assert [path.name for path in tmp_path.iterdir()] == [store_key({})]


def test_parts_of_two_processes_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_parts, "PART_BYTES", 50)
    for own in (list(range(1, 20, 2)), list(range(0, 20, 2))):
        write_parts(tmp_path, GivenBatches(batches(own, 4)), np.empty(0))
    assert covered_places(tmp_path)[0].tolist() == list(range(20))
    (tmp_path / "store").mkdir()
    merge_parts(tmp_path, tmp_path / "store")
    np.testing.assert_array_equal(np.load(tmp_path / "store" / "features.npy"), FEATURES)
    names = sorted(file.name for file in (tmp_path / "store").iterdir())
    assert names == ["features.npy", "indices.npy", "labels.npy"]


def test_two_jobs_share_a_store(tmp_path, monkeypatch):
    """The second waits for the first, deletes nothing of it, and reads what it has made."""
    monkeypatch.setattr(feature_parts, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(feature_parts, "PART_BYTES", 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        for batch in batches([4, 2, 0], 1):
            yield batch
            begun.set()
            assert go_on.wait(30)

    class Slow(GivenBatches):
        def batches(self, covered):
            return slow()

    results = {}
    second = GivenBatches(batches([4, 2, 0], 1))
    jobs = [
        threading.Thread(target=lambda: results.update(a=stored_features(tmp_path, {}, Slow([])))),
        threading.Thread(target=lambda: results.update(b=stored_features(tmp_path, {}, second))),
    ]
    jobs[0].start()
    assert begun.wait(30)
    jobs[1].start()
    jobs[1].join(0.2)
    assert jobs[1].is_alive() and second.handed == []
    go_on.set()
    for job in jobs:
        job.join(30)
    assert second.handed == []
    for arrays, _ in results.values():
        np.testing.assert_array_equal(arrays["features"], FEATURES[[0, 2, 4]])
    assert [path.name for path in tmp_path.iterdir()] == [store_key({})]


def test_nothing_half_done_is_left_of_wrong_data(tmp_path):
    broken = GivenBatches(batches([0, 1], 1), stop=(1, DataError("shard broke off")))
    with pytest.raises(DataError, match="broke off"):
        stored_features(tmp_path, {}, broken)
    with pytest.raises(DataError, match="no samples"):
        stored_features(tmp_path, {}, GivenBatches([]))
    with pytest.raises(DataError, match="read twice"):
        stored_features(tmp_path, {}, GivenBatches(batches([1, 1], 1)))
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
