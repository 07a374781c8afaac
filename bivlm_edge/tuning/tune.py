"""Fine-tune a quantized model as configured, and never leave it worse than it was."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bivlm_edge.calibration.capture import Batch
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import Progress, QuantizableModel, QuantizedModel, quantize_model
from bivlm_edge.tuning.blocks import tune_blocks
from bivlm_edge.tuning.end_to_end import tune_end_to_end
from bivlm_edge.tuning.objective import Teacher, compute_dtype, mean_divergence
from bivlm_edge.tuning.planes import PlaneWeight
from bivlm_edge.tuning.trainer import RATES, State, Trainer, norms_and_biases, restore

_HELD_OUT_SHARE = 8
_MOST_HELD_OUT = 8
_BLOCK_EPOCHS = 2


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What fine-tuning did.

    Attributes:
        tune: What was trained, see `config.TUNINGS`.
        before: KL divergence from the float model on held-out batches, in nats per position.
        after: The same afterwards; `before` if nothing was gained and all was put back.
        dtype: Of the matrix products while training.
        seconds: Time taken.
        log: Losses on the way: per block, or per interval of steps.
    """

    tune: str
    before: float
    after: float
    dtype: str
    seconds: float
    log: list[dict[str, float]]

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
        Errors of `quantize_model` and `tune_model`.
    """
    if config.tune == "none":
        return quantize_model(vlm, batches, config, progress, work_folder), None
    used = batches if tuning_batches is None else tuning_batches
    split_batches(used)
    teacher = Teacher(_float_copy(vlm.module))
    quantized = quantize_model(vlm, batches, config, progress, work_folder)
    tell = progress or (lambda *_: None)
    return quantized, tune_model(vlm, quantized, teacher, used, config, tell)


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

    Row coefficients, norms and biases are trained, with "signs" the signs of the planes as well;
    planes, transforms and bytes stay what they are. Afterwards `quantized.weights` and the layers
    of `vlm.module` hold the same values again.

    Args:
        vlm: The quantized model; modified.
        quantized: What `quantize_model` returned for it; modified.
        teacher: Made of a copy of `vlm.module` before it was quantized.
        batches: Calibration inputs; some are held out to judge by.
        config: `tune`, `tune_steps`, `tune_rate` and `seed`.
        tell: Called with (what runs, steps done, steps in all).

    Raises:
        RequestError: fewer than two batches, or nothing to train.
        TuningError: a loss is not finite; the model is as it was.
    """
    started = time.perf_counter()
    training, held_out = split_batches(batches)
    packed = _binary_weights(quantized)
    start = State(
        packed,
        {name: value.detach().clone() for name, value in norms_and_biases(vlm.module).items()},
    )
    before = mean_divergence(vlm.module, held_out, teacher)
    try:
        state, log = _tune(vlm, packed, teacher, training, held_out, config, tell)
    except BaseException:
        restore(vlm.module, start)
        raise
    after = before
    if state is not None:
        restore(vlm.module, state)
        after = mean_divergence(vlm.module, held_out, teacher)
    if state is not None and after < before:
        quantized.weights.update(state.packed)
        quantized.reports = [
            dataclasses.replace(report, output_error=None) if report.name in packed else report
            for report in quantized.reports
        ]
    else:
        restore(vlm.module, start)
        after = before
    dtype = str(compute_dtype()).removeprefix("torch.")
    seconds = round(time.perf_counter() - started, 1)
    return TuningReport(config.tune, before, after, dtype, seconds, log)


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


def _tune(
    vlm: QuantizableModel,
    packed: Mapping[str, BinaryWeight],
    teacher: Teacher,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    config: QuantConfig,
    tell: Progress,
) -> tuple[State | None, list[dict[str, float]]]:
    """The best state found, or None, and the log."""
    module = vlm.module
    rates = RATES.times(config.tune_rate)
    if config.tune == "blocks":
        return tune_blocks(
            module,
            vlm.block_sequences(),
            packed,
            teacher.module,
            training,
            held_out,
            rates,
            _BLOCK_EPOCHS,
            config.seed,
            tell,
        )
    floats = dict(teacher.module.named_modules())
    weights = {
        name: PlaneWeight(weight, floats[name].weight if config.tune == "signs" else None)
        for name, weight in packed.items()
    }
    steps = config.tune_steps
    trainer = Trainer(module, weights, norms_and_biases(module), rates, steps)
    return tune_end_to_end(
        module,
        trainer,
        training,
        held_out,
        teacher,
        steps,
        config.seed,
        lambda done: tell("tuning end to end", done, steps),
    )


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
