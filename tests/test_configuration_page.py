"""docs/configuration.md: made from the schemas, never stale, every key of every kind on it."""

import dataclasses
import re

import pytest
from omegaconf import DictConfig, OmegaConf

from muse.config_fields import key
from muse.config_schema import Config
from muse.generation.generator_config import GeneratorConfig
from muse.multimodal.umm_run_config import UMMRunConfig
from tests.helpers import ROOT
from tools import make_config_reference as tool

PAGE = ROOT / "docs/configuration.md"
TITLES = {"Tokenizer": Config, "Generator": GeneratorConfig, "Multimodal model": UMMRunConfig}


def part(title: str) -> str:
    """The page between a title and the next."""
    return PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def leaves(node: DictConfig, prefix: str = "") -> set[str]:
    """Every key, dotted, of a configuration with all defaults."""
    found = set()
    for name in OmegaConf.to_container(node, resolve=False):
        child = node._get_node(name)
        typed = isinstance(child, DictConfig) and dataclasses.is_dataclass(child._metadata.ref_type)
        found |= leaves(child, f"{prefix}{name}.") if typed else {prefix + name}
    return found


def test_the_page_is_not_stale(tmp_path, capsys):
    """python tools/make_config_reference.py would change nothing."""
    assert tool.main(["--output", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


@pytest.mark.parametrize("title", TITLES)
def test_every_key_stands_in_its_part(title):
    """In a table, or in a section whose keys are those of the tokenizer of the same name."""
    text = part(title)
    tables = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE))
    whole = re.findall(r"^As \[`(\w+)`\]\(#\w+\) of the tokenizer\.", text, re.MULTILINE)
    for section, names in re.findall(
        r"^As \[`([\w.]+)`\]\(\S+\) of the tokenizer: (.+)\.$", text, re.M
    ):
        tables |= {f"{section}.{name}" for name in re.findall(r"`(\w+)`", names)}
    keys = leaves(OmegaConf.structured(TITLES[title]))
    assert {name for name in keys if name.split(".")[0] not in whole} == tables
    tokenizer = leaves(OmegaConf.structured(Config))
    for name in whole:
        assert {one for one in keys if one.startswith(f"{name}.")} == {
            one for one in tokenizer if one.startswith(f"{name}.")
        }


def test_rows_by_hand():
    """A range of two ends, choices, a text that Markdown would change, an own default."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert (
        "| `losses.reconstruction.type` | text | `l2` | `l1`, `l2` | mean over all elements of "
        "[0,1] pixels |"
    ) in lines
    (row,) = [line for line in lines if line.startswith("| `model.encoder.drop_path` |")]
    assert row.startswith("| `model.encoder.drop_path` | number | `0.0` | ≥ 0, \\< 1 | stochastic")
    assert (
        "| `latents.shape` | list of integers, or null | `null` |  | [channels, height, width] "
        "that the latents must have; null: whatever they have |"
    ) in lines


def test_a_new_key_is_on_the_page(monkeypatch):
    @dataclasses.dataclass
    class Part:
        size: dict[str, float] = key({"a": 1.5}, "of a | b", above=0)

    @dataclasses.dataclass
    class Whole:
        part: Part = dataclasses.field(default_factory=Part, metadata={"sentence": "what it is"})

    monkeypatch.setattr(tool, "KINDS", (("Things", Whole, "For tests."),))
    assert tool.reference_page().endswith(
        "- [Things](#things)\n\n## Things\n\nFor tests.\n\n### `part`\n\nWhat it is.\n\n"
        "| key | type | default | choices, range | |\n|---|---|---|---|---|\n"
        "| `part.size` | mapping of text to number | `{a: 1.5}` | > 0 | of a \\| b |\n"
    )
