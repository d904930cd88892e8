"""Does the Python that runs this file have what an extra of pyproject.toml asks for?

`scripts/setup_env.sh` runs it to tell a complete environment from a half-installed one, without
network and without importing anything heavy: it compares installed metadata with the requirements,
one level into the extras that they name themselves (`megatron-core[training]`).

    python scripts/check_environment.py train     # exit code 0, or 1 and one line for each gap
"""

import argparse
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_gaps(requirement_text: str) -> list[str]:
    """What the running environment lacks of one requirement, as readable lines; empty if nothing.

    requirement_text: a PEP 508 requirement, such as "megatron-core[training]>=0.18.2,<0.20".
    """
    # Not at the top: `packaging` may itself be what is missing, and main() says so in a sentence.
    from packaging.requirements import Requirement

    requirement = Requirement(requirement_text)
    try:
        installed = distribution(requirement.name)
    except PackageNotFoundError:
        return [f"{requirement_text}: not installed"]
    # prereleases: the torch of NVIDIA's images is an alpha build, 2.10.0a0+... and does count.
    if not requirement.specifier.contains(installed.version, prereleases=True):
        return [f"{requirement_text}: version {installed.version} is installed"]
    gaps = []
    for extra in sorted(requirement.extras):
        for text in installed.requires or []:
            inner = Requirement(text)
            marker = inner.marker
            if marker is None or not marker.evaluate({"extra": extra}):
                continue
            if marker.evaluate({"extra": ""}):
                continue  # holds without the extra too: not what the extra adds
            inner.marker = None
            gaps.extend(f"{gap} (asked for by {requirement})" for gap in find_gaps(str(inner)))
    return gaps


def read_requirements() -> dict[str, list[str]]:
    """What pyproject.toml asks for, by extra; "" is the package alone. An extra that names others of
    the package's own extras has their requirements, too.
    """
    # Not at the top: as in find_gaps.
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"": project["dependencies"], **project["optional-dependencies"]}

    def resolve(extra: str) -> list[str]:
        texts = []
        for text in found[extra]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                texts += [inner for other in requirement.extras for inner in resolve(other)]
            else:
                texts.append(text)
        return sorted(set(texts))

    return {extra: resolve(extra) for extra in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extra", help="an extra of pyproject.toml, such as train or test")
    extra = parser.parse_args().extra
    try:
        requirements = read_requirements()
        if extra not in requirements:
            parser.error(f"pyproject.toml has no extra {extra!r}: {', '.join(requirements)}")
        wanted = requirements[""] + requirements[extra]
        gaps = [gap for text in wanted for gap in find_gaps(text)]
    except ModuleNotFoundError as error:
        gaps = [f"{error.name}: not installed, and nothing can be checked without it"]
    for gap in gaps:
        print(gap)
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
