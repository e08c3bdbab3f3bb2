"""The documents: every key, test, link and fault they name exists, and their examples run."""

import ast
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from muse.config import load_config
from muse.config_schema import Config
from tests.data.helpers import encode, picture

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(
    file
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if file.is_file()
)
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
# Paths of the project in inline code and in code blocks, such as `muse/config.py`.
PATH = re.compile(r"(?<![\w./-])((?:muse|scripts|tools|docs|configs|tests)/[\w./-]*)(\{)?")
ADDED_BY_EXAMPLES = {"losses.total_variation.weight"}
FIRST_ROWS = range(1, 25)  # known before the project was built; the document carries all of them


def schema_keys(node: DictConfig | None = None, prefix: str = "") -> set[str]:
    """Every section and key of the configuration, dotted."""
    node = OmegaConf.structured(Config) if node is None else node
    keys = set()
    for name in OmegaConf.to_container(node, resolve=False):
        keys.add(prefix + name)
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys |= schema_keys(child, f"{prefix}{name}.")
    return keys


def fidelity_rows() -> dict[int, list[str]]:
    """Number -> cells of the rows of the comparison in docs/fidelity.md."""
    rows: dict[int, list[str]] = {}
    for line in (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            assert int(cells[0]) not in rows, f"row {cells[0]} stands twice"
            rows[int(cells[0])] = cells
    return rows


@functools.cache
def defined_tests(file: Path) -> set[str]:
    """Names of the test functions of a file, methods of its classes included."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


# --- docs/fidelity.md
def test_every_row_of_the_comparison_is_there_and_whole():
    rows = fidelity_rows()
    assert set(FIRST_ROWS) <= rows.keys() and sorted(rows) == list(range(1, len(rows) + 1))
    for number, cells in rows.items():
        assert len(cells) == 7, (
            f"row {number} has {len(cells)} cells: # point paper release ours key test"
        )
        assert all(cells), f"row {number} has an empty cell"


def test_every_key_of_the_comparison_exists():
    known = schema_keys()
    for number, cells in fidelity_rows().items():
        named = [key.partition("=")[0] for key in re.findall(r"`([^`]+)`", cells[5])]
        assert named or re.fullmatch(r"— \w.*", cells[5]), (
            f"row {number}: a key, or — and why there is none"
        )
        assert not set(named) - known, (
            f"row {number} names keys that do not exist: {sorted(set(named) - known)}"
        )


def test_every_test_of_the_comparison_exists():
    for number, cells in fidelity_rows().items():
        named = re.findall(r"`(tests/[^`]+::[^`]+)`", cells[6])
        assert named or re.fullmatch(r"— \w.*", cells[6]), (
            f"row {number}: a test, or — and why there is none"
        )
    for document in DOCS:
        for reference in re.findall(
            r"`(tests/[^`]+::[^`]+)`", document.read_text(encoding="utf-8")
        ):
            path, _, function = reference.partition("::")
            assert (ROOT / path).is_file(), f"{document.name}: no file {path}"
            assert function in defined_tests(ROOT / path), (
                f"{document.name}: {path} has no {function}"
            )


# --- all documents
@pytest.mark.parametrize(
    "name", ["fidelity.md", "extending.md", "data.md", "training.md", "questions.md"]
)
def test_every_key_in_the_text_exists(name):
    """Inline code that begins with a section of the configuration, such as `losses.itc.gather`."""
    known = schema_keys()
    sections = "|".join(key for key in known if "." not in key)
    text = CODE.sub("", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    found = set(re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)(?:=[^`]*)?`", text))
    assert found and not found - known - ADDED_BY_EXAMPLES


def anchors(file: Path) -> set[str]:
    """The anchors GitHub makes of a document's headings."""
    headings = re.findall(
        r"^#+ (.*)$", CODE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCS, ids=lambda file: file.name)
def test_every_local_link_resolves(document):
    text = CODE.sub("", document.read_text(encoding="utf-8"))
    for target in itertools.chain.from_iterable(LINK.findall(text)):
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target} leads nowhere"
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), (
            f"{document.name}: no heading for {target}"
        )


def named_paths(text: str) -> set[str]:
    """Paths of the project that a document names and does not add itself."""
    added = set(re.findall(r"```\w+\n# (\S+/\S+)\n", text))
    paths = set()
    for code in re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL):
        for path, brace in PATH.findall(code):  # of `stage{1,2}` the folder is looked at
            paths.add(path.rpartition("/")[0] if brace else path.rstrip("."))
    return paths - added


@pytest.mark.parametrize("document", DOCS, ids=lambda file: file.name)
def test_every_path_of_the_project_exists(document):
    paths = named_paths(document.read_text(encoding="utf-8"))
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_paths_are_found_in_inline_code_and_in_blocks():
    text = (
        "`muse/a.py` muse/b.py `outputs/muse/c` `tests/d.py::test`\n```bash\nsh tools/e.sh\n```\n"
    )
    added = "```python\n# muse/f.py\nimport f\n```\n`muse/f.py` `docs/run{0,1}`"
    assert named_paths(text + added) == {"muse/a.py", "tests/d.py", "tools/e.sh", "docs"}


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    index = text.partition("## Documents\n")[2].partition("\n## ")[0]
    pages = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\((docs/\w+\.md)\)", index)) == pages


