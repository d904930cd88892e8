"""Packaging of megatron_laep: what is installed, and what is left to the environment.

`INSTALL_REQUIRES` names only what the package imports at top level. Everything else (torch,
Megatron-Core) is an extra: a GPU container brings its own builds of these, and a plain
`pip install megatron-laep` there must not pull a second torch over them. The TransformerEngine and
the apex of real jobs come with the GPU image, never from here: the package that PyPI knows by the
second name is another project.

The two constants are read as values by `scripts/check_environment.py` and
`tests/test_packaging.py`, also where setuptools is not installed: the call of `setup` and its
import stand behind the usual guard.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = ["numpy", "tabulate", "tqdm"]

_TOOLS = ["PyYAML"]  # model and hardware files of `laep simulate`; JSON ones do without

_REPORT = ["jinja2>=3.1", "plotly>=6"]  # `laep report`: the template, the figures' script

_TRAIN = [
    "torch>=2.6",
    "megatron-core[training]>=0.19,<0.20",
    "psutil",  # Megatron's torch_dist checkpoint writer asks for it only when it saves
    "tensorboard",
    "tokenizers",  # scripts/prepare_data.py --tokenizer-json
    *_TOOLS,
]
_TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "scipy",
    "wandb",
    "emerging-optimizers>=0.2",  # Muon and Lion
]

EXTRAS_REQUIRE = {
    "tools": _TOOLS,
    "report": _REPORT,
    "train": _TRAIN,
    "test": _TRAIN + _REPORT + _TEST,
}


def read_version() -> str:
    """The version, read as text: an import would need numpy before pip has installed it."""
    source = (ROOT / "megatron_laep" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise ValueError(
            'megatron_laep/__init__.py has no line of the form __version__ = "1.2.3": '
            "setup.py takes the version from there, put the line back"
        )
    return match.group(1)


def read_long_description() -> str:
    """README.md; empty where it was left out, for example in a minimal Docker build context."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


if __name__ == "__main__":
    from setuptools import find_packages, setup

    setup(
        name="megatron-laep",
        version=read_version(),
        description="Layer-adaptive expert pruning of Megatron-Core MoE models as they train",
        long_description=read_long_description(),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        packages=find_packages(include=["megatron_laep", "megatron_laep.*"]),
        package_data={"megatron_laep.tools.report": ["page/*"]},
        python_requires=">=3.12",
        entry_points={"console_scripts": ["laep = megatron_laep.tools.__main__:main"]},
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS_REQUIRE,
    )
