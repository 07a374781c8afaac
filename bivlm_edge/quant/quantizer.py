"""Quantize every linear layer of a model by one method, in order, and report what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bivlm_edge import distributed
from bivlm_edge.calibration.calls import Batch, Blocks
from bivlm_edge.calibration.capture import FixedWeights, LayerGroup, Weighting, walk
from bivlm_edge.calibration.float_stream import FloatStream
from bivlm_edge.calibration.importance import token_importance
from bivlm_edge.calibration.place import HOME, Place, find_place
from bivlm_edge.calibration.vlmq import ModalityWeights, VlmqWeighting
from bivlm_edge.config import QuantConfig
from bivlm_edge.distributed import Team
from bivlm_edge.errors import CheckpointError, RequestError
from bivlm_edge.memory import release_freed
from bivlm_edge.quant import methods
from bivlm_edge.quant.allocation import Plan
from bivlm_edge.quant.calibrated import (
    calibrated_layer,
    corrects_bias,
    group_seed,
    has_bias,
    naming,
)
from bivlm_edge.quant.linalg import output_energy
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.packed import CHUNK, PANEL, BinaryWeight, can_stack
from bivlm_edge.quant.planning import plan_planes
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight, QuantizedWeight
from bivlm_edge.quant.work_folder import WorkFolder, describe_run, pack_weight, unpack_weight

if TYPE_CHECKING:
    from bivlm_edge.models.streaming import StreamedBlocks

Progress = Callable[[str, int, int], None]


class QuantizableModel(Protocol):
    """What the quantizer needs of `models.VisionLanguageModel`."""

    @property
    def module(self) -> Any:
        """The torch module, in evaluation mode and float32."""

    def block_sequences(self) -> Sequence[Blocks]:
        """The blocks whose linear layers are quantized, in order of execution."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: Dotted name in the whole model.
        n: Output features.
        k: Input features.
        method: Name of the method.
        planes: `plane_columns` of a BinaryWeight, else None.
        hadamard_block: 0 without a transform.
        true_bits: Bits per weight, every byte counted.
        claimed_bits: What the method's paper would claim; equal to `true_bits` for all others.
        output_error: tr(E H E^T) / tr(W H W^T) with all tokens weighing alike, the bias corrected
            where the method does so; E is what rounding changed, W the float weight. None for
            random weights, which approximate nothing.
        error_is_held_out: Whether H comes from batches that calibrated nothing.
    """

    name: str
    n: int
    k: int
    method: str
    planes: tuple[int, ...] | None
    hadamard_block: int
    true_bits: float
    claimed_bits: float
    output_error: float | None
    error_is_held_out: bool


@dataclass(slots=True)
class QuantizedModel:
    """The weights of the quantized layers and the account of all others.

    Attributes:
        weights: Dotted name -> quantized weight.
        reports: One per quantized layer, in order of execution.
        stacked: Names of layers with the same input whose weights become one in the graph: signs
            and order of the columns are stored once.
        skipped: Dotted name of every other nn.Linear -> why it stays as it is.
        modalities: Dotted name -> mean weights of text and image tokens, with importance `vlmq`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    stacked: list[tuple[str, ...]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, ModalityWeights] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights in the graph."""
        repeated = (self.weights[name] for names in self.stacked for name in names[1:])
        return sum(weight.nbytes for weight in self.weights.values()) - sum(
            weight.transform_bytes for weight in repeated if isinstance(weight, BinaryWeight)
        )

    @property
    def true_bits(self) -> float:
        """Bytes of all quantized weights in the graph, in bits per weight; 0 if there are none."""
        weights = sum(weight.n * weight.k for weight in self.weights.values())
        return 8 * self.nbytes / weights if weights else 0.0


def quantize_model(
    vlm: QuantizableModel,
    batches: Sequence[Batch],
    config: QuantConfig,
    progress: Progress | None = None,
    work_folder: Path | None = None,
) -> QuantizedModel:
    """Quantize the linear layers of all blocks, each on the inputs that quantized ones produce.

    Afterwards the layers of `vlm.module` hold the dequantized weights, and biases corrected by
    `bivlm-edge` for the mean error: the module computes what the packed weights say.

    Args:
        vlm: The model; modified.
        batches: Calibration inputs, at least one.
        config: Method, bits and seed.
        progress: Called with a layer's name, the layers done and the layers in all.
        work_folder: Where to keep what is finished. Called again with the same model, batches and
            config, everything found there is taken over, and the result is the same bit by bit.

    Raises:
        RequestError: no batches, no such device, the budget is below one plane per layer, or the
            work folder belongs to another run.
        CheckpointError: a parameter of the module holds NaN or infinity.
        DataError: the calibration data make NaN or infinity in a layer's input or in the gradient
            of its output, or a Hessian that no damping makes positive definite.
        OutputError: the work folder cannot be written.
    """
    result = QuantizedModel(skipped=skipped_layers(vlm, config.method))
    streamed: StreamedBlocks | None = getattr(vlm, "streamed", None)
    _check_weights(vlm.module, streamed)
    if config.method == "none":
        return result
    if not batches:
        raise RequestError("there are no calibration batches. Give at least one.")
    held = streamed.held if streamed else None
    team, place = distributed.current(), find_place(config.device)
    work = _open_work_folder(work_folder, vlm.module, streamed, batches, config, team)
    batches = team.share(batches)
    sequences = vlm.block_sequences()
    total = len(linear_layers(vlm.module)) - len(result.skipped)
    weighting: Weighting | None = None
    plans: Mapping[str, Plan] = {}
    if config.token_weights == "loss":
        with streamed.recomputing() if streamed else nullcontext():
            whole = HOME if streamed else place
            weighting = _fixed_weights(vlm, sequences, batches, config, work, team, whole)
    needs = methods.declaration(config.method).needs
    if "budget" in needs and "model-budget" not in config.without:
        walk_once = partial(
            walk,
            vlm.module,
            sequences,
            batches,
            weighting,
            held=held,
            team=team,
            place=place,
            frozen=True,
        )
        plans = plan_planes(walk_once, result.skipped, config, work)
    if config.token_weights == "vlmq":
        vision = _vision_rows(vlm.module, batches)
        weighting = VlmqWeighting(vlm.module, sequences, batches, vision, result.modalities, team)

    propagates = "propagation" in needs and "propagation" not in config.without
    reference = FloatStream(vlm.module, sequences, batches, place) if propagates else None

    def restore(layers: Mapping[str, nn.Linear]) -> bool:
        names = [name for name in layers if name not in result.skipped]
        if names and not _restore_group(names, layers, result, work):
            return False
        finish(names, layers)
        return True

    def finish(names: Sequence[str], layers: Mapping[str, nn.Linear]) -> None:
        _note_stacked(names, result)
        if streamed:
            for name in names:
                streamed.keep(name, result.weights[name], layers[name].bias)

    for group in walk(
        vlm.module, sequences, batches, weighting, restore, held, reference, team, place
    ):
        names = [name for name in group.layers if name not in result.skipped]
        if progress is not None:
            for done, name in enumerate(names, start=len(result.weights)):
                progress(name, done, total)
        layers = [calibrated_layer(name, group, config) for name in names]
        weights = _quantize_group(layers, group, config, plans.get(names[0]))
        for layer, weight in zip(layers, weights, strict=True):
            result.reports.append(_install(layer, weight, group, config))
            result.weights[layer.name] = weight
        finish(names, group.layers)
        _save_group(names, group.layers, result, work)
        release_freed()
    if streamed:
        dense = [name for name in result.weights if isinstance(result.weights[name], DenseWeight)]
        streamed.settle(dense)
    for name in linear_layers(vlm.module):
        if name not in result.weights:
            result.skipped.setdefault(name, "not reached by the calibration inputs")
    return result


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by dotted name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def skipped_layers(vlm: QuantizableModel, method: str) -> dict[str, str]:
    """Return the linear layers that a method leaves alone, with the reason."""
    layers = linear_layers(vlm.module)
    if method == "none":
        return dict.fromkeys(layers, "method none: weights stay float")
    inside = {
        id(layer)
        for sequence in vlm.block_sequences()
        for _, block in sequence.blocks
        for layer in block.modules()
    }
    skipped = {}
    for name, layer in layers.items():
        n, k = layer.weight.shape
        if name.endswith("lm_head"):
            skipped[name] = "vocabulary: exported apart"
        elif id(layer) not in inside:
            skipped[name] = "outside the blocks that the exported graph runs"
        elif n < PANEL or k < CHUNK:
            skipped[name] = (
                f"too small ({n} x {k}): it would be padded to {PANEL} rows and {CHUNK} columns"
            )
    return skipped


def _note_stacked(names: Sequence[str], result: QuantizedModel) -> None:
    """Note whether layers with the same input become one weight in the graph."""
    weights = [result.weights[name] for name in names]
    is_shared = len(names) > 1 and all(isinstance(weight, BinaryWeight) for weight in weights)
    if is_shared and can_stack([weight.n for weight in weights]):
        result.stacked.append(tuple(names))


def _open_work_folder(
    path: Path | None,
    module: nn.Module,
    streamed: StreamedBlocks | None,
    batches: Sequence[Batch],
    config: QuantConfig,
    team: Team,
) -> WorkFolder:
    if path is None:
        return WorkFolder(None)
    tensors = (
        (name, streamed.read(name) if streamed and tensor.is_meta else tensor)
        for name, tensor in module.state_dict().items()
    )
    model_config = getattr(module, "config", None)
    run = {} if team.rank else describe_run(tensors, batches, config, team, model_config)
    return WorkFolder(path, run, team)


def _check_weights(module: nn.Module, streamed: StreamedBlocks | None) -> None:
    """Refuse a model that computes nothing sound, whichever of its parts are quantized.

    Raises:
        CheckpointError: a parameter is not finite.
    """
    for path, parameter in module.named_parameters():
        values = parameter.detach()
        if streamed and values.is_meta:
            values = streamed.read(path)
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            name, _, kind = path.rpartition(".")
            raise CheckpointError(
                f"the {kind} of '{name}' holds {bad} NaN or infinite values of "
                f"{values.numel()}. Give a sound checkpoint."
            )


def _vision_rows(module: nn.Module, batches: Sequence[Batch]) -> list[Tensor] | None:
    """Which tokens of each batch stand for image features, bool (tokens,); None without images."""
    token = getattr(getattr(module, "config", None), "image_token_id", None)
    if token is None or any("input_ids" not in batch for batch in batches):
        return None
    return [(batch["input_ids"] == token).reshape(-1) for batch in batches]


def _fixed_weights(
    vlm: QuantizableModel,
    sequences: Sequence[Blocks],
    batches: Sequence[Batch],
    config: QuantConfig,
    work: WorkFolder,
    team: Team,
    place: Place,
) -> FixedWeights:
    """Token weights of all layers, from the work folder if they are there.

    Of several processes each has those of its own batches, and keeps none.
    """
    found = work.load("importance") if team.size == 1 else None
    if found is not None:
        split: dict[str, list[Tensor]] = {
            name: list(torch.split(torch.from_numpy(found.arrays[name]), lengths))
            for name, lengths in found.values.items()
        }
        return FixedWeights(split)
    weights = token_importance(vlm.module, sequences, batches, config.seed, team, place)
    if team.size == 1:
        work.save(
            "importance",
            {name: [len(row) for row in rows] for name, rows in weights.items()},
            {name: torch.cat(rows).numpy() for name, rows in weights.items()},
        )
    return FixedWeights(weights)


def _save_group(
    names: Sequence[str],
    layers: Mapping[str, nn.Linear],
    result: QuantizedModel,
    work: WorkFolder,
) -> None:
    """Keep quantized layers with the same input: weights, biases and reports."""
    values, arrays = {}, {}
    for name, report in zip(names, result.reports[-len(names) :], strict=True):
        weight, tensors = pack_weight(name, result.weights[name])
        values[name] = {"weight": weight, "report": asdict(report)}
        arrays.update(tensors)
        if has_bias(layers[name]):
            arrays[f"{name}.bias"] = layers[name].bias.detach().numpy()
    work.save(f"layers.{names[0]}", values, arrays)


@torch.no_grad()
def _restore_group(
    names: Sequence[str],
    layers: Mapping[str, nn.Linear],
    result: QuantizedModel,
    work: WorkFolder,
) -> bool:
    """Put layers that an earlier run has finished in place; False if it has not."""
    step = work.load(f"layers.{names[0]}")
    if step is None:
        return False
    for name in names:
        stored = step.values[name]
        weight = unpack_weight(name, stored["weight"], step.arrays)
        layers[name].weight.copy_(torch.from_numpy(weight.dequantize()))
        if has_bias(layers[name]):
            layers[name].bias.copy_(torch.from_numpy(step.arrays[f"{name}.bias"]))
        report = stored["report"]
        planes = report["planes"] and tuple(report["planes"])
        result.reports.append(LayerReport(**{**report, "planes": planes}))
        result.weights[name] = weight
    return True


@torch.no_grad()
def _quantize_group(
    layers: Sequence[CalibratedLayer], group: LayerGroup, config: QuantConfig, plan: Plan | None
) -> Sequence[QuantizedWeight]:
    """Quantize layers with the same input; without a plan they have `--bits` to themselves."""
    weights = sum(layer.weight.numel() for layer in layers)
    options = LayerOptions(
        part=group.part,
        bits=config.bits,
        grid=config.grid,
        n_uns=config.n_uns,
        paper_exact=config.paper_exact,
        byte_budget=plan.nbytes if plan else int(config.bits * weights / 8),
        seed=group_seed(config, group),
        without=config.without,
    )
    with naming([layer.name for layer in layers]):
        return methods.load(config.method).quantize(layers, options)


@torch.no_grad()
def _install(
    target: CalibratedLayer, quantized: QuantizedWeight, group: LayerGroup, config: QuantConfig
) -> LayerReport:
    """Leave a quantized weight in its layer, correct the bias, and report the error."""
    name, layer = target.name, group.layers[target.name]
    weight = layer.weight.detach().float().clone()
    rounded = torch.from_numpy(quantized.dequantize())
    layer.weight.copy_(rounded)
    judged = group.inputs.held_out or group.inputs.fit
    moments = judged.hessian
    if corrects_bias(layer, config):
        fit = group.statistics(name).fit
        mean = fit.mean
        wanted = mean if fit.reference_mean is None else fit.reference_mean
        layer.bias.add_(weight.double() @ wanted - rounded.double() @ mean)
        moments = judged.around(mean)
    energy = output_energy(weight, judged.hessian)
    binary = quantized if isinstance(quantized, BinaryWeight) else None
    return LayerReport(
        name=name,
        n=quantized.n,
        k=quantized.k,
        method=config.method,
        planes=binary.plane_columns if binary else None,
        hadamard_block=binary.hadamard_block if binary else 0,
        true_bits=quantized.true_bits,
        claimed_bits=getattr(quantized, "claimed_bits", quantized.true_bits),
        output_error=output_energy(rounded - target.weight, moments) / max(energy, 1e-30),
        error_is_held_out=group.inputs.held_out is not None,
    )