def test_the_citation_is_of_the_software_and_names_the_paper():
    """What CFF 1.2.0 requires; the title and number of the paper as README has them."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    title, number = re.search(r"  title     = \{(.+)\}[\s\S]+?arXiv ([\d.]+)", readme).groups()
    (paper,) = cited["identifiers"]
    assert paper == {
        "type": "url",
        "value": f"https://arxiv.org/abs/{number}",
        "description": paper["description"],
    }
    assert title in paper["description"] and title in cited["abstract"]


def test_the_readme_draws_every_room_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    drawing = next(block for block in CODE.findall(text) if "muse/models/" in block)
    rooms = [path.parent.name for path in (ROOT / "muse").glob("*/__init__.py")]
    assert sorted(re.findall(r"^muse/(\w+)/", drawing, re.MULTILINE)) == sorted(rooms)


def test_every_key_of_the_default_configuration_has_a_comment():
    """On its own line, or on the line of a section that holds it."""
    bare, commented = [], [False]
    for line in (ROOT / "configs" / "default.yaml").read_text(encoding="utf-8").splitlines():
        found = re.match(r"( *)([a-z0-9_]+):(.*)$", line)
        if not found:
            continue
        depth, is_section = len(found[1]) // 2, not found[3].partition("#")[0].strip()
        del commented[depth + 1 :]
        commented.append("#" in found[3] or commented[depth])
        if not is_section and not commented[-1]:
            bare.append(line.strip())
    assert not bare, f"keys without a comment in configs/default.yaml: {bare}"


# --- docs/data.md
def test_the_kinds_of_broken_samples_are_those_of_the_code():
    """Every string given to BadSample, or noted as a fault, is a row of the table, and no other."""
    kinds = set()
    for file in (ROOT / "muse" / "data").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        kinds |= set(re.findall(r'BadSample\(\s*"([a-z_]+)"', text)) | set(
            re.findall(r'fault="([a-z_]+)"', text)
        )
        kinds |= set(re.findall(r'\.fault = .*"([a-z_]+)"', text)) | set(
            re.findall(r'else "([a-z_]+)", str\(error\)', text)
        )
    table = (
        (ROOT / "docs" / "data.md")
        .read_text(encoding="utf-8")
        .partition("| kind |")[2]
        .partition("\n\n")[0]
    )
    assert set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)) == kinds


# --- examples
def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a document in one language, in order."""
    return re.findall(
        rf"```{language}\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL
    )


def run_examples(name: str) -> dict:
    """The Python blocks of a document, run one after another in one namespace."""
    namespace: dict = {"__name__": "example"}
    for number, block in enumerate(blocks(name, "python")):
        exec(compile(block, f"{name}, example {number + 1}", "exec"), namespace)  # noqa: S102 - our own documents
    return namespace


