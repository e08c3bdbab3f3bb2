"""Segmentation probe: BatchNorm and a 1x1 convolution on frozen features.

The mIoU goes to OUTPUT_DIR/metrics.json, some predictions to OUTPUT_DIR/segmentation.png.
"""

import sys

from muse import cli
from muse.evaluation import command
from muse.evaluation.segmentation import SegmentRecipe, run_segment_probe


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    command.add_feature_flags(parser, "block")
    command.add_data_flags(parser, "outputs/segment_probe", train=True)
    command.add_flag(
        parser,
        "mode",
        choices=("muse", "baseline"),
        default="muse",
        help="baseline: the bare encoder, as --baseline",
    )
    command.add_flag(
        parser,
        "labels",
        choices=("ade20k", "plain", "foreground"),
        default="ade20k",
        help="ade20k: 0 is ignored and 1..150 become 0..149; plain: the masks' numbers; "
        "foreground: 0 against the rest",
    )
    command.add_flag(
        parser, "num_classes", type=int, help="default: 150 for ade20k, else from the data"
    )
    command.add_flag(parser, "steps", type=int, default=2000)
    command.add_flag(parser, "probe_batch_size", type=int, default=32)
    command.add_flag(parser, "learning_rate", "lr", type=float, default=3e-3)
    command.add_flag(parser, "num_pictures", type=int, default=6)
    cli.refuse(parser, "this probe counts optimizer steps; use --steps", "--epochs")
    args = cli.parse(parser, argv)
    baseline = "encoder" if args.mode == "baseline" else args.baseline
    recipe = SegmentRecipe(
        args.labels, args.num_classes, args.steps, args.probe_batch_size, args.learning_rate
    )
    setup = command.set_up(args, cli.load_cfg(args))
    measured = run_segment_probe(setup, recipe, args.feature, baseline, args.num_pictures)
    if measured is not None:
        path = command.write_metrics(setup, measured, "segmentation.png")
        values = measured.values
        absent, classes = values["classes_absent"], values["classes"]
        print(
            f"mIoU {values['miou']:.4f} over {classes - absent} classes "
            f"({absent} of {classes} absent), pixel accuracy {values['pixel_accuracy']:.4f}"
        )
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
