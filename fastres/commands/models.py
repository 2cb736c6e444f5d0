"""``fastres models``."""

from __future__ import annotations

import argparse

from fastres.models import describe_models


def models(args: argparse.Namespace) -> int:
    """List the networks."""
    for name, parameters, summary in describe_models():
        print(f"{name:<18}{parameters / 1e6:>8.2f} M  {summary}")
    return 0
