"""What all commands share: errors to exit codes, tables, progress."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bivlm_edge import report
from bivlm_edge.config import DEVICES
from bivlm_edge.errors import BivlmError

EXIT_UNEXPECTED = 1
EXIT_BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_PLAIN_WIDTH = 180

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON only.")]
ModelArgument = Annotated[str, typer.Argument(help="The exported model.onnx.", metavar="MODEL")]
NoCustomOpsOption = Annotated[
    bool,
    typer.Option(
        "--no-custom-ops", help="Run on stock ONNX Runtime operators, without the kernel library."
    ),
]
KeepTokensOption = Annotated[
    float | None,
    typer.Option(
        "--keep-tokens",
        help="Fraction of the image tokens to keep, of a model exported with pruning.",
        show_default="as exported",
    ),
]
ProviderOption = Annotated[
    str,
    typer.Option(
        "--provider",
        help="Where the graph runs: cpu, or cuda on an NVIDIA GPU (docs/JETSON.md).",
        metavar="cpu|cuda",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", help="Threads of one operator.", show_default="physical cores"),
]

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where calibration inputs run through the model, block by block: "
        f"{' or '.join(DEVICES)}. cuda has not run on hardware yet.",
    ),
]

P = ParamSpec("P")
R = TypeVar("R")


def unwind_on_sigterm() -> None:
    """Let SIGTERM unwind like an interrupt, so that what cleans up does so."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))


def new_app() -> typer.Typer:
    """Return an application whose errors `command_errors` prints."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )


def command_errors(command: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn what a command raises into a message on stderr and an exit code.

    The decorated function takes `_debug: DebugOption`; with it, the traceback is shown as well.

    Args:
        command: Name that starts the message, e.g. "bivlm-run".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                result = function(*args, **kwargs)
                sys.stdout.flush()
            except KeyboardInterrupt:
                raise typer.Exit(EXIT_INTERRUPTED) from None
            except BrokenPipeError:
                # The reader left; the interpreter must not try to flush into the closed pipe.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(EXIT_BROKEN_PIPE) from None
            except BivlmError as error:
                _complain(f"{command}: {error}", debug=bool(kwargs.get("_debug")))
                raise typer.Exit(error.exit_code) from error
            except typer.Exit:
                raise
            except Exception as error:
                is_debug = bool(kwargs.get("_debug"))
                advice = "" if is_debug else " Run it again with --debug for the traceback."
                text = " ".join(str(error).split())
                _complain(
                    f"{command}: unexpected {type(error).__name__}: {text}.{advice}", debug=is_debug
                )
                raise typer.Exit(EXIT_UNEXPECTED) from error
            return result

        return run

    return decorate


def _complain(message: str, *, debug: bool) -> None:
    sys.stdout.flush()
    if debug:
        Console(stderr=True).print_exception()
    typer.echo(message, err=True)


class _PipeConsole(Console):
    """A console that leaves a closed pipe to `command_errors` instead of exiting by itself."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def split_names(values: Iterable[str]) -> tuple[str, ...]:
    """Names given by repeating an option, by commas, or by both."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def show(*renderables: RenderableType) -> None:
    """Print tables to stdout, wide enough for all columns where stdout is no terminal."""
    console = _PipeConsole(file=sys.stdout)
    if not console.is_terminal:
        console = _PipeConsole(file=sys.stdout, width=_PLAIN_WIDTH)
    for renderable in renderables:
        console.print(renderable)


def show_json(values: dict[str, Any]) -> None:
    """Print one line of JSON."""
    typer.echo(report.to_json(values))


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs, if stderr is a terminal.

    Args:
        description: What runs.
        total: Steps.

    Yields:
        A function to call with the number of steps done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def progress_by_name() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr for work whose steps have names, if stderr is a terminal.

    Yields:
        A function to call with what runs, the steps done and the steps in all.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("loading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell
