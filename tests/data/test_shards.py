import itertools
import os
import shlex

import pytest

from muse.data.shards import check_enough, expand_urls, split_shards, with_retries
from muse.data.tar import TarSource
from muse.errors import DataError
from tests.data.helpers import encode, key, picture, sample, write_shards, write_tar


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")
    return [str(folder / name) for name in names]


def test_expand_every_form(tmp_path):
    a, b, c = touch(tmp_path, "x-000.tar", "x-001.tar", "y-000.tar")
    d = tmp_path
    assert expand_urls(f"{d}/x-{{000..001}}.tar") == [a, b]
    assert expand_urls(f"{d}/y-000.tar::{d}/x-{{000..001}}.tar") == [c, a, b]
    assert expand_urls([f"{d}/y-000.tar", d / "x-000.tar"]) == [c, a]
    assert expand_urls(f"{d}/x-*.tar") == [a, b]
    assert expand_urls(f"{d}/{{x,y}}-00?.tar") == [a, b, c]
    assert expand_urls(d) == [a, b, c]
    assert expand_urls(f"file:{a}") == [a]
    assert expand_urls("pipe:cat a | awk '{print $1}'") == ["pipe:cat a | awk '{print $1}'"]
    assert expand_urls("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert expand_urls("s3://bucket/a b.tar") == ["pipe:aws s3 cp 's3://bucket/a b.tar' -"]


@pytest.mark.parametrize(
    "pattern, part",
    [
        ("{d}/x-{{000..003}}.tar", "x-001.tar and 2 more"),
        ("{d}/z-*.tar", "z-*.tar"),
        ("{d}/gone", "gone"),
        ("{d}/empty", "empty"),
        ("nfs4://host/a.tar", "nfs4"),
        ("{d}/note.txt", "note.txt"),
        ("", "empty shard url"),
    ],
)
def test_a_pattern_without_shards_is_named(tmp_path, pattern, part):
    touch(tmp_path, "x-000.tar", "note.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        expand_urls(pattern.format(d=tmp_path))
    assert part in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="empty"):
        expand_urls([])


@pytest.mark.parametrize("count, world, workers", [(16, 2, 4), (17, 4, 3), (7, 1, 7)])
def test_parts_are_disjoint_and_complete(count, world, workers):
    parts = [split_shards(range(count), p, world * workers) for p in range(world * workers)]
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(parts)


def test_enough_shards():
    check_enough(8, 4, 2, "x")
    check_enough(4, 4, 0, "x")
    with pytest.raises(
        DataError,
        match=r"x has 7 shards for 3 ranks x 4 workers = 12 readers: use at most 2 workers",
    ):
        check_enough(7, 3, 4, "x")
    with pytest.raises(DataError, match="write at least 4 shards"):
        check_enough(2, 4, 1, "x")


def test_retries_repeat_nothing_and_wait_twice_as_long():
    waits, starts = [], []

    def start():
        starts.append(1)
        for i in range(10):
            if i == 4 and len(starts) <= 3:
                raise OSError("gone")
            yield i

    assert list(
        with_retries(start, (OSError,), "x", attempts=4, first_wait=0.5, sleep=waits.append)
    ) == list(range(10))
    assert waits == [0.5, 1.0, 2.0] and len(starts) == 4
    starts.clear()
    got = []
    with pytest.raises(OSError, match="gone"):
        got.extend(with_retries(start, (OSError,), "x", attempts=3, sleep=waits.append))
    with pytest.raises(ZeroDivisionError):  # not a reading error: raised at once
        list(with_retries(lambda: (1 // 0 for _ in range(1)), (OSError,), "x", sleep=waits.append))


def content(source):
    records = [record.load() for shard in source.shards for record in source.read(shard)]
    return [(record.key, record.members, record.fault) for record in records]


def test_stream_and_local_reading_agree(tmp_path):
    members = {key(n): sample(n) for n in range(6)}
    expected = [(name, parts, None) for name, parts in members.items()]
    plain = write_tar(tmp_path / "a.tar", members)
    zipped = write_tar(tmp_path / "a.tar.gz", members)
    assert content(TarSource(str(plain))) == expected
    assert content(TarSource(str(zipped))) == expected
    assert content(TarSource(f"pipe:cat {plain}")) == expected
    assert content(TarSource(f"pipe:gunzip -c {zipped}")) == expected
    assert TarSource(str(plain)).local and not TarSource(str(zipped)).local


def test_other_members_are_left_out_and_the_first_of_a_double_counts(tmp_path):
    first, second = encode(picture(0)), encode(picture(1))
    path = tmp_path / "a.tar"
    write_tar(
        path,
        {
            "__meta__/x": {"txt": b"no"},
            "a": {"png": first, "npy": b"no", "PNG": second, "txt": b"yes"},
        },
    )
    assert content(TarSource(str(path))) == [("a", {"png": first, "txt": b"yes"}, None)]


def test_a_shard_cut_anywhere_gives_its_whole_samples_and_one_fault(tmp_path):
    members = {key(n): {"txt": f"caption {n}".encode(), "cls": b"1"} for n in range(4)}
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    assert len(data) % 512 == 0
    # A member is a header block and a data block; a sample is known to be whole when the next
    # header was read.
    for cut in [*range(0, 8 * 1024, 300), 1024, 2048, 8 * 1024 - 512, 8 * 1024]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        for url in (f"{tmp_path}/cut.tar", f"pipe:cat {tmp_path}/cut.tar"):
            got = content(TarSource(url, attempts=1))
            assert got[-1][2] == "truncated_tar", (cut, url)
            whole = max(0, -(-(cut - 511) // 2048) - 1)
            keys = [name for name, _, _ in got[:-1]]
            assert keys == list(members)[: len(keys)] and whole <= len(keys) <= cut // 2048, (
                cut,
                url,
            )
            assert all(parts == members[name] for name, parts, _ in got[:-1])
    (tmp_path / "cut.tar").write_bytes(
        data[: 8 * 1024 + 512]
    )  # the end marker's first block is enough
    assert [fault for _, _, fault in content(TarSource(f"{tmp_path}/cut.tar"))] == [None] * 4


def test_text_named_tar(tmp_path):
    (tmp_path / "a.tar").write_text("not an archive " * 100)
    assert [fault for _, _, fault in content(TarSource(f"{tmp_path}/a.tar"))] == ["truncated_tar"]


def test_a_flaky_command_is_tried_again(tmp_path):
    """The command gives up after half of the shard, twice; every sample comes once."""
    write_shards(tmp_path, 1, 12)
    shard, count = tmp_path / "t-000.tar", tmp_path / "tries"
    half = shard.stat().st_size // 2
    script = tmp_path / "flaky.sh"
    script.write_text(
        f"echo x >> {count}; if [ $(wc -l < {count}) -lt 3 ]; "
        f"then head -c {half} {shard}; exit 7; fi; cat {shard}\n"
    )
    source = TarSource(f"pipe:sh {shlex.quote(str(script))}", attempts=3, first_wait=0.01)
    assert [name for name, _, _ in content(source)] == [key(n) for n in range(12)]
    assert count.read_text().count("x") == 3


def test_a_command_that_never_works_is_a_fault(tmp_path, capfd):
    source = TarSource("pipe:exit 3", attempts=2, first_wait=0.01)
    assert [(name, fault) for name, _, fault in content(source)] == [
        ("pipe:exit 3", "unreadable_shard")
    ]
    path = write_tar(tmp_path / "a.tar", {"a": {"txt": b"x"}})
    source = TarSource(str(path), attempts=2, first_wait=0.01)
    os.remove(path)
    assert [fault for _, _, fault in content(source)] == ["unreadable_shard"]


def test_a_command_that_fails_after_the_last_sample_is_still_a_fault(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": {"txt": b"x"}})
    got = content(TarSource(f"pipe:cat {path}; exit 5", attempts=1))
    # Whether the sample still comes depends on when the command's status is seen.
    assert got[-1][2] == "unreadable_shard" and [name for name, _, fault in got if not fault] in (
        ["a"],
        [],
    )
