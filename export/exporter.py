"""From a checkpoint to a validated model.onnx: quantize, trace, join, write, compare, rename."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from bivlm_edge import custom_ops_library
from bivlm_edge.bundle import BundlePaths
from bivlm_edge.calibration.batches import make_batches
from bivlm_edge.config import Dtype, ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import OutputError, RequestError
from bivlm_edge.export import (
    assets,
    data_file,
    decoder_parts,
    functions,
    parts,
    schemas,
    sizes,
    tower_parts,
)
from bivlm_edge.export.export_report import Account, build_report, count_parameters
from bivlm_edge.export.fuse import fuse_shared_inputs
from bivlm_edge.export.graph import GraphOptions, join_parts, set_default_keep
from bivlm_edge.export.oracle import Sample
from bivlm_edge.export.validate import validate, ways_to_run
from bivlm_edge.models import VisionLanguageModel, tower_pruning
from bivlm_edge.pruning import KeepChoice
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model
from bivlm_edge.quant.vocabulary import round_vocabulary, vocabulary_note
from bivlm_edge.quant.weights import GroupWeight
from bivlm_edge.tuning import TuningReport, check_tunable, drawn_batches, quantize_and_tune

logger = logging.getLogger(__name__)

VALIDATION_SAMPLES = 8
FIRST_RATIO = 0.5  # of an export whose ratio is chosen: what it is compared with torch at before
Progress = Callable[[str, int, int], None]
Choose = Callable[[Path], KeepChoice]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token table ``(vocab, hidden)`` for the graph, and the head by name if it is quantized."""

    table: GroupWeight | NDArray[np.float32]
    head: dict[str, GroupWeight]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        paths: The bundle.
        report: Content of assets/export_report.json.
    """

    paths: BundlePaths
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_bundle` put into the files: their bytes, and whether the library is used."""

    account: Account
    uses_custom_ops: bool


def export_model(
    vlm: VisionLanguageModel,
    items: Sequence[VqaItem],
    target: Path,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    work_folder: Path | None = None,
    choose: Choose | None = None,
) -> ExportResult:
    """Quantize a checkpoint and write it as one ONNX model.

    Afterwards the float weights of `vlm.module` hold the quantized values.

    Args:
        vlm: An open checkpoint.
        items: Pictures and prompts for calibration and validation.
        target: Path of the graph, ending in .onnx; data and assets are written beside it.
        config: Options.
        overwrite: Replace what is there.
        progress: Called with (what runs, steps done, steps in all).
        work_folder: Where quantization keeps what is finished, see `quantize_model`.
        choose: Called with the graph, complete and compared with torch, if `prune.tolerance` is
            given; says how many tokens it keeps of each image. The file is compared once more
            with that number as its default.

    Raises:
        OutputError: The target exists, is not writable, or the disk is full.
        ValidationError: The graph does not compute what the quantized model computes.
        UnsupportedModelError: A part cannot be traced or quantized.
    """
    paths = check_target(target, overwrite=overwrite)
    if not items:
        raise RequestError("no calibration pictures were given; at least one is needed.")
    if (choose is None) != (config.prune.tolerance is None):
        raise ValueError("a tolerance and what chooses by it go together")
    custom_ops_library()  # validation needs it: better missed now than after quantizing
    check_tunable(vlm, config.quant)
    if config.prune.is_active:
        check_pruning(vlm, config.prune)
    tell = progress or _tell_nobody
    started = time.perf_counter()
    quantized, tuning = _quantize(vlm, items, config.quant, tell, work_folder)
    vocabulary = _quantize_vocabulary(vlm, quantized, config.quant.vocabulary_bits)
    quantized.skipped.update(tables_in_float(vlm, vocabulary.table))
    dtype = torch_dtype(config.dtype)
    weights = {**quantized.weights, **vocabulary.head}
    parameters = count_parameters(vlm.module)
    if choose is not None:
        config = _keeping(config, FIRST_RATIO)
    with staging(paths, overwrite=overwrite) as staged:
        paused = vlm.streamed.paused() if vlm.streamed else contextlib.nullcontext()
        with parts.installed(vlm, weights, dtype), paused:
            written = write_bundle(vlm, vocabulary.table, staged, dtype, config, tell)
        tell("validating", 0, 1)
        samples = _validation_samples(vlm, items)
        ways = ways_to_run(written.uses_custom_ops, config.fallback)
        comparisons = validate(staged.graph, vlm, config, samples, ways)
        choice = None if choose is None else choose(staged.graph)
        if choice is not None:
            config = _keeping(config, choice.kept / vlm.image_tokens)
            set_default_keep(staged.graph, choice.kept)
            assets.write_manifest(vlm, staged, config, uses_custom_ops=written.uses_custom_ops)
            comparisons = validate(staged.graph, vlm, config, samples, ways)
        report = build_report(
            vlm, quantized, written.account, comparisons, staged, config, parameters
        )
        report["tuning"] = None if tuning is None else tuning.to_json()
        report["keep_tokens"] = None if choice is None else choice.account
        report["seconds"] = round(time.perf_counter() - started, 1)
        assets.write_report(report, staged.assets, paths.graph.name)
    return ExportResult(paths, report)


