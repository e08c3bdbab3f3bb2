"""The authors' checkpoint: golden outputs, every form of the file, the full-size key list, and the
way back.
"""

import importlib.util
import json
import logging

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from muse import MUSE_ViT, load_config, load_release_checkpoint
from muse.config import model_config
from muse.errors import CheckpointError
from muse.models.loading import initial_model, load_model
from muse.models.release_weights import from_release, to_release
from tests.golden.fill import GOLDEN, filled_state_dict
from tests.helpers import ROOT, one_error

TOLERANCE = 1e-4
KEYS_1B = GOLDEN / "release_muse_1b_keys.json"


@pytest.fixture(scope="module")
def state():
    return filled_state_dict(GOLDEN / "release_tiny_keys.json")


@pytest.fixture(scope="module")
def config():
    return json.loads((GOLDEN / "release_tiny_config.json").read_text())["model"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "release_tiny.safetensors")


@pytest.fixture(scope="module")
def release_file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "pytorch_model.bin"
    torch.save(state, path)
    return path


def hold_golden(model, golden) -> None:
    """All outputs that the authors' code gave, within the tolerance of shared/reference."""
    images = golden["images"]
    with torch.no_grad():
        encoding = model.encode(images, return_attention=True)
        ours = {
            "latent": encoding.latent,
            "topology": encoding.topology[-1],
            "semantic": encoding.semantic,
            "image_embeds": model.embed_image(images),
            "reconstruction": model.decode(encoding.latent),
        }
    theirs = {**golden, "reconstruction": (golden["reconstruction"] + 1) / 2}
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        assert (value - theirs[name]).abs().max() < TOLERANCE, name


def test_outputs_equal_the_authors_code(release_file, config, golden):
    model = load_release_checkpoint(release_file, config)
    assert not model.training
    hold_golden(model, golden)
    # The training forward walks another path (explicit attention, every block through the
    # projector).
    with torch.no_grad():
        out = model(golden["images"])
    assert (out.image_embeds[-1] - golden["image_embeds"]).abs().max() < TOLERANCE
    assert (out.log_topology[-1].exp() - golden["topology"]).abs().max() < TOLERANCE
    assert (out.reconstruction - (golden["reconstruction"] + 1) / 2).abs().max() < TOLERANCE


def test_paper_routing_differs_by_the_join_alone(release_file, config, golden):
    state = load_release_checkpoint(release_file, config).state_dict()
    latents = []
    for changes in ({}, {"join_semantics": False}):
        model = MUSE_ViT({**config, "routing": "paper", **changes}, load_backbones=False).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            latents.append(model.encode(golden["images"]).latent)
    joined, parted = latents
    assert (joined - golden["latent"]).abs().max() > 0.01
    assert (parted - golden["latent"]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"routing": "paper"}, "with model.routing=paper; pass model.routing=release "),
        ({"routing": "shared"}, "with model.routing=shared; pass model.routing=release "),
        ({"routing": "paper", "join_semantics": False}, "with model.routing=paper; pass"),
        ({"join_semantics": True}, "with model.join_semantics=true; pass model.join_semantics=nul"),
    ],
)
def test_another_routing_is_refused_with_what_to_set(changes, words, release_file, config):
    """Never a warning and wrong numbers: neither from Python nor in training."""
    for load in (load_release_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=words):
            load(release_file, {**config, **changes})
    cfg = OmegaConf.create(
        {"model": {**config, **changes}, "experiment": {"init_from": str(release_file)}}
    )
    with pytest.raises(CheckpointError, match="tools/convert_checkpoint.py"):
        initial_model(cfg)


def test_training_starts_from_the_authors_file_and_under_another_routing_from_a_directory(
    release_file, config, golden, tmp_path
):
    cfg = OmegaConf.create({"model": config, "experiment": {"init_from": str(release_file)}})
    hold_golden(initial_model(cfg).eval(), golden)
    load_release_checkpoint(release_file, config).save_pretrained(tmp_path / "muse")
    cfg = OmegaConf.create(
        {
            "model": {**config, "routing": "paper"},
            "experiment": {"init_from": str(tmp_path / "muse")},
        }
    )
    assert initial_model(cfg).config.routing == "paper"


