"""tools/check_docs.sh: each block of README and docs is run by a test, or is on its list."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import ROOT
from tools import doc_blocks as tool

PAGE = """# Page

*Takes a moment.*

```bash
# makes a file
echo {word} > made.txt
pwd
```

*Takes a moment.*

```bash
false
echo not reached
```

*Needs a GPU.*

```python
print(6 * 7)
```

```bash
echo a test runs this
```
"""


def test_every_command_is_run_by_a_test_or_listed():
    environment = {**os.environ, "MUSE_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "tools/check_docs.sh", "--list"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    names = [name for name, _, _ in rows]
    assert all(re.match("(Needs|Takes) .", mark) and command for _, mark, command in rows)
    found = (
        0  # counted another way: a fence of commands, and whether an italic line stands above it.
    )
    for file in tool.documents():
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip() not in ("```bash", "```python"):
                continue
            above = next(text for text in reversed(lines[: number - 1]) if text.strip())
            marked = above.startswith(("*Needs ", "*Takes ")) and above.endswith("*")
            assert (f"{file.name}:{number}" in names) == marked
            found += marked
    assert found == len(names) > 20


def run_page(tmp_path, monkeypatch, capsys, *words):
    """Exit code and lines of the tool on PAGE, in a folder of its own."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(word="hello"))
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    flags = ["--output", str(tmp_path / "logs"), "--documents", str(page)]
    code = tool.main([*words, *flags])
    return code, re.sub(r"\d+ s", "N s", capsys.readouterr().out).splitlines()


def test_blocks_that_take_time_are_run(tmp_path, monkeypatch, capsys):
    code, lines = run_page(tmp_path, monkeypatch, capsys)
    log = tmp_path / "logs/page.md-13.log"
    assert code == 1
    assert lines == [
        "passed   page.md:5: N s",
        f"failed   page.md:13: N s (exit code 1, see {log})",
        "not run  page.md:20: Needs a GPU.",
    ]
    assert (tmp_path / "made.txt").read_text() == "hello\n"
    assert (tmp_path / "logs/page.md-5.log").read_text() == f"{tmp_path}\n"
    assert log.read_text() == ""


def test_a_named_block_alone_is_run(tmp_path, monkeypatch, capsys):
    assert run_page(tmp_path, monkeypatch, capsys, "page.md:20") == (
        0,
        ["passed   page.md:20: N s"],
    )
    assert (tmp_path / "logs/page.md-20.log").read_text() == "42\n"
    assert not (tmp_path / "made.txt").exists()


def test_a_block_over_the_limit_is_ended_with_all_that_it_started(tmp_path, monkeypatch, capsys):
    block = "sleep 60 &\necho $! > child.txt\nwait\n"
    monkeypatch.setitem(globals(), "PAGE", f"*Takes long.*\n\n```bash\n{block}```\n")
    code, (line,) = run_page(tmp_path, monkeypatch, capsys, "--limit", "2")
    assert code == 1 and line.startswith("too long page.md:3: N s")
    child = Path("/proc") / (tmp_path / "child.txt").read_text().strip() / "stat"
    until = time.monotonic() + 10  # a killed process may still be ending; sleep would go on
    while state(child) not in "ZX" and time.monotonic() < until:
        time.sleep(0.05)
    assert state(child) in "ZX"


def state(stat: Path) -> str:
    """The letter of a process's state in its `/proc/N/stat`; X, dead, where there is none."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def test_a_name_that_is_none(tmp_path, monkeypatch, capsys):
    assert run_page(tmp_path, monkeypatch, capsys, "page.md:99")[0] == 2