def test_data_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for animal in ("cow", "dog", "hen"):
        (tmp_path / "photos" / f"{animal}.jpg").write_bytes(
            encode(picture(len(animal), 80, 70), "JPEG")
        )
    batch = run_examples("data.md")["batch"]
    assert sorted(file.name for file in (tmp_path / "data").glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    assert batch["text"] == [f"a photo of a {key}" for key in batch["keys"]]
    assert "torch.Size([2, 3, 64, 64])" in capsys.readouterr().out


def lines_added(text: str, change: str) -> str:
    """`text` with a change of docs/extending.md: lines that stay (" "), come ("+") or go ("-")."""
    lines, place = text.splitlines(), 0
    for mark, line in ((line[:1], line[1:]) for line in change.splitlines()):
        if mark == "+":
            lines.insert(place, line)
            place += 1
        else:
            place = lines.index(line, place)  # ValueError: the file has no such line here
            if mark == "-":
                del lines[place]
            else:
                place += 1
    return "\n".join(lines) + "\n"


def test_lines_are_added_where_their_neighbours_are():
    assert lines_added("a\nb\nc\na\n", " b\n+x\n+y\n-a\n+z") == "a\nb\nx\ny\nc\nz\n"
    with pytest.raises(ValueError, match="is not in list"):
        lines_added("a\nb\n", " b\n+x\n a")


# What the copy of the project with all changes of docs/extending.md is asked.
QUESTIONS = """
import json
from muse.experiments.ablation import VARIANTS
from muse.losses.muse_loss import MuseLoss
from muse.losses.reconstruction import ReconstructionTerm
from muse.losses.total_variation import TotalVariationTerm
from muse.stages import STAGES, select_trainable
from muse.teachers.build import build_topology_teacher
from omegaconf import OmegaConf
from safetensors.torch import load_file

ramp = torch.arange(8.0).div(8).expand(2, 3, 4, 8).contiguous()
loss = MuseLoss([ReconstructionTerm(1.0, "l2"), TotalVariationTerm(0.5)])
out = type("Out", (), {"reconstruction": ramp})()
teacher = build_topology_teacher({"kind": "colour", "temperature": 0.1}, 3, (1, 2))
target = teacher(torch.stack([ramp[0], torch.ones(3, 4, 8)]))
stage4 = load_config("configs/muse_tiny/stage4.yaml")
small = load_config("configs/muse_small/stage1.yaml")
overrides = ["losses.total_variation.weight=0.01", "teacher.topology.kind=colour"]
chosen = load_config("configs/muse_tiny/stage1.yaml", overrides)
print(json.dumps({
    "loss": loss(out, {"images": torch.zeros_like(ramp)})[0].item(),
    "needs": loss.needs,
    "terms": list(MuseLoss.from_config(chosen, model).terms),
    "grid": target.grid,
    "maps": [maps[:, 0].tolist() for maps in target.maps],
    "stage4": [stage4.training.stage, stage4.model.dim],
    "trained": select_trainable(model, STAGES["decoder_finetuning"].trainable),
    "small": [small.model.dim, small.model.num_blocks, OmegaConf.to_container(small.losses)],
    "blocks": len(model.muse_blocks),
    "parameters": [[name, p.numel()] for name, p in model.named_parameters()],
    "variant": VARIANTS["last_block"].overrides,
    "line": load_file(final / "model.safetensors")["weight"].tolist(),
}))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the project with all changes that docs/extending.md shows."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("muse", "configs", "tools"):
        shutil.copytree(ROOT / folder, root / folder)
    for language in ("python", "yaml", "diff"):
        for block in blocks("extending.md", language):
            named = re.match(r"# (\S+/\S+)\n", block)
            if language == "diff":
                path = root / named[1]
                path.write_text(lines_added(path.read_text(), block[named.end() :]))
            elif named:
                assert not (ROOT / named[1]).exists(), f"{named[1]} is in the project already"
                (root / named[1]).parent.mkdir(exist_ok=True)
                (root / named[1]).write_text(block)
    run_python(root, "tools/make_default_config.py")
    return root


def run_python(root: Path, *words: str) -> list[str]:
    """Run the Python of this process in `root`, on the package there; the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def answers(extended) -> tuple[list[str], dict]:
    """What the examples of docs/extending.md print, and the answers to QUESTIONS."""
    examples = [block for block in blocks("extending.md", "python") if not block.startswith("# ")]
    code = "\n".join([*examples, QUESTIONS])
    *printed, last = run_python(extended, "-c", code)
    return printed, json.loads(last)


def test_extending_examples_run(answers):
    printed, found = answers
    assert eval(printed[0])["mae"] == pytest.approx(0.25)  # noqa: S307 - what the example printed
    assert int(printed[1]) == sum(count for _, count in found["parameters"]) > 0
    assert found["blocks"] == 2
    assert printed[2] == "outputs/line/final"
    assert printed[3] == "torch.Size([8, 3, 32, 32])"


def test_the_example_of_a_loss(answers, extended):
    """On a ramp whose neighbours in a row differ by 1/8, and in a column by nothing."""
    _, found = answers
    square = sum((place / 8) ** 2 for place in range(8)) / 8
    assert found["loss"] == pytest.approx(square + 0.5 / 8)
    assert found["needs"] == {
        "topology": False,
        "semantics": False,
        "reconstruction": True,
        "encoder_only": False,
    }
    assert found["terms"] == ["reconstruction", "topology", "total_variation"]
    assert "  total_variation:\n    weight: 0.0" in (extended / "configs/default.yaml").read_text()


def test_the_example_of_a_teacher(answers):
    """The mean colours of the ramp's halves are .5 apart in each channel, a white picture's 0."""
    _, found = answers
    apart = math.exp(-(3**0.5) * 0.5 / 0.1)
    near, far = 1 / (1 + apart), apart / (1 + apart)
    assert found["grid"] == [1, 2] and len(found["maps"]) == 3
    for ramp, white in found["maps"]:
        torch.testing.assert_close(torch.tensor(ramp), torch.tensor([[near, far], [far, near]]))
        torch.testing.assert_close(torch.tensor(white), torch.full((2, 2), 0.5))


def test_the_example_of_another_kind_of_model(answers, extended):
    """Trained by the trainer to the weights that its targets were made with."""
    _, found = answers
    assert found["line"][0] == pytest.approx([1.0, -2.0, 0.5], abs=0.02)
    assert (extended / "outputs/line/checkpoint-200").is_dir()


def test_the_examples_of_a_stage_a_size_and_a_variant(answers):
    _, found = answers
    tiny = load_config(ROOT / "configs/muse_tiny/stage3.yaml")
    assert found["stage4"] == ["decoder_finetuning", tiny.model.dim]
    parts = ("to_latent.", "decoder_adapter.", "decoder.")
    assert found["trained"] == [name for name, _ in found["parameters"] if name.startswith(parts)]
    full = load_config(ROOT / "configs/muse_1b/stage1.yaml")
    losses = OmegaConf.to_container(full.losses)
    assert found["small"] == [384, 4, {**losses, "total_variation": {"weight": 0.0}}]
    assert found["variant"] == ["losses.topology.blocks=last"]
