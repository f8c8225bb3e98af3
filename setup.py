"""Where the packages lie; everything else about the distribution is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sgmd_dist", "sgmd_dist.*"]), *find_packages("kernels")],
    # kernels/ is a plain folder: a package of that name would shadow the PyPI package `kernels`, which diffusers and
    # transformers look for.
    package_dir={"sgmd_kernels": "kernels/sgmd_kernels"},
)
