"""The wheel as a user gets it: installed into a folder, run outside of the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import muse
from muse import command_line
from tests.helpers import ROOT, one_error

# Packages of extras, which look as if they were not installed.
BLOCKED = ("accelerate", "timm", "open_clip", "lpips", "torch_fidelity")
SITE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def found(name, path=None, target=None):
    return None if name.split(".")[0] in {blocked!r} else find(name, path, target)
PathFinder.find_spec = found
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a folder `build` beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    kept = [name for name in kept if re.match(r"(muse|configs|scripts)/|[^/]+$", name)]
    for name in filter(lambda name: (ROOT / name).is_file(), kept):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    words = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *words, "-w", str(folder), str(source)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The folder of `pip install --target`, with an empty working directory beside it."""
    target = wheel.parent / "site"
    words = ["-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *words], check=True)
    (wheel.parent / "work").mkdir()
    return target


def run(installed: Path, *words: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`muse WORDS` of the wheel, in a folder without the repository."""
    hooks = installed.parent / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(SITE.format(blocked=set(blocked)))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(installed.parent),
        "PYTHONPATH": f"{installed}:{hooks}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, installed / "bin/muse", *words],
        cwd=installed.parent / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_what_a_user_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    expected = {f"muse/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {f"muse/{path.relative_to(ROOT)}" for path in (ROOT / "scripts").glob("*.py")}
    tiny = (ROOT / "muse/pretrained/muse_tiny").iterdir()
    expected |= {str(path.relative_to(ROOT)) for path in tiny} | {"muse/py.typed"}
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs"))]
    assert f"\nVersion: {muse.__version__}\n" in facts and "\nRequires-Python: >=3.10\n" in facts
    assert set(re.findall(r"Provides-Extra: (\w+)", facts)) == {
        "demo",
        "eval",
        "train",
        "app",
        "dev",
    }
    found = re.findall(r"Programming Language :: Python :: (3\.\d+)", facts)
    assert found == ["3.10", "3.11", "3.12", "3.13"]
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", facts, re.MULTILINE)
    assert "torch" in needed and not set(needed) & {"timm", "lpips", "accelerate", "gradio"}


def test_a_picture_right_after_installation(installed):
    """The first command of a new user, with the packages of no extra."""
    (installed.parent / "work/photos").mkdir()
    shutil.copy(ROOT / "docs/images/astronaut.jpg", installed.parent / "work/photo.jpg")
    done = run(installed, "reconstruct", "photo.jpg", "--max_side", "128", blocked=BLOCKED)
    assert done.returncode == 0, done.stderr
    out = installed.parent / "work/reconstructions"
    names = ["photo.png", "photo_compare.png", "reconstructions.csv"]
    assert sorted(os.listdir(out)) == names
    assert "PSNR" in done.stdout and "shrunk from 512x512" in done.stdout
    done = run(installed, "info", "muse_tiny", blocked=BLOCKED)
    assert done.returncode == 0 and "reconstruct" in done.stdout, done.stderr
    done = run(installed, "report", "muse_tiny", "--data", "photo.jpg", blocked=BLOCKED)
    assert done.returncode == 0, done.stderr
    assert (installed.parent / "work/report.html").stat().st_size > 50_000


def test_a_package_that_is_not_installed_is_one_line(installed):
    shards = [f"dataset.params.{part}_shards_path_or_url=x" for part in ("train", "eval")]
    words = ("train", "--config", "muse_tiny/stage1", *shards)
    done = run(installed, *words, blocked=BLOCKED)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not installed (pip install 'muse-tokenizer[" in done.stderr


def test_help_of_the_installed_command_imports_nothing_heavy(installed):
    heavy = ("torch", "omegaconf", "numpy", "safetensors")
    done = run(installed, "--help", blocked=heavy)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in command_line.COMMANDS)
    assert " linear_probe" in done.stdout and "benchmark" not in done.stdout


# --- the command in a clone
def test_every_command_is_a_script_with_flags_of_its_own(capsys):
    for name, (script, _) in command_line.COMMANDS.items():
        if command_line.script_file(script) is None:
            continue
        with pytest.raises(SystemExit) as caught:
            command_line.main([name, "--help"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: muse {name} ")


def test_mistakes_of_the_command_are_one_line(capsys, monkeypatch):
    assert "did you mean reconstruct?" in one_error(capsys, command_line.main(["reconstuct"]))
    assert "muse nonsense: no such command" in one_error(capsys, command_line.main(["nonsense"]))
    monkeypatch.setattr(command_line, "SCRIPTS", (Path("/nowhere"), Path("/nowhere")))
    line = one_error(capsys, command_line.main(["report", "run"]))
    assert line == "error: muse report: this version of muse has no scripts/report.py"


def test_a_script_without_the_requirements_is_one_line():
    code = "import sys; sys.modules['omegaconf'] = None\nfrom muse import cli"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the Python package 'omegaconf' is not installed" in done.stderr


def test_the_package_reads_as_python_3_10():
    """Grammar, and names of the standard library that came later."""
    later = re.compile(
        r"\bhashlib\.file_digest|from typing import .*\b(Self|Never|Unpack|assert_never)\b"
        r"|\bimport tomllib|\bStrEnum\b|\bExceptionGroup\b|contextlib\.chdir|datetime\.UTC"
        r"|itertools\.batched|\.add_note\("
    )
    files = [*(ROOT / "muse").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert len(files) > 150
    for file in files:
        text = file.read_text(encoding="utf-8")
        ast.parse(text, feature_version=(3, 10))
        assert not later.search(text), file
