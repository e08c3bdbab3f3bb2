"""Reconstruction quality of a checkpoint: rFID, IS, PSNR, SSIM, LPIPS, or any other metric.

The values go to OUTPUT_DIR/metrics.json, the first pictures to OUTPUT_DIR/reconstructions.png.
"""

import sys

from muse import cli
from muse.evaluation import command
from muse.evaluation.evaluator import check_metric_names, measure_reconstruction

OPTIONS = ("feature_network", "feature_weights", "inception_weights", "lpips_net", "lpips_weights")


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__, checkpoint=True)
    command.add_data_flags(parser, "outputs/evaluate")
    command.add_protocol_flags(parser, "evaluate")
    command.add_flag(
        parser,
        "metrics",
        help="comma-separated: rfid, is, psnr, ssim, lpips, lpips_alex, lpips_vgg, fd_<network>, "
        "perceptual_<network>; default: the protocol's",
    )
    command.add_flag(
        parser,
        "feature_network",
        help="adds a Fréchet distance in another network: efficientnet_lite0 (in a package), "
        "dinov2, or a timm name",
    )
    command.add_flag(parser, "feature_weights", help="file (dinov2: or folder) of its weights")
    command.add_flag(
        parser, "inception_weights", help="torch-fidelity's Inception file, for rfid and is"
    )
    command.add_flag(parser, "lpips_net", default="alex", choices=("alex", "vgg", "squeeze"))
    command.add_flag(
        parser, "lpips_weights", help="torchvision's file of the LPIPS backbone, or their folder"
    )
    command.add_flag(
        parser,
        "save_images",
        metavar="DIR|FILE.npz",
        help="all reconstructions: PNG files, or arr_0 of (N,H,W,3) uint8",
    )
    command.add_flag(
        parser, "num_pictures", type=int, default=8, help="pictures in reconstructions.png"
    )
    args = cli.parse(parser, argv)
    names = None
    if args.metrics is not None:
        names = [name.strip() for name in args.metrics.split(",") if name.strip()]
        check_metric_names(names)
    setup = command.set_up(args, cli.load_cfg(args))
    options = {name: getattr(args, name) for name in OPTIONS}
    measured = measure_reconstruction(setup, names, args.num_pictures, args.save_images, **options)
    if measured is not None:
        path = command.write_metrics(setup, measured, "reconstructions.png")
        for name, value in measured.values.items():
            print(f"{name:>24} {value:.4f}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
