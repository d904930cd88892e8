"""Does the Python that runs this file have what an extra of setup.py asks for?

`scripts/setup_env.sh` runs it to tell a complete environment from a half-installed one, without
network and without importing anything heavy: it compares installed metadata with the requirements,
one level into the extras that they name themselves (`megatron-core[training]`).

    python scripts/check_environment.py train     # exit code 0, or 1 and one line for each gap
"""

import argparse
import runpy
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_gaps(requirement_text: str) -> list[str]:
    """What the running environment lacks of one requirement, as readable lines; empty if nothing.

    requirement_text: a PEP 508 requirement, such as "megatron-core[training]>=0.19,<0.20".
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


def main() -> int:
    values = runpy.run_path(str(ROOT / "setup.py"), run_name="megatron_laep_setup_values")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extra", choices=sorted(values["EXTRAS_REQUIRE"]))
    extra = parser.parse_args().extra
    try:
        gaps = [
            gap
            for text in values["INSTALL_REQUIRES"] + values["EXTRAS_REQUIRE"][extra]
            for gap in find_gaps(text)
        ]
    except ModuleNotFoundError as error:
        gaps = [f"{error.name}: not installed, and nothing can be checked without it"]
    for gap in gaps:
        print(gap)
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
