"""Configuration: every key known, typed, checked, frozen; default.yaml comes from the schema."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, ReadonlyConfigError

from muse import ConfigError, load_config
from muse.config import (
    ROUTING_CELLS,
    STREAM_KEYS,
    model_config,
    nearest,
    plain,
    read_section,
    resolved,
    shipped_config,
    stage_files,
    unset_variable,
)
from muse.config_checks import check_training_crop
from muse.config_fields import key, restore_words, walk
from muse.config_model import ModelConfig
from muse.config_schema import Config, TextTeacherConfig, TopologyTeacherConfig
from muse.errors import MuseError
from muse.teachers.build import TOPOLOGY_TEACHERS
from muse.training.tokenizer_task import TokenizerTask
from tests.helpers import MODEL, ROOT

DEFAULT = ROOT / "configs/default.yaml"
FILES = sorted(
    file
    for file in (ROOT / "configs").rglob("*.yaml")
    # accelerate's own; laid over others; of another schema
    if file.parent.name.partition("_")[0] not in ("accelerate", "recipes", "generation", "umm")
)


CHOICES = {name: f.metadata["choices"] for name, f in walk(Config) if f.metadata.get("choices")}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def empty(tmp_path):
    return write(tmp_path, "empty.yaml", "{}")


# ------------------------------------------------------------------------------- defaults and files
def default_script():
    path = ROOT / "tools/make_default_config.py"
    spec = importlib.util.spec_from_file_location("make_default_config", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_default_yaml_is_what_the_schema_says(tmp_path, capsys):
    """Keys, defaults, order, comments: tools/make_default_config.py would change nothing."""
    assert default_script().main(["--output", str(tmp_path / "default.yaml")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "default.yaml")
    assert (tmp_path / "default.yaml").read_text() == DEFAULT.read_text()


def test_default_yaml_states_choices_and_sentences():
    """Two keys by hand, one of them too long for its line."""
    lines = [line.strip() for line in DEFAULT.read_text().splitlines()]
    assert "mixed_precision: bf16        # no | bf16 | fp16" in lines
    start = lines.index(
        "kind: none                 # none | backbone; for losses.distillation (a stand-in for a"
    )
    assert lines[start + 1] == "# pretrained encoder)"
    assert max(len(line) for line in DEFAULT.read_text().splitlines()) <= 100


def test_default_yaml_is_the_defaults_and_states_every_key():
    def keys(node, prefix=""):
        for name, value in node.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")

    written = OmegaConf.to_container(OmegaConf.load(DEFAULT), resolve=False)
    typed = OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)
    assert set(keys(written)) == set(keys(typed))
    assert written == typed


def test_every_section_of_default_yaml_has_its_comments():
    lines = [
        line
        for line in DEFAULT.read_text().splitlines()
        if ":" in line and not line.lstrip().startswith("#")
    ]
    assert sum("#" in line for line in lines) > len(lines) / 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_file_loads_without_environment(file, monkeypatch):
    for name in ("CHECKPOINT_DIR", "DATA_DIR", "MUSE_DATA"):
        monkeypatch.delenv(name, raising=False)
    cfg = load_config(file)
    assert OmegaConf.is_readonly(cfg)
    assert resolved(cfg)["model"]["routing"] in ROUTING_CELLS


@pytest.mark.parametrize("size", ["muse_1b", "muse_3b", "muse_tiny"])
def test_stages_say_what_fidelity_says(size):
    """The recipe that FIDELITY quotes, stage by stage; the small model keeps order and switches."""
    one, two, three = (
        load_config(ROOT / f"configs/{size}/stage{stage}.yaml") for stage in (1, 2, 3)
    )
    assert [cfg.training.stage for cfg in (one, two, three)] == [
        "topology_warmup",
        "semantic_injection",
        "synergistic_tuning",
    ]
    assert [cfg.model.isolate_streams for cfg in (one, two, three)] == [True, True, False]
    assert [cfg.losses.itc.weight > 0 for cfg in (one, two, three)] == [False, True, True]
    assert all(
        cfg.losses.topology.weight > 0 and cfg.model.routing == "paper" for cfg in (one, two, three)
    )
    if size == "muse_tiny":
        return
    assert [cfg.optimizer.params.learning_rate for cfg in (one, two, three)] == [4e-4, 2e-4, 5e-5]
    assert [cfg.lr_scheduler.params.end_lr for cfg in (one, two, three)] == [1e-5, 1e-5, 1e-6]
    warmup = [5000, 5000, 1000] if size == "muse_3b" else [2000, 5000, 1000]
    assert [cfg.lr_scheduler.params.warmup_steps for cfg in (one, two, three)] == warmup
    assert [cfg.losses.topology.weight for cfg in (one, two, three)] == [2.0, 5.0, 0.2]
    assert [cfg.losses.itc.weight for cfg in (one, two, three)] == [0.0, 0.2, 0.1]
    assert [cfg.losses.perceptual.weight for cfg in (one, two, three)] == [1.1, 1.1, 2.0]
    assert [cfg.losses.adversarial.weight for cfg in (one, two, three)] == [0.0, 0.0, 0.5]
    assert [cfg.model.grad_scale for cfg in (one, two, three)] == [0.5, 0.5, 1.0]
    assert [cfg.training.per_gpu_batch_size for cfg in (one, two, three)] == [48, 48, 32]
    assert (
        three.optimizer.lr_multipliers == {"^encoder\\.": 0.5}
        and three.losses.adversarial.start == 0
    )
    steps = [75_000, 75_000, 50_000] if size == "muse_3b" else [50_000] * 3
    assert [cfg.training.max_train_steps for cfg in (one, two, three)] == steps
    assert (
        [source.weight for source in one.dataset.params.train_shards_path_or_url] == [0.2, 0.6, 0.2]
        if not isinstance(one.dataset.params.train_shards_path_or_url[0], str)
        else True
    )


# ----------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.ruting=paper", ["unknown key model.ruting", "did you mean model.routing?"]),
        (
            "model.isolate_stream=true",
            ["unknown key model.isolate_stream", "did you mean model.isolate_streams?"],
        ),
        ("losses.topolgy.weight=1", ["unknown key losses.topolgy", "losses.topology"]),
        (
            "lr_scheduler.params.warmup=3",
            ["unknown key lr_scheduler.params.warmup", "lr_scheduler.params.warmup_steps"],
        ),
        ("trainer.seed=1", ["unknown key trainer", "did you mean training?"]),
        ("zzzzqqq=1", ["unknown key zzzzqqq"]),
        ("model.dim=wide", ["wrong type for model.dim"]),
        ("training.max_train_steps=1.5", ["wrong type for training.max_train_steps"]),
        ("optimizer.params.learning_rate=fast", ["wrong type for optimizer.params.learning_rate"]),
        ("training.use_ema=perhaps", ["wrong type for training.use_ema"]),
        ("model=3", ["wrong type for model: a section of keys was expected, got 3"]),
        (
            "model.encoder=random",
            ["wrong type for model.encoder: a section of keys was expected, got 'random'"],
        ),
        ("model.encoder.config=3", ["wrong type for model.encoder.config"]),
        ("losses.topology=null", ["wrong type for losses.topology"]),
        ("training.trainable=5", ["training.trainable"]),
        ("model.routing=mine", ["model.routing must be one of paper, release, shared", "mine"]),
        ("training.stage=stage1", ["training.stage must be one of", "topology_warmup"]),
        ("training.max_train_steps=0", ["training.max_train_steps must be positive, got 0"]),
        ("model.num_blocks=-1", ["model.num_blocks must be positive"]),
        ("losses.itc.weight=-0.5", ["losses.itc.weight must be zero or more"]),
        ("losses.itc.weight=.nan", ["losses.itc.weight must be zero or more"]),
        ("losses.itc.weight=.inf", ["losses.itc.weight must be zero or more"]),
        (
            "optimizer.params.learning_rate=-1",
            ["optimizer.params.learning_rate must be zero or more"],
        ),
        ("model.num_heads=7", ["model.dim=512", "model.num_heads=7"]),
        ("model.num_heads=512", ["even head width"]),
        (
            "dataset.preprocessing.crop_size=256",
            ["crop_size=256 is larger than resize_shorter_edge=224"],
        ),
        ("no_equals_sign", ["'no_equals_sign' is not an override of the form key=value"]),
        ("model.dim=[1", ["overrides"]),
    ],
)
def test_one_wrong_key_is_one_line_that_names_it(override, words, empty):
    with pytest.raises(ConfigError) as caught:
        load_config(empty, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert isinstance(caught.value, MuseError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.preprocessing.crop_size=210", "crop_size=210 is not a multiple of 28"),
        ("model.unshuffle=5", "not a multiple of 70"),
    ],
)
def test_a_training_crop_is_of_whole_cells_and_any_other_is_not_refused(override, words, empty):
    config = load_config(empty, [override])
    with pytest.raises(ConfigError, match=words):
        check_training_crop(config)
    with pytest.raises(ConfigError, match=words):
        TokenizerTask(config).build(None)
    check_training_crop(load_config(empty))


@pytest.mark.parametrize("name", [name for name, choices in CHOICES.items() if "order" not in name])
def test_every_choice_is_checked(name, empty):
    with pytest.raises(ConfigError, match=f"{name} must be one of .*got 'nonsense'"):
        load_config(empty, [f"{name}=nonsense"])


def test_keys_with_choices():
    """The table that the choices were, before they stood at their fields."""
    assert {
        "model.routing",
        "model.gradient_checkpointing",
        "teacher.precision",
        "teacher.topology.kind",
        "teacher.topology.order",
        "teacher.text.kind",
        "teacher.feature.kind",
        "losses.reconstruction.type",
        "losses.perceptual.precision",
        "losses.topology.blocks",
        "losses.topology.heads",
        "losses.itc.blocks",
        "losses.itc.objective",
        "losses.adversarial.precision",
        "dataset.params.mix",
        "optimizer.name",
        "lr_scheduler.scheduler",
        "training.stage",
        "training.mixed_precision",
        "experiment.tracker",
    } == CHOICES.keys()


@pytest.mark.parametrize(
    ("bound", "names"),
    [
        (
            ("least", 1),
            "model.dim model.num_heads model.num_blocks model.unshuffle model.latent_dim "
            "model.semantic_dim training.max_train_steps training.per_gpu_batch_size "
            "training.gradient_accumulation_steps dataset.preprocessing.resize_shorter_edge "
            "dataset.preprocessing.crop_size dataset.params.eval_batch_size experiment.log_every",
        ),
        (
            ("least", 0),
            "losses.reconstruction.weight losses.perceptual.weight losses.topology.weight "
            "losses.itc.weight losses.adversarial.weight losses.distillation.weight "
            "losses.recognition.weight "
            "dataset.params.num_workers_per_gpu optimizer.params.learning_rate "
            "lr_scheduler.params.warmup_steps dataset.max_bad_fraction training.max_skipped_steps "
            "training.max_grad_norm experiment.keep_last experiment.save_every "
            "experiment.eval_every experiment.generate_every teacher.text.cache "
            "model.encoder.drop_path",
        ),
        (("above", 0), "teacher.topology.temperature"),
        (("below", 1), "model.encoder.drop_path"),
    ],
    ids=["positive", "zero or more", "above zero", "below one"],
)
def test_every_range_is_checked(bound, names, empty):
    kind, limit = bound
    found = {name for name, f in walk(Config) if f.metadata.get(kind) == limit}
    assert found == set(names.split())
    wrong = limit - 1 if kind == "least" else limit
    words = {("least", 1): "positive", ("least", 0): "zero or more"}.get(bound, f"{kind} {limit}")
    for name in found:
        with pytest.raises(ConfigError, match=f"{name} must be {words}, got {wrong}"):
            load_config(empty, [f"{name}={wrong}"])


@pytest.mark.parametrize("word", ["no", "No", "off", "false"])
def test_words_that_yaml_reads_as_booleans_stay_words(word, empty, tmp_path):
    """`no` is a choice of this key and the only one that YAML's false can mean."""
    assert load_config(empty, [f"training.mixed_precision={word}"]).training.mixed_precision == "no"
    file = write(tmp_path, "precision.yaml", f"training: {{mixed_precision: {word}}}")
    assert load_config(file).training.mixed_precision == "no"


