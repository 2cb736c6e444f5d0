"""Tables as Markdown, and pages with tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under columns, all but the first column to the right."""
    rule = [":--"] + ["--:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *rows])


def fill(page: str, found: dict[str, str]) -> str:
    """The page with all that is found between ``<!-- bench:name -->`` and ``<!-- /bench:name -->`` replaced."""

    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->\n{found[name]}\n<!-- /bench:{name} -->" if name in found else match[0]

    return re.sub(r"<!-- bench:([\w-]+) -->.*?<!-- /bench:\1 -->", replaced, page, flags=re.DOTALL)
