"""Write the export of an architecture with random weights, without its float weights ever existing.

The module is made from its configuration with parameters that have no memory; linear layers become
operator modules with packed random weights, and only what stays float is filled.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from bivlm_edge import custom_ops_library
from bivlm_edge.config import DEFAULT_VOCABULARY_BITS, ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.errors import RequestError, UnsupportedModelError, ValidationError
from bivlm_edge.export import parts
from bivlm_edge.export.assets import write_report
from bivlm_edge.export.export_report import build_report, count_parameters
from bivlm_edge.export.exporter import (
    ExportResult,
    check_target,
    staging,
    tables_in_float,
    write_bundle,
)
from bivlm_edge.export.oracle import Sample
from bivlm_edge.export.torch_ops import BinaryLinear, GroupHead, GroupLinear
from bivlm_edge.export.validate import RUNTIME_ERRORS, OnnxRunner
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.models.families import FAMILIES
from bivlm_edge.quant.methods.nbits4 import GROUP as NBITS4_GROUP
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import (
    LayerReport,
    QuantizedModel,
    linear_layers,
    skipped_layers,
)
from bivlm_edge.quant.vocabulary import group_size, vocabulary_note
from bivlm_edge.quant.weights import GroupWeight, QuantizedWeight
from bivlm_edge.synthetic import METHODS, NAMES, Method, Progress
from bivlm_edge.synthetic.architectures import ARCHITECTURES, Architecture
from bivlm_edge.synthetic.weights import (
    Budget,
    draw_transform,
    random_binary_weight,
    random_group_weight,
)

BITS = 2.0
KEEP_RATIO = 0.5
NOTE = (
    "the weights are random: only speed and memory mean anything, the answers do not. Checked by "
    "one prefill and one decode step in ONNX Runtime with finite logits, not against torch"
)
# Layers that read one input, by the last part of their names.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FLOAT_SPREAD = 0.02


def build(
    name: str,
    method: Method,
    target: Path,
    *,
    pruned: bool = False,
    vocabulary_bits: int = DEFAULT_VOCABULARY_BITS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the export of a known architecture with random weights.

    Args:
        name: One of `synthetic.NAMES`.
        method: "bivlm-edge" (two planes, Hadamard blocks, 2.0 true bits) or "nbits4".
        target: Path of the graph, ending in .onnx.
        pruned: Prune image tokens; a run keeps KEEP_RATIO of them unless it asks otherwise.
        vocabulary_bits: Bits of the token table and the head, one of VOCABULARY_BITS.
        overwrite: Replace what is there.
        progress: Called with (what runs, steps done, steps in all).

    Raises:
        RequestError: There is no such architecture or method.
        OutputError: The target exists, is not writable, or the disk is full.
        ValidationError: ONNX Runtime cannot run the graph, or its logits are not finite.
    """
    if name not in NAMES or method not in METHODS:
        raise RequestError(
            f"there is no synthetic model {name!r} by method {method!r}. Accepted: "
            f"{', '.join(NAMES)} by {', '.join(METHODS)}."
        )
    return build_architecture(
        ARCHITECTURES[name],
        name,
        method,
        target,
        pruned=pruned,
        vocabulary_bits=vocabulary_bits,
        overwrite=overwrite,
        progress=progress,
    )


