"""Answer questions about pictures: one picture, or a benchmark's TSV.

The answers to a TSV go to FILE.tsv with the column `prediction`, as VLMEvalKit's judges read it.
"""

import sys

from muse import cli
from muse.errors import ConfigError
from muse.evaluation.measurement import check_number
from muse.inference import read_image
from muse.multimodal.benchmarks import ask_benchmark, read_questions, write_predictions
from muse.multimodal.umm_command import one_of, open_for_command, parse_umm, umm_parser


def make_parser():
    """The flags."""
    parser = umm_parser(__doc__)
    parser.add_argument("--image", metavar="FILE", help="one picture, with --question")
    parser.add_argument("--question", metavar="TEXT", action="append", help="may be repeated")
    parser.add_argument("--tsv", metavar="FILE", help="a benchmark in VLMEvalKit's layout")
    parser.add_argument("--output", metavar="FILE.tsv", help="answers to --tsv")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of an answer")
    return parser


@cli.entry
def main(argv=None) -> int:
    args = parse_umm(make_parser(), argv)
    check_number("max_new_tokens", args.max_new_tokens, 1)
    if one_of(args, "image", "tsv") == "tsv":
        if args.output is None:
            raise ConfigError("--tsv needs --output FILE.tsv")
        questions = read_questions(args.tsv)
        umm = open_for_command(args)
        answers = ask_benchmark(umm, questions, args.batch_size, max_new_tokens=args.max_new_tokens)
        write_predictions(args.output, questions, answers)
        print(args.output)
        return 0
    asked = [text.strip() for text in args.question or () if text.strip()]
    if not asked:
        raise ConfigError("--image needs --question TEXT")
    image = read_image(args.image)
    umm = open_for_command(args)
    images = image.to(umm.queries.device)[None].expand(len(asked), -1, -1, -1)
    for said in umm.answer(images, asked, args.max_new_tokens):
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
