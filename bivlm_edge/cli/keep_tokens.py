"""What `bivlm-export --keep-tokens auto` takes, and what chooses then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bivlm_edge.config import ExportConfig
from bivlm_edge.datasets import DATA_SETS, VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import AUTO, KeepChoice


def check_auto(
    fraction: float | None, tolerance: float | None, data: str | None, questions: int | None
) -> None:
    """Refuse options of `--keep-tokens auto` that nothing would read.

    Args:
        fraction: `--keep-tokens`; None: auto.
        tolerance: `--tolerance`.
        data: `--validation`.
        questions: `--validation-questions`.

    Raises:
        RequestError: One is given without auto, or no question is left.
    """
    if questions is not None and questions < 1:
        raise RequestError(
            f"--validation-questions {questions} leaves no question to ask. Give 1 or more."
        )
    if fraction is None:
        return
    for option, value in (
        ("--tolerance", tolerance),
        ("--validation", data),
        ("--validation-questions", questions),
    ):
        if value is not None:
            raise RequestError(
                f"{option} {value} is read with --keep-tokens {AUTO} alone. Leave it out, or give "
                f"--keep-tokens {AUTO} in place of {fraction:g}."
            )


def chooser(
    items: Sequence[VqaItem],
    calibration: str | None,
    data: str | None,
    questions: int | None,
    config: ExportConfig,
    tell: Callable[[str, int, int], None],
) -> Callable[[Path], KeepChoice]:
    """Return what chooses the number of tokens; the questions are read first: errors come early.

    Args:
        items: What calibration draws from.
        calibration: `--calibration`, or the data set that the checkpoint names.
        data: `--validation`.
        questions: `--validation-questions`.
        config: Of the export, with a tolerance.
        tell: Shows progress.
    """
    from bivlm_edge.redundancy import automatic
    from bivlm_edge.tuning import drawn_items

    tolerance, quant = config.prune.tolerance, config.quant
    assert tolerance is not None
    # without --calibration other checkpoints are calibrated on a data set that is not theirs
    own = () if calibration is None else items
    named = calibration if calibration in DATA_SETS else None
    name, asked = automatic.validation_questions(
        data, named, own, drawn_items(quant, items), tolerance=tolerance, limit=questions
    )
    return partial(
        automatic.choose_for_file,
        name=name,
        questions=asked,
        tolerance=tolerance,
        seed=quant.seed,
        tell=tell,
    )
