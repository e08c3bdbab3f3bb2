"""Two processes give what one gives, though one has more samples than the other."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from muse.evaluation.evaluator import Evaluator
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix
from muse.evaluation.metrics.inception import InceptionScores

COUNT = 23


def project(images):
    """(B,3,16,16) -> features (B,24) and logits (B,10)."""
    features = images.flatten(1).double() @ torch.linspace(
        -1, 1, 768 * 24, dtype=torch.float64
    ).sin().view(768, 24)
    return features.float(), 3 * features[:, :10].float()


def measure(rank, world):
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(COUNT, 3, 16, 16, generator=generator)
    fake = (real + 0.1 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    labels = torch.randint(0, 4, (2, COUNT, 8, 8), generator=generator)
    evaluator = Evaluator(
        ("psnr", "ssim", "fd_projection"), feature_network=lambda x: project(x)[0], expect=COUNT
    )
    evaluator.metrics.append(InceptionScores(("rfid", "is"), project))
    confusion = ConfusionMatrix(4)
    mine = torch.arange(COUNT)[rank::world] if world > 1 else torch.arange(COUNT)
    for index in mine.split(4):
        evaluator.update(real[index], fake[index], index)
        confusion.update(labels[0, index], labels[1, index])
    return evaluator.compute() | {"miou": confusion.compute().mean}


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    (folder / f"{rank}.json").write_text(json.dumps(measure(rank, world)))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, (2, tmp_path), nprocs=2)
    single = measure(0, 1)
    assert set(single) == {"psnr", "ssim", "fd_projection", "rfid", "is", "is_std", "miou"}
    for rank in range(2):
        for name, value in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert value == pytest.approx(single[name], rel=1e-6), name
