"""How threads wait: the default where the user has not chosen, and the tool that measures it."""

import json
import os
import subprocess
import sys

import pytest

from muse.utils.threads import WAITING_VARIABLES, wait_without_spinning
from tests.helpers import ROOT

COMMON = f"source '{ROOT}/tools/common.sh'; env"


def test_threads_do_not_spin_unless_the_user_says_so():
    environment = {}
    assert wait_without_spinning(environment) is True
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
    for name in WAITING_VARIABLES:
        own = {name: ""}
        assert wait_without_spinning(own) is False and own == {name: ""}


def test_setting_it_needs_no_torch():
    code = "import sys, muse.utils.threads; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("chosen", [None, *WAITING_VARIABLES])
def test_launchers_set_what_the_package_sets(chosen):
    outer = {name: value for name, value in os.environ.items() if name not in WAITING_VARIABLES}
    outer |= {"MUSE_PYTHON": sys.executable} | ({chosen: "7"} if chosen else {})
    done = subprocess.run(["bash", "-c", COMMON], env=outer, capture_output=True, text=True)
    pairs = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    expected = {name: value for name, value in outer.items() if name in WAITING_VARIABLES}
    wait_without_spinning(expected)
    assert {name: pairs[name] for name in WAITING_VARIABLES if name in pairs} == expected


def test_the_tool_measures_alone_and_busy_for_every_setting(tmp_path):
    words = ["--settings", "none", "OMP_WAIT_POLICY=PASSIVE", "--steps", "1", "--batch", "1"]
    words += ["--repeats", "1", "--threads", "1", "--output", str(tmp_path / "busy.json")]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/busy_bench.py", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "busy.json").read_text())
    assert list(rows) == ["none", "OMP_WAIT_POLICY=PASSIVE"]
    for row in rows.values():
        assert row["busy_over_alone"] == pytest.approx(row["busy"] / row["alone"])
        assert row["alone_over_first"] == pytest.approx(row["alone"] / rows["none"]["alone"])


def test_the_tool_refuses_a_setting_it_does_not_know():
    words = [sys.executable, ROOT / "tools/busy_bench.py", "--settings", "OMP_SPIN=1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "OMP_SPIN=1: none, or one of" in done.stderr
