"""A generator's configuration: typed, checked, frozen, read as the tokenizer's is."""

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from muse.config import load_config, plain
from muse.config_fields import walk
from muse.errors import ConfigError
from muse.generation.generator_config import GeneratorConfig, load_generator_config
from tests.helpers import ROOT

FILES = sorted((ROOT / "configs/generation").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_file_loads(file):
    cfg = load_generator_config(file)
    assert cfg.optimizer.params.beta2 == 0.95 and cfg.optimizer.params.weight_decay == 0.0


def test_it_is_found_by_its_short_name_and_frozen():
    cfg = load_generator_config("generation/tiny", ["generator.depth=2"])
    assert cfg.generator.depth == 2 and cfg.generator.hidden_size == 192
    with pytest.raises(ReadonlyConfigError):
        cfg.generator.depth = 3


def test_every_key_has_a_sentence_or_is_a_section():
    bare = [
        name
        for name, field in walk(GeneratorConfig)
        if not field.metadata.get("sentence")
        and not field.metadata.get("choices")
        and not hasattr(field.type, "__dataclass_fields__")
    ]
    assert bare == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("generator.dpth=3", "unknown key generator.dpth; did you mean generator.depth?"),
        ("training.stage=x", "unknown key training.stage"),
        ("sampling.method=dopri", "sampling.method must be one of euler, heun, got 'dopri'"),
        ("sampling.steps=0", "sampling.steps must be positive, got 0"),
        ("sampling.shift=0", "sampling.shift must be above 0"),
        ("sampling.cfg_interval=[0.8,0.2]", "sampling.cfg_interval must be two ascending times"),
        ("generator.depth=many", "wrong type for generator.depth"),
        ("generator.hidden_size=100", "hidden_size=100 is not a multiple of 4 x"),
        ("generator.class_dropout_prob=1.0", "class_dropout_prob must be below 1"),
        ("latents.shape=[8,8]", r"latents.shape must be \[channels, height, width\]"),
    ],
)
def test_a_wrong_key_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_generator_config("generation/tiny", [override])


def test_the_two_kinds_of_files_are_not_mixed_up():
    with pytest.raises(ConfigError, match="unknown key generator"):
        load_config("generation/tiny")
    with pytest.raises(ConfigError, match="unknown key model"):
        load_generator_config("muse_tiny/stage3")


def test_a_missing_variable_is_named_when_it_is_needed(monkeypatch):
    monkeypatch.delenv("LATENTS_DIR", raising=False)
    cfg = load_generator_config("generation/tiny")
    assert "LATENTS_DIR" in OmegaConf.to_yaml(cfg)
    with pytest.raises(Exception, match="LATENTS_DIR"):
        plain(cfg.latents)
