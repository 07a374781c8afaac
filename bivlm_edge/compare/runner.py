"""Run what is missing, each run in a fresh process, and collect the rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bivlm_edge.compare.rows import RowFolder, file_name, fingerprint, identity_digest
from bivlm_edge.compare.specification import Run
from bivlm_edge.errors import OutputError
from bivlm_edge.provenance import code_version, library_versions, machine

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a comparison have in common.

    Attributes:
        model: As the user gave it, or the folder of the bundled model.
        data: See `job.Job`.
        limit: Likewise.
        calibration: Likewise.
        calibration_name: In words.
        threads: Of torch.
    """

    model: str
    data: str
    limit: int | None
    calibration: str | None
    calibration_name: str
    threads: int

    def identity(self) -> dict[str, Any]:
        """Return what the numbers of every run depend on."""
        return {
            "model": fingerprint(self.model),
            "data": fingerprint(self.data),
            "limit": self.limit,
            "calibration": fingerprint(self.calibration or self.calibration_name),
            "threads": self.threads,
            "code": code_version(),
            "libraries": library_versions(),
            "machine": machine(),
        }

    def facts(self, model_name: str) -> dict[str, Any]:
        """Return what every row says about them."""
        return {
            "model": model_name,
            "data": self.data,
            "limit": self.limit,
            "calibration": self.calibration_name,
            "threads": self.threads,
            "machine": machine(),
            "code": code_version(),
            "libraries": library_versions(),
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that gave no row, and why."""

    run: str
    reason: str
    exit_code: int


class _RunFailed(Exception):  # noqa: N818 - becomes a Failure
    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def run_all(
    runs: Sequence[Run], setting: Setting, model_name: str, folder: Path, tell: Tell
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Return a row for every run that finished, now or before; a failed one stops no other.

    Args:
        runs: What to run, in order.
        setting: Model, data and so on.
        model_name: In tables.
        folder: Finished rows are kept under rows/, what a run printed under logs/, layers of runs
            that have not finished under work/.
        tell: Called with (what runs, steps done, steps in all).

    Raises:
        DataError: The file of a finished row is damaged.
        OutputError: The folder cannot be written.
    """
    finished = RowFolder(folder / "rows")
    common = setting.identity()
    identities = [{**common, "config": asdict(run.config)} for run in runs]
    # damaged rows are found before hours of work
    known = [
        finished.load(run.name, identity) for run, identity in zip(runs, identities, strict=True)
    ]
    logs = folder / "logs"
    try:
        logs.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{logs}': {error.strerror}.") from error
    rows, failures = [], []
    for number, (run, identity, row) in enumerate(zip(runs, identities, known, strict=True)):
        if row is None:
            mark = f"{number + 1}/{len(runs)} {run.name}"
            work = folder / "work" / identity_digest(identity)
            try:
                measured = _measure(run, setting, logs, work, _marked(tell, mark))
            except _RunFailed as error:
                failures.append(Failure(run.name, str(error), error.exit_code))
                continue
            row = _row(run, measured, setting.facts(model_name))
            finished.save(run.name, identity, row)
            shutil.rmtree(work, ignore_errors=True)
        rows.append(row)
    return rows, failures


def _row(run: Run, measured: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(asdict(run.config), default=sorted))
    return {
        "method": run.config.method,
        "budget": run.budget,
        **measured,
        "run": run.name,
        "series": run.series,
        "seed": run.config.seed,
        "options": config,
        **facts,
    }


def _marked(tell: Tell, mark: str) -> Tell:
    return lambda what, done, total: tell(f"{mark}: {what}", done, total)


def _measure(run: Run, setting: Setting, logs: Path, work: Path, tell: Tell) -> dict[str, Any]:
    """What one fresh process measured."""
    job = {
        "model": setting.model,
        "data": setting.data,
        "limit": setting.limit,
        "calibration": setting.calibration,
        "config": asdict(run.config),
        "threads": setting.threads,
        "work_folder": str(work),
    }
    log = logs / f"{file_name(run.name)}.log"
    command = [sys.executable, "-P", "-m", "bivlm_edge.compare.job"]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            last = _converse(process, json.dumps(job, default=sorted), tell)
        finally:
            process.kill()  # does nothing to one that has ended
    if "result" in last:
        result: dict[str, Any] = last["result"]
        return result
    if "error" in last:
        raise _RunFailed(last["error"], last["exit_code"])
    code = process.returncode
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    cause = lines[-1] if lines else "it printed nothing"
    if code < 0:
        cause = f"ended by signal {-code} (9: perhaps no memory was left); {cause}"
    raise _RunFailed(f"{cause} (all of it: {log})", 1)


def _converse(process: subprocess.Popen[str], job: str, tell: Tell) -> dict[str, Any]:
    """Hand over the job and return the last message; the process has ended."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    with suppress(BrokenPipeError):  # it died at once: its log says why
        process.stdin.write(job)
    with suppress(BrokenPipeError):
        process.stdin.close()
    last: dict[str, Any] = {}
    for line in process.stdout:
        last = json.loads(line)
        if "what" in last:
            tell(last["what"], last["done"], last["total"])
    process.wait()
    return last