def test_a_boolean_that_means_no_choice_is_refused(empty):
    for override in ("training.mixed_precision=yes", "experiment.tracker=off"):
        with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} must be one of"):
            load_config(empty, [override])
    assert load_config(empty, ["training.use_ema=no"]).training.use_ema is False


def test_each_boolean_word_is_restored_where_it_is_a_choice():
    @dataclasses.dataclass
    class Switches:
        light: str = key("dim", choices=("on", "off", "dim"))
        answer: str = key("yes", choices=("yes", "no"))
        formal: str = key("true", choices=("true", "false"))
        both: str = key("no", choices=("no", "off"))
        free: str = key("")

    for value, words in ((True, ["on", "yes", "true"]), (False, ["off", "no", "false"])):
        given = OmegaConf.create(
            dict.fromkeys(("light", "answer", "formal", "both", "free"), value)
        )
        config = OmegaConf.merge(OmegaConf.structured(Switches), given)
        restore_words(config, Switches)
        assert [config.light, config.answer, config.formal] == words
        assert config.both == config.free == str(value)  # two could be meant, or none


def test_a_key_that_was_a_boolean_still_reads_as_one(empty, tmp_path):
    """`model.gradient_checkpointing` of older files and checkpoints."""
    for value, mode in (("true", "blocks"), ("false", "none"), ("all", "all")):
        word = f"gradient_checkpointing: {value}"
        file = write(tmp_path, f"{value}.yaml", f"model: {{{word}}}")
        assert load_config(file).model.gradient_checkpointing == mode
        override = load_config(empty, [f"model.{word.replace(': ', '=')}"])
        assert override.model.gradient_checkpointing == mode
    for value, mode in ((True, "blocks"), (False, "none")):
        assert model_config({"gradient_checkpointing": value}).gradient_checkpointing == mode
    with pytest.raises(ConfigError, match="gradient_checkpointing must be one of none, blocks"):
        load_config(empty, ["model.gradient_checkpointing=some"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.routing=shared", "model.join_semantics=true"],
            "join_semantics=true is impossible with model.routing=shared",
        ),
        (
            ["losses.topology.weight=1", "teacher.topology.kind=none"],
            "losses.topology.weight=1.0 needs a teacher",
        ),
        (
            ["losses.itc.weight=1", "teacher.text.kind=none"],
            "losses.itc.weight=1.0 needs a teacher",
        ),
        (["losses.distillation.weight=1"], "teacher.feature.kind is none"),
        (
            ["losses.reconstruction.weight=0", "losses.perceptual.weight=0"],
            "nothing would be learned",
        ),
        (
            ["model.decoder.source=random", "model.decoder.config.latent_channels=8"],
            "model.latent_dim=32",
        ),
    ],
)
def test_keys_that_exclude_each_other(overrides, words, empty):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        load_config(empty, overrides)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory, a configuration file was expected"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(write(tmp_path, "broken.yaml", "model: {dim: [1\n"))
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(write(tmp_path, "list.yaml", "[1, 2]"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="bytes.yaml"):
        load_config(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="unknown key model.dims; did you mean model.dim"):
        load_config(write(tmp_path, "typo.yaml", "model: {dims: 512}"))


# --------------------------------------------------------------------------------------- base files
def test_base_files_are_read_first_and_from_beside_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "root.yaml", "model: {dim: 64, num_heads: 4}\ntraining: {seed: 1}")
    write(
        tmp_path / "deep",
        "middle.yaml",
        "base: ../root.yaml\nmodel: {dim: 128}\ntraining: {seed: 2}",
    )
    write(tmp_path, "other.yaml", "training: {seed: 3, ema_decay: 0.5}")
    top = write(
        tmp_path / "deep", "top.yaml", "base: [middle.yaml, ../other.yaml]\nmodel: {num_blocks: 3}"
    )
    cfg = load_config(top, ["training.ema_decay=0.25"])
    assert (cfg.model.dim, cfg.model.num_heads, cfg.model.num_blocks) == (128, 4, 3)
    assert (cfg.training.seed, cfg.training.ema_decay) == (3, 0.25)


def test_base_that_is_missing_or_names_itself(tmp_path):
    with pytest.raises(ConfigError, match="gone.yaml: no such configuration file"):
        load_config(write(tmp_path, "a.yaml", "base: gone.yaml"))
    write(tmp_path, "b.yaml", "base: c.yaml")
    with pytest.raises(ConfigError, match="names itself through `base`"):
        load_config(write(tmp_path, "c.yaml", "base: b.yaml"))
    for base in ("3", "[3]", "{a: 1}"):
        with pytest.raises(
            ConfigError, match="d.yaml: base must be a file name or a list of file names"
        ):
            load_config(write(tmp_path, "d.yaml", f"base: {base}"))


def test_the_same_base_twice_is_no_circle(tmp_path):
    write(tmp_path, "root.yaml", "training: {seed: 7}")
    write(tmp_path, "left.yaml", "base: root.yaml")
    write(tmp_path, "right.yaml", "base: root.yaml")
    assert (
        load_config(write(tmp_path, "top.yaml", "base: [left.yaml, right.yaml]")).training.seed == 7
    )


# ----------------------------------------------------------------------- overrides, types, freezing
def test_overrides_reach_nested_keys_and_free_sections(empty):
    cfg = load_config(
        empty,
        [
            "model.encoder.config.hidden_size=64",
            "losses.perceptual.weights.lpips=/x/y.pth",
            "optimizer.params.learning_rate=1e-5",
            "training.trainable=[^decoder]",
            "experiment.init_from=null",
            "model.isolate_streams=null",
            "training.seed=1",
        ],
    )
    assert cfg.model.encoder.config.hidden_size == 64 and cfg.losses.perceptual.weights == {
        "lpips": "/x/y.pth"
    }
    assert cfg.optimizer.params.learning_rate == 1e-5 and list(cfg.training.trainable) == [
        "^decoder"
    ]
    assert (
        cfg.experiment.init_from is None
        and cfg.training.seed == 1
        and cfg.model.isolate_streams is True
    )


def test_a_loaded_configuration_cannot_be_changed(empty):
    cfg = load_config(empty)
    with pytest.raises(ReadonlyConfigError):
        cfg.model.dim = 256
    with pytest.raises(ReadonlyConfigError):
        cfg.model.encoder.config["hidden_size"] = 3
    assert cfg.model.dim == 512


@pytest.mark.parametrize("routing", ROUTING_CELLS)
def test_routing_fills_its_cells_and_each_cell_can_be_overridden(routing, empty):
    cfg = load_config(empty, [f"model.routing={routing}"])
    cells = ROUTING_CELLS[routing]
    found = {
        name: cfg.model[name]
        for name in ("isolate_streams", "shield_attention", "join_semantics", "shield_semantics")
    }
    assert {**found, "topology": cfg.losses.topology.blocks, "itc": cfg.losses.itc.blocks} == cells
    for name in ("isolate_streams", "shield_attention", "shield_semantics"):
        turned = load_config(empty, [f"model.routing={routing}", f"model.{name}={not cells[name]}"])
        assert turned.model[name] is (not cells[name])
    assert (
        load_config(
            empty, [f"model.routing={routing}", "losses.topology.blocks=last"]
        ).losses.topology.blocks
        == "last"
    )


def test_model_section_alone_from_dict_dataclass_and_node(empty):
    assert model_config(MODEL).dim == 32 and model_config(MODEL).routing == "paper"
    assert model_config(ModelConfig(dim=64, num_heads=2)).dim == 64
    assert model_config(load_config(empty, ["model.dim=256"]).model).dim == 256
    with pytest.raises(ConfigError, match="unknown key model.dims; did you mean model.dim"):
        model_config({"dims": 3})
    with pytest.raises(ConfigError, match="wrong type for model.dim"):
        model_config({"dim": "wide"})
    with pytest.raises(ConfigError, match="model.routing must be one of"):
        model_config({"routing": "mine"})


def test_contract_keys_of_the_model_section():
    """CONTRACT.md's listing of `cfg.model`, value by value."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    cfg = load_config(DEFAULT).model
    contract = {
        "routing": "paper",
        "isolate_streams": True,
        "shield_attention": True,
        "join_semantics": True,
        "dim": 512,
        "num_heads": 8,
        "num_blocks": 6,
        "unshuffle": 2,
        "latent_dim": 32,
        "semantic_dim": 768,
        "grad_scale": 1.0,
        "encoder": {"source": "OpenGVLab/InternVL3-1B-hf", "config": {}},
        "decoder": {"source": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "config": {}},
    }
    assert contract.keys() <= fields
    listed = {name: plain(cfg[name]) for name in contract}
    assert listed["encoder"].pop("drop_path") == 0.0  # came later
    assert listed == contract


def test_stream_keys_are_cells_of_every_routing_and_keys_of_the_model():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    assert [name for name in fields if name in ROUTING_CELLS["paper"]] == list(STREAM_KEYS)
    for cells in ROUTING_CELLS.values():
        assert cells.keys() == {*STREAM_KEYS, "topology", "itc"}


# ---------------------------------------------------------------------------------- single sections
def test_a_section_alone_is_a_plain_dict_over_its_defaults(monkeypatch, empty):
    monkeypatch.setenv("TEACHERS", "/weights")
    given = OmegaConf.create({"source": "${oc.env:TEACHERS}/clip", "config": {"dim": 4}})
    read = read_section(given, TextTeacherConfig, "teacher.text")
    assert read == {
        "kind": "open_clip",
        "source": "/weights/clip",
        "config": {"dim": 4},
        "cache": 32768,
    }
    assert type(read["config"]) is dict
    read["config"]["dim"] = 5
    assert read_section(None, TextTeacherConfig, "teacher.text")["config"] == {}
    cfg = load_config(empty, ["teacher.text.cache=7"])
    assert read_section(cfg.teacher.text, TextTeacherConfig, "teacher.text")["cache"] == 7
    null = {"temperature": None, "layers": None}
    assert read_section(null, TopologyTeacherConfig, "t") == dataclasses.asdict(
        TopologyTeacherConfig()
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sorce": "x"}, r"unknown key t\.sorce; did you mean source\?"),
        ({"temperature": "warm"}, r"wrong type for t\.temperature"),
        ({"spread": 3.5}, r"wrong type for t\.spread"),
        ({"order": 3}, r"t\.order must be one of 1, 2, got 3"),
        ({"temperature": 0}, r"t\.temperature must be above 0, got 0"),
        ({"kind": "colour"}, r"t\.kind must be one of dinov3, affinity, random, none"),
    ],
)
def test_a_section_alone_is_checked_like_a_configuration(given, words):
    with pytest.raises(ConfigError, match=words):
        read_section(given, TopologyTeacherConfig, "t")
    choices = {"kind": ("colour",)}
    assert read_section({"kind": "colour"}, TopologyTeacherConfig, "t", choices)["kind"] == "colour"


def test_kinds_of_teachers_are_those_that_can_be_built():
    assert set(CHOICES["teacher.topology.kind"]) == {"none", *TOPOLOGY_TEACHERS}


# --------------------------------------------------------------- configurations that come with muse
def test_shipped_configurations_by_short_name(tmp_path, monkeypatch):
    expected = ROOT / "configs/muse_tiny/stage3.yaml"
    assert shipped_config("muse_tiny/stage3.yaml") == expected
    monkeypatch.chdir(tmp_path)
    whole = load_config(expected)
    for name in ("muse_tiny/stage3", "muse_tiny/stage3.yaml", "configs/muse_tiny/stage3.yaml"):
        assert load_config(name) == whole
    with pytest.raises(ConfigError, match="did you mean muse_tiny/stage3.yaml"):
        shipped_config("muse_tiny/stage33.yaml")
    with pytest.raises(ConfigError, match="stage9: no such configuration file; did you mean muse_"):
        load_config("muse_tiny/stage9")
    with pytest.raises(ConfigError, match="did you mean generation/imagenet256_xl\\?"):
        load_config("configs/generation/imagenet256xl")
    (tmp_path / "muse_tiny").mkdir()
    write(tmp_path / "muse_tiny", "stage3.yaml", "training: {seed: 5}")
    assert (
        load_config("muse_tiny/stage3.yaml").training.seed == 5
    )  # a file of one's own comes first


def test_a_directory_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is a directory, a configuration file was expected$"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="expected; it holds model.yaml, .*stage1.yaml"):
        load_config(ROOT / "configs/muse_1b")


def test_stages_of_a_variant_by_name(tmp_path, monkeypatch):
    expected = [ROOT / f"configs/muse_1b/stage{n}.yaml" for n in (1, 2, 3)]
    monkeypatch.chdir(tmp_path)
    for name in ("muse_1b", "configs/muse_1b", ROOT / "configs/muse_1b"):
        assert stage_files(name) == expected
    with pytest.raises(ConfigError, match="muse_1c: no stage.*did you mean muse_1b"):
        stage_files("muse_1c")


def test_shipped_configurations_are_installed_with_the_package(tmp_path):
    """What `pip install .` would copy, read where there is no clone."""
    source, target = tmp_path / "source", tmp_path / "installed"
    for folder in ("muse", "configs", "scripts"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for file in (ROOT / "setup.py", ROOT / "README.md", *ROOT.glob("requirements*.txt")):
        shutil.copy(file, source)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(target)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    code = (
        "from muse import load_config; from muse.config import shipped_config; import sys\n"
        "print(shipped_config('muse_tiny/stage3.yaml'))\n"
        "print(load_config('configs/muse_1b/stage1').training.stage)\n"
        "print('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [
        str(target / "muse/configs/muse_tiny/stage3.yaml"),
        "topology_warmup",
        "False",  # a configuration loads without torch
    ]
    installed = {file.relative_to(target / "muse") for file in target.rglob("*.yaml")}
    assert installed == {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml")}


# -------------------------------------------------------------------------------------- environment
def test_environment_is_read_when_a_value_is_used(empty, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    cfg = load_config(empty)
    with pytest.raises(InterpolationResolutionError) as caught:
        cfg.dataset.params.train_shards_path_or_url  # noqa: B018 - reading it is the test
    assert "DATA_DIR" in unset_variable(
        caught.value
    ) and "dataset.params.train_shards_path_or_url" in unset_variable(caught.value)
    with pytest.raises(ConfigError, match="DATA_DIR"):
        plain(cfg.dataset)
    kept = resolved(cfg)["dataset"]["params"]["train_shards_path_or_url"]
    assert kept == "${oc.env:DATA_DIR}/train-{000000..000007}.tar"
    monkeypatch.setenv("DATA_DIR", "/somewhere")
    assert cfg.dataset.params.train_shards_path_or_url == "/somewhere/train-{000000..000007}.tar"
    assert resolved(cfg)["dataset"]["params"]["eval_shards_path_or_url"].startswith(
        "/somewhere/val-"
    )


def test_unset_variable_inside_a_list_of_sources(monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    cfg = load_config(ROOT / "configs/muse_1b/stage1.yaml", ["experiment.output_dir=/tmp/x"])
    with pytest.raises(ConfigError, match="DATA_DIR"):
        plain(cfg.dataset.params.train_shards_path_or_url)


def test_nearest():
    assert nearest("rooting", ["routing", "dim"]) == "; did you mean routing?"
    assert nearest("xyz", ["routing", "dim"]) == ""
