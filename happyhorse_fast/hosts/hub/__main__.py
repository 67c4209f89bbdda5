"""`python -m happyhorse_fast.hosts.hub FOLDER`: build the kernel repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from happyhorse_fast.hosts.hub.build import NAME, build


def main() -> None:
    """Build, and say what was made."""
    parser = argparse.ArgumentParser(prog="python -m happyhorse_fast.hosts.hub", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where; new or empty")
    parser.add_argument("--repo-id", default=f"happyhorse/{NAME}", help="name on the hub (default: %(default)s)")
    given = parser.parse_args()
    try:
        made = build(given.folder, given.repo_id)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(made)} files in {given.folder}; try it: LocalLayerRepository({str(given.folder)!r}, layer_name=...)")


if __name__ == "__main__":
    main()
