"""`pip install -e .`: the package `muse`; requirements are read from requirements.txt."""

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
    packages=find_packages(include=["muse", "muse.*"]),
    install_requires=requirements,
)
