"""Every code block of README and docs: it runs by itself after the demo, or its words are parsed.

A block gets a shell of its own, in a copy of the project whose `outputs/demo` is laid out as
`bash tools/demo.sh` leaves it (two steps a stage). A block below a line in italics that begins with
*Needs* or *Takes* is not run here (`bash tools/check_docs.sh` runs it): its commands' flags are
parsed, and the configurations that they name are loaded with their overrides.
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from muse.config import load_config
from muse.generation.generator_config import load_generator_config
from muse.multimodal.umm_run_config import load_umm_config
from tests import forked_python
from tests.helpers import ROOT
from tests.training.processes import free_port
from tools.doc_blocks import Block, documents, marked_blocks, read_blocks

DOCS = documents()
NO_CODE = ("", "text", "bibtex")
EXTENDING = "extending.md"  # its blocks change a copy of the project: tests/test_docs.py
LAYOUT = ("configs", "docs", "muse", "scripts", "tests", "tools")


def treatment(block: Block) -> str:
    """run, parsed, configuration, extended or no code; "" for an unknown language."""
    if block.language in NO_CODE:
        return "no code"
    if block.document == EXTENDING and block.language in ("python", "yaml", "diff"):
        return "extended"
    if block.language in ("bash", "python"):
        return "parsed" if block.mark else "run"
    return "configuration" if block.language == "yaml" else ""


BLOCKS = [
    block for file in DOCS for block in read_blocks(file.name, file.read_text(encoding="utf-8"))
]


def treated(how: str) -> list[Block]:
    return [block for block in BLOCKS if treatment(block) == how]


def test_every_block_is_treated():
    """`pytest -s` shows how."""
    for how in ("run", "parsed", "configuration", "extended", "no code"):
        print(f"\n{how:>13}: {', '.join(map(str, treated(how)))}", end="")
    unknown = [f"{block}: {block.language}" for block in BLOCKS if not treatment(block)]
    assert not unknown, "no test treats blocks of this language"
    lines = [line for file in DOCS for line in file.read_text(encoding="utf-8").splitlines()]
    assert 2 * len(BLOCKS) == sum(line.lstrip().startswith("```") for line in lines)
    assert treated("run") and treated("parsed") and treated("extended")
    assert treated("parsed") == marked_blocks(DOCS)  # what tools/check_docs.sh runs


def test_a_block_is_read_with_its_mark():
    text = "# A\n\n*Needs a GPU.*\n\n```bash\na b\n```\ntext\n```python\nc\n```\n*b*\n```\nd\n```"
    assert read_blocks("x.md", text) == [
        Block("x.md", 5, "bash", "a b\n", "Needs a GPU."),
        Block("x.md", 9, "python", "c\n", ""),
        Block("x.md", 13, "", "d\n", ""),
    ]


# --- blocks that run
# As tools/demo.sh does it, with two steps a stage, on drawn pictures named as the real ones.
DEMO = """
from pathlib import Path
from muse.experiments.demo import STAGES, stage_config
from muse.experiments.demo_data import make_demo_data
from muse.training.tokenizer_task import train
output = Path("outputs/demo")
data = output / "data-everything"
make_demo_data(kind="shapes", output=data, images=16, val_images=4, workers=1)
own = [
    f"dataset.params.train_shards_path_or_url={data}/train-*.tar",
    f"dataset.params.eval_shards_path_or_url={data}/val-*.tar",
]
for stage in STAGES:
    train(stage_config(stage, 2, output, own))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which configs/muse_tiny trains for two steps of two pictures."""
    root = tmp_path_factory.mktemp("project")
    for name in LAYOUT:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (root / "configs/muse_tiny").glob("*.yaml"):
        text = re.sub(r"(max_train_steps|per_gpu_batch_size): \d+", r"\1: 2", file.read_text())
        file.write_text(text.replace("log_every: 10", "log_every: 1"))
    return root


@pytest.fixture(scope="module")
def environment(project, tmp_path_factory):
    """A user's environment after the demo: nothing of this process's; a `python` with muse."""
    programs = tmp_path_factory.mktemp("bin")
    python = str(programs / "python")
    variables = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(programs),
        "PYTHONPATH": str(project),  # in place of the installed package
        "MUSE_PYTHON": python,
        "PYTHON_EXEC": python,  # what torchrun starts
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_PORT": str(free_port()),  # another run may have the default one
    }
    server = forked_python.start(programs, variables)
    (programs / "muse").write_text(f'#!/bin/sh\nexec {python} -m muse "$@"\n')
    (programs / "muse").chmod(0o755)
    yield variables
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def demo(project, environment) -> Path:
    """The project after the demo."""
    succeeds("python -", environment, project, DEMO)
    return project


@pytest.fixture
def workplace(demo, tmp_path) -> Path:
    """The project after the demo, with nothing that another block has left."""
    for name in LAYOUT:
        (tmp_path / name).symlink_to(demo / name)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/demo").symlink_to(demo / "outputs/demo")
    return tmp_path


def succeeds(code: str, environment: dict[str, str], folder: Path, stdin: str = "") -> str:
    """What a fresh shell prints; the first failure or unset variable in it is a failure."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{code}{stdin}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("block", treated("run"), ids=str)
