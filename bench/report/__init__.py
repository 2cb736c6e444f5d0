"""Results as Markdown tables and pictures: ``python -m bench.report [FOLDER ...]``, or ``--fill``.

Reads campaign folders (see `bench.campaign`) and the single results beside them. Every table says the device that it
was measured on, or that its figures are counted or predicted. ``--fill`` fills in the sections of README.md and the
pages of docs/ between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``; one with no result to show stays as it is.
"""
