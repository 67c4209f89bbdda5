"""Cases of several commits in turns on one GPU, each commit in a process of its own: what a change of a kernel brings.

    python -m bench.commits prepare 74c8bc1 0123abc --cases attention-dense   # without a GPU: sources and kernels
    python -m bench.commits time --cases attention-dense --impl hopper        # with one: what was prepared, in turns
    python -m bench.commits run 0123abc bench.ops --cases attention-dense     # a module of one, with its kernels

First all commits hold a case against its gate at the same time: a race may show only where several processes share the
GPU (docs/kernels/attention.md). Those that pass take turns, half a second each, and the table has the medians. A
process that does not answer in time is killed, and its commit left out from there on, so that one kernel that waits for
ever costs the others nothing.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from bench import began
from bench.cases import Case, cases, select
from bench.gpu.__main__ import environment, primed_cache
from bench.measure.timing import Timing
from bench.results import COMMIT_VARIABLE, Json, describe_machine
from bench.table import Table

FOLDER = bootstrap.ROOT / ".commits"
"""Commits that are prepared, each in a folder of its name."""
SOURCES = ("bench", "csrc", "happyhorse_fast", "kernels", ":!bench/results", ":!*.safetensors")
"""What of a commit is measured, as git names it: 2 MB, of which a GPU machine may take few."""
WORKER = Path(__file__).with_name("commit_worker.py")
RUN = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
COLUMNS = ("case", "commit", "ms", "spread", "TFLOP/s", "the first one's time over it", "MHz", "W")


def worker(tree: Path, environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """What `subprocess` starts the worker with, in a commit's sources.

    Without `site`, which would let an installation of this checkout provide the commit's kernels.
    """
    path = os.pathsep.join([str(tree), *(entry for entry in sys.path if entry and Path(entry) != bootstrap.ROOT)])
    own = {"PYTHONPATH": path, COMMIT_VARIABLE: tree.name}
    return {"args": [sys.executable, "-S", "-c", RUN, *arguments], "cwd": tree, "env": {**environment, **own}}


def prepare(commits: Sequence[str], words: str, more: Sequence[str]) -> None:
    """Put commits' sources and primed kernels into :data:`FOLDER`, in place of what is there of the same names.

    Args:
        commits: As git names them; their folders are called the same.
        words: Of the cases whose kernels are compiled, comma-separated.
        more: Options of `bench.prime`.

    Raises:
        CalledProcessError: There is no such commit, or a kernel of it does not compile; stderr has said why.
    """
    only = "|".join(words.split(","))
    for commit in commits:
        tree = FOLDER / commit
        shutil.rmtree(tree, ignore_errors=True)
        packed = subprocess.run(
            ["git", "archive", commit, "--", *SOURCES], cwd=bootstrap.ROOT, stdout=subprocess.PIPE, check=True
        )
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(tree, filter="data")
        options = ("--into", str(tree / ".primed"), "--only", f"^case .*({only})", *more)
        without_caches = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(**worker(tree, without_caches, "run", "bench.prime", *options), check=True)


def kernel_environment(tree: Path, device: torch.device) -> dict[str, str]:
    """Environment in which a commit's kernels run on a device, those that were compiled ahead."""
    arch = describe_machine(device).get("capability")
    return environment(dry=device.type == "cpu") | primed_cache(tree / ".primed", arch, tree / "logs")


@dataclass
class Commit:
    """A commit's process.

    Attributes:
        tree: Its sources.
        process: The worker.
        channel: To it.
        out: Why it is asked no more; empty while it is.
    """

    tree: Path
    process: subprocess.Popen[bytes]
    channel: Any
    out: str = ""

    @classmethod
    def started(cls, tree: Path, device: torch.device, scope: str) -> Commit:
        """Start the worker; it answers once it has imported everything."""
        own, other = multiprocessing.Pipe()
        how = worker(tree, kernel_environment(tree, device), str(other.fileno()), device.type, scope)
        process = subprocess.Popen(**how, pass_fds=[other.fileno()])
        other.close()
        return cls(tree, process, own)

    def ask(self, method: str, *arguments: object) -> None:
        """Send a question."""
        with contextlib.suppress(OSError):  # its answer will be that it is gone
            self.channel.send((method, arguments))

    def answer(self, seconds: float) -> Any:
        """The answer to the question before; None where there is none, and :attr:`out` says why."""
        try:
            if self.channel.poll(seconds):
                fine, found = self.channel.recv()
                if fine:
                    return found
                self.out = found
            else:
                self.out = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            self.out = f"its process ended with {self.process.wait()}"
        self.end()
        return None

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def compare(commits: Sequence[Commit], case: Case, options: argparse.Namespace) -> bool:
    """Gate a case in all commits that are not out at once, then let the green ones take turns, and print the table.

    Returns:
        Whether all took turns.
    """
    asked = [commit for commit in commits if not commit.out]
    for commit in asked:
        commit.ask("gate", case.name, options.impl)
    problems = {commit.tree.name: commit.answer(options.patience) for commit in asked}
    green = [commit for commit in asked if problems[commit.tree.name] == []]
    taken: dict[str, list[tuple[list[float], Json]]] = {commit.tree.name: [] for commit in green}
    for commit in green * options.turns:
        if not commit.out:
            commit.ask("time", case.name, options.impl, options.seconds)
            if (turn := commit.answer(options.patience)) is not None:
                taken[commit.tree.name].append(turn)
    timed = {commit.tree.name: taken[commit.tree.name] for commit in green if not commit.out}
    rows = [row(case, name, found, next(iter(timed.values()))) for name, found in timed.items()]
    without = {name: found[0] for name, found in problems.items() if found} | {
        c.tree.name: c.out for c in commits if c.out
    }
    rows += [(case.name, name, *"-" * (len(COLUMNS) - 3), why) for name, why in without.items()]
    print(Table("", COLUMNS, tuple(rows)).text(), flush=True)
    return len(timed) == len(commits)