def build_architecture(
    architecture: Architecture,
    name: str,
    method: Method,
    target: Path,
    *,
    pruned: bool = False,
    vocabulary_bits: int = DEFAULT_VOCABULARY_BITS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the export of any architecture with random weights; see `build`."""
    paths = check_target(target, overwrite=overwrite)
    prune = PruneConfig(keep_ratio=KEEP_RATIO if pruned else 1.0)
    config = ExportConfig(
        QuantConfig(method=method, bits=BITS, vocabulary_bits=vocabulary_bits), prune
    )
    custom_ops_library()  # the check needs it: better missed now than after drawing
    started = time.perf_counter()

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}, {method}: {what}", done, total)

    tell("module", 0, 1)
    vlm = _open(architecture, name)
    parameters = count_parameters(vlm.module)
    seed = zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantized = _draw_layers(vlm, method, rng, tell)
        table = _draw_vocabulary(vlm, quantized, rng, vocabulary_bits)
        _fill_floats(vlm.module)
    with staging(paths, overwrite=overwrite) as staged:
        with parts.installed(vlm, {}, torch.float32):
            written = write_bundle(vlm, table, staged, torch.float32, config, tell)
        tell("trial run", 0, 1)
        _check_run(vlm, staged.graph, uses_library=written.uses_custom_ops)
        report = build_report(vlm, quantized, written.account, [], staged, config, parameters)
        report |= {"note": NOTE, "seconds": round(time.perf_counter() - started, 1)}
        write_report(report, staged.assets, paths.graph.name)
    return ExportResult(paths, report)


class NoMemory(TorchFunctionMode):
    """Inside the block, `torch.empty` returns tensors without memory: parameters, not buffers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


def _open(architecture: Architecture, name: str) -> VisionLanguageModel:
    with NoMemory():
        module = architecture.module()
    module.eval().requires_grad_(False)
    without_values = [key for key, buffer in module.named_buffers() if buffer.is_meta]
    if without_values:
        raise UnsupportedModelError(
            f"the buffer {without_values[0]} of {name} is made by torch.empty, so that its values "
            "are lost. Fill it after the module is made."
        )
    return VisionLanguageModel(
        name=name,
        family=FAMILIES[module.config.model_type],
        module=module,
        tokenizer=architecture.tokenizer(),
        image_processor=architecture.image_processor(),
        chat_template=architecture.chat_template,
    )


def _draw_layers(
    vlm: VisionLanguageModel, method: Method, rng: np.random.Generator, tell: Progress
) -> QuantizedModel:
    """Put operator modules with random weights in place of the linear layers of all blocks.

    Only the modules hold the weights: codes of four bits take a byte each until they are packed.
    """
    result = QuantizedModel(skipped=skipped_layers(vlm, method))
    layers = {
        name: layer
        for name, layer in linear_layers(vlm.module).items()
        if name not in result.skipped
    }
    budget = Budget(BITS)
    for names in _by_input(layers):
        tell("weights", len(result.reports), len(layers))
        k = layers[names[0]].in_features
        transform = None
        if method == "bivlm-edge":
            planes = budget.spend((layers[name].out_features for name in names), k)
            transform = draw_transform(rng, k, planes)
        for name in names:
            n = layers[name].out_features
            weight: QuantizedWeight
            if transform is None:
                weight = random_group_weight(rng, n, k, bits=4, group=NBITS4_GROUP, symmetric=False)
            else:
                weight = random_binary_weight(rng, n, transform)
            _replace(vlm.module, name, weight)
            result.reports.append(_layer_report(name, method, weight))
    return result


def _by_input(layers: Mapping[str, nn.Linear]) -> Iterator[list[str]]:
    """Yield the names of layers that read the same input together, in order."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in layers:
        parent, _, last = name.rpartition(".")
        shared = next((names for names in _SHARED_INPUTS if last in names), (last,))
        groups.setdefault((parent, *shared), []).append(name)
    yield from groups.values()


def _replace(module: nn.Module, name: str, weight: BinaryWeight | GroupWeight) -> None:
    linear: Any = module.get_submodule(name)
    bias = None if linear.bias is None else _FLOAT_SPREAD * torch.randn(weight.n)
    kind = BinaryLinear if isinstance(weight, BinaryWeight) else GroupLinear
    module.set_submodule(name, kind(weight, bias))  # type: ignore[arg-type]


def _layer_report(name: str, method: Method, weight: BinaryWeight | GroupWeight) -> LayerReport:
    binary = weight if isinstance(weight, BinaryWeight) else None
    return LayerReport(
        name=name,
        n=weight.n,
        k=weight.k,
        method=method,
        planes=binary.plane_columns if binary else None,
        hadamard_block=binary.hadamard_block if binary else 0,
        true_bits=weight.true_bits,
        claimed_bits=weight.true_bits,
        output_error=None,
        error_is_held_out=False,
    )


def _draw_vocabulary(
    vlm: VisionLanguageModel, quantized: QuantizedModel, rng: np.random.Generator, bits: int
) -> GroupWeight:
    """Return a token table at 8 or 4 bits; the head becomes a module of its operator."""
    table, head = vlm.module.get_input_embeddings(), vlm.module.get_output_embeddings()
    rows, width = table.weight.shape
    group = group_size(width, bits)
    if group is None:
        raise UnsupportedModelError(
            f"the token table has {width} columns, which are no multiple of 16: GroupMatMul does "
            "not take it."
        )

    def draw() -> GroupWeight:
        return random_group_weight(rng, rows, width, bits=bits, group=group, symmetric=True)

    drawn = draw()
    quantized.skipped.update(tables_in_float(vlm, drawn))
    name = next(name for name, module in vlm.module.named_modules() if module is head)
    quantized.skipped[name] = vocabulary_note(bits)
    module: Any = vlm.module
    bias = None if head.bias is None else _FLOAT_SPREAD * torch.randn(rows)
    module.set_submodule(name, GroupHead(drawn if head.weight is table.weight else draw(), bias))
    return drawn


def _fill_floats(module: Any) -> None:
    """Draw what stays float: norms around 1, biases around 0, convolutions and position tables.

    The token table stays without memory: the graph reads the quantized one.
    """
    table = module.get_input_embeddings()
    for part in module.modules():
        if part is table or isinstance(part, (BinaryLinear, GroupLinear)):
            continue
        for name, tensor in part.named_parameters(recurse=False):
            drawn = torch.randn(tensor.shape)
            if tensor.ndim > 1:
                drawn *= tensor[0].numel() ** -0.5
            else:
                drawn = _FLOAT_SPREAD * drawn + (name == "weight")
            setattr(part, name, nn.Parameter(drawn, requires_grad=False))


def _check_run(vlm: VisionLanguageModel, graph: Path, *, uses_library: bool) -> None:
    """Prefill a picture and decode a token.

    Raises:
        ValidationError: ONNX Runtime fails, or a logit is not finite.
    """
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(vlm.pixels(Image.fromarray(noise)))[None]
    ids = vlm.encode(vlm.prompt("what is this?"))
    try:
        runner = OnnxRunner(graph, with_library=uses_library)
        sample = Sample(torch.tensor([ids]), pixels, *vlm.positions(ids))
        found = runner.run(sample, steps=2, in_place=True)
    except RUNTIME_ERRORS as error:
        raise ValidationError(
            f"ONNX Runtime cannot run the graph of {vlm.name}: {error}"
        ) from error
    if not np.isfinite(found.logits).all():
        raise ValidationError(f"{vlm.name} has logits that are not finite. No file was written.")
