"""Measurements: scripts to run from the checkout, as in ``python -m bench.depth``, and their raw results."""
