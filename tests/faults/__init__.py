"""Faults on purpose: what becomes of runs and files when processes are killed, disks are full and bytes are wrong.

`test_faults.py` tries a few of each. The campaign tries hundreds, prints a table and records it for docs/results.md:

    PYTHONPATH=tests python -m faults --kills 200 --damages 500

A row counts how often a fault was tried and how it ended: refused with a message of one line that names the file or the
remedy, harmless (the same data, the same run), or wrong, of which there should be none.
"""
