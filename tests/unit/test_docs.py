"""The documents refer to what is there, and each of them is found from the index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from mulligan.trainer.settings import ALGORITHMS
from tests.support.paths import ROOT

METHODS = ROOT / "docs" / "methods.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])


def headings(page: Path) -> set[str]:
    """As GitHub links to them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def missing(page: Path, text: str) -> list[str]:
    """Links of the page's text to files or headings that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        if "://" not in link and not (target.exists() and (not heading or heading in headings(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert missing(page, page.read_text()) == []


@pytest.mark.parametrize("link", ["gone.md", "index.md#no-such-heading", "#no-such-heading"])
def test_a_link_that_leads_nowhere_is_noticed(link: str) -> None:
    assert missing(ROOT / "docs" / "index.md", f"[page]({link}) [there](index.md#documentation)") == [link]


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / path).resolve() for path in re.findall(r"\]\(([^)#]+)", index.read_text())}
    documents = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index}
    assert documents - linked == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "NOTICE", "docs/architecture.md"])
def test_paths_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(
        r"`((?:services|tests|proto|models|docs|examples|docker|benchmarks)/[\w./-]+)`", (ROOT / page).read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def rows_of(page: str) -> set[str]:
    """The names that begin the rows of a page's tables."""
    return set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(rows_of("methods.md") & set(ALGORITHMS.built_in)))
def test_a_method_names_its_file_and_its_recipe(name: str) -> None:
    (row,) = [row for row in METHODS.read_text().splitlines() if row.startswith(f"| `{name}` |")]
    assert f"(../services/trainer/algorithms/{name}.py)" in row
    if f"algorithm.name={name}" not in row:
        recipe = re.search(r"\((\.\./recipes/[^)]+)\)", row)
        assert recipe is not None
        assert tomllib.loads((METHODS.parent / recipe[1]).read_text())["algorithm"]["name"] == name
