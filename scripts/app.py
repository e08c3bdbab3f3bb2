"""A live page on this machine: drop a picture, see reconstruction, attention and nearest labels."""

import os
import sys

from muse import cli


@cli.entry
def main(argv=None) -> int:
    """Parse, open the model, serve until Ctrl-C."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "run",
        nargs="?",
        default="muse_tiny",
        help="a training run's directory, a save_pretrained directory, or muse_tiny",
    )
    parser.add_argument("--config", default=None, help="in place of the run's own configuration")
    parser.add_argument("--checkpoint", default=None, help="in place of the run's final weights")
    parser.add_argument("--port", type=int, default=7860, help="of http://127.0.0.1:PORT")
    parser.add_argument(
        "--device", default=None, help="cuda, mps or cpu; the first that exists when not given"
    )
    args = cli.parse(parser, argv)
    # Nothing leaves this machine, and nothing is fetched.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from muse.experiments.app import build_app, open_live_model  # noqa: PLC0415 - heavy

    live = open_live_model(args.run, args.config, args.checkpoint, cli.device(args.device))
    page = build_app(live, args.run)
    page.launch(server_name="127.0.0.1", server_port=args.port, share=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
