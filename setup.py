"""For tools that look for it; all that is said about the package stands in pyproject.toml."""

from setuptools import setup

setup()
