"""Shows the whole path without the published weights: writes a tiny random checkpoint of every part in their layout.

    python examples/tiny_checkpoint.py tiny
    happyhorse-fast generate "a pony on a meadow" --model tiny --out pony.mp4

It makes noise, not pictures, in seconds on a CPU. Needs `pip install "happyhorse-fast[pipeline]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from happyhorse_fast.pipeline.tiny import write_tiny_checkpoint


def main() -> None:
    """Write the checkpoint into the folder named on the command line; print its parts and their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    write_tiny_checkpoint(folder)
    total = 0
    for part in sorted(folder.iterdir()):
        size = sum(file.stat().st_size for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file())
        total += size
        print(f"{part.name}: {size / 1e6:.2f} MB")
    print(f"{folder} is whole: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
