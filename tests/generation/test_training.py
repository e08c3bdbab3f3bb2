"""A generator through the common trainer: exact, averaged, resumed, watched."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from muse.errors import CheckpointError, ConfigError, DataError
from muse.generation import LatentShards, LatentStatistics, flow_loss
from muse.generation.generator import Generator
from muse.generation.generator_task import GeneratorTask, train_generator
from muse.generation.latent_data import latent_loader
from muse.training.trainer import Trainer
from scripts import extract_latents
from scripts import train_generator as script
from tests.generation.conftest import generator_settings, save_tokenizer
from tests.helpers import one_error

EVERY_TWO = {"experiment": {"save_every": 2, "keep_last": 9}}


# ---------------------------------------------------------------------------------------- the data
def loader_of(cfg, latents_dir, **options):
    shards = LatentShards(latents_dir)
    statistics = LatentStatistics.load(latents_dir / "statistics.safetensors")
    return latent_loader(cfg, shards, statistics, **options)


def test_an_epoch_is_every_latent_once_normalised(generator_cfg, latents_dir):
    loader = loader_of(generator_cfg(), latents_dir)
    batches = [batch for batch, _ in zip(loader, range(8))]
    stored = {record.key: record for record in LatentShards(latents_dir)}
    keys = [key for batch in batches for key in batch["keys"]]
    assert sorted(keys) == sorted(stored)
    statistics = LatentStatistics.load(latents_dir / "statistics.safetensors")
    views = set()
    for batch in batches:
        for key, latent, label in zip(batch["keys"], batch["latents"], batch["labels"]):
            record = stored[key]
            candidates = statistics.normalise(record.latents)
            equal = [bool(torch.equal(latent, view)) for view in candidates]
            assert sum(equal) == 1 and int(label) == record.label
            views.add(equal.index(True))
    assert views == {0, 1}
    everything = torch.cat([batch["latents"] for batch in batches])
    assert everything.mean().abs() < 0.1 and (everything.std() - 1).abs() < 0.1


def test_the_view_is_drawn_anew_every_epoch(generator_cfg, latents_dir):
    loader = iter(loader_of(generator_cfg(), latents_dir))
    epochs = []
    for _ in range(2):
        batches = [next(loader) for _ in range(8)]
        epochs.append(
            {
                key: latent
                for batch in batches
                for key, latent in zip(batch["keys"], batch["latents"])
            }
        )
    changed = sum(not torch.equal(epochs[0][key], epochs[1][key]) for key in epochs[0])
    assert 16 <= changed <= 48  # of 64, each with probability one half


@pytest.mark.parametrize("cached", [True, False])
def test_its_position_is_restored(generator_cfg, latents_dir, cached):
    cfg = generator_cfg({"latents": {"cache_in_memory": cached}})
    first = loader_of(cfg, latents_dir)
    stream = iter(first)
    for _ in range(11):  # into the second epoch
        next(stream)
    state = json.loads(json.dumps(first.state_dict()))
    wanted = [next(stream) for _ in range(3)]
    second = loader_of(cfg, latents_dir)
    second.load_state_dict(state)
    for batch, other in zip(wanted, iter(second)):
        assert batch["keys"] == other["keys"]
        assert torch.equal(batch["latents"], other["latents"])


def test_two_processes_see_different_halves(generator_cfg, latents_dir):
    halves = []
    for rank in range(2):
        loader = loader_of(generator_cfg(), latents_dir, rank=rank, world=2)
        batches = [batch for batch, _ in zip(loader, range(4))]
        halves.append({key for batch in batches for key in batch["keys"]})
    assert len(halves[0]) == len(halves[1]) == 32 and not halves[0] & halves[1]


# -------------------------------------------------------------------------------------- the task
def test_a_step_minimises_velocity_and_weighted_cosine(generator_cfg):
    cfg = generator_cfg({"flow": {"cosine_weight": 0.5, "time_mean": -0.75, "shift": 2.0}})
    task = GeneratorTask(cfg)
    trainer = Trainer(cfg, task)
    batch = next(trainer.batches())
    with torch.no_grad():
        torch.manual_seed(5)
        loss, numbers = task.compute_loss(trainer.wrapped, batch, 0)
        torch.manual_seed(5)
        wanted = flow_loss(
            trainer.model, batch["latents"], batch["labels"], time_mean=-0.75, shift=2.0
        )
    velocity, cosine = float(wanted.velocity.mean()), float(wanted.cosine.mean())
    assert float(numbers["velocity"]) == pytest.approx(velocity)
    assert float(loss) == pytest.approx(velocity + 0.5 * cosine)
    # A new network's velocity is 0: the error is the mean square of data - noise, about 2.
    assert velocity == pytest.approx(2.0, rel=0.2)


def test_processes_draw_differently(generator_cfg):
    draws = []
    for rank in range(2):
        task = GeneratorTask(generator_cfg())
        task.accelerator = type("Process", (), {"process_index": rank})
        task.prepare()
        draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_the_fixed_table_has_no_average_and_is_saved(generator_cfg):
    cfg = generator_cfg(EVERY_TWO)
    run = train_generator(cfg).parent
    means = load_file(run / "checkpoint-4/ema.safetensors")
    weights = load_file(run / "checkpoint-4/model.safetensors")
    final = load_file(run / "final/model.safetensors")
    assert weights.keys() - means.keys() == {
        "pos_embed",
        "feat_rope.freqs_cos",
        "feat_rope.freqs_sin",
    }
    assert final.keys() == weights.keys()
    assert all(torch.equal(final[name], mean) for name, mean in means.items())
    # A checkpoint opens as its averages over its own weights: the same as `final`.
    opened = Generator.from_pretrained(run / "checkpoint-4").net.state_dict()
    assert all(torch.equal(opened[name], final[name]) for name in final)
    assert Generator.from_pretrained(run).facts == Generator.from_pretrained(run / "final").facts


def test_resumed_equals_unbroken_bit_for_bit(generator_cfg, tmp_path):
    looking = {
        "experiment": {"save_every": 2, "keep_last": 9, "generate_every": 2, "eval_every": 2}
    }
    cfg = generator_cfg(looking, {"training": {"max_train_steps": 6}}, output="whole")
    whole = train_generator(cfg).parent
    shutil.copytree(whole / "checkpoint-2", tmp_path / "broken/checkpoint-2")
    torch.manual_seed(99)
    cfg = generator_cfg(looking, {"training": {"max_train_steps": 6}}, output="broken")
    broken = train_generator(cfg).parent
    for name in ("model", "ema", "state", "rank-0"):
        left, right = (
            load_file(run / f"checkpoint-6/{name}.safetensors") for run in (whole, broken)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_what_it_looks_at_moves_no_generator(generator_cfg):
    """Samples and distances while it trains change nothing of the training."""
    runs = [
        train_generator(
            generator_cfg(
                {
                    "experiment": {"generate_every": every, "eval_every": every},
                    "evaluation": {"images": 6},
                },
                output=f"every{every}",
            )
        ).parent
        for every in (0, 1)
    ]
    left, right = (load_file(run / "final/model.safetensors") for run in runs)
    assert all(torch.equal(left[key], right[key]) for key in left)
    records = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    distances = [record["eval"] for record in records if "eval" in record]
    assert len(distances) == 4
    assert all(one["fd_efficientnet_lite0"] > 0 and one["samples"] == 6 for one in distances)
    assert (runs[1] / "images/samples-4.png").is_file()
    assert not (runs[0] / "images/samples-4.png").exists()


def test_checkpointing_changes_nothing(generator_cfg):
    """Recomputed blocks give the same weights, bit for bit."""
    runs = [
        train_generator(
            generator_cfg({"generator": {"gradient_checkpointing": on}}, output=f"recomputed-{on}")
        ).parent
        for on in (False, True)
    ]
    left, right = (load_file(run / "final/model.safetensors") for run in runs)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_it_starts_from_another_generator(generator_cfg, tmp_path):
    first = train_generator(generator_cfg(output="first"))
    from_directory = {"experiment": {"init_from": str(first.parent)}}
    state = load_file(first / "model.safetensors")
    published = tmp_path / "published.pt"
    torch.save({"model": {}, "ema": {f"module.{k}": v for k, v in state.items()}}, published)
    from_file = {"experiment": {"init_from": str(published)}}
    for change in (from_directory, from_file):
        cfg = generator_cfg(change, output="second")
        net = GeneratorTask(cfg).build(Accelerator(cpu=True))
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


# -------------------------------------------------------------------------------- what is refused
def test_latents_of_another_tokenizer_are_refused(generator_cfg, tokenizer_dir, tmp_path):
    other = save_tokenizer(tmp_path / "other", seed=1)
    watched = {"experiment": {"generate_every": 1}, "tokenizer": {"checkpoint": str(other)}}
    with pytest.raises(CheckpointError, match="other: another tokenizer"):
        train_generator(generator_cfg(watched))
    statistics = LatentStatistics("channel", "f" * 64)
    statistics.update(torch.randn(4, 8, 4, 4))
    copied = tmp_path / "latents"
    shutil.copytree(generator_cfg().latents.path, copied)
    statistics.save(copied / "statistics.safetensors")
    with pytest.raises(CheckpointError, match="statistics.*latents of another tokenizer"):
        train_generator(generator_cfg({"latents": {"path": str(copied)}}))


def test_a_run_does_not_go_on_with_latents_of_another_tokenizer(
    generator_cfg, latents_dir, tokenizer_config, tmp_path
):
    cfg = generator_cfg(EVERY_TWO)
    train_generator(cfg)
    other, folder = save_tokenizer(tmp_path / "other", seed=1), tmp_path / "latents"
    words = ["--config", str(tokenizer_config), "--checkpoint", str(other)]
    assert extract_latents.main([*words, "--output", str(folder)]) == 0
    with pytest.raises(CheckpointError, match="its checkpoint: latents of another tokenizer"):
        train_generator(generator_cfg(EVERY_TWO, {"latents": {"path": str(folder)}}))


def test_it_goes_on_without_a_decoder(generator_cfg, latents_dir, tmp_path, caplog):
    """Latents whose tokenizer has moved can be learned; only nothing is drawn."""
    copied = tmp_path / "latents"
    shutil.copytree(latents_dir, copied)
    index = json.loads((copied / "latents.json").read_text())
    index["notes"]["checkpoint"]["path"] = "moved/away"
    (copied / "latents.json").write_text(json.dumps(index))
    changes = {"latents": {"path": str(copied)}, "experiment": {"generate_every": 4}}
    run = train_generator(generator_cfg(changes)).parent
    assert "moved/away" in caplog.text and not list((run / "images").iterdir())


def test_a_wrong_class_number_is_one_line(generator_cfg, latents_dir):
    """At once by the index, and by the record where an index says otherwise."""
    fewer = {"generator": {"num_classes": 5}}
    with pytest.raises(ConfigError, match="num_classes=5, but .* has labels up to 7"):
        train_generator(generator_cfg(fewer))
    loader = loader_of(generator_cfg(fewer), latents_dir)
    message = r"latents-\d+\.tar: train\d+ has the label [567], but .* labels are 0 to 4"
    with pytest.raises(DataError, match=message):
        list(zip(loader, range(8)))


def test_another_shape_or_network_is_refused(generator_cfg):
    with pytest.raises(ConfigError, match=r"latents.shape=\[32, 8, 8\], but .* \[8, 4, 4\]"):
        train_generator(generator_cfg({"latents": {"shape": [32, 8, 8]}}))
    with pytest.raises(ConfigError, match="generator: input_size 4x4 is not a multiple"):
        train_generator(generator_cfg({"generator": {"patch_size": 3}}))
    train_generator(generator_cfg(EVERY_TWO))
    with pytest.raises(ConfigError, match="was written by another model"):
        train_generator(generator_cfg({"generator": {"depth": 1}}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "latents.json").unlink(), "holds no latents.json"),
        (lambda folder: (folder / "latents-000003.tar").write_bytes(b"x" * 700), "truncated"),
        (lambda folder: (folder / "latents-000003.tar").unlink(), "is missing"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "not statistics"),
    ],
)
def test_damaged_latents_are_one_line(damage, message, latents_dir, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(latents_dir, folder)
    damage(folder)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(generator_settings(folder, tmp_path / "run")))
    assert message in one_error(capsys, script.main(["--config", str(file), "--device", "cpu"]))


def test_a_latent_of_no_tensor_stops_the_run(generator_cfg, latents_dir, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(latents_dir, folder)
    file = folder / "latents-000000.tar"
    content = file.read_bytes()
    place = content.index(b"latents", content.index(b".safetensors"))
    file.write_bytes(content[:place] + b"LATENTS" + content[place + 7 :])
    with pytest.raises(DataError, match="1 of .* samples could not be used: bad_latents 1"):
        changes = {"latents": {"path": str(folder)}, "training": {"max_train_steps": 12}}
        train_generator(generator_cfg(changes))
