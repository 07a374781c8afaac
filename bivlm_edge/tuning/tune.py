"""Fine-tune a quantized model as configured, and never leave it worse than it was."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bivlm_edge.calibration.batches import drawn_indices
from bivlm_edge.calibration.calls import Batch
from bivlm_edge.calibration.precision import compute_dtype
from bivlm_edge.config import QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import (
    Progress,
    QuantizableModel,
    QuantizedModel,
    linear_layers,
    quantize_model,
)
from bivlm_edge.tuning.blocks import tune_blocks
from bivlm_edge.tuning.end_to_end import tune_end_to_end
from bivlm_edge.tuning.objective import Teacher, head_of, mean_divergence
from bivlm_edge.tuning.planes import PlaneWeight
from bivlm_edge.tuning.trainer import (
    BLOCK_RATES,
    END_TO_END_RATES,
    State,
    Trainer,
    norms_and_biases,
    restore,
)

_HELD_OUT_SHARE = 8
_MOST_HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What fine-tuning did.

    Attributes:
        tune: One of `config.TUNINGS`.
        signs: Whether signs were trained as well.
        before: KL divergence from the float model on held-out batches, in nats per position.
        after: The same afterwards; `before` if nothing was gained and all was put back.
        dtype: Of the matrix products while training.
        seconds: Time taken.
        log: Losses on the way: per block, or per interval of steps; `divergence` after a stage.
    """

    tune: str
    signs: bool
    before: float
    after: float
    dtype: str
    seconds: float
    log: list[dict[str, float | str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the report of an export."""
        return dataclasses.asdict(self)


def quantize_and_tune(
    vlm: QuantizableModel,
    batches: Sequence[Batch],
    config: QuantConfig,
    progress: Progress | None = None,
    work_folder: Path | None = None,
    tuning_batches: Sequence[Batch] | None = None,
) -> tuple[QuantizedModel, TuningReport | None]:
    """Quantize a model and fine-tune it if `config.tune` says so.

    Fine-tuning holds the float model beside the quantized one.

    Args:
        vlm: The model; modified.
        batches: Calibration inputs.
        config: Options.
        progress: Called with what runs, the steps done and the steps in all.
        work_folder: See `quantize_model`; what was tuned is not kept there.
        tuning_batches: Inputs to tune on and judge by; None: the calibration inputs.

    Returns:
        The quantized model, and what fine-tuning did, None without it.

    Raises:
        RequestError, UnsupportedModelError: those of `check_tunable`, `quantize_model` and
            `tune_model`.
    """
    check_tunable(vlm, config)
    if config.tune == "none":
        return quantize_model(vlm, batches, config, progress, work_folder), None
    used = batches if tuning_batches is None else tuning_batches
    split_batches(used)
    teacher = Teacher(_float_copy(vlm.module))
    quantized = quantize_model(vlm, batches, config, progress, work_folder)
    tell = progress or (lambda *_: None)
    return quantized, tune_model(vlm, quantized, teacher, used, config, tell)


def drawn_batches(
    config: QuantConfig, draw: Callable[[int], Sequence[Batch]]
) -> tuple[Sequence[Batch], Sequence[Batch] | None]:
    """Calibration inputs and tuning inputs, as `quantize_and_tune` takes them.

    Args:
        config: Says how many samples; none are drawn for method `none`.
        draw: Makes batches of so many samples.
    """
    if config.method == "none":
        return [], None
    batches = draw(config.calibration_samples)
    if config.tune == "none" or config.tune_samples is None:
        return batches, None
    return batches, draw(config.tune_samples)


def drawn_items(config: QuantConfig, items: Sequence[VqaItem]) -> list[VqaItem]:
    """Return the items that `drawn_batches` draws from, for calibration and for tuning."""
    if config.method == "none":
        return []
    counts = {config.calibration_samples}
    if config.tune != "none" and config.tune_samples is not None:
        counts.add(config.tune_samples)
    drawn = {i for count in counts for i in drawn_indices(len(items), count, config.seed)}
    return [items[index] for index in sorted(drawn)]


def check_tunable(vlm: QuantizableModel, config: QuantConfig) -> None:
    """Refuse a model that cannot be fine-tuned as configured, before hours of work.

    Raises:
        RequestError: it is streamed from disk.
        UnsupportedModelError: it has no output embeddings.
    """
    if config.tune == "none":
        return
    if getattr(vlm, "streamed", None) is not None:
        raise RequestError(
            f"--tune {config.tune} needs the whole model in memory, twice, and the float weights "
            "of this one stay on disk. Export with --no-stream, or use --tune none."
        )
    head_of(vlm.module)


def _float_copy(module: nn.Module) -> nn.Module:
    """A copy that shares the token table, which quantizing leaves alone."""
    tables = [layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)]
    copied: nn.Module = copy.deepcopy(module, {id(table): table for table in tables})
    return copied


def tune_model(
    vlm: QuantizableModel,
    quantized: QuantizedModel,
    teacher: Teacher,
    batches: Sequence[Batch],
    config: QuantConfig,
    tell: Progress,
) -> TuningReport:
    """Train what the packed format leaves open, so that the model answers as the float model.

    Row coefficients, norms and biases are trained, and signs if `config.tune_signs`; planes,
    transforms and bytes stay what they are. A stage that does not lower the divergence on held-out
    batches is undone. Afterwards `quantized.weights` and the layers of `vlm.module` hold the same
    values again.

    Args:
        vlm: The quantized model; modified.
        quantized: What `quantize_model` returned for it; modified.
        teacher: Made of a copy of `vlm.module` before it was quantized.
        batches: Calibration inputs; some are held out to judge by.
        config: The fields that begin with `tune`, and `seed`.
        tell: Called with (what runs, steps done, steps in all).

    Raises:
        RequestError: fewer than two batches, or nothing to train.
        TuningError: a loss is not finite; the model is as it was.
    """
    started = time.perf_counter()
    training, held_out = split_batches(batches)
    state = State(_binary_weights(quantized), _copied(norms_and_biases(vlm.module)))
    loss = before = mean_divergence(vlm.module, held_out, teacher)
    log: list[dict[str, float | str]] = []
    stages = ("blocks", "end-to-end") if config.tune == "both" else (config.tune,)
    for stage in stages:
        try:
            found, entries = _STAGES[stage](
                vlm, state.packed, teacher, training, held_out, config, tell
            )
        except BaseException:
            restore(vlm.module, state)
            raise
        log += [{"stage": stage, **entry} for entry in entries]
        if found is None:
            restore(vlm.module, state)
            continue
        restore(vlm.module, found)
        reached = mean_divergence(vlm.module, held_out, teacher)
        log.append({"stage": stage, "divergence": reached})
        if reached < loss:
            loss = reached
            state = State(found.packed, {**state.vectors, **found.vectors})
        else:
            restore(vlm.module, state)
    changed = {
        name for name, weight in state.packed.items() if weight is not quantized.weights[name]
    }
    quantized.weights.update(state.packed)
    quantized.reports = [
        dataclasses.replace(report, output_error=None) if report.name in changed else report
        for report in quantized.reports
    ]
    return TuningReport(
        tune=config.tune,
        signs=config.tune_signs,
        before=before,
        after=loss,
        dtype=str(compute_dtype()).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 1),
        log=log,
    )


def split_batches(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on and batches to judge by, the latter spread evenly.

    Raises:
        RequestError: there are fewer than two.
    """
    if len(batches) < 2:
        raise RequestError(
            f"fine-tuning needs at least two calibration batches, one of them to judge by; there "
            f"are {len(batches)}. Give more samples, or use --tune none."
        )
    count = min(_MOST_HELD_OUT, max(1, len(batches) // _HELD_OUT_SHARE))
    chosen = {(2 * i + 1) * len(batches) // (2 * count) for i in range(count)}
    training = [batch for i, batch in enumerate(batches) if i not in chosen]
    return training, [batches[i] for i in sorted(chosen)]


_Entries = list[dict[str, float]]


def _tune_blocks(
    vlm: QuantizableModel,
    packed: Mapping[str, BinaryWeight],
    teacher: Teacher,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    config: QuantConfig,
    tell: Progress,
) -> tuple[State | None, _Entries]:
    return tune_blocks(
        vlm.module,
        vlm.block_sequences(),
        packed,
        teacher.module,
        training,
        held_out,
        BLOCK_RATES.times(config.tune_rate),
        config.tune_epochs,
        config.seed,
        config.tune_signs,
        tell,
    )


def _tune_end_to_end(
    vlm: QuantizableModel,
    packed: Mapping[str, BinaryWeight],
    teacher: Teacher,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    config: QuantConfig,
    tell: Progress,
) -> tuple[State | None, _Entries]:
    module, steps = vlm.module, config.tune_steps
    floats = linear_layers(teacher.module)
    weights = {
        name: PlaneWeight(weight, floats[name].weight if config.tune_signs else None)
        for name, weight in packed.items()
    }
    rates = END_TO_END_RATES.times(config.tune_rate)
    return tune_end_to_end(
        module,
        Trainer(module, weights, norms_and_biases(module), rates, steps),
        training,
        held_out,
        teacher,
        steps,
        config.seed,
        lambda done: tell("tuning end to end", done, steps),
    )


_STAGES = {"blocks": _tune_blocks, "end-to-end": _tune_end_to_end}


def _copied(vectors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vectors.items()}


def _binary_weights(quantized: QuantizedModel) -> dict[str, BinaryWeight]:
    """The weights that have coefficients to train.

    Raises:
        RequestError: there are none.
    """
    packed = {
        name: weight
        for name, weight in quantized.weights.items()
        if isinstance(weight, BinaryWeight)
    }
    if not packed:
        raise RequestError(
            "there is nothing to fine-tune: no layer of this model is stored as bit planes. "
            "Use --method bivlm-edge, or --tune none."
        )
    return packed
