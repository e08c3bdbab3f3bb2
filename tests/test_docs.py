"""The documents: every key, test, link and fault they name exists, and their examples run."""

import ast
import functools
import itertools
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from muse.config import load_config
from muse.config_schema import Config

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(
    file for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if file.is_file()
)
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
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


# ------------------------------------------------------------------------------------------------ docs/fidelity.md
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


# ------------------------------------------------------------------------------------------------ all documents
@pytest.mark.parametrize("name", ["fidelity.md", "extending.md", "data.md"])
def test_every_key_in_the_text_exists(name):
    """Words in code style that begin with a section of the configuration, such as `losses.itc.gather`."""
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


# ------------------------------------------------------------------------------------------------ docs/data.md
def test_the_kinds_of_broken_samples_are_those_of_the_code():
    """Every string given to BadSample, or noted as a record's fault, is a row of the table, and no other."""
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


# ------------------------------------------------------------------------------------------------ examples
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
    from tests.data.helpers import encode, picture

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for animal in ("cow", "dog", "hen"):
        (tmp_path / "photos" / f"{animal}.jpg").write_bytes(
            encode(picture(len(animal), 80, 70), "JPEG")
        )
    batch = run_examples("data.md")["batch"]
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    assert batch["text"] == [f"a photo of a {key}" for key in batch["keys"]]
    assert "torch.Size([2, 3, 64, 64])" in capsys.readouterr().out


@pytest.fixture
def tables():
    """The tables that the examples add to; afterwards they are what they were."""
    from muse.evaluation.evaluator import METRICS
    from muse.experiments.ablation import VARIANTS
    from muse.losses.muse_loss import TERMS
    from muse.stages import STAGES
    from muse.teachers.build import TOPOLOGY_TEACHERS

    tables = (METRICS, TERMS, TOPOLOGY_TEACHERS, STAGES, VARIANTS)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before):
        table.clear()
        table.update(content)


def test_extending_examples_run(tmp_path, monkeypatch, capsys, tables):
    import torch

    from muse.losses.muse_loss import MuseLoss
    from muse.losses.reconstruction import ReconstructionTerm
    from muse.teachers import build_topology_teacher

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    names = run_examples("extending.md")
    printed = capsys.readouterr().out.splitlines()
    assert eval(printed[0])["mae"] == pytest.approx(0.25)  # noqa: S307 - what the example printed
    assert (
        int(printed[1]) == sum(p.numel() for p in names["model"].parameters()) > 0
        and len(names["model"].muse_blocks) == 2
    )
    assert printed[2] == "torch.Size([8, 3, 32, 32])"

    ramp = (
        torch.arange(8.0).div(8).expand(2, 3, 4, 8).contiguous()
    )  # neighbours in a row differ by 1/8, in a column by 0
    loss = MuseLoss([ReconstructionTerm(1.0, "l2"), names["TotalVariationTerm"](0.5)])
    out = type("Out", (), {"reconstruction": ramp})()
    assert loss(out, {"images": torch.zeros_like(ramp)})[0].item() == pytest.approx(
        ramp.square().mean().item() + 0.5 / 8
    )
    assert loss.needs == {
        "topology": False,
        "semantics": False,
        "reconstruction": True,
        "encoder_only": False,
    }

    target = build_topology_teacher({"kind": "colour", "temperature": 0.1}, 3, (1, 2))(
        torch.stack([ramp[0], torch.ones(3, 4, 8)])
    )
    apart = (
        torch.tensor(-(3**0.5) * 0.5 / 0.1).exp().item()
    )  # the halves' means lie .5 apart in each channel
    assert len(target.maps) == 3 and target.grid == (1, 2)
    torch.testing.assert_close(target.maps[0][0, 0, 0], torch.tensor([1, apart]) / (1 + apart))
    torch.testing.assert_close(target.maps[0][1, 0], torch.full((2, 2), 0.5))


def test_extending_configurations_load(tmp_path, tables):
    """The YAML examples, written under the names they state, with the new stage's row in the table."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    namespace: dict = {}
    exec(next(block for block in blocks("extending.md", "python") if "STAGES[" in block), namespace)  # noqa: S102
    written = []
    for block in blocks("extending.md", "yaml"):
        path = tmp_path / re.match(r"# (\S+\.yaml)", block)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block, encoding="utf-8")
        written.append(path)
    loaded = {
        path.relative_to(tmp_path / "configs").as_posix(): load_config(path) for path in written
    }
    assert loaded["muse_tiny/stage4.yaml"].training.stage == "decoder_finetuning"
    assert (
        loaded["muse_tiny/stage4.yaml"].model.dim
        == load_config(ROOT / "configs/muse_tiny/stage3.yaml").model.dim
    )
    small, full = (
        loaded["muse_small/stage1.yaml"],
        load_config(ROOT / "configs/muse_1b/stage1.yaml"),
    )
    assert (small.model.dim, small.model.num_blocks) == (384, 4) and small.losses == full.losses
