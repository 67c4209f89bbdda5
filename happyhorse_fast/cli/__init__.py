"""The command line ``happyhorse-fast``: generate, demo, sample, verify, plan, bench, doctor; each has ``--help``.

Exit codes: 0 done, 1 a check failed, memory ran out or another rank is gone, 2 bad input, 130 interrupted. Results go
to standard output, as tables or with ``--json`` as one JSON document; everything else goes to standard error.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from happyhorse_fast._version import __version__
from happyhorse_fast.arguments import NonFiniteError
from happyhorse_fast.cli import bench, demo, doctor, generate, plan, sample, verify

PROGRAM = "happyhorse-fast"
# What the package raises for bad input: messages name the argument, what came and what is allowed.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NonFiniteError)

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which takes "[on the left]" for a style and drops it
    context_settings={"max_content_width": 1000},  # help as wide as the terminal
)
for _command in (generate.generate, demo.demo, sample.sample, verify.verify, plan.plan, bench.bench, doctor.doctor):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    # Read by run(), which sees the error.
    traceback: Annotated[bool, typer.Option("--traceback", help="On bad input, show where it was noticed.")] = False,
) -> None:
    """Joint audio-video denoising with a 15B single-stream Transformer."""
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. ``arguments`` are those after the program's name, by default the process's.

    Bad input becomes one line on standard error, unless ``--traceback`` asks for more.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings(), _logged():
            warnings.showwarning = _show_warning
            code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # an error of parsing, from whichever copy of click this typer brings
            return _fail(error.format_message(), error.exit_code)  # type: ignore[attr-defined]
        name = type(error).__name__  # by name: torch may not have been imported
        failed = name in ("OutOfMemoryError", "RankError")
        expected = isinstance(error, _USER_ERRORS) or name == "BackendError"
        if "--traceback" in arguments or not (failed or expected):
            raise
        hint = f"; `{PROGRAM} plan` says what a clip needs" if name == "OutOfMemoryError" else ""
        return _fail(f"{error}{hint}", 1 if failed else 2)
    return _fail("interrupted", 130) if code == 130 else int(code or 0)


def _fail(message: str, code: int) -> int:
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    # One line, whose parts stay apart: a checkpoint's problems come one to a line.
    text = "".join(f"{line} " if line.endswith((":", ",", ";")) else f"{line}; " for line in lines[:-1]) + lines[-1]
    print(f"{PROGRAM}: error: {text}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Without the place in the code, which to a user of the program reads like a crash."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


@contextmanager
def _logged() -> Iterator[None]:
    """Show what the package logs, notes on progress included."""
    logger, lines = logging.getLogger("happyhorse_fast"), logging.StreamHandler()
    lines.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


def main() -> None:
    """Entry point of the program."""
    # A name that the locale lacks is no error after the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run())