def check_pruning(vlm: VisionLanguageModel, prune: PruneConfig) -> None:
    """Refuse scores and places that a model does not have.

    Raises:
        RequestError: It has no such layer.
        UnsupportedModelError: It joins patches behind the tower that are to be dropped in it.
    """
    if prune.vision_layer is not None:
        vlm.check_vision_layer(prune.vision_layer, prune.scores, prune.score_layer)
    else:
        vlm.check_score(prune.scores, prune.score_layer)
    vlm.check_prune_layer(prune.layer)


def _keeping(config: ExportConfig, ratio: float) -> ExportConfig:
    return replace(config, prune=replace(config.prune, keep_ratio=ratio))


def take_part(
    vlm: VisionLanguageModel,
    items: Sequence[VqaItem],
    config: ExportConfig,
    work_folder: Path | None = None,
) -> None:
    """Share the quantization of an `export_model` that another process runs; write nothing."""
    check_tunable(vlm, config.quant)
    if config.quant.method != "none":  # the first process tunes alone
        options = config.quant
        batches = make_batches(vlm.prepare, items, options.calibration_samples, options.seed)
        quantize_model(vlm, batches, options, None, work_folder)


def write_bundle(
    vlm: VisionLanguageModel,
    table: GroupWeight | NDArray[np.float32],
    staged: BundlePaths,
    dtype: torch.dtype,
    config: ExportConfig,
    tell: Progress,
) -> Written:
    """Trace the parts, join them, and write graph, data, tokenizer, template and manifest.

    Args:
        vlm: Its layers are modules that trace to operator nodes (`parts.installed`).
        table: Token table ``(vocab, hidden)``.
        staged: Where to write; the names are the final ones.
        dtype: Of activations.
        config: Options.
        tell: Called with (what runs, steps done, steps in all).
    """
    tell("tracing", 0, 2)
    model = _build_graph(vlm, table, dtype, config)
    functions.attach(model, config.fallback)
    account = Account(sizes.layer_sizes(model), sizes.table_sizes(model))
    tell("writing", 1, 2)
    data_file.save(model, staged.graph, staged.data.name)
    staged.assets.mkdir()
    assets.write_assets(vlm, staged.assets)
    has_custom_ops = any(node.domain == schemas.DOMAIN for node in model.graph.all_nodes())
    assets.write_manifest(vlm, staged, config, uses_custom_ops=has_custom_ops)
    return Written(account, has_custom_ops)


def torch_dtype(name: Dtype) -> torch.dtype:
    """Return the type that an option names."""
    return torch.float16 if name == "fp16" else torch.float32


def _tell_nobody(what: str, done: int, total: int) -> None:
    """Ignore progress."""


def check_target(target: Path, *, overwrite: bool) -> BundlePaths:
    """Check early that the target can be written.

    Raises:
        RequestError: The name does not end in .onnx.
        OutputError: The folder is missing or not writable, or something is there already.
    """
    if target.suffix != ".onnx":
        raise RequestError(
            f"the target '{target}' does not end in .onnx. Try '{target.stem}.onnx'."
        )
    paths = BundlePaths(target)
    if not target.parent.is_dir():
        raise OutputError(f"the folder '{target.parent}' does not exist. Create it first.")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into '{target.parent}': {error.strerror}. Choose another folder."
        ) from error
    present = [path for path in (paths.graph, paths.data, paths.assets) if path.exists()]
    if present and not overwrite:
        names = ", ".join(f"'{path.name}'" for path in present)
        raise OutputError(
            f"{names} already exists in '{target.parent}'. Add --overwrite to replace it, "
            "or choose another name."
        )
    return paths


def _quantize(
    vlm: VisionLanguageModel,
    items: Sequence[VqaItem],
    options: QuantConfig,
    tell: Progress,
    work_folder: Path | None,
) -> tuple[QuantizedModel, TuningReport | None]:
    draw = partial(make_batches, vlm.prepare, items, seed=options.seed)
    batches, tuning = drawn_batches(options, draw)
    return quantize_and_tune(vlm, batches, options, tell, work_folder, tuning)


def _quantize_vocabulary(
    vlm: VisionLanguageModel, quantized: QuantizedModel, bits: int
) -> Vocabulary:
    """Round token table and head where the linear layers are quantized.

    The module's own tables get the dequantized values; `quantized.skipped` says what became of
    the head.
    """
    table = vlm.module.get_input_embeddings()
    head = vlm.module.get_output_embeddings()
    name = next(name for name, module in vlm.module.named_modules() if module is head)
    if not quantized.weights:
        return Vocabulary(table.weight.numpy(), {})
    rounded = round_vocabulary(vlm.module, bits)
    if rounded is None:
        quantized.skipped[name] = "vocabulary: its width is not a multiple of 16; kept in float"
        return Vocabulary(table.weight.numpy(), {})
    quantized.skipped[name] = vocabulary_note(bits)
    table_weight, head_weight = rounded
    return Vocabulary(table_weight, {name: head_weight})


