"""Controls first, then the number of image tokens that each selector needs, then the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bivlm_edge.redundancy import statistics
from bivlm_edge.redundancy.answering import Answers, Cost
from bivlm_edge.redundancy.curves import ALL, Judge, Measured, interval
from bivlm_edge.redundancy.plan import (
    BASELINES,
    FULL,
    NO_IMAGE,
    RANDOM,
    RARE_TEXT,
    SHUFFLED,
    TEXT,
    Run,
    Setting,
    tenth,
)
from bivlm_edge.redundancy.questions import Questions

IMAGE_NOT_USED = "IMAGE_NOT_USED"
TOO_FEW_QUESTIONS = "TOO_FEW_QUESTIONS"
ALL_TOKENS_NEEDED = "ALL_TOKENS_NEEDED"
SELECTOR_ADDS_NOTHING = "SELECTOR_ADDS_NOTHING"
REDUNDANT = "REDUNDANT"

Ask = Callable[[Run], Answers]
Costs = Callable[[list[int]], dict[int, Cost]]
Result = dict[str, Any]


def analyse(
    questions: Questions,
    setting: Setting,
    image_tokens: int,
    own_mode: str,
    ask: Ask,
    costs: Costs | None = None,
) -> Result:
    """Carry out an analysis of one model.

    Args:
        questions: What is asked.
        setting: How.
        image_tokens: Tokens of one image before pruning.
        own_mode: Selector of the file; preferred among equals.
        ask: Carries out a run.
        costs: Measures prompts with numbers of image tokens; None: nothing is measured.

    Returns:
        Everything, ready for JSON: verdict, controls, K* by selector, "curves".

    Raises:
        RequestError: The setting asks for numbers of tokens that the model does not have.
    """
    tested = setting.grid(image_tokens)
    full_run = ask(Run(FULL, image_tokens))

    def measured(*runs: Answers) -> Measured:
        return Measured.of(runs, questions, full_run.texts)

    full = measured(full_run)
    no_image = measured(ask(Run(NO_IMAGE, 0)))
    shuffled = measured(ask(Run(SHUFFLED, image_tokens, setting.seed)))
    judge = Judge(
        questions, setting.tolerance, image_tokens, full, no_image, shuffled, setting.seed
    )
    result: Result = {
        "image_tokens": image_tokens,
        "questions": len(questions.items),
        "pictures": len(questions.pictures),
        "questions_needed": statistics.questions_needed(setting.tolerance),
        "tolerance": setting.tolerance,
        "searched": setting.searches,
        "alpha": statistics.ALPHA,
        "own_mode": own_mode,
        **controls(questions, judge, full, no_image, shuffled),
        "mode": None,
        "k_star": None,
        "random_k_star": None,
        "redundancy": None,
        "random_redundancy": None,
        "method_value": None,
        "modes": {},
        "curves": {},
        "question_tokens": [],
        "rarest_question_tokens": [],
        "costs": [],
    }
    if not result["image_used"]:
        return {"verdict": IMAGE_NOT_USED, "message": not_used(result), **result}
    found: dict[str, dict[int, Measured]] = {}
    for mode in setting.modes:
        points = found[mode] = {image_tokens: full, 0: no_image}

        def add(kept: int, mode: str = mode, points: dict[int, Measured] = points) -> None:
            points[kept] = measured(*map(ask, setting.runs(mode, kept)))

        for kept in tested[1:-1]:
            add(kept)
        # kinds of question make do with what the whole needs, but for what the file selects by
        for subset in judge.subsets if mode == own_mode else [ALL]:
            while judge.uses_image(subset) and setting.searches:
                middle = statistics.next_to_test(judge.bracket(points, subset), image_tokens)
                if middle is None:
                    break
                add(middle)
    for mode, points in found.items():
        baselines = {name: found[name] for name in BASELINES if name in found and name != mode}
        result["modes"][mode] = judge.summary(points, tested)
        result["curves"][mode] = judge.curve(points, baselines)
    no_question = measured(*map(ask, setting.runs(TEXT, 0)))  # whichever tokens go first
    for name, selector in (("question_tokens", TEXT), ("rarest_question_tokens", RARE_TEXT)):
        of_text = {image_tokens: full, 0: no_question}
        for kept in tested[1:-1]:
            of_text[kept] = measured(*map(ask, setting.runs(selector, kept)))
        result[name] = judge.curve(of_text, {})
    if costs is not None:
        result["costs"] = [
            {
                "kept": kept,
                "prefill_ms": cost.prefill_ms,
                "kv_bytes": cost.kv_bytes,
                "prompt_tokens": cost.prompt_tokens,
            }
            for kept, cost in sorted(costs(tested).items())
        ]
    _conclude(result)
    verdict, message = _verdict(result)
    return {"verdict": verdict, "message": message, **result}


def controls(
    questions: Questions,
    judge: Judge,
    full: Measured,
    no_image: Measured,
    shuffled: Measured,
) -> Result:
    """Return what the right picture, none and another one give, and the gain of the right one."""
    gained = judge.gain(ALL)
    runs = {"full": full, "no_image": no_image, "shuffled": shuffled}
    n = len(questions.items)
    accuracy = {name: float(run.correct.mean()) for name, run in runs.items()}
    none = accuracy["no_image"]
    return {
        **{f"accuracy_{name}": value for name, value in accuracy.items()},
        "intervals": {name: interval(value, n) for name, value in accuracy.items()},
        "gain": gained.value,
        "gain_low": gained.low,
        "image_used": gained.is_used,
        "image_contribution": (accuracy["full"] - none) / none if none > 0 else None,
        "kinds": {
            kind: {
                "questions": len(of),
                **{name: float(run.correct[of].mean()) for name, run in runs.items()},
                "gain": judge.gain(kind).value,
                "gain_low": judge.gain(kind).low,
                "image_used": judge.uses_image(kind),
            }
            for kind, of in judge.subsets.items()
            if kind != ALL
        },
        "digests": {name: run.digest for name, run in runs.items()},
    }


def _conclude(result: Result) -> None:
    """Fill in what random selection makes of each K*, who beats which baseline, and the best."""
    modes = result["modes"]
    random = modes.get(RANDOM)
    for mode, summary in modes.items():
        compares = random is not None and mode != RANDOM
        k_star = summary["k_star"]
        summary["method_value"] = random["k_star"] / k_star if compares and k_star > 0 else None
        for name in BASELINES:
            is_judged = name in modes and mode not in (name, RANDOM)
            # as many tokens as the baseline fails with, or fewer
            failed = modes[name]["k_failed"] if is_judged else None
            fewer = k_star <= (-1 if failed is None else failed)
            summary[f"beats_{name}"] = fewer if is_judged else None
    order = sorted(modes, key=lambda mode: mode != result["own_mode"])  # stable: as asked for
    best = min(
        [mode for mode in order if mode != RANDOM] or order,
        key=lambda mode: modes[mode]["k_star"],
    )
    result["mode"] = best
    for name in ("k_star", "redundancy", "method_value"):
        result[name] = modes[best][name]
    if random is not None:
        result["random_k_star"] = random["k_star"]
        result["random_redundancy"] = random["redundancy"]


def _verdict(result: Result) -> tuple[str, str]:
    """The word and the sentences; what is claimed is what the runs bear out."""
    modes, own, best = result["modes"], result["own_mode"], result["mode"]
    judged = own if own in modes and own != RANDOM else best
    against = [name for name in BASELINES if modes[judged][f"beats_{name}"] is not None]
    differences = _at_a_tenth(result, judged, against)
    verdict, claim = _need(result, judged)
    if verdict == REDUNDANT and against:
        by_need = any(modes[judged][f"beats_{name}"] for name in against)
        at_tenth = any(minus["interval"][0] > 0 for minus in differences.values())
        if not (by_need or at_tenth):
            verdict = SELECTOR_ADDS_NOTHING
            claim += f" {judged} adds nothing: it needs no fewer than {' or '.join(against)}."
    said = [
        _compared(judged, name, tenth(result["image_tokens"]), minus)
        for name, minus in differences.items()
    ]
    return verdict, " ".join([claim, *said])


def _need(result: Result, judged: str) -> tuple[str, str]:
    """What K* says; `judged` is the selector whose worth is asked for."""
    tokens, best, k_star = result["image_tokens"], result["mode"], result["k_star"]
    points = f"{100 * result['tolerance']:g} point{'s' * (result['tolerance'] != 0.01)}"
    if k_star == tokens:
        below = [point for point in result["curves"][best] if point["kept"] < tokens]
        if below[-1]["undecided"]:
            return TOO_FEW_QUESTIONS, (
                f"Nothing can be said about {points}: with {below[-1]['kept']} of {tokens} tokens "
                f"the loss is within the tolerance, but not its confidence bound. "
                f"{result['questions']:,} questions were asked; a tolerance of {points} needs "
                f"about {result['questions_needed']:,}."
            )
        needed = "are needed" if result["searched"] else "alone are enough of the numbers tested"
        return ALL_TOKENS_NEEDED, (
            f"All {tokens} image tokens {needed}: {best} with {below[-1]['kept']} loses more "
            f"than {points}."
        )
    said = [
        f"{best} with {k_star} of {tokens} image tokens loses no more than {points} "
        f"({result['redundancy']:.1%} redundant)"
    ]
    if result["gain"] <= result["tolerance"]:
        said.append(f"but the picture itself adds only {100 * result['gain']:.2f} points")
    modes = result["modes"]
    if RANDOM in modes and best != RANDOM:
        said.append(f"random selection needs {modes[RANDOM]['k_star']}")
    else:
        said.append("random selection was not compared with")
    if judged != best:
        said.append(f"the file's own {judged} needs {modes[judged]['k_star']}")
    if not result["searched"]:
        said.append("no other number was tested")
    return REDUNDANT, f"{'; '.join(said)}."


def _at_a_tenth(result: Result, judged: str, against: Sequence[str]) -> dict[str, Result]:
    """How far above each baseline a selector is at a tenth of the tokens, if that was tested."""
    kept = tenth(result["image_tokens"])
    of = [point for point in result["curves"][judged] if point["kept"] == kept]
    found = {name: point[f"minus_{name}"] for point in of for name in against}
    return {name: minus for name, minus in found.items() if minus is not None}


def _compared(judged: str, name: str, kept: int, minus: Result) -> str:
    low, high = minus["interval"]
    word = (
        "is better than" if low > 0 else "is worse than" if high < 0 else "is not told apart from"
    )
    judgement = "" if low > 0 else ": the selector adds nothing over it there"
    return (
        f"At {kept} tokens {judged} {word} {name} ({100 * minus['mean']:+.2f} points, "
        f"{100 * low:+.2f} to {100 * high:+.2f}){judgement}."
    )


def not_used(result: Result) -> str:
    """Return the sentence for a model without gain; `result` holds its controls."""
    return (
        f"The model does not use the image: {result['accuracy_full']:.2%} with it, "
        f"{result['accuracy_no_image']:.2%} without, {result['accuracy_shuffled']:.2%} with "
        f"another one; the gain of {100 * result['gain']:.2f} points is not above 0 at 95 % "
        f"confidence ({100 * result['gain_low']:.2f}). No redundancy is claimed."
    )
