"""Finished runs on disk, so that an interrupted analysis goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bivlm_edge.compare.rows import RowFolder
from bivlm_edge.provenance import ANSWER_CODE, code_version
from bivlm_edge.redundancy.answering import Answers, Model
from bivlm_edge.redundancy.plan import Run
from bivlm_edge.redundancy.questions import Questions
from bivlm_edge.runtime.session import KERNEL_VARIABLE

_FIELDS = frozenset({"answers", "kept_tokens", "seconds"})

OnRun = Callable[[Run], Callable[[int], None]]


class FinishedRuns:
    """Asks a model, or takes the answers that a folder has of the same run.

    A run is the same if graph, weights, tokenizer, operator library, questions, pictures and the
    code that asks are.
    """

    def __init__(
        self, model: Model, questions: Questions, folder: Path, on_run: OnRun, limit: int | None
    ) -> None:
        """Make the folder.

        Args:
            model: Answers.
            questions: What it is asked.
            folder: Of the finished runs.
            on_run: Called with every run that is carried out; returns what is called with the
                number of questions done.
            limit: Longest answer; None: the manifest's.

        Raises:
            OutputError: The folder cannot be made.
        """
        self._model = model
        self._rows = RowFolder(folder, _FIELDS)
        self._on_run = on_run
        session = model.session
        self._identity: dict[str, Any] = {
            "model": {role: record.sha256 for role, record in session.manifest.files.items()},
            "questions": questions.digest,
            "max_new_tokens": limit,
            "code": code_version(ANSWER_CODE),
            "library": None if session.library is None else _sha256(Path(session.library)),
            "kernel": os.environ.get(KERNEL_VARIABLE) or "auto",
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
        }

    def ask(self, run: Run) -> Answers:
        """Return the answers of a run.

        Raises:
            DataError: The file of a finished run is damaged.
            OutputError: The folder cannot be written.
            BivlmError: As `Model.answers`.
        """
        identity = {**self._identity, "run": asdict(run)}
        row = self._rows.load(run.name, identity)
        if row is None:
            answers = self._model.answers(run, self._on_run(run))
            self._rows.save(
                run.name,
                identity,
                {
                    "answers": list(answers.texts),
                    "kept_tokens": answers.kept_tokens,
                    "seconds": round(answers.seconds, 3),
                },
            )
            return answers
        return Answers(tuple(row["answers"]), row["kept_tokens"], row["seconds"])


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
