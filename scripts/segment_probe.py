"""Segmentation probe: BatchNorm and a 1x1 convolution on frozen features; mIoU into OUTPUT_DIR/metrics.json."""

import sys
from pathlib import Path

from muse import cli


@cli.entry
def main(argv=None) -> int:
    from muse.evaluation import command, frozen_features

    parser = cli.parser(__doc__)
    frozen_features.add_flags(parser, "block")
    command.add_flags(parser, "outputs/segment_probe", train=True)
    parser.add_argument(
        "--mode",
        choices=("muse", "baseline"),
        default="muse",
        help="baseline: the bare encoder, as --baseline",
    )
    parser.add_argument(
        "--labels",
        choices=("ade20k", "plain", "foreground"),
        default="ade20k",
        help="ade20k: 0 is ignored and 1..150 become 0..149; plain: the masks' numbers; foreground: 0 against the rest",
    )
    parser.add_argument(
        "--num_classes",
        "--num-classes",
        type=int,
        default=None,
        help="default: 150 for ade20k, else from the data",
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--probe_batch_size", "--probe-batch-size", type=int, default=32)
    parser.add_argument("--learning_rate", "--learning-rate", type=float, default=3e-3)
    parser.add_argument("--num_pictures", "--num-pictures", type=int, default=6)
    args = cli.parse(parser, argv)
    args.baseline = "encoder" if args.mode == "baseline" else args.baseline
    cfg = cli.load_cfg(args)
    from muse.evaluation.segmentation_run import run_segment_probe

    measured = run_segment_probe(args, cfg)
    if measured is not None:
        from muse.utils.viz_utils import save_image

        values, facts, sheet = measured
        path = command.write_metrics(args, cfg, values, **facts)
        if sheet is not None:
            save_image(sheet, Path(args.output_dir) / "segmentation.png")
        print(
            f"mIoU {values['miou']:.4f} over {values['classes'] - values['classes_absent']} classes "
            f"({values['classes_absent']} of {values['classes']} absent), pixel accuracy {values['pixel_accuracy']:.4f}"
        )
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
