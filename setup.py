"""`pip install .`: the package `muse`, its configurations and scripts, and the command `muse`.

What must be installed stands in the requirements files alone; the version in `muse/__init__.py`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def requirements(name: str) -> dict[str, list[str]]:
    """Section -> packages of a requirements file; `# [NAME] [NAME]` begins a section of these."""
    sections: dict[str, list[str]] = {}
    names = ["core"]
    for line in (here / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# ["):
            names = re.findall(r"\[(\w+)\]", line)
        elif line and not line.startswith(("#", "-r")):
            for section in names:
                sections.setdefault(section, []).append(line)
    return sections


runtime = requirements("requirements.txt")
demo = requirements("requirements-demo.txt")["core"]
extras = {name: packages for name, packages in runtime.items() if name != "core"}
extras["demo"] = sorted({*demo, *extras["train"], *extras["eval"]})
extras["app"] = requirements("requirements-app.txt")["core"]
extras["dev"] = sorted({*extras["demo"], *requirements("requirements-dev.txt")["core"]})
version = re.search(r'^__version__ = "(.+)"$', (here / "muse/__init__.py").read_text(), re.M)[1]

setup(
    name="muse-tokenizer",
    version=version,
    description="MUSE: a unified visual tokenizer (arXiv 2605.05646)",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    # configs/ and scripts/ stay at the top of the repository and are installed inside the package,
    # where `muse.config.shipped_config` and `muse.command_line` find them.
    packages=[*find_packages(include=["muse", "muse.*"]), "muse.configs", "muse.scripts"],
    package_dir={"muse.configs": "configs", "muse.scripts": "scripts"},
    package_data={
        "muse": ["py.typed", "pretrained/*/*", "experiments/page/*"],
        "muse.configs": ["**/*.yaml"],
    },
    entry_points={"console_scripts": ["muse = muse.command_line:main"]},
    install_requires=runtime["core"],
    extras_require=extras,
)