def tables_in_float(
    vlm: VisionLanguageModel, exported: GroupWeight | NDArray[np.float32]
) -> dict[str, str]:
    """Return the weights that are no linear layers, with what becomes of them."""
    table = vlm.module.get_input_embeddings()
    found = {}
    for name, module in vlm.module.named_modules():
        if module is table:
            found[name] = (
                vocabulary_note(exported.bits) if isinstance(exported, GroupWeight) else "float"
            )
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            found[name] = "convolution of the patches: kept in float"
        elif isinstance(module, nn.Embedding):
            found[name] = "position table: kept in float"
    return found


def _validation_samples(vlm: VisionLanguageModel, items: Sequence[VqaItem]) -> list[Sample]:
    samples = []
    for item in items[:VALIDATION_SAMPLES]:
        pixels = torch.from_numpy(vlm.pixels(item.image.open()))[None]
        ids = vlm.encode(vlm.prompt(item.question))
        samples.append(Sample(torch.tensor([ids]), pixels, *vlm.positions(ids)))
    return samples


def _build_graph(
    vlm: VisionLanguageModel,
    table: GroupWeight | NDArray[np.float32],
    dtype: torch.dtype,
    config: ExportConfig,
) -> ir.Model:
    tower_end = None
    if config.prune.vision_layer is None:
        vision = parts.trace_vision(vlm, config.prune, dtype, config.opset)
    else:
        vision, tower_end = tower_parts.trace_tower(vlm, config.prune, dtype, config.opset)
    layer, cache_dtype = config.prune.layer, torch_dtype(config.kv_cache)
    leading = last_token = None
    if layer == 0:
        decoder = decoder_parts.trace_decoder(vlm, dtype, cache_dtype, config.opset)
    else:
        leading = decoder_parts.trace_leading(vlm, layer, dtype, cache_dtype, config.opset)
        decoder = decoder_parts.trace_trailing(vlm, layer, dtype, cache_dtype, config.opset)
        if config.prune.scores == "last-token":
            last_token = decoder_parts.trace_last_token(vlm, dtype, config.opset)
    options = GraphOptions(
        image_token_id=vlm.image_token_id,
        image_tokens=vlm.image_tokens,
        hidden_size=int(vlm.text_config.hidden_size),
        pixel_shape=vlm.pixel_shape,
        dtype=ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.FLOAT,
        opset=config.opset,
        prune=config.prune,
        place_features=vlm.place_features() if config.prune.spreads else None,
        position_axes=1 if vlm.image_grid is None else 3,
        class_tokens=0 if tower_end is None else tower_pruning.class_tokens(vlm),
        context=int(vlm.text_config.max_position_embeddings),
    )
    text_scores = None
    if config.prune.is_active and config.prune.scores == "text":
        text_scores = parts.trace_text_scores(vlm, dtype, config.opset)
    rule = None
    if config.prune.is_active and config.prune.mass is not None:
        rule = parts.trace_rule(vlm, config.prune.mass, config.opset)
    model = join_parts(
        vision, decoder, table, options, text_scores, rule, leading, last_token, tower_end
    )
    fuse_shared_inputs(model)
    return model


@contextlib.contextmanager
def staging(paths: BundlePaths, *, overwrite: bool) -> Iterator[BundlePaths]:
    """Yield a bundle in a hidden folder beside the target; move it into place at the end.

    Whatever goes wrong before the end, an interrupt included, leaves the target as it was.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{paths.graph.name}.", dir=paths.graph.parent))
    except OSError as error:
        raise _output_error(paths, error) from error
    replaced = folder / "replaced"
    try:
        staged = BundlePaths(folder / paths.graph.name)
        yield staged
        replaced.mkdir()
        _move_into_place(staged, paths, replaced, overwrite=overwrite)
        shutil.rmtree(replaced)
    except OSError as error:
        raise _output_error(paths, error) from error
    finally:
        # What could not be put back stays in `replaced` rather than being deleted.
        if replaced.is_dir() and any(replaced.iterdir()):
            logger.error("the old export could not be put back; it lies in '%s'", replaced)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _output_error(paths: BundlePaths, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write '{paths.graph}': {error.strerror or error}. Nothing was changed there. "
        "Free some space, or choose another folder."
    )


def _move_into_place(
    staged: BundlePaths, paths: BundlePaths, replaced: Path, *, overwrite: bool
) -> None:
    """Rename the three parts, the graph last; put the old ones back if one rename fails."""
    pairs = [
        (staged.assets, paths.assets),
        (staged.data, paths.data),
        (staged.graph, paths.graph),
    ]
    undo: list[tuple[Path, Path]] = []
    try:
        for source, destination in pairs:
            if destination.exists():
                if not overwrite:
                    raise OutputError(f"'{destination}' appeared during the export; not replaced.")
                old = replaced / destination.name
                undo.append((old, destination))
                destination.rename(old)
            undo.append((destination, source))
            source.rename(destination)
    except BaseException:
        for moved, origin in reversed(undo):
            if moved.exists() and not origin.exists():
                moved.rename(origin)
        raise