@pytest.mark.parametrize("name", ["ema_model/pytorch_model.bin", "pytorch_model.bin"])
def test_a_directory_of_the_authors_training(name, state, config, golden, tmp_path):
    """Row 53 of docs/fidelity.md; the running means win, as in a checkpoint of ours."""
    folder = tmp_path / "run/checkpoint-50000"
    (folder / "ema_model").mkdir(parents=True)
    torch.save(state, folder / name)
    if name.startswith("ema_model"):
        torch.save({**state, "to_latent.bias": torch.ones(32)}, folder / "pytorch_model.bin")
        hold_golden(load_model(folder / "ema_model", config), golden)
    hold_golden(load_model(folder, config), golden)
    cfg = OmegaConf.create({"model": config, "experiment": {"init_from": str(folder.parent)}})
    hold_golden(initial_model(cfg).eval(), golden)


def test_a_stage_1_file_brings_all_but_the_semantic_parts(state, config, golden, tmp_path, caplog):
    """Row 53: written without projector and logit scale; both are initialised, and it is said."""
    absent = {
        name for name in state if name.startswith("semantic_projector.") or name == "logit_scale"
    }
    assert len(absent) == 3
    path = tmp_path / "pytorch_model.bin"
    torch.save({name: tensor for name, tensor in state.items() if name not in absent}, path)
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO, logger="muse"):
        model = load_release_checkpoint(path, config)
    assert "without semantic_projector and logit_scale; both are initialised anew" in caplog.text
    with torch.no_grad():
        assert (
            model.decode(model.encode(golden["images"]).latent) - (golden["reconstruction"] + 1) / 2
        ).abs().max() < TOLERANCE
    torch.manual_seed(3)
    new = MUSE_ViT(config, load_backbones=False).state_dict()
    for name in absent:
        assert torch.equal(model.state_dict()[name], new[name])
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4)
    # Two of the three missing is no stage-1 file but a broken one.
    torch.save({name: t for name, t in state.items() if name not in absent - {"logit_scale"}}, path)
    with pytest.raises(CheckpointError, match="2 missing tensors"):
        load_release_checkpoint(path, config)


