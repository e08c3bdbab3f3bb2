"""1.28 million features stay on disk: the probe reads them in slices, each of bounded size."""

import numpy as np
import pytest
import torch

from muse.evaluation import probe_heads
from muse.evaluation.frozen_features import stored_features
from muse.evaluation.linear_probe import train_linear_probe
from tests.evaluation.stores import GivenBatches


class Watched:
    """A memory-mapped array that notes how many rows each read asks for; never read whole."""

    def __init__(self, array):
        assert isinstance(array, np.memmap)
        self.array, self.shape, self.reads = array, array.shape, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        rows = self.array[index]
        self.reads.append(len(rows))
        return rows

    def __array__(self, *args, **kwargs):
        raise AssertionError("the whole store was read into memory")


def store(folder, seed, count):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    rows = 2 * torch.eye(4, 16)[labels] + torch.randn(count, 16, generator=generator)

    parts = [slice(start, start + 50) for start in range(0, count, 50)]
    batches = [
        {
            "features": rows[part].numpy(),
            "labels": labels[part].numpy(),
            "indices": np.arange(count)[part],
        }
        for part in parts
    ]
    arrays, _ = stored_features(folder, {"seed": seed}, GivenBatches(batches))
    return arrays["features"], torch.tensor(np.array(arrays["labels"])), rows


def test_the_probe_reads_batches_and_blocks_of_a_mapped_store(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_heads, "EVAL_BLOCK", 64)
    train, labels, rows = store(tmp_path, 0, 700)
    val, val_labels, val_rows = store(tmp_path, 1, 300)
    watched, watched_val = Watched(train), Watched(val)
    options = dict(rates=(0.1, 0.3), epochs=3, batch_size=100)
    result = train_linear_probe(watched, labels, watched_val, val_labels, **options)
    # 70 of the 700 are held out: six batches of the others, then two blocks of these
    assert watched.reads == 3 * [*[100] * 6, 64, 70 - 64]
    assert set(watched_val.reads) == {64, 300 % 64} and sum(watched_val.reads) == 3 * 300
    assert result == train_linear_probe(rows, labels, val_rows, val_labels, **options)


def test_divergence_is_an_error_only_where_no_rate_is_left(tmp_path):
    train, labels, _ = store(tmp_path, 0, 700)
    result = train_linear_probe(
        train, labels, train, labels, rates=(0.1, 1e300), epochs=3, batch_size=100
    )
    assert result.learning_rate == 0.1 and result.by_rate["1e+300"].micro == 0
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        train_linear_probe(train, labels, train, labels, rates=(1e300,), epochs=3, batch_size=100)
    with pytest.raises(ValueError, match="one class"):
        train_linear_probe(train, labels * 0, train, labels * 0)
