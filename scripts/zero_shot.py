"""Zero-shot classification (top-1, top-5) and, if asked for, caption retrieval, into OUTPUT_DIR/metrics.json."""

import sys

from muse import cli


@cli.entry
def main(argv=None) -> int:
    from muse.evaluation import command

    parser = cli.parser(__doc__, checkpoint=True)
    command.add_flags(parser, "outputs/zero_shot")
    parser.add_argument(
        "--classnames",
        default=None,
        help="file, one name a line in the order of the labels; default: classes.txt beside the shards, the class "
        "folders' names, else open_clip's ImageNet names",
    )
    parser.add_argument(
        "--templates",
        default=None,
        help="file, one template a line with {} for the name; default: open_clip's 80",
    )
    parser.add_argument(
        "--retrieval",
        type=int,
        default=0,
        metavar="K",
        help="also caption retrieval among K (the data needs captions)",
    )
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    from muse.evaluation.zero_shot_run import run_zero_shot

    measured = run_zero_shot(args, cfg)
    if measured is not None:
        values, facts = measured
        for name, value in values.items():
            print(f"{name:>20} {value:.4f}" if isinstance(value, float) else f"{name:>20} {value}")
        print(command.write_metrics(args, cfg, values, **facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
