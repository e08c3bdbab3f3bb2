"""The store puts rows of several processes in order, is read back, outlives no change of data."""

import numpy as np
import pytest

from muse.data.dataloader import open_source
from muse.errors import DataError
from muse.evaluation import frozen_features
from muse.evaluation.frozen_features import source_facts, store_key, stored_features

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
