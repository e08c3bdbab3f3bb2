"""Shards behind http and S3 that fail: begun again with growing waits, nothing twice, counted; and
a clear stop when nothing helps.
"""

import os
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from muse.data.dataloader import train_loader
from muse.data.tar import TarSource
from muse.errors import DataError
from tests.data.helpers import key, keys_of, take, write_shards

SIZE = {"resize_shorter_edge": 16, "crop_size": 12}
ALL = [key(n) for n in range(12)]


def keys(source) -> list[tuple[str, str | None]]:
    return [(record.key, record.fault) for shard in source.shards for record in source.read(shard)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """`server(plan)` -> the url of a shard of 12 samples; answer k follows plan[k]: `cut`, `drop`,
    `missing` or `whole` (then on).
    """
    write_shards(tmp_path, 1, 12)
    data = (tmp_path / "t-000.tar").read_bytes()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def start(plan: list[str]) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                step = plan.pop(0) if plan else "whole"
                if step == "drop":
                    return  # the connection ends without a word
                if step == "missing":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if step == "cut" else data)

            def log_message(self, *args):
                pass

        one = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        running.append(one)
        return f"http://127.0.0.1:{one.server_address[1]}/t-000.tar"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def test_http_that_drops_and_cuts(server, caplog):
    source = TarSource(server(["drop", "cut", "cut"]), attempts=3, first_wait=0.01)
    assert keys(source) == [(name, None) for name in ALL]
    assert source.retries == 3  # the count of failures in a row begins anew where samples came
    assert sum("trying again in" in record.message for record in caplog.records) == 3


def test_http_that_never_answers_is_given_up_with_its_reason(server, caplog):
    url = server(["missing"] * 9)
    source = TarSource(url, attempts=3, first_wait=0.01)
    assert keys(source) == [(url, "unreadable_shard")] and source.retries == 2
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and said[0].startswith(
        f"reading {url} given up after 3 tries and 0 samples"
    )
    assert "exit 22" in caplog.text  # what curl says of a 404


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """An `aws` on the PATH that fails, then breaks off in the middle, then gives the shard; it
    notes what it was asked for.
    """
    write_shards(tmp_path, 1, 12)
    shard, folder = tmp_path / "t-000.tar", tmp_path / "bin"
    folder.mkdir()
    (folder / "aws").write_text(f"""#!/bin/sh
echo "$@" >> {shlex.quote(str(tmp_path))}/asked
case $(wc -l < {shlex.quote(str(tmp_path))}/asked) in
  1) exit 1;;
  2) head -c {shard.stat().st_size // 2} {shlex.quote(str(shard))}; exit 1;;
  *) cat {shlex.quote(str(shard))};;
esac
""")
    (folder / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "asked"


def test_s3_through_the_aws_command(aws):
    source = TarSource("s3://bucket/set one/t-{000..000}.tar", attempts=3, first_wait=0.01)
    assert keys(source) == [(name, None) for name in ALL] and source.retries == 2
    assert aws.read_text().splitlines() == ["s3 cp s3://bucket/set one/t-000.tar -"] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_counts_what_its_workers_tried_again(aws, workers):
    source = TarSource("s3://bucket/t-000.tar", attempts=3, first_wait=0.01)
    loader = train_loader(source, batch_size=6, num_workers=workers, shuffle_buffer=1, **SIZE)
    assert sorted(keys_of(take(loader, 2))) == ALL
    assert loader.retries == 2 and loader.bad.total == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_is_gone_stops_the_run(tmp_path, workers):
    """Whatever share of bad samples is allowed: else a run would go through epochs of nothing."""
    write_shards(tmp_path, 1, 12)
    source = TarSource(
        [f"pipe:cat {tmp_path}/t-000.tar", *(f"pipe:exit {n}" for n in range(3, 9))],
        attempts=2,
        first_wait=0.01,
    )
    loader = train_loader(source, batch_size=2, num_workers=workers, max_bad_fraction=1.0, **SIZE)
    said = "3 shards in a row cannot be read, the last of them pipe:exit .*the same command goes on"
    with pytest.raises(DataError, match=said) as caught:
        take(loader, 100)
    assert "\n" not in str(caught.value)


def test_one_shard_that_is_gone_is_counted_and_left_out(tmp_path):
    write_shards(tmp_path, 3, 4)
    shards = [f"{tmp_path}/t-00{n}.tar" for n in range(3)]
    source = TarSource([shards[0], "pipe:exit 3", *shards[1:]], attempts=2, first_wait=0.01)
    loader = train_loader(source, batch_size=4, max_bad_fraction=1.0, **SIZE)
    assert sorted(keys_of(take(loader, 3))) == ALL
    take(loader, 1)  # into the next epoch
    assert (
        set(loader.bad.counts) == {"unreadable_shard"}
        and "pipe:exit 3" in loader.bad.keys["unreadable_shard"]
    )
