"""The pages hang together: links and anchors lead somewhere, and the list of pages has all of them."""

import pkgutil
import re

import pytest
from helpers import ROOT

from benchmarks import one_step

README, *PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page):  # without blocks of code
    return re.sub(r"^```.*?^```$|^    .*?$", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """Of the headings, as GitHub has them: small letters, no punctuation, a number if they come again."""
    words = [re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", prose(page), re.M)]
    return {f"{word}-{words[:i].count(word)}".removesuffix("-0").replace(" ", "-")
            for i, word in enumerate(words)}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(page)):
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or target.suffix == ".py" or anchor in anchors(target)), name


def test_every_page_is_found_and_the_readme_is_short():
    assert {page.name for page in PAGES} <= {"README.md", *re.findall(r"\((\w+\.md)\)", prose(PAGES[0]))}
    lines = README.read_text().splitlines()
    assert len(lines) <= 200 and "](docs/methods.md)" in "".join(lines[:25])


def test_what_moved_is_where_the_page_says():
    rows = re.findall(r"^\|(.*)\| `([\w.]+)`", (ROOT / "docs/moved.md").read_text(), re.M)
    for before, now in rows:
        assert set(re.findall(r"`(\w+)`", before.split("|")[-1])) <= set(dir(pkgutil.resolve_name(now))), now


def test_the_step_on_paper_is_that_of_the_code():
    page = one_step.PAGE.read_text()
    assert one_step.same(page, one_step.written(page)), "python -m benchmarks.one_step"
    assert len(re.findall(r"-?\d\.\d{3}\b", page)) > 600
    assert not one_step.same(page, page.replace("= 1.325", "= 1.328"))
