"""The tutorial's code runs, and the files that it and CONTRIBUTING.md name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_block_of_the_tutorial_runs():
    text = (ROOT / "docs" / "tutorial.md").read_text()
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert len(blocks) >= 9
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], "docs/tutorial.md", "exec")  # so that an error names the line
        exec(code, namespace)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/tutorial.md"])
def test_paths_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:kernels|fastres|bench|tests|docs)/[\w/.]+)`", text))
    assert named, f"{page} names no file"
    for path in named:
        assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"
