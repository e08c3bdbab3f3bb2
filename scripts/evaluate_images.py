"""Two sets of pictures against each other: a folder, tar shards, or an npz (arr_0; mu, sigma).

The values go to OUTPUT_DIR/metrics.json.
"""

import sys

from muse import __version__, cli
from muse.errors import ConfigError, DataError, MuseError
from muse.evaluation import command
from muse.evaluation.image_comparison import ComparisonOptions, check_names, compare_image_sets
from muse.evaluation.image_sets import open_image_set
from muse.utils.distributed import leave_processes
from muse.utils.io import versions

COMMAND = "evaluate_images"


def flags():
    """The parser of this command's flags."""
    parser = cli.plain_parser(__doc__)

    def add(name: str, **options) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, **options)

    add("real", required=True, metavar="SOURCE", help="the reference")
    add("fake", required=True, metavar="SOURCE", help="what is measured")
    add(
        "metrics",
        help="comma-separated: fid, is, sfid, precision, recall, fd_<network>, and of pairs psnr, "
        "ssim, lpips_alex, lpips_vgg; default: the protocol's",
    )
    command.add_protocol_flags(parser, COMMAND, precision=False)
    add("output_dir", default="outputs/evaluate_images", help="where metrics.json goes")
    add("device", help="cuda, mps or cpu; the first that exists when not given")
    add("batch_size", type=int, default=64, help="pictures at a time; changes no result")
    add("num_workers", type=int, default=0, help="loader processes")
    add("inception_weights", help="torch-fidelity's Inception file")
    add("feature_weights", help="file (dinov2: or folder) with the weights of the network of fd_")
    command.add_timeout_flag(parser)
    add("lpips_weights", help="torchvision's file of the LPIPS backbone, or their folder")
    return parser


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(flags(), argv)
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    protocol = command.resolve_protocol(args, None)
    recipe = protocol.recipe
    metrics = args.metrics.split(",") if args.metrics is not None else recipe.metrics
    names = check_names([name.strip() for name in metrics if name.strip()])
    device = cli.device(args.device)
    output = command.clear_metrics(args.output_dir)
    options = ComparisonOptions(
        command.join(args, device),
        args.batch_size,
        args.num_workers,
        args.inception_weights,
        args.feature_weights,
        args.lpips_weights,
    )
    real, fake = (open_image_set(source, recipe.crop) for source in (args.real, args.fake))
    try:
        values, facts = compare_image_sets(real, fake, names, recipe, options)
    except MuseError:
        raise
    except ValueError as error:  # too few pictures, NaN: a fact of the data
        raise DataError(f"{args.fake}: {error}") from error
    if not leave_processes():
        return 0
    for name, value in values.items():
        print(f"{name:>24} {value:.4f}")
    facts = protocol.facts(facts["sets"]["fake"]["images"]) | facts
    facts |= {
        "device": options.device,
        "loading": command.loading_facts(options.batch_size, options.num_workers),
        "muse": __version__,
        "versions": versions(),
    }
    command.write_values(output / command.METRICS_FILE, values, facts)
    print(output / command.METRICS_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
