"""`pip install .`: the package `muse` with its configurations, and what requirements.txt names."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = [
    line
    for line in (here / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

setup(
    name="muse-tokenizer",
    version="0.1.0",
    description="MUSE: a unified visual tokenizer (arXiv 2605.05646)",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ stays at the top of the repository and is installed inside the package, where
    # `muse.config.shipped_config` finds it.
    packages=[*find_packages(include=["muse", "muse.*"]), "muse.configs"],
    package_dir={"muse.configs": "configs"},
    package_data={"muse": ["pretrained/*/*"], "muse.configs": ["**/*.yaml"]},
    install_requires=requirements,
)