def test_a_block_runs_by_itself(block, workplace, environment):
    """One that cannot, or not within seconds, says so: *Needs …* or *Takes …* above it."""
    code, stdin = (block.code, "") if block.language == "bash" else ("python -", block.code)
    succeeds(code, environment, workplace, stdin)


# --- blocks whose commands are only parsed
# What the launchers start besides Python. Any other command prints its words.
PROGRAMS = ("bash", "dirname", "nproc")
PRINT = "printf '%q ' \"$@\"; echo"
# train_stage.sh asks `python -c` for the number of GPUs.
PYTHON = f'#!/usr/bin/env bash\n[ "$1" = -c ] && echo 8 && exit\nset -- "$0" "$@"; {PRINT}\n'


# Scripts whose configuration is no tokenizer's.
LOADERS = {
    "train_generator": load_generator_config,
    "generate": load_generator_config,
    "train_umm": load_umm_config,
}


class Parsed(Exception):
    """Raised in place of running a command: carries its flags."""


@pytest.fixture
def dry_environment(tmp_path) -> dict[str, str]:
    """A shell whose commands print their words, launchers included, and start nothing."""
    for name in PROGRAMS:
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return {
        "PATH": str(tmp_path),
        "MUSE_PYTHON": str(tmp_path / "python"),
        "DRY_RUN": "1",
        "BASH_FUNC_command_not_found_handle%%": f"() {{ {PRINT}\n}}",
    }


@pytest.fixture
def parse_alone(monkeypatch):
    """Every parser raises its flags as `Parsed`; the working directory is the project's."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def stop(parser, words=None, parse=parse):
            raise Parsed(parse(parser, words))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("block", treated("parsed"), ids=str)
def test_the_words_of_a_block_are_known(block, dry_environment, parse_alone):
    if block.language == "python":
        imports = [node for node in ast.parse(block.code).body if "Import" in type(node).__name__]
        exec(compile(ast.Module(imports, []), str(block), "exec"), {})  # noqa: S102
        return
    printed = succeeds(block.code, dry_environment, ROOT).splitlines()
    assert len(printed) >= len(command_lines(block.code)) > 0
    for line in printed:
        check_words(shlex.split(line))


def command_lines(code: str) -> list[str]:
    """The lines of a block that start something: not comments and settings."""
    lines = code.replace("\\\n", " ").splitlines()
    settings = re.compile(r"(export )?(\w+=\S* *)*(#.*)?")
    return [line for line in lines if not settings.fullmatch(line.strip())]


def check_words(words: list[str]) -> None:
    """The script's own parser takes them, and the configuration that they name is valid with its
    overrides.
    """
    place = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        return  # a command that is not this project's
    script = (ROOT / words[place]).relative_to(ROOT)
    module = importlib.import_module(".".join(script.with_suffix("").parts))
    with pytest.raises(Parsed) as found:
        module.main(words[place + 1 :])
    flags = vars(found.value.args[0])
    config = flags.get("config")
    if config and ("muse_" in config or Path(config).is_file()):
        load = LOADERS.get(script.stem, load_config)
        words = flags["overrides"] if "overrides" in flags else flags["words"]
        load(config, [word for word in words if "=" in word])


def test_unknown_words_are_found(dry_environment, parse_alone, capsys):
    printed = succeeds(
        "A=1\nnothing here\nbash tools/train_stage1.sh muse_tiny training.seeds=1\n"
        "python scripts/inference.py --no_such_flag\n",
        dry_environment,
        ROOT,
    )
    other, launched, direct = map(shlex.split, printed.splitlines())
    assert other == ["nothing", "here"]
    with pytest.raises(Exception, match="unknown key training.seeds"):
        check_words(launched)
    with pytest.raises(pytest.fail.Exception):  # the parser complains: nothing is parsed
        check_words(direct)
    assert "--no_such_flag" in capsys.readouterr().err
    assert command_lines("a b \\\n c\n# d\n\nE=1 F=2 # g\nexport H=3\nI=4 j\n") == [
        "a b   c",
        "I=4 j",
    ]


@pytest.mark.parametrize("block", treated("configuration"), ids=str)
def test_a_configuration_is_valid(block, tmp_path):
    (tmp_path / "block.yaml").write_text(block.code)
    load_config(tmp_path / "block.yaml")
