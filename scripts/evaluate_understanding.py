"""MMBench and MMVP by exact matching, from a TSV in VLMEvalKit's layout; nothing is downloaded.

The scores go to OUTPUT_DIR/metrics.json, the answers to OUTPUT_DIR/predictions.tsv.
"""

import sys

from muse import cli
from muse.errors import ConfigError
from muse.multimodal.benchmarks import (
    BENCHMARKS,
    ask_benchmark,
    read_questions,
    require_answers,
    rotated,
    write_predictions,
)
from muse.multimodal.umm_command import command_facts, open_for_command, parse_umm, umm_parser
from muse.utils.io import file_sha256, writable_directory, write_json


def make_parser():
    """The flags."""
    parser = umm_parser(__doc__)
    parser.add_argument("--benchmark", required=True, choices=tuple(BENCHMARKS))
    parser.add_argument("--tsv", required=True, metavar="FILE", help="the questions")
    parser.add_argument("--output_dir", default="outputs/understanding", help="for the results")
    parser.add_argument(
        "--text_only", action="store_true", help="without pictures: what the text gives away"
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="mmbench: ask each question with its options in every rotation, where FILE has one",
    )
    return parser


@cli.entry
def main(argv=None) -> int:
    args = parse_umm(make_parser(), argv)
    if args.rotate and args.benchmark != "mmbench":
        raise ConfigError("--rotate is MMBench's circular evaluation")
    questions = read_questions(args.tsv)
    require_answers(questions)
    questions = rotated(questions) if args.rotate else questions
    output = writable_directory(args.output_dir)
    umm = open_for_command(args)
    answers = ask_benchmark(umm, questions, args.batch_size, pictures=not args.text_only)
    scores = BENCHMARKS[args.benchmark](questions, answers)
    for name, value in scores.items():
        print(f"{name:>24} {value:.4f}")
    write_predictions(output / "predictions.tsv", questions, answers)
    facts = command_facts(args, questions=len(questions), tsv_sha256=file_sha256(args.tsv))
    write_json(output / "metrics.json", {**scores, "protocol": facts})
    print(output / "metrics.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
