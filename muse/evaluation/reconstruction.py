"""The measurement behind scripts/evaluate.py."""

import argparse

import torch

from muse import cli
from muse.evaluation import command
from muse.evaluation.evaluator import Evaluator, reconstruct_batches
from muse.utils.distributed import is_main
from muse.utils.viz_utils import comparison_sheet


def measure_reconstruction(
    args: argparse.Namespace, cfg
) -> tuple[dict[str, float], dict, torch.Tensor | None]:
    """Metrics, facts for the protocol, and the sheet of the first pictures (of process 0).

    Data and metrics are opened before the model, so that a wrong path or a missing weights file is told of at once.
    """
    command.check_numbers(args, num_pictures=0)
    command.start(args)
    loader = command.eval_data(args, cfg, args.val_url, "eval_shards_path_or_url", ("images",))
    evaluator = Evaluator(
        [name.strip() for name in args.metrics.split(",") if name.strip()],
        args.feature_network,
        args.device,
        inception_weights=args.inception_weights,
        feature_weights=args.feature_weights,
        lpips_net=args.lpips_net,
        lpips_weights=args.lpips_weights,
    )
    model = cli.load_model(args, cfg)
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    with command.one_line_errors("evaluation"):
        for real, fake in reconstruct_batches(model, loader, evaluator):
            missing = args.num_pictures - sum(len(pair[0]) for pair in first)
            if missing > 0:
                first.append((real[:missing].cpu(), fake[:missing].cpu()))
        facts = command.data_facts(loader, cfg)
        if loader.num_samples is not None:
            evaluator.expect = loader.num_samples - facts["samples"]["skipped"]
        values = evaluator.compute()
    sheet = (
        comparison_sheet(*map(torch.cat, zip(*first, strict=True))) if first and is_main() else None
    )
    return values, evaluator.protocol() | facts, sheet
