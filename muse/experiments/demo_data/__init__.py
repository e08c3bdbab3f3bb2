"""Demo pictures for a CPU: cut-outs on photographs (`stamps`) and drawn scenes (`shapes`)."""

from muse.experiments.demo_data.build import make_demo_data

__all__ = ["make_demo_data"]
