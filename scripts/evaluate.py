"""Reconstruction quality of a checkpoint: rFID, IS, PSNR, SSIM, LPIPS (or any other metric) into
OUTPUT_DIR/metrics.json.
"""

import sys
from pathlib import Path

from muse import cli

METRICS = "rfid,is,psnr,ssim,lpips"


@cli.entry
def main(argv=None) -> int:
    from muse.evaluation import command

    parser = cli.parser(__doc__, checkpoint=True)
    command.add_flags(parser, "outputs/evaluate")
    parser.add_argument(
        "--metrics",
        default=METRICS,
        help="comma-separated: rfid, is, psnr, ssim, lpips, fd_<network>, perceptual_<network>",
    )
    parser.add_argument(
        "--feature_network",
        "--feature-network",
        default=None,
        help="adds a Fréchet distance in another network: efficientnet_lite0 (in a package), or a timm name",
    )
    parser.add_argument(
        "--feature_weights",
        "--feature-weights",
        default=None,
        help="file with that network's weights",
    )
    parser.add_argument(
        "--inception_weights",
        "--inception-weights",
        default=None,
        help="torch-fidelity's Inception file, for rfid and is",
    )
    parser.add_argument(
        "--lpips_net", "--lpips-net", default="alex", choices=("alex", "vgg", "squeeze")
    )
    parser.add_argument(
        "--lpips_weights",
        "--lpips-weights",
        default=None,
        help="torchvision's file of the LPIPS backbone",
    )
    parser.add_argument(
        "--num_pictures",
        "--num-pictures",
        type=int,
        default=8,
        help="pictures in reconstructions.png",
    )
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    from muse.evaluation.reconstruction import measure_reconstruction

    values, facts, sheet = measure_reconstruction(args, cfg)
    if command.finish():
        from muse.utils.viz_utils import save_image

        path = command.write_metrics(args, cfg, values, **facts)
        if sheet is not None:
            save_image(sheet, Path(args.output_dir) / "reconstructions.png")
        for name, value in values.items():
            print(f"{name:>24} {value:.4f}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
