"""Zero-shot classification (top-1, top-5) and, if asked for, caption retrieval.

The values go to OUTPUT_DIR/metrics.json.
"""

import sys

from muse import cli
from muse.evaluation import command
from muse.evaluation.zero_shot import check_candidates, run_zero_shot


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__, checkpoint=True)
    command.add_data_flags(parser, "outputs/zero_shot")
    command.add_protocol_flags(parser, "zero_shot")
    command.add_flag(
        parser,
        "classnames",
        help="file, one name a line in the order of the labels, or `imagenet`; default: "
        "classes.txt beside the data, the class folders' names (WordNet ids have theirs), else "
        "ImageNet's, if the labels are all of them",
    )
    command.add_flag(
        parser,
        "templates",
        help="file, one template a line with {} for the name; default: open_clip's 80",
    )
    command.add_flag(
        parser,
        "retrieval",
        type=int,
        default=0,
        metavar="K",
        help="also caption retrieval among K (the data needs captions)",
    )
    probe = "nothing is trained here; the linear probe is scripts/linear_probe.py"
    cli.refuse(parser, probe, *("--mode", "--lp_lr", "--lp_epochs", "--lr", "--epochs"))
    args = cli.parse(parser, argv)
    check_candidates(args.retrieval)
    setup = command.set_up(args, cli.load_cfg(args))
    measured = run_zero_shot(setup, args.classnames, args.templates, args.retrieval)
    if measured is not None:
        path = command.write_metrics(setup, measured)
        for name, value in measured.values.items():
            print(f"{name:>20} {value:.4f}" if isinstance(value, float) else f"{name:>20} {value}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
