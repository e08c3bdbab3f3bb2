"""Segmentation probe: batch norm and a 1x1 convolution on frozen features.

The mIoU goes to OUTPUT_DIR/metrics.json, some predictions to OUTPUT_DIR/segmentation.png.
"""

import sys
from dataclasses import replace

from muse import cli
from muse.evaluation import command
from muse.evaluation.measurement import check_number
from muse.evaluation.protocols import find_protocol
from muse.evaluation.segmentation import run_segment_probe
from muse.evaluation.segmentation_pictures import SavedPredictions
from muse.evaluation.segmentation_settings import MaskLabels, adjusted_recipe


def _add_probe_flags(parser) -> None:
    """Labels, and how the head is trained and measured, which is the protocol's by default."""
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
    command.add_flag(parser, "steps", type=int, help="batches, in place of the protocol's")
    command.add_flag(parser, "probe_batch_size", type=int, help="pictures in each of them")
    command.add_flag(
        parser,
        "learning_rates",
        "learning_rate",
        "lr",
        type=float,
        nargs="+",
        help="of several, a head each, one is chosen on held-out training pictures",
    )
    command.add_flag(
        parser,
        "inference",
        choices=("whole", "slide"),
        help="logits of the picture in one piece, or the mean over windows",
    )


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    command.add_feature_flags(parser, "block")
    command.add_data_flags(parser, "outputs/segment_probe", train=True)
    command.add_protocol_flags(parser, "segment_probe")
    command.add_flag(
        parser,
        "mode",
        choices=("muse", "baseline"),
        default="muse",
        help="baseline: the bare encoder, as --baseline",
    )
    _add_probe_flags(parser)
    command.add_flag(parser, "num_pictures", type=int, default=6)
    command.add_flag(
        parser,
        "save_predictions",
        metavar="DIR",
        help="a PNG of every validation picture, its true and its predicted labels in colours",
    )
    command.add_flag(
        parser, "classnames", metavar="FILE", help="for their legend: one name a line, by label"
    )
    cli.refuse(parser, "this probe counts optimizer steps; use --steps", "--epochs")
    args = cli.parse(parser, argv)
    labels = MaskLabels(args.labels, args.num_classes)
    settings = {
        "steps": args.steps,
        "batch_size": args.probe_batch_size,
        "learning_rates": args.learning_rates,
        "inference": args.inference,
        "resize": args.resize,
        "crop": args.crop,
    }
    check_number("crop", args.crop, 1)
    recipe = adjusted_recipe(find_protocol(args.protocol, "segment_probe"), **settings)
    if recipe.augmentation:  # its pictures are measured whole: --crop is of training and windows
        args.crop = None
    setup = command.set_up(args, cli.load_cfg(args))
    changed = {key: value for key, value in vars(recipe).items() if key != "crop"}
    setup = replace(setup, protocol=setup.protocol.with_recipe(**changed))
    saved = SavedPredictions(args.save_predictions, args.classnames)
    baseline = "encoder" if args.mode == "baseline" else args.baseline
    measured = run_segment_probe(
        setup, labels, args.feature, baseline, args.num_pictures, saved if saved.folder else None
    )
    if measured is not None:
        path = command.write_metrics(setup, measured, "segmentation.png")
        print(_summary(measured.values, recipe.mean_over))
        print(path)
    return 0


def _summary(values: dict, mean_over: str) -> str:
    absent, classes = values["classes_absent"], values["classes"]
    counted = classes - absent if mean_over == "present" else classes
    oracle = values["oracle"]
    grid = "x".join(map(str, oracle["grid"]))
    return (
        f"mIoU {values['miou']:.4f} over {counted} classes ({absent} of {classes} absent), "
        f"pixel accuracy {values['pixel_accuracy']:.4f}\n"
        f"bound of the {grid} grid: mIoU {oracle['miou_upsampled']:.4f} with each cell's shares "
        f"upsampled, {oracle['miou_cells']:.4f} with its majority class"
    )


if __name__ == "__main__":
    sys.exit(main())
