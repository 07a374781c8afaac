"""One run of a comparison in a process of its own: quantize, evaluate, report time and memory.

`python -m bivlm_edge.compare.job` takes the job as JSON from stdin and writes one JSON object per
line: {"what", "done", "total"} while it runs, at last {"result": ...} or {"error", "exit_code"}.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers.utils import logging

from bivlm_edge.calibration.batches import calibration_items, make_batches
from bivlm_edge.calibration.text_batches import calibration_batches, evaluation_windows
from bivlm_edge.compare import evaluation
from bivlm_edge.config import QuantConfig
from bivlm_edge.datasets import VqaItem, calibrating_data, load_questions
from bivlm_edge.errors import BivlmError
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.models.language_model import LanguageModel, load_model
from bivlm_edge.quant.quantizer import QuantizedModel
from bivlm_edge.quant.vocabulary import round_vocabulary
from bivlm_edge.quant.work_folder import has_steps
from bivlm_edge.runtime.evaluate import Score
from bivlm_edge.runtime.process_memory import memory_bytes
from bivlm_edge.tuning import check_tunable, drawn_batches, quantize_and_tune

FLOAT_BITS = 32.0
_MB = 1e6
_PROGRESS_S = 0.2

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to run; all values are plain.

    Attributes:
        model: A folder, a hub id or "smollm2-135m".
        data: A name of DATA_SETS, a .jsonl file of questions, or a text (see `texts.load_text`).
        limit: Questions or windows at most; None: all.
        calibration: Pictures or texts of one's own, or None.
        config: Fields of QuantConfig.
        threads: Of torch.
        work_folder: Where finished layers are kept, so that a killed job can go on; None: nowhere.
    """

    model: str
    data: str
    limit: int | None
    calibration: str | None
    config: dict[str, Any]
    threads: int
    work_folder: str | None = None


def execute(job: Job, tell: Tell) -> dict[str, Any]:
    """Run a job and return what was measured.

    Keys: `claimed_bits`, `true_bits`, `accuracy`, `open_ended_accuracy`, `perplexity`,
    `is_finite` (whether the perplexity is), `tuning` (the report of fine-tuning, or None),
    `seconds` (quantization and fine-tuning), `resumed` (whether they are those of the last start
    alone, which went on where another one was killed), `evaluation_seconds`, `peak_mb` (VmHWM of
    this process, 10^6 bytes), `quantization_peak_mb` (before the evaluation), and for questions
    `questions`, `interval`, `open_ended_interval`, `per_kind`, for texts `windows`.
    """
    torch.set_num_threads(job.threads)
    config = QuantConfig(**job.config)
    torch.manual_seed(config.seed)
    tell("loading", 0, 1)
    model = load_model(job.model)
    check_tunable(model, config)
    evaluate: Callable[[], dict[str, Any]]
    if isinstance(model, VisionLanguageModel):
        items = questions(job)
        vlm = model

        def evaluate() -> dict[str, Any]:
            return _answered(vlm, items, tell)

    else:
        windows = evaluation_windows(model, job.data, job.limit)
        language_model = model

        def evaluate() -> dict[str, Any]:
            return _read(language_model, windows, tell)

    batches, tuning = drawn_batches(config, partial(_calibration, model, job, config.seed))
    work_folder = None if job.work_folder is None else Path(job.work_folder)
    is_resumed = work_folder is not None and has_steps(work_folder)
    started = time.perf_counter()
    quantized, tuned = quantize_and_tune(model, batches, config, tell, work_folder, tuning)
    if quantized.weights:
        round_vocabulary(model.module, config.vocabulary_bits)  # as an export does
    seconds = time.perf_counter() - started
    del batches, tuning
    quantization_peak = _peak_mb()
    started = time.perf_counter()
    found = evaluate()
    return {
        **_bits(quantized),
        **found,
        "tuning": None if tuned is None else tuned.to_json(),
        "seconds": round(seconds, 2),
        "resumed": is_resumed,
        "evaluation_seconds": round(time.perf_counter() - started, 2),
        "peak_mb": _peak_mb(),
        "quantization_peak_mb": quantization_peak,
    }


def questions(job: Job) -> list[VqaItem]:
    """The questions of a job."""
    return load_questions(job.data)[: job.limit]


def _calibration(
    model: VisionLanguageModel | LanguageModel, job: Job, seed: int, samples: int
) -> Sequence[dict[str, Tensor]]:
    if isinstance(model, LanguageModel):
        return calibration_batches(model, samples, seed, source=job.calibration)
    source = job.calibration or calibrating_data(job.data)
    return make_batches(model.prepare, calibration_items(source), samples, seed)


def _bits(quantized: QuantizedModel) -> dict[str, float]:
    """True bits of the model, and those that its method claims: the same where it claims none."""
    if not quantized.weights:
        return {"claimed_bits": FLOAT_BITS, "true_bits": FLOAT_BITS}
    if all(report.claimed_bits == report.true_bits for report in quantized.reports):
        # not their mean: layers with the same input share what each report counts
        return {"claimed_bits": quantized.true_bits, "true_bits": quantized.true_bits}
    weights = sum(report.n * report.k for report in quantized.reports)
    claimed = sum(report.claimed_bits * report.n * report.k for report in quantized.reports)
    return {"claimed_bits": claimed / weights, "true_bits": quantized.true_bits}


def _answered(vlm: VisionLanguageModel, items: Sequence[VqaItem], tell: Tell) -> dict[str, Any]:
    answers = evaluation.answer(
        vlm, items, on_progress=lambda done: tell("answering", done, len(items))
    )
    scores = evaluation.score(items, answers)
    open_ended = scores.open_ended
    return {
        "accuracy": scores.overall.accuracy,
        "open_ended_accuracy": None if open_ended is None else open_ended.accuracy,
        **_perplexity(answers.expected),
        "questions": scores.overall.n,
        "interval": _interval(scores.overall),
        "open_ended_interval": None if open_ended is None else _interval(open_ended),
        "per_kind": {kind: found.accuracy for kind, found in scores.per_kind.items()},
    }


def _read(model: LanguageModel, windows: Tensor, tell: Tell) -> dict[str, Any]:
    likelihood = evaluation.text_likelihood(
        model, windows, on_progress=lambda done: tell("reading", done, len(windows))
    )
    return {
        "accuracy": None,
        "open_ended_accuracy": None,
        **_perplexity(likelihood),
        "windows": list(windows.shape),
    }


def _perplexity(likelihood: evaluation.Likelihood) -> dict[str, Any]:
    """JSON has no infinity: a perplexity that is not finite is None and marked."""
    value = likelihood.perplexity
    is_finite = math.isfinite(value)
    return {"perplexity": value if is_finite else None, "is_finite": is_finite}


def _interval(score: Score) -> list[float]:
    return [score.low, score.high]


def _peak_mb() -> float | None:
    peak = memory_bytes().get("vm_hwm")
    return None if peak is None else round(peak / _MB, 1)


def _main() -> int:
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with it
    logging.disable_progress_bar()
    try:
        result = execute(Job(**json.load(sys.stdin)), _progress(channel))
    except BivlmError as error:
        _say(channel, {"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    _say(channel, {"result": result})
    return 0


def _progress(channel: TextIO) -> Tell:
    last = -math.inf

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_S:
            last = now
            _say(channel, {"what": what, "done": done, "total": total})

    return tell


def _say(channel: TextIO, values: dict[str, Any]) -> None:
    channel.write(json.dumps(values, allow_nan=False) + "\n")
    channel.flush()


if __name__ == "__main__":
    sys.exit(_main())
