"""bivlm-redundancy: how many image tokens an exported model needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from rich.table import Table

from bivlm_edge import __version__
from bivlm_edge.bundle import BundlePaths, read_manifest
from bivlm_edge.cli.common import (
    DebugOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    command_errors,
    new_app,
    progress,
    progress_by_name,
    show,
    show_json,
    split_names,
)
from bivlm_edge.cli.eval import DATA_HELP, SPLIT_HELP, questions_of
from bivlm_edge.compare.plot import require_matplotlib
from bivlm_edge.config import PRUNE_MODES
from bivlm_edge.datasets import CALIBRATION_SPLIT, DATA_SETS
from bivlm_edge.errors import OutputError, RequestError
from bivlm_edge.files import write_bytes, write_text
from bivlm_edge.provenance import ANSWER_CODE, code_version
from bivlm_edge.redundancy import pages, plot
from bivlm_edge.redundancy.analysis import Result, analyse
from bivlm_edge.redundancy.answering import Model
from bivlm_edge.redundancy.curves import interval
from bivlm_edge.redundancy.finished import FinishedRuns
from bivlm_edge.redundancy.plan import BASELINES, Run, Setting
from bivlm_edge.redundancy.questions import Questions, gather, question_only, spread
from bivlm_edge.report import to_json

_NAME = "redundancy"

app = new_app()


@app.command()
@command_errors("bivlm-redundancy")
def run(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option("--data", help=DATA_HELP),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Another export of the same model, e.g. in float, to show side by side; may be "
            "repeated.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help=SPLIT_HELP)] = "test",
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            help="So many questions, on pictures from all over the data.",
            show_default="all",
        ),
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--modes",
            help=f"Selectors to compare, separated by commas: {', '.join(PRUNE_MODES)}.",
            show_default=f"the model's own, {', '.join(BASELINES)}",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of random per number of tokens.")] = 5,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Points of accuracy that may be lost."),
    ] = 1.0,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            help="Also test this number of image tokens, beside all, a half, a quarter ... 1, 0 "
            "and a tenth; may be repeated.",
        ),
    ] = None,
    no_search: Annotated[
        bool,
        typer.Option(
            "--no-search",
            help="Test the numbers of --tokens alone, all and none: to compare selectors there.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Longest answer.", show_default="the model's own"),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", help="Folder for page, picture, CSV, JSON and finished runs."),
    ] = Path(_NAME),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no picture.")] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """Find how many image tokens a model needs, and whether its selector is any good.

    MODEL is an export with --keep-tokens (any fraction). It is asked with the right picture, with
    none and with another one; if the picture gains nothing, the verdict is IMAGE_NOT_USED. Then
    the number of tokens is halved again and again for each selector, and the smallest one that
    loses no more than the tolerance is sought. Finished runs are kept in the output folder; an
    interrupted command started again goes on behind them.

    Examples:
      bivlm-redundancy model.onnx --data easy-vqa --limit 2000
      bivlm-redundancy two_bit.onnx --against float.onnx --data easy-vqa --modes mmr,maxmin,random
      bivlm-redundancy model.onnx --data mine.jsonl --tolerance 2 --tokens 7 --json
      bivlm-redundancy model.onnx --data scenes --tokens 26 --no-search
    """
    if not no_plot:
        require_matplotlib()
    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} leaves no question to ask. Give 1 or more.")
    paths = [model, *(against or [])]
    names = _names(paths)
    chosen = split_names(modes or [])
    setting = Setting(
        tuple(dict.fromkeys(chosen)) or BASELINES,
        seeds=seeds,
        tolerance=tolerance / 100,
        seed=seed,
        also=tuple(tokens or ()),
        searches=not no_search,
    )
    _check_alike(paths)
    items = spread(questions_of(data, split), limit)
    with progress("pictures", len(items)) as on_progress:
        questions = gather(items, on_progress)
    blind = _question_only(questions, data)
    folder = _folder(output)
    results: list[Result] = []
    for path, name in zip(paths, names, strict=True):
        asked = Model(path, questions, threads=threads, max_new_tokens=max_new_tokens)
        own = setting if chosen else _with_own(setting, asked.mode)
        found = _analyse(asked, questions, own, folder / "runs", max_new_tokens, name)
        results.append(
            {
                "model": name,
                **found,
                **blind,
                "intervals": {**found["intervals"], **blind["intervals"]},
                "kinds": {
                    kind: {**values, **blind["kinds"][kind]}
                    for kind, values in found["kinds"].items()
                },
                "data": data,
                "split": split if data in DATA_SETS else None,
                "seed": seed,
                "seeds": seeds,
                "code": code_version(ANSWER_CODE),
                "questions_digest": questions.digest,
                "versions": {
                    "bivlm-edge": __version__,
                    "onnxruntime": ort.__version__,
                    "numpy": np.__version__,
                },
            }
        )
    for other in results[1:]:
        other["delta_redundancy"] = _delta(results[0], other)
        other["delta_by_mode"] = {
            mode: _delta(summary, other["modes"][mode])
            for mode, summary in results[0]["modes"].items()
            if mode in other["modes"]
        }
    _write(results, folder, with_picture=not no_plot)
    if not as_json:
        _show(results, folder)
    show_json({**results[0], "against": results[1:]})


def _analyse(
    model: Model,
    questions: Questions,
    setting: Setting,
    folder: Path,
    limit: int | None,
    name: str,
) -> Result:
    with progress_by_name() as tell:

        def on_run(run: Run) -> Any:
            return lambda done: tell(f"{name}: {run.name}", done, len(questions.items))

        runs = FinishedRuns(model, questions, folder, on_run, limit)
        return analyse(questions, setting, model.image_tokens, model.mode, runs.ask, model.costs)


def _with_own(setting: Setting, mode: str) -> Setting:
    """The default: the model's own selector before the baselines."""
    return replace(setting, modes=tuple(dict.fromkeys((mode, *BASELINES))))


