"""What was skipped, and why, in one line at the end of every run; where CI=true, a skipped test is a failure.

The markers of ``core_suite`` are given here, too.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.core_suite import CORE, SHORT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file, _, name = item.nodeid.partition("::")
        if file in CORE and item.get_closest_marker("long") is None:
            item.add_marker("core")
        if f"{file}::{name.partition('[')[0]}" in SHORT:
            item.add_marker("short")


def _skipped(config: pytest.Config) -> Counter[tuple[str, str]]:
    """(file, reason) -> number of tests."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found: Counter[tuple[str, str]] = Counter()
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[report.nodeid.split("::")[0], reason.removeprefix("Skipped: ")] += 1
    return found


def _must_not_skip() -> bool:
    return os.environ.get("CI", "").lower() == "true"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _must_not_skip() and _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    found = _skipped(config)
    if not found:
        return
    parts = [f"{count} in {file}: {reason}" for (file, reason), count in sorted(found.items())]
    state = "FAILED, CI=true allows no skipped test" if _must_not_skip() else "SKIPPED"
    line = f"{state}: {sum(found.values())} ({'; '.join(parts)})"
    terminalreporter.write_line(line, red=_must_not_skip(), yellow=not _must_not_skip())
