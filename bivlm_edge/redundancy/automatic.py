"""`--keep-tokens auto`: the fewest image tokens that validation questions let an export keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bivlm_edge.datasets import DATA_SETS, VALIDATION_SPLIT, VqaItem, load_questions
from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import KeepChoice
from bivlm_edge.redundancy import statistics
from bivlm_edge.redundancy.analysis import (
    ALL_TOKENS_NEEDED,
    IMAGE_NOT_USED,
    REDUNDANT,
    TOO_FEW_QUESTIONS,
    Ask,
    controls,
    not_used,
)
from bivlm_edge.redundancy.answering import Answers, Model
from bivlm_edge.redundancy.curves import Judge, Measured
from bivlm_edge.redundancy.plan import FULL, NO_IMAGE, SHUFFLED, Run, grid
from bivlm_edge.redundancy.questions import Questions, gather, spread

Tell = Callable[[str, int, int], None]

# of the questions that a loss of nothing needs to pass: a small loss has to pass as well
_MORE_QUESTIONS = 2


def validation_questions(
    data: str | None,
    calibration: str | None,
    items: Sequence[VqaItem],
    calibrated: Sequence[VqaItem],
    *,
    tolerance: float,
    limit: int | None,
) -> tuple[str, Questions]:
    """Return what an export is judged by, and its name; never a test split.

    Args:
        data: `--validation`: a named data set, whose validation split is taken, or a .jsonl file.
            None: as `calibration` says.
        calibration: Named data set that calibrates; None: it is a list or folder of one's own.
        items: What calibration draws from, with answers where they are known.
        calibrated: What it drew: questions on these pictures are left out.
        tolerance: Points of accuracy.
        limit: Questions; None: twice as many as a run without any loss needs to pass.

    Raises:
        RequestError: There are no questions with answers.
        DataError: The data cannot be read, or are about one picture.
    """
    source = data if data is not None else calibration
    name = "the calibration data"
    if source is None:
        known = [item for item in items if item.answer]
    else:
        known = load_questions(source, VALIDATION_SPLIT)
        name = f"{source}, {VALIDATION_SPLIT}" if source in DATA_SETS else source
    seen = {item.image for item in calibrated}
    left = [item for item in known if item.image not in seen]
    if not left:
        lacks = "whose pictures were not calibrated on" if known else "with known answers"
        raise RequestError(
            f"--keep-tokens auto needs questions {lacks}; there are none in {name}. Add "
            f"--validation with {', '.join(DATA_SETS)}, or a .jsonl file of image, question and "
            "answer, or give --keep-tokens a fraction."
        )
    if limit is None:
        limit = _MORE_QUESTIONS * statistics.questions_needed(tolerance / 100)
    return name, gather(spread(left, limit))


def choose_for_file(
    path: Path,
    name: str,
    questions: Questions,
    *,
    tolerance: float,
    seed: int,
    tell: Tell,
) -> KeepChoice:
    """Ask an exported model, one with a TokenPrune, with ever fewer image tokens.

    Args:
        path: The graph; run with the operator library.
        name: Of the questions.
        questions: What is asked.
        tolerance: Points of accuracy that may be lost.
        seed: Of the pictures that are exchanged, and of `random`.
        tell: Called with what runs, questions done, questions in all.
    """
    model = Model(path, questions)

    def ask(run: Run) -> Answers:
        what = f"choosing: {run.name}"
        return model.answers(run, lambda done: tell(what, done, len(questions.items)))

    choice = choose(questions, tolerance, model.image_tokens, model.mode, ask, seed)
    return KeepChoice(choice.kept, {"data": name, **choice.account})


def choose(
    questions: Questions, tolerance: float, image_tokens: int, mode: str, ask: Ask, seed: int
) -> KeepChoice:
    """Return the fewest tokens from which on every tested number passes.

    A number passes if the lower 95 % bound of its paired difference to all tokens is no more than
    the tolerance below 0. It is halved until one fails, then the gap is bisected.

    Args:
        questions: What is asked.
        tolerance: Points of accuracy that may be lost.
        image_tokens: Tokens of one image before pruning.
        mode: Selector.
        ask: Carries out a run.
        seed: See `choose_for_file`.
    """
    full_run = ask(Run(FULL, image_tokens))

    def measured(run: Answers) -> Measured:
        return Measured.of([run], questions, full_run.texts)

    full, no_image = measured(full_run), measured(ask(Run(NO_IMAGE, 0)))
    shuffled = measured(ask(Run(SHUFFLED, image_tokens, seed)))
    judge = Judge(questions, tolerance / 100, image_tokens, full, no_image, shuffled, seed)
    account: dict[str, Any] = {
        "questions": len(questions.items),
        "pictures": len(questions.pictures),
        "digest": questions.digest,
        "tolerance": tolerance,
        "mode": mode,
        "image_tokens": image_tokens,
        **controls(questions, judge, full, no_image, shuffled),
    }
    points = {image_tokens: full, 0: no_image}
    if account["image_used"]:

        def passes(kept: int) -> bool:
            points[kept] = measured(ask(Run(mode, kept, seed)))
            return judge.bracket(points).failed < kept

        for kept in grid(image_tokens)[1:-1]:
            if not passes(kept):
                break
        bracket = judge.bracket(points)
        while (middle := statistics.next_to_test(bracket, image_tokens)) is not None:
            passes(middle)
            bracket = judge.bracket(points)
    kept = max(1, judge.bracket(points).enough) if account["image_used"] else image_tokens
    account["tested"] = judge.curve(points, {})
    account["kept"], account["keep_ratio"] = kept, kept / image_tokens
    account["verdict"], account["message"] = _verdict(account)
    return KeepChoice(kept, account)


def _verdict(account: dict[str, Any]) -> tuple[str, str]:
    tokens, kept, mode = account["image_tokens"], account["kept"], account["mode"]
    tolerance = account["tolerance"]
    points = f"{tolerance:g} point{'s' * (tolerance != 1)}"
    if not account["image_used"]:
        return IMAGE_NOT_USED, f"{not_used(account)} All {tokens} image tokens are kept."
    below = [point for point in account["tested"] if point["kept"] < kept]
    if kept == tokens:
        nearest = below[-1]
        loss = -100 * nearest["difference"]
        said = (
            f"No ratio below 1 passes: with {nearest['kept']} of {tokens} image tokens {mode} "
            f"loses {loss:.2f} points, at 95 % confidence up to "
            f"{-100 * nearest['difference_low']:.2f}, and {points} may be lost. All are kept."
        )
        if not nearest["undecided"]:
            return ALL_TOKENS_NEEDED, said
        needed = statistics.questions_needed(tolerance / 100)
        return TOO_FEW_QUESTIONS, (
            f"{said} {account['questions']:,} questions were asked; a tolerance of {points} needs "
            f"about {needed:,} or more."
        )
    chosen = next(point for point in account["tested"] if point["kept"] == kept)
    said = (
        f"{mode} keeps {kept} of {tokens} image tokens (ratio {account['keep_ratio']:.4g}): the "
        f"difference to all is {100 * chosen['difference']:+.2f} points, at 95 % confidence no "
        f"less than {100 * chosen['difference_low']:+.2f}, and {points} may be lost"
    )
    if below and below[-1]["kept"] > 0:
        said += f"; {below[-1]['kept']} lose {-100 * below[-1]['difference']:.2f} points"
    if account["gain"] * 100 <= tolerance:
        said += f". The picture itself adds only {100 * account['gain']:.2f} points"
    return REDUNDANT, f"{said}."
