"""Packaging: the Triton kernels live in ./kernels and install as ``fastres.kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastres", "fastres.*"]), "fastres.kernels"],
    package_data={"fastres": ["py.typed"], "fastres.ops.cpu": ["*.cpp"]},
    package_dir={"fastres": "fastres", "fastres.kernels": "kernels"},
)
