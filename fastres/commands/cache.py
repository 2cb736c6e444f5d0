"""``fastres cache``."""

from __future__ import annotations

import argparse

from fastres.cache import cache_folder, clear, kept, private_folder


def cache(args: argparse.Namespace) -> int:
    """Show or clear what fastres keeps on this machine: decoded images, compiled passes, timed choices."""
    folders = list(dict.fromkeys((cache_folder(), private_folder())))
    entries = [entry for folder in folders for entry in kept(folder)]
    for path, meaning, size in entries:
        print(f"{size / 2**20:>10.1f} MiB  {meaning:<17}  {path}")
    for folder in folders:
        if args.clear:
            print(f"removed {clear(folder)} files from {folder}")
        else:
            print(f"{sum(size for path, _, size in entries if path.parent == folder) / 2**20:>10.1f} MiB  {folder}")
    return 0
