"""Where this machine's own results are kept: timed choices, compiled passes."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FASTRES_CACHE``, or ``fastres`` in the user's cache folder."""
    folder = os.environ.get("FASTRES_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "fastres"