def row(case: Case, name: str, taken: Sequence[Any], first: Sequence[Any]) -> tuple[str, ...]:
    """A line of the table, from turns: (ms of each call, clock and power)."""
    times, firsts = (Timing(tuple(ms for calls, _ in turns for ms in calls), "events") for turns in (taken, first))
    states = [state for _, state in taken if state]
    return (
        case.name,
        name,
        f"{times.median_ms:.4g}",
        f"{(times.high_ms - times.low_ms) / times.median_ms:.0%}",
        f"{case.computed_flops() / times.median_ms / 1e9:.4g}",
        f"{firsts.median_ms / times.median_ms:.3f}x",
        *(f"{statistics.median(s[key] for s in states):.0f}" if states else "" for key in ("sm_mhz", "power_w")),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a commit was left out of a case, or a case for want of time."""
    parser = argparse.ArgumentParser(prog="python -m bench.commits", description=__doc__.partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="without a GPU; further options are bench.prime's")
    preparing.add_argument("commits", nargs="+", help="as git names them, without '/'")
    running = commands.add_parser("run", help="a module of a commit that is prepared, with its kernels")
    running.add_argument("commits", nargs=1, metavar="commit")
    running.add_argument("module", nargs=argparse.REMAINDER, help="such as bench.ops, and its options")
    timing = commands.add_parser("time", help="what was prepared, in turns")
    for one in (preparing, timing):
        one.add_argument("--cases", required=True, help="comma-separated words; cases whose name holds one of them")
    timing.add_argument("commits", nargs="*", help="of those prepared; all by default, by name")
    timing.add_argument("--device", default=default, help=f"default here: {default}")
    timing.add_argument("--scope", default="main", help="of the cases, as of bench.ops")
    impls = ("triton", "hopper", "cuda", "reference")
    timing.add_argument("--impl", required=True, choices=impls, help="as of bench.ops")
    timing.add_argument("--turns", type=int, default=4, help="of each commit")
    timing.add_argument("--seconds", type=float, default=0.5, help="of a turn")
    timing.add_argument("--minutes", type=float, default=60.0, help="start no more cases after this long")
    timing.add_argument("--patience", type=float, default=60.0, help="seconds to wait for an answer")
    options, more = parser.parse_known_args(argv)
    deadline = began(argv) + 60 * options.minutes if options.command == "time" else 0.0
    if options.command == "prepare":
        try:
            prepare(options.commits, options.cases, more)
        except subprocess.CalledProcessError as error:
            print(f"not prepared: {' '.join(map(str, error.cmd))} ended with {error.returncode}", file=sys.stderr)
            return 1
        return 0
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    prepared = sorted(path.name for path in FOLDER.glob("*") if path.is_dir())
    names = options.commits or prepared
    if not names or not {*names} <= {*prepared}:
        parser.error(f"commits must be among those prepared, {', '.join(prepared) or 'none'}; got {', '.join(names)}")
    if options.command == "run":
        tree = FOLDER / names[0]
        how = worker(tree, kernel_environment(tree, torch.device(default)), "run", *options.module)
        return subprocess.run(**how, check=False).returncode
    chosen = select(cases(options.scope), options.cases)
    device = torch.device(options.device)
    commits = [Commit.started(FOLDER / name, device, options.scope) for name in names]
    all_timed = [False] * len(chosen)
    try:
        for number, case in enumerate(chosen):
            if time.monotonic() > deadline:
                print(f"time is up: {case.name} and later ones were not timed", file=sys.stderr)
                break
            all_timed[number] = compare(commits, case, options)
    finally:
        for commit in commits:
            commit.end()
    return 0 if all(all_timed) else 1


if __name__ == "__main__":
    sys.exit(main())