def _question_only(questions: Questions, data: str) -> dict[str, Any]:
    """What the most frequent answer to each question scores, where the data have a train split."""
    kinds = questions.kinds
    if data not in DATA_SETS:
        return {
            "accuracy_question_only": None,
            "intervals": {},
            "kinds": {kind: {"question_only": None} for kind in kinds},
        }
    correct = questions.correct(
        question_only(questions.items, questions_of(data, CALIBRATION_SPLIT))
    )
    accuracy = float(correct.mean())
    return {
        "accuracy_question_only": accuracy,
        "intervals": {"question_only": interval(accuracy, len(correct))},
        "kinds": {kind: {"question_only": float(correct[of].mean())} for kind, of in kinds.items()},
    }


def _delta(first: Result, other: Result) -> float | None:
    """Redundancy of a model, or of one of its selectors, minus that of another's.

    None where one of them claims none.
    """
    if first["redundancy"] is None or other["redundancy"] is None:
        return None
    return float(first["redundancy"] - other["redundancy"])


def _names(paths: Sequence[str]) -> list[str]:
    """The names of the files without suffix; with their folders if two are the same.

    Raises:
        RequestError: A model is given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise RequestError(
            "the same model is given twice. --against takes another export, e.g. in float."
        )
    stems = [path.stem for path in resolved]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{path.parent.name}/{path.stem}" for path in resolved]


def _check_alike(paths: Sequence[str]) -> None:
    """Refuse exports of different models, whose numbers of tokens mean different things.

    Raises:
        BundleError: One is missing or damaged.
        RequestError: Their pictures have different numbers of tokens.
    """
    first, *others = [read_manifest(BundlePaths(Path(path))).image_tokens for path in paths]
    for path, tokens in zip(paths[1:], others, strict=True):
        if tokens != first:
            raise RequestError(
                f"a picture has {tokens} tokens in '{path}' and {first} in '{paths[0]}': these are "
                "different models. --against takes another export of the same one."
            )


def _folder(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder '{output}': {error.strerror}. Choose another --output."
        ) from error
    return output


def _write(results: Sequence[Result], folder: Path, *, with_picture: bool) -> None:
    if with_picture:
        write_bytes(folder / f"{_NAME}.png", plot.png(results))
    write_text(folder / f"{_NAME}.csv", pages.csv_text(results))
    write_text(folder / f"{_NAME}.json", to_json({**results[0], "against": results[1:]}) + "\n")
    picture = f"{_NAME}.png" if with_picture else None
    write_text(folder / f"{_NAME}.md", pages.markdown(results, picture))


def _show(results: Sequence[Result], folder: Path) -> None:
    sheets = [pages.controls(results)]
    if any(result["modes"] for result in results):
        sheets.append(pages.needs(results))
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        show(table)
    for result in results:
        typer.echo(f"{result['model']}: {result['verdict']}. {result['message']}")
    typer.echo(f"written: {folder / f'{_NAME}.md'}")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
