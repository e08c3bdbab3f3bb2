"""`--recipe paper|release`: all keys that make a run the paper's or the release's, row by row of
docs/fidelity.md.
"""

import re

import pytest
from omegaconf import OmegaConf

from muse import ConfigError, config, load_config
from muse.teachers.base import choose_layers
from scripts import train_stage1
from tests.helpers import ROOT, one_error, run_config

SIZES = ("muse_1b", "muse_3b", "muse_tiny")
STAGES = (1, 2, 3)
KEYS = {  # key: (paper, release), the same in every stage
    "model.routing": ("paper", "release"),  # row 1 and the table of routings
    "model.join_semantics": (True, False),
    "model.shield_attention": (True, True),
    "model.shield_semantics": (True, True),
    "losses.topology.blocks": ("all", "last"),
    "losses.topology.heads": ("mean", "mean"),
    "losses.topology.transpose": (False, True),  # row 4
    "losses.itc.blocks": ("all", "last"),
    "losses.itc.gather": (True, False),  # row 6
    "losses.itc.objective": ("nce", "nce"),
    "losses.clamp_reconstruction": (False, True),  # row 44
    "losses.adversarial.precision": ("mixed", "float32"),  # row 48
    "model.encoder.drop_path": (0.0, 0.1),  # row 45
    "dataset.params.mix": ("sample", "batch"),  # row 46
    "dataset.params.resampled": (False, True),  # row 54
    "dataset.params.shuffle_buffer": (1000, 5000),
    "dataset.preprocessing.jpeg_draft": (True, False),  # row 57
    "optimizer.no_decay": ([], ["^encoder\\.embeddings\\."]),  # row 36
    "lr_scheduler.params.discriminator_end_lr": (None, 2e-6),  # row 55
}


def stages(size: str, recipe: str | None, overrides=()) -> list:
    files = [ROOT / f"configs/{size}/stage{stage}.yaml" for stage in STAGES]
    return [load_config(file, overrides, recipe) for file in files]


def test_the_ledger_names_every_key_of_a_recipe_and_the_recipes_set_all_that_it_names():
    """The table of docs/fidelity.md against both files."""
    text = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8").partition("| where | keys |")[2]
    named = set(
        re.findall(
            r"`((?:model|losses|dataset|optimizer|lr_scheduler)\.[\w.]+)`",
            text.partition("\n\n")[0],
        )
    )
    assert len(named) == 23

    def keys(node: dict, prefix: str = "") -> set[str]:
        inner = [(f"{prefix}{name}", value) for name, value in node.items()]
        leaves = {name for name, value in inner if not isinstance(value, dict)}
        return leaves.union(
            *(keys(value, f"{name}.") for name, value in inner if isinstance(value, dict))
        )

    for recipe in ("paper", "release"):
        loaded = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/recipes/{recipe}.yaml"))
        set_by = keys(loaded).union(*(keys(part) for part in loaded.pop("stages", {}).values()))
        set_by = {name for name in set_by if not name.startswith("stages.")}
        of_the_paper = {
            "losses.reconstruction.weight",
            "losses.perceptual.weight",
            "optimizer.params.learning_rate",
        }
        assert set_by == (named if recipe == "paper" else named - of_the_paper)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_every_stage_has_the_documented_numbers(recipe, size):
    loaded = stages(size, recipe)
    for key, values in KEYS.items():
        expected = values[recipe == "release"]
        assert [OmegaConf.select(cfg, key) for cfg in loaded] == [expected] * 3, key
    isolated = [cfg.model.isolate_streams for cfg in loaded]
    assert isolated == ([True, True, False] if recipe == "paper" else [False] * 3)

    # What differs by stage: L_rec (row 8), the rate of stage 3 (row 9), steps (row 47).
    pixels = [cfg.losses.reconstruction.weight for cfg in loaded]
    assert pixels == ([0.1, 0.1, 1.0] if recipe == "paper" else [1.0, 1.0, 1.0])
    own = stages(size, None)
    for cfg, plain in zip(loaded, own, strict=True):
        assert cfg.training == plain.training and cfg.experiment == plain.experiment
    perceptual = [cfg.losses.perceptual.weight for cfg in loaded]
    rates = [cfg.optimizer.params.learning_rate for cfg in loaded]
    if recipe == "paper":
        assert perceptual == [0.11, 0.11, own[2].losses.perceptual.weight] and rates[2] == 1e-5
    else:
        assert perceptual == [cfg.losses.perceptual.weight for cfg in own]
        assert rates == [cfg.optimizer.params.learning_rate for cfg in own]
    if size != "muse_tiny":
        steps = [cfg.training.max_train_steps for cfg in loaded]
        assert steps == ([75_000, 75_000, 50_000] if size == "muse_3b" else [50_000] * 3)
        assert rates == [4e-4, 2e-4, 1e-5 if recipe == "paper" else 5e-5]
        assert perceptual[2] == 2.0 and loaded[2].optimizer.lr_multipliers == {"^encoder\\.": 0.5}
        assert perceptual[:2] == ([0.11, 0.11] if recipe == "paper" else [1.1, 1.1])


def test_the_teacher_layer_of_the_block_that_learns_under_release_is_the_teacher_s_last():
    """Row 2 needs no key: evenly spaced layers end at the last one."""
    for depth, blocks in ((32, 6), (12, 4), (7, 3)):
        assert choose_layers(None, depth, blocks)[-1] == depth - 1


def test_overrides_win_and_a_recipe_wins_over_the_stage_s_file():
    file = "configs/muse_1b/stage3.yaml"
    cfg = load_config(file, ["losses.itc.gather=true", "model.encoder.drop_path=0.2"], "release")
    assert cfg.losses.itc.gather and cfg.model.encoder.drop_path == 0.2
    assert load_config(file).optimizer.params.learning_rate == 5e-5
    assert load_config(file, recipe="paper").optimizer.params.learning_rate == 1e-5
    # The stage is the one that is trained, also where an override names it.
    cfg = load_config(file, ["training.stage=topology_warmup"], "paper")
    assert cfg.losses.reconstruction.weight == 0.1 and cfg.optimizer.params.learning_rate == 5e-5


def test_recipes_that_do_not_exist_or_name_an_unknown_stage(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="papr: no such recipe; there are paper, release"):
        load_config("configs/muse_1b/stage1.yaml", recipe="papr")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own.yaml").write_text("stages: {topology_warmupp: {}}")
    monkeypatch.setattr(config, "SHIPPED", (tmp_path,))
    with pytest.raises(ConfigError, match="unknown stage topology_warmupp; did you mean topology_"):
        load_config(ROOT / "configs/muse_1b/stage1.yaml", recipe="own")
    (tmp_path / "recipes/own.yaml").write_text("stages: {topology_warmup: {model: {ruting: 1}}}")
    with pytest.raises(ConfigError, match="unknown key model.ruting"):
        load_config(ROOT / "configs/muse_1b/stage1.yaml", recipe="own")


def test_a_stage_trains_by_a_recipe_and_says_so_in_its_directory(shapes_data, tmp_path, capsys):
    file = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run")
    words = ["--config", str(file), "--device", "cpu", "--recipe", "release"]
    assert train_stage1.main([*words, "losses.topology.transpose=false"]) == 0
    written = OmegaConf.load(tmp_path / "run/config.yaml")
    assert written.model.routing == "release" and written.model.encoder.drop_path == 0.1
    assert written.losses.clamp_reconstruction and written.losses.topology.transpose is False
    assert written.dataset.params.mix == "batch"
    assert "no such recipe" in one_error(capsys, train_stage1.main([*words[:-1], "mine"]))
