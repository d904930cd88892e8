"""Links of README and docs lead somewhere, and what they say of files and flags is there."""

import json
import re
from pathlib import Path

import pytest

from megatron_laep.records import decision_log
from tests.support import report_run

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "configs/*.md", "patches/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.relative_to(ROOT).as_posix()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_is_there(page):
    broken = []
    for link in _LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_links_are_found_at_all():
    links = {page: _LINK.findall(prose(page)) for page in PAGES}
    assert "docs/flags.md" in links["README.md"]
    assert sum(map(len, links.values())) > 40
    assert "the-quickstarts-output" in anchors(ROOT / "docs" / "benchmarks.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    # `scripts/x.py`, also with arguments behind it, and `tests/x.py`.
    named = re.findall(r"`((?:scripts|tests|configs|megatron_laep)/[\w./-]+)[ `]", prose(page))
    assert [name for name in named if page != "CHANGELOG.md" and not (ROOT / name).exists()] == []


def test_every_page_of_the_docs_is_reached_from_readme_and_index():
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert {Path(link).name for link in _LINK.findall(prose("docs/README.md"))} == pages
    assert pages <= {Path(link).name for link in _LINK.findall(prose("README.md"))}


def test_nobody_is_told_to_install_from_an_index():
    for page in PAGES:
        assert not re.search(r"pip install ['\"]?megatron[-_]laep", (ROOT / page).read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def names_in(value: object) -> set[str]:
    """The names of all fields of a JSON value, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


def test_every_field_of_every_file_is_explained(tmp_path):
    run = report_run.make_run(tmp_path) / "laep"
    written = {
        f"## {name}": json.loads((run / "iter_0000375" / name).read_text())
        for name in ("map.json", "loads.json", "table.json")
    }
    # The names of the thresholds are those of the flags.
    (decision,) = map(json.loads, (run / decision_log.NAME).read_text().splitlines())
    del decision["thresholds"]
    decision["windows"] = []
    written[f"## {decision_log.NAME}"] = decision
    header = json.loads((run / "loads-full.json").read_text())
    written["## loads-NAME.json and loads-NAME.bin"] = header | {
        field: None for field, _, _ in header["dtype"]
    }
    parts = re.split(r"\n(?=## )", prose("docs/files.md"))
    sections = {part.partition("\n")[0]: part for part in parts}
    for title, content in written.items():
        explained = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", sections[title]))))
        assert names_in(content) <= explained, title
