"""Which runs a comparison consists of, from what a user types. No torch."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bivlm_edge.config import METHODS, STAGES, QuantConfig, takes_bits
from bivlm_edge.errors import RequestError

FLOAT = "none"
ABLATED = "bivlm-edge"
_WITHOUT = "without"
# fine-tuning is no stage of the method: it is switched on, for long enough to show its effect
TUNED = ("tune=end-to-end,tune_steps=50", "tune=end-to-end,tune_signs=true,tune_steps=50")
_IN_SPECIFICATION = "METHOD[@BITS][,OPTION=VALUE...]"


@dataclass(frozen=True, slots=True)
class Run:
    """One method with its options.

    Attributes:
        name: As `parse_run` reads it.
        config: All options.
        budget: What `bits` was asked for; None where a method has bits of its own.
    """

    name: str
    config: QuantConfig
    budget: float | None

    @property
    def series(self) -> str:
        """Name without the budget: runs of one series differ in bits only."""
        method, *options = self.name.split(",")
        return ",".join([method.partition("@")[0], *options])


def parse_run(text: str, defaults: Mapping[str, Any] | None = None) -> Run:
    """Read e.g. "gptq@4", "bivlm-edge@1.5,without=hadamard+prefix" or "billm".

    Options are the fields of QuantConfig; lists are written with "+".

    Args:
        text: The specification.
        defaults: Fields of QuantConfig where the text says nothing.

    Raises:
        RequestError: It cannot be read, or the options do not go together.
    """
    head, *assignments = text.strip().split(",")
    method, at, bits = head.partition("@")
    if method not in METHODS:
        raise RequestError(
            f"run {text!r}: the method {method!r} is not known. Accepted: {', '.join(METHODS)}."
        )
    values: dict[str, Any] = {**(defaults or {}), "method": method}
    given = dict(_assignment(text, assignment) for assignment in assignments)
    if at:
        values["bits"] = _converted(text, "bits", float, bits)
        if not takes_bits(method):
            raise RequestError(
                f"run {text!r}: {method} has bits of its own and takes no budget. Write {method!r}."
            )
    try:
        config = QuantConfig(**{**values, **given})
    except RequestError as error:
        raise RequestError(f"run {text!r}: {error}") from error
    budget = float(config.bits) if takes_bits(method) else None
    name = method if budget is None else f"{method}@{budget:g}"
    return Run(",".join([name, *assignments]), config, budget)


def plan(
    names: Sequence[str],
    budgets: Sequence[float],
    specifications: Sequence[str],
    *,
    ablate: bool,
    defaults: Mapping[str, Any],
) -> list[Run]:
    """Return the float model first, then methods x budgets, single runs, and the ablation.

    Args:
        names: Methods; one with bits of its own runs once.
        budgets: Bits for all others.
        specifications: Further runs, see `parse_run`.
        ablate: Whether bivlm-edge runs with each of its stages switched off in turn, and with each
            of TUNED, at every budget.
        defaults: Fields of QuantConfig for all runs.

    Raises:
        RequestError: A method is not known, does not accept a budget, or nothing is to run.
    """
    texts = [FLOAT]
    for name in names:
        if name in METHODS and not takes_bits(name):
            texts.append(name)
        else:
            texts += [f"{name}@{budget:g}" for budget in budgets]
    texts += specifications
    if ablate:
        for budget in budgets:
            texts.append(f"{ABLATED}@{budget:g}")
            texts += [f"{ABLATED}@{budget:g},{_WITHOUT}={stage}" for stage in STAGES]
            texts += [f"{ABLATED}@{budget:g},{options}" for options in TUNED]
    runs: dict[QuantConfig, Run] = {}
    for text in texts:
        asked = parse_run(text, defaults)
        runs.setdefault(asked.config, asked)
    if len(runs) == 1 and FLOAT not in names:
        raise RequestError(
            f"nothing to compare. Give --method NAME or --run {_IN_SPECIFICATION}, e.g. "
            "--method bivlm-edge --method gptq --budget 2."
        )
    return list(runs.values())


def _assignment(text: str, assignment: str) -> tuple[str, Any]:
    """One "option=value" as field and value of QuantConfig."""
    name, sign, value = assignment.partition("=")
    hints = get_type_hints(QuantConfig)
    field = name.strip().replace("-", "_")
    if not sign or field not in hints or field in ("method", "bits"):
        accepted = ", ".join(sorted(set(hints) - {"method", "bits"}))
        raise RequestError(
            f"run {text!r}: {assignment!r} is not OPTION=VALUE with an option of "
            f"{_IN_SPECIFICATION}. Options: {accepted}."
        )
    return field, _converted(text, field, hints[field], value.strip())


def _converted(text: str, field: str, hint: Any, value: str) -> Any:
    """`value` in the type of its field."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        hint = next(choice for choice in get_args(hint) if choice is not type(None))
        origin = get_origin(hint)
    if origin is Literal or hint is str:
        return value
    if origin is collections.abc.Collection:
        return tuple(value.split("+"))
    if hint is bool:
        if value in ("true", "false"):
            return value == "true"
        raise RequestError(f"run {text!r}: {field}={value} is neither true nor false.")
    try:
        return hint(value)
    except ValueError:
        raise RequestError(f"run {text!r}: {field}={value} is not a number.") from None
