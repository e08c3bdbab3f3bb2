"""Zero-shot classification (top-1, top-5) and, if asked for, image-text retrieval.

The values go to OUTPUT_DIR/metrics.json.
"""

import sys
from dataclasses import replace

from muse import cli
from muse.evaluation import command
from muse.evaluation.zero_shot import run_zero_shot
from muse.evaluation.zero_shot_task import ZeroShotTask


def _candidates(word: str) -> int | str:
    """A number, or the word as it is: `ZeroShotTask` says what is wrong with it."""
    return int(word) if word.lstrip("-").isdigit() else word


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__, checkpoint=True)
    command.add_data_flags(parser, "outputs/zero_shot")
    command.add_protocol_flags(parser, "zero_shot")
    command.add_flag(
        parser,
        *("classnames", "classes"),
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
        type=_candidates,
        metavar="K|all",
        help="caption retrieval among K, or of all pictures and all captions, both ways; default: "
        "the protocol's",
    )
    command.add_flag(
        parser,
        "captions",
        metavar="FILE",
        help="captions of the folder --val_url: Karpathy's or COCO's json, Flickr30k's token file, "
        "or a csv with image,caption; default: those beside the pictures",
    )
    probe = "nothing is trained here; the linear probe is scripts/linear_probe.py"
    cli.refuse(parser, probe, *("--mode", "--lp_lr", "--lp_epochs", "--lr", "--epochs"))
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    recipe = command.resolve_protocol(args, cfg).recipe
    asked = args.retrieval if args.retrieval is not None else recipe.retrieval or 0
    task = ZeroShotTask(args.classnames, args.templates, asked, args.captions)
    setup = command.set_up(args, cfg)
    setup = replace(setup, protocol=setup.protocol.with_recipe(**task.changes(recipe)))
    measured = run_zero_shot(setup, task)
    if measured is not None:
        path = command.write_metrics(setup, measured)
        for name, value in measured.values.items():
            print(f"{name:>34} {value:.4f}" if isinstance(value, float) else f"{name:>34} {value}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
