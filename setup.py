"""Maps the top-level folder ``kernels/`` into the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["happyhorse_fast", "happyhorse_fast.*"]),
        "happyhorse_fast.kernels",
        *(f"happyhorse_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    # `kernels` is also the import name of a library that users have, so it is never installed under that name
    # (docs/decisions/0001-kernels-package-dir.md).
    package_dir={"happyhorse_fast.kernels": "kernels"},
)
