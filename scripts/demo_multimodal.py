"""Train a small multimodal model on a CPU and measure it: prompts to pictures, edits, questions."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from muse import cli
from muse.errors import ConfigError
from muse.evaluation.measurement import check_number


def make_parser():
    """The flags."""
    parser = cli.plain_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_true", help="a minute: shows that it runs")
    size.add_argument("--full", action="store_true", help="hours; goes on where it was stopped")
    add = parser.add_argument
    add("--tokenizer", help="checkpoint of MUSE; default: muse_tiny, else that of tools/demo.sh")
    add("--kind", choices=("stamps", "shapes"), default="stamps", help="demo pictures to make")
    add("--steps", metavar="N,N,N,N,N", help="of language, projector and the stages 1 to 3")
    add("--images", type=int, help="training samples of each kind")
    add("--seed", type=int, help="of training and of all noise")
    add("--output", help="default: outputs/demo-multimodal, with -fast or -full behind it")
    add("overrides", nargs="*", metavar="key=value", help="of the model's configuration")
    return parser


def stage_steps(text: str) -> tuple[int, ...]:
    """ "300,100,30,500,200" as five whole numbers."""
    words = text.split(",")
    if len(words) != 5 or not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--steps must be five whole numbers above 0, got {text!r}")
    return tuple(map(int, words))


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(make_parser(), argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    name = "fast" if args.fast else "full" if args.full else "default"
    suffix = "" if name == "default" else f"-{name}"
    output = Path(args.output or f"outputs/demo-multimodal{suffix}")
    given = {"steps": stage_steps(args.steps)} if args.steps else {}
    for flag, least in (("images", 16), ("seed", 0)):
        check_number(flag, value := getattr(args, flag), least)
        if value is not None:
            given[flag] = value

    # heavy, and --help is quick
    from muse.experiments import demo_multimodal, multimodal_report  # noqa: PLC0415

    plan = replace(demo_multimodal.MULTIMODAL_PLANS[name], **given)
    results = demo_multimodal.run_multimodal_demo(
        output, plan, args.tokenizer, args.kind, args.overrides
    )
    print(multimodal_report.multimodal_text(results))
    pictures = ", ".join(str(output / sheet) for sheet in multimodal_report.MULTIMODAL_SHEETS)
    print(f"{results['seconds']:.0f} s in all; pictures: {pictures}; words: {output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
