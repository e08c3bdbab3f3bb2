import gc
import json
import os
import random
import tarfile

import pytest
from webdataset.filters import shuffle

from muse.data import records, shard_index
from muse.data.dataloader import eval_loader, train_loader
from muse.data.eval import count_samples
from muse.data.ordering import replay, shuffled
from muse.data.tar import TarSource
from muse.errors import DataError, MuseError
from tests.data.helpers import key, same, sample, take, write_faulty, write_shards, write_tar

SIZE = {"resize_shorter_edge": 16, "crop_size": 12}


@pytest.fixture
def forget():
    """What another process knows: nothing that this one remembers."""

    def clear():
        shard_index._index.cache_clear()
        shard_index._contents.cache_clear()

    clear()
    return clear


@pytest.fixture
def no_scan(monkeypatch, forget):
    def refuse(path):
        raise AssertionError(f"{path} was scanned")

    def start():
        forget()
        monkeypatch.setattr(shard_index, "scan_shard", refuse)

    return start


def content(source):
    found = [record.load() for shard in source.shards for record in source.read(shard)]
    return [(record.key, record.members, record.fault) for record in found]


def test_places_are_those_of_tarfile(tmp_path, forget):
    path = write_tar(tmp_path / "a.tar", {key(n): sample(n) for n in range(5)})
    with tarfile.open(path) as archive:
        wanted = {info.name: (info.offset_data, info.size) for info in archive}
    index = shard_index.shard_index(str(path))
    places = {
        f"{name}.{ext}": place for name, parts in index.samples for ext, place in parts.items()
    }
    assert places == wanted and index.fault is None
    facts, samples = (tmp_path / "a.tar.idx").read_text().splitlines()
    stat = path.stat()
    assert json.loads(facts) == {
        "format": 1,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "samples": 5,
        "fault": None,
    }
    assert [name for name, _ in json.loads(samples)] == [key(n) for n in range(5)]


def test_one_scan_serves_counts_evaluation_training_and_resume(tmp_path, forget, no_scan):
    urls = write_shards(tmp_path, 3, 7)
    first = content(TarSource(urls))
    whole = take(train_loader(urls, batch_size=4, shuffle_buffer=5, **SIZE), 9)
    no_scan()
    assert content(TarSource(urls)) == first and len(first) == 21
    assert count_samples(TarSource(urls)) == [7, 7, 7]
    loader = eval_loader(urls, batch_size=4, **SIZE)
    assert loader.num_samples == 21 and sum(len(batch["keys"]) for batch in loader) == 21
    loader = train_loader(urls, batch_size=4, shuffle_buffer=5, **SIZE)
    head = take(loader, 4)
    forget()
    resumed = train_loader(urls, batch_size=4, shuffle_buffer=5, **SIZE)
    resumed.load_state_dict(loader.state_dict())
    assert same(head + take(resumed, 5), whole)


def test_a_shard_that_was_written_again_is_scanned_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", {key(n): sample(n) for n in range(3)})
    source = TarSource(str(path))
    assert [name for name, _, _ in content(source)] == [key(n) for n in range(3)]
    write_tar(path, {key(n): sample(n) for n in range(10, 14)})
    assert [name for name, _, _ in content(source)] == [key(n) for n in range(10, 14)]
    assert source.contents(str(path)) == (4, None)


@pytest.mark.parametrize("text", ["", "{}\n[]\n", "no json\n", '{"format": 1', None])
def test_an_index_that_cannot_be_used_is_replaced(tmp_path, forget, text):
    path = write_tar(tmp_path / "a.tar", {key(n): sample(n) for n in range(3)})
    wanted, index = content(TarSource(str(path))), tmp_path / "a.tar.idx"
    good = index.read_text()
    if text is None:  # the first line is right, the second cut off
        text = good[: good.index("\n") + 30]
    index.write_text(text)
    forget()
    assert content(TarSource(str(path))) == wanted and index.read_text() == good


def test_without_a_place_for_it_every_process_scans(tmp_path, forget, monkeypatch):
    def full(path):
        raise MuseError("disk full")

    path = write_tar(tmp_path / "a.tar", {key(n): sample(n) for n in range(3)})
    monkeypatch.setattr(shard_index, "atomic_file", full)
    assert len(content(TarSource(str(path)))) == 3
    forget()
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)
    assert len(content(TarSource(f"file:{path}"))) == 3
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_broken_shard_stays_broken_and_is_named(tmp_path, no_scan):
    urls = write_faulty(tmp_path, 4)
    first = content(TarSource(urls))
    assert first[-1][2] == "truncated_tar"
    no_scan()
    assert content(TarSource(urls)) == first
    assert TarSource(urls).contents(f"{tmp_path}/a-1.tar") == (3, "truncated_tar")
    with pytest.raises(DataError, match=r"a-1.tar breaks off \(truncated_tar\) after 3 samples"):
        eval_loader(urls, batch_size=2, **SIZE)


# ----------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("total, size", [(0, 4), (1, 4), (3, 4), (4, 4), (5, 4), (40, 7), (40, 1)])
def test_the_order_is_webdatasets_and_can_be_entered_anywhere(total, size):
    whole = list(range(total))
    if size > 1:
        whole = list(shuffle(size, initial=size, rng=random.Random(1))(iter(range(total))))
    assert list(shuffled(range(total), size, random.Random(1))) == whole
    for skip in range(total + 3):
        rng = random.Random(1)
        held, start = replay(total, size, rng, skip)
        assert list(shuffled(range(start, total), size, rng, held)) == whole[skip:]


def test_a_late_position_is_found_without_a_record(tmp_path):
    """As 2 million numbers, checked against the plain way at the end of the epoch."""
    total, size, left = 2_000_000, 1000, 500
    rng = random.Random(5)
    held, start = replay(total, size, rng, total - left)
    plain = list(shuffled(range(total), size, random.Random(5)))
    assert list(shuffled(range(start, total), size, rng, held)) == plain[-left:]


# ---------------------------------------------------------------------------------- one handle
def test_a_shard_is_opened_once_and_closed_with_its_last_record(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", {key(n): sample(n) for n in range(6)})
    opened, read, really = [], [], os.open
    monkeypatch.setattr(
        records.os, "open", lambda *args: opened.append(really(*args)) or opened[-1]
    )
    at = records._read_at
    monkeypatch.setattr(records, "_read_at", lambda *args: read.append(args) or at(*args))
    source = TarSource(str(path))
    shard_index.shard_index(str(path))
    opened.clear()
    found = [record.load() for record in source.read(str(path))]
    assert [record.members for record in found] == [sample(n) for n in range(6)]
    assert len(opened) == 1 and len(read) == 6
    del found
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(opened[0])


def test_no_more_files_stay_open_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_FILES", 2)
    urls = write_shards(tmp_path, 5, 2)
    source = TarSource(urls)
    waiting = [record for shard in source.shards for record in source.read(shard)]
    waiting = waiting[::2] + waiting[1::2]  # every shard is met twice
    assert [record.load().members for record in waiting] == [
        sample(n) for n in (*range(0, 10, 2), *range(1, 10, 2))
    ]
    assert sum(record.file._handle is not None for record in waiting[:5]) == 2
