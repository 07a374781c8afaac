"""bivlm-eval: accuracy on questions with known answers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bivlm_edge import report
from bivlm_edge.cli.common import (
    DebugOption,
    JsonOption,
    KeepTokensOption,
    ModelArgument,
    NoCustomOpsOption,
    ProviderOption,
    ThreadsOption,
    command_errors,
    new_app,
    progress,
    show,
    show_json,
)
from bivlm_edge.datasets import DATA_SETS, VqaItem, load_questions
from bivlm_edge.errors import RequestError
from bivlm_edge.memory import keep_no_freed_memory
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.evaluate import Evaluation, Score, evaluate
from bivlm_edge.runtime.providers import CPU

DATA_HELP = f"{', '.join(DATA_SETS)}, or a file of JSON lines with image, question and answer."
_SPLITS = "; ".join(f"{name} has {', '.join(data.splits)}" for name, data in DATA_SETS.items())
SPLIT_HELP = f"Split of a named data set: {_SPLITS}."

app = new_app()


@app.command()
@command_errors("bivlm-eval")
def run(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option("--data", help=DATA_HELP),
    ],
    split: Annotated[str, typer.Option("--split", help=SPLIT_HELP)] = "test",
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Ask only the first questions.", show_default="all"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Longest answer.", show_default="the model's own"),
    ] = None,
    keep_tokens: KeepTokensOption = None,
    provider: ProviderOption = CPU,
    no_custom_ops: NoCustomOpsOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """Measure how often a model answers exactly as expected.

    Answers are compared stripped and in lower case. Prints a table, then one
    line of JSON; the intervals are 95 % Wilson score intervals.

    Examples:
      bivlm-eval model.onnx --data easy-vqa
      bivlm-eval model.onnx --data scenes --split validation
      bivlm-eval model.onnx --data mine.jsonl --limit 100 --json
    """
    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} leaves no question to ask. Give 1 or more.")
    keep_no_freed_memory()
    session = load(model, provider=provider, custom_ops=not no_custom_ops, threads=threads)
    answerer = Answerer(session.keeping_fraction(keep_tokens))
    items = questions_of(data, split)[:limit]
    with progress("questions", len(items)) as on_progress:
        found = evaluate(answerer, items, max_new_tokens=max_new_tokens, on_progress=on_progress)
    result = {
        "model": model,
        "data": data,
        "split": split if data in DATA_SETS else None,
        "custom_ops": answerer.session.library is not None,
        "provider": answerer.session.provider,
        **_to_json(found),
    }
    if not as_json:
        show(report.evaluation_table(result))
    show_json(result)


def questions_of(data: str, split: str) -> list[VqaItem]:
    """Return the questions that `--data` and `--split` name.

    Raises:
        RequestError: The data set has no such split.
        DataError: The data cannot be read.
    """
    if data in DATA_SETS and split not in DATA_SETS[data].splits:
        accepted = ", ".join(DATA_SETS[data].splits)
        raise RequestError(f"--split {split!r} is not known. Accepted: {accepted}.")
    return load_questions(data, split)


def _to_json(found: Evaluation) -> dict[str, Any]:
    open_ended = None if found.open_ended is None else _score(found.open_ended)
    return {
        **_score(found.overall),
        "open_ended": open_ended,
        "open_ended_accuracy": None if open_ended is None else open_ended["accuracy"],
        "per_kind": {kind: _score(score) for kind, score in found.per_kind.items()},
        "prompt_tokens": round(found.prompt_tokens, 2),
        "kept_tokens": round(found.kept_tokens, 2),
        "seconds": round(found.seconds, 3),
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "n": score.n,
        "correct": score.correct,
        "accuracy": score.accuracy,
        "interval": [score.low, score.high],
    }


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
