"""The pages are true: their code runs, what they name is there, and their figures are the results'."""

import re
from pathlib import Path

import pytest

from bench.record import RESULTS
from bench.report.__main__ import PAGES, newest_campaign, relative, sections
from bench.report.campaign import CAMPAIGN
from bench.tables import fill
from fastres.models import registry
from fastres.nn import structure

ROOT = Path(__file__).parent.parent
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
# pages, or a section of one, whose blocks of Python run in order
RUN = [
    "README.md",
    "docs/derivation.md",
    "docs/fusing.md",
    "docs/tutorial.md",
    "CONTRIBUTING.md#a-new-network-in-three-steps",
]
OTHERS = {"volume", "steps"}  # filled in by bench.scaling, see tests/bench/test_scaling.py


def named(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def registries(monkeypatch):
    """What a page registers is gone after it."""
    for module, name in ((registry, "MODELS"), (structure, "_entries"), (structure, "_found")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_python_runs(page, registries):
    page, _, section = page.partition("#")
    text = (ROOT / page).read_text()
    start, end = section_of(text, section) if section else (0, len(text))
    namespace: dict = {}
    blocks = list(re.compile(r"^```python\n(.*?)^```", re.M | re.S).finditer(text, start, end))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], ROOT / page, "exec")  # so that an error names the line
        exec(code, namespace)
    if drawn := re.search(r"^```text\n(.*?)\n```", text, re.M | re.S):  # by the page's own code
        assert drawn[1] == namespace["picture"]


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_paths_that_a_page_names_exist(page):
    text = page.read_text()
    for path in set(re.findall(r"`((?:kernels|fastres|bench|tests|docs|examples)/[\w/.]+)`", text)):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_links_lead_to_files_and_their_sections(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not section or section in anchors(target.read_text()), link


def section_of(text, anchor):
    """Where a section of the second level begins and ends."""
    headings = list(re.finditer(r"^## (.+)$", text, re.M))
    starts = [heading.start() for heading in headings if anchor_of(heading[1]) == anchor]
    return starts[0], min((h.start() for h in headings if h.start() > starts[0]), default=len(text))


def anchor_of(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text):
    """The names that headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.M)
    return set(map(anchor_of, headings))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def found():
    return sections(RESULTS, newest_campaign(RESULTS))


def test_every_section_is_on_a_page_and_every_marker_means_one(found):
    shown = {name for page in PAGES for name in re.findall(r"<!-- bench:([\w-]+) -->", page.read_text())}
    assert found.keys() - {"tests", "accuracy"} <= shown
    assert shown <= found.keys() | CAMPAIGN.keys() | OTHERS


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_figures_are_the_results(page, found):
    """As ``python -m bench.report --fill`` leaves them."""
    text = page.read_text()
    assert fill(text, relative(found, page)) == text
