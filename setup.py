"""Maps the top-level folders into the package and builds what is not Python; the rest is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT))  # an isolated build does not look here

from csrc import native  # noqa: E402


class BuildNative(build_ext):
    """Builds the host module, and beside it the device binaries where there is nvcc."""

    def run(self) -> None:
        native.build((ROOT if self.inplace else Path(self.build_lib)) / "happyhorse_fast", ROOT)


if native.compiler() is None:
    # nvcc needs it as well. What is left is whole: NVRTC compiles the kernels at first use, Python builds the maps.
    print(
        "happyhorse-fast: no C++ compiler found (CXX, or the one this Python was built with), so neither"
        " happyhorse_fast._C nor CUDA binaries are built",
        file=sys.stderr,
    )

setup(
    packages=[
        *find_packages(include=["happyhorse_fast", "happyhorse_fast.*"]),
        "happyhorse_fast.csrc",
        "happyhorse_fast.kernels",
        *(f"happyhorse_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    # `kernels` is also the import name of a library that users have, so it is never installed under that name
    # (docs/decisions/0001-kernels-package-dir.md).
    package_dir={"happyhorse_fast.csrc": "csrc", "happyhorse_fast.kernels": "kernels"},
    ext_modules=[Extension("happyhorse_fast._C", [str(native.MODULE.relative_to(ROOT))])] if native.compiler() else [],
    cmdclass={"build_ext": BuildNative},
)