FORMS = {
    "plain": lambda state: state,
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "model": lambda state: {"model": state},
    "ema_model": lambda state: {
        "ema_model": {f"module.{name}": tensor for name, tensor in state.items()},
        "model": {},
    },
    "teacher": lambda state: {
        **state,
        "dino_teacher.layer.0.weight": torch.zeros(3),
        "dino_teacher.norm.bias": torch.zeros(3),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_and_prefixes_of_a_pickle(form, state, config, golden, tmp_path, caplog):
    path = tmp_path / "pytorch_model.bin"
    torch.save(FORMS[form](state), path)
    with caplog.at_level(logging.INFO, logger="muse"):
        model = load_release_checkpoint(path, config)
    with torch.no_grad():
        assert (model.encode(golden["images"]).latent - golden["latent"]).abs().max() < TOLERANCE
    report = [line.split() for line in caplog.messages]
    encoder = next(words for words in report if words[0] == "encoder")
    assert encoder == ["encoder", "loaded", "32", "skipped", "0", "missing", "0", "unexpected", "0"]
    if form == "teacher":
        assert next(words for words in report if words[0] == "dino_teacher")[3:5] == [
            "skipped",
            "2",
        ]


@pytest.mark.parametrize("form", ["plain", "module", "both"])
def test_safetensors_file_through_every_door(form, state, config, golden, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(FORMS[form](state), path)
    for model in (load_release_checkpoint(path, config), load_model(path, config)):
        with torch.no_grad():
            assert (
                model.encode(golden["images"]).latent - golden["latent"]
            ).abs().max() < TOLERANCE


def test_missing_and_unexpected_tensors_are_named(state, config, tmp_path):
    path = tmp_path / "model.bin"
    torch.save({name: tensor for name, tensor in state.items() if name != "to_latent.bias"}, path)
    with pytest.raises(CheckpointError, match=r"model: 1 missing tensor \(to_latent\.bias\)$"):
        load_release_checkpoint(path, config)
    torch.save({**state, "surprise.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"model: 1 unexpected tensor \(surprise\.weight\)$"):
        load_release_checkpoint(path, config)
    torch.save(
        {name.replace("attn.qkv", "attn.kqv"): tensor for name, tensor in state.items()}, path
    )
    with pytest.raises(
        CheckpointError,
        match=r"missing tensors \(the first is encoder.encoder.layer.0.attention.k_proj",
    ):
        load_release_checkpoint(path, config)


def test_another_size_is_named(state, config, tmp_path):
    path = tmp_path / "model.bin"
    torch.save({**state, "to_latent.bias": torch.zeros(16)}, path)
    with pytest.raises(
        CheckpointError, match=r"to_latent\.bias has shape \(16,\), the model makes it \(32,\)"
    ):
        load_release_checkpoint(path, config)


class Touch:
    """A pickle that runs code when it is opened the unsafe way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "wrap", [lambda bad, state: bad, lambda bad, state: {"model": state, "args": bad}]
)
def test_a_pickle_that_carries_code_is_refused_and_not_run(wrap, state, config, tmp_path):
    path, trace = tmp_path / "model.bin", tmp_path / "code-ran"
    torch.save(wrap(Touch(trace), state), path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_release_checkpoint(path, config)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"this is text, not a checkpoint", b"PK\x03\x04 half a zip", b"{}", b"\x80\x02]."],
)
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_file_that_is_no_checkpoint(content, name, config, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_release_checkpoint(path, config)


def test_no_such_file_and_no_tensors(config, tmp_path):
    with pytest.raises(CheckpointError, match="not found: .*none.bin"):
        load_release_checkpoint(tmp_path / "none.bin", config)
    torch.save({"epoch": 3}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        load_release_checkpoint(tmp_path / "model.bin", config)


# ---------------------------------------------------------------------------------------- full size
@pytest.fixture(scope="module")
def full_size():
    """MUSE-1B on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return MUSE_ViT(
            load_config(ROOT / "configs/muse_1b/stage1.yaml", ["model.routing=release"]).model,
            load_backbones=False,
        )


def test_full_size_consumes_every_key_with_equal_shapes(full_size):
    shapes = json.loads(KEYS_1B.read_text())
    assert len(shapes) == 617
    released = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = full_size.state_dict()
    converted, report = from_release(released, expected)
    assert len(report.loaded) == 615 and sorted(report.skipped) == ["dino_mean", "dino_std"]
    assert not report.missing and not report.unexpected
    assert {name: tuple(t.shape) for name, t in converted.items()} == {
        name: tuple(t.shape) for name, t in expected.items()
    }


def test_full_size_has_the_counted_parameters(full_size):
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 486_459_556


def test_full_size_names_lead_back_to_the_release(full_size):
    shapes = {
        name: list(tensor.shape) for name, tensor in to_release(full_size.state_dict()).items()
    }
    assert shapes == json.loads(KEYS_1B.read_text())


# ---------------------------------------------------------------------------------------- converter
@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps({"model": {**config, "routing": "paper"}}))
    return path


def convert(*words) -> int:
    spec = importlib.util.spec_from_file_location(
        "convert_checkpoint", ROOT / "tools/convert_checkpoint.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in words])


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_converter_there_and_back(
    suffix, state, config, config_file, release_file, golden, tmp_path
):
    ours, theirs = tmp_path / "muse", tmp_path / "back" / f"model.{suffix}"
    assert (
        convert(
            "--config",
            config_file,
            "--checkpoint",
            release_file,
            "--output",
            ours,
            "--device",
            "cpu",
        )
        == 0
    )
    hold_golden(MUSE_ViT.from_pretrained(ours), golden)

    assert (
        convert(
            "--config",
            config_file,
            "--checkpoint",
            ours,
            "--output",
            theirs,
            "--to",
            "release",
            "--device",
            "cpu",
        )
        == 0
    )
    back = load_file(theirs) if suffix == "safetensors" else torch.load(theirs, weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    hold_golden(load_release_checkpoint(theirs, config), golden)
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []  # nothing half-written is left


def test_converter_refuses_what_the_authors_code_cannot_compute(
    config, config_file, tmp_path, capsys
):
    MUSE_ViT(model_config({**config, "routing": "paper"})).save_pretrained(tmp_path / "paper")
    words = (
        "--config",
        config_file,
        "--checkpoint",
        tmp_path / "paper",
        "--to",
        "release",
        "--output",
    )
    line = one_error(capsys, convert(*words, tmp_path / "x.bin"))
    assert "model.routing=paper" in line
    line = one_error(capsys, convert(*words, tmp_path / "x.bin", "model.routing=paper"))
    assert "routing=release alone" in line
    assert "named .bin or .safetensors" in one_error(capsys, convert(*words, tmp_path / "folder"))
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "folder").exists()


def test_converter_says_in_one_line_where_it_cannot_write(
    config_file, release_file, tmp_path, capsys
):
    (tmp_path / "file").write_text("in the way")
    line = one_error(
        capsys,
        convert(
            "--config",
            config_file,
            "--checkpoint",
            release_file,
            "--output",
            tmp_path / "file" / "out",
        ),
    )
    assert "cannot be written" in line
