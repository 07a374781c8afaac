"""bivlm-export: quantize, prune, export and validate a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from bivlm_edge.cli.common import (
    DebugOption,
    DeviceOption,
    JsonOption,
    command_errors,
    new_app,
    progress_by_name,
    show,
    show_json,
    split_names,
    unwind_on_sigterm,
)
from bivlm_edge.cli.keep_tokens import check_auto, chooser
from bivlm_edge.config import (
    DEFAULT_BITS,
    DEFAULT_METRIC,
    DEFAULT_SCORE_LAYER,
    DEFAULT_TOLERANCE,
    DEFAULT_VOCABULARY_BITS,
    DTYPES,
    FALLBACKS,
    GRIDS,
    METHODS,
    PRUNE_MODES,
    STAGES,
    TUNINGS,
    ExportConfig,
    PruneConfig,
    QuantConfig,
    check_bits_are_read,
)
from bivlm_edge.datasets import DATA_SETS, EASY_VQA_NAME
from bivlm_edge.pruning import parse_fraction
from bivlm_edge.quant import methods
from bivlm_edge.reference import REFERENCE_MODELS, resolve_model
from bivlm_edge.report import export_tables

app = new_app()


def _choices(values: tuple[str, ...]) -> str:
    return ", ".join(values)


@app.command()
@command_errors("bivlm-export")
def export(
    target: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.onnx")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help=f"Checkpoint: a local folder, a hub id, or a bundled reference model: "
            f"{' or '.join(REFERENCE_MODELS)}.",
            show_default=REFERENCE_MODELS[0],
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", help=_choices(METHODS))] = "bivlm-edge",
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help="True bits per weight, all scales and padding counted; gptq and rtn: bits of a "
            "code (2, 4 or 8).",
            show_default=f"{DEFAULT_BITS:g}; other methods have their own",
        ),
    ] = None,
    vocabulary_bits: Annotated[
        int,
        typer.Option(
            "--vocabulary-bits",
            help="Bits of the token table and the output head, counted apart from --bits: 8, or 4 "
            "for a smaller file and faster tokens.",
        ),
    ] = DEFAULT_VOCABULARY_BITS,
    grid: Annotated[
        str,
        typer.Option("--grid", help=f"gptq: levels per group or per row: {_choices(GRIDS)}"),
    ] = "minmax",
    n_uns: Annotated[
        int, typer.Option("--n-uns", help="bivlm-paper: unsalient groups, 1 to 6.")
    ] = 5,
    paper_exact: Annotated[
        bool,
        typer.Option(
            "--paper-exact", help="bivlm-paper: salient codes by equation 14 as it is printed."
        ),
    ] = False,
    importance: Annotated[
        str | None,
        typer.Option(
            "--importance",
            help="How much each token counts in calibration: none (all alike), vlmq (error of each "
            "attention block), loss (the answer).",
            show_default="loss with bivlm-edge, else none",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            help=f"Stages of bivlm-edge to switch off, with commas or repeated: {_choices(STAGES)}",
            show_default="none",
            metavar="STAGE",
        ),
    ] = None,
    keep_tokens: Annotated[
        str,
        typer.Option(
            "--keep-tokens",
            help="Fraction of the image tokens to keep, or auto: the smallest that loses no more "
            "than --tolerance on validation questions.",
            metavar="FRACTION|auto",
        ),
    ] = "1",
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="--keep-tokens auto: points of accuracy that may be lost, at 95 % confidence.",
            show_default="1.0",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            help=f"--keep-tokens auto: questions to ask: {', '.join(DATA_SETS)} (their validation "
            "split) or a .jsonl file of image, question, answer.",
            show_default="those of --calibration that it does not draw",
            metavar="DATA",
        ),
    ] = None,
    validation_questions: Annotated[
        int | None,
        typer.Option(
            "--validation-questions",
            help="--keep-tokens auto: how many of them.",
            show_default="as the tolerance needs: 2,706 for 1 point",
        ),
    ] = None,
    keep_rule: Annotated[
        str | None,
        typer.Option(
            "--keep-rule",
            help="mass:SHARE keeps of each picture as many tokens as hold that share of its "
            "scores, and no more than --keep-tokens.",
            show_default="always as many as --keep-tokens",
            metavar="RULE",
        ),
    ] = None,
    prune_mode: Annotated[str, typer.Option("--prune-mode", help=_choices(PRUNE_MODES))] = "mmr",
    prune_score: Annotated[
        str | None,
        typer.Option(
            "--prune-score",
            help="What makes an image token important: attention (that it receives in the vision "
            "tower), distance (from the picture's mean), norm (of its features), text (nearness "
            "to the question: for single questions, not for chats), last-token (attention of the "
            "prompt's last token in the layer before --prune-layer; likewise), none.",
            show_default="mmr: distance, topk_score: attention, others: none",
        ),
    ] = None,
    score_layer: Annotated[
        int,
        typer.Option(
            "--score-layer",
            help="Block of the vision tower for --prune-score attention, from 0, or from the last "
            "if below 0 (with --prune-vision-layer the last that sees all patches).",
        ),
    ] = DEFAULT_SCORE_LAYER,
    prune_metric: Annotated[
        str | None,
        typer.Option(
            "--prune-metric",
            help="What makes tokens alike in the modes that keep different ones: features, or "
            "places (kept tokens spread over the picture).",
            show_default=DEFAULT_METRIC,
        ),
    ] = None,
    prune_theta: Annotated[
        float | None,
        typer.Option(
            "--prune-theta",
            help="mmr, dpp: weight of the score against similarity, 0 to 1.",
            show_default="0.1 with mmr by places, else 0.5",
        ),
    ] = None,
    prune_layer: Annotated[
        int,
        typer.Option(
            "--prune-layer",
            help="Decoder layer, from 0, before which image tokens are dropped; those before it "
            "see all of them. 0: before the decoder.",
        ),
    ] = 0,
    prune_vision_layer: Annotated[
        int | None,
        typer.Option(
            "--prune-vision-layer",
            help="Block of the vision tower, from 0, behind which patches are dropped: the rest "
            "of the tower sees fewer too (LLaVA).",
            show_default="patches stay to the end of the tower",
        ),
    ] = None,
    positions: Annotated[
        str,
        typer.Option(
            "--positions",
            help="Positions of kept tokens: keep (their own), contiguous (gaps are closed).",
        ),
    ] = "keep",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="easy-vqa, scenes, a folder of pictures with prompts.txt (a question per line) or "
            "a .jsonl file of image, question, answer.",
            show_default="the data set that a reference model was trained on; of others easy-vqa",
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option("--calibration-samples", help="Pictures to calibrate on.")
    ] = 512,
    tune: Annotated[
        str,
        typer.Option(
            "--tune",
            help="Train coefficients, norms and biases on the calibration pictures towards the "
            f"float model: {_choices(TUNINGS)}",
        ),
    ] = "none",
    tune_signs: Annotated[
        bool, typer.Option("--tune-signs", help="Train the signs as well, with --tune.")
    ] = False,
    tune_epochs: Annotated[
        int, typer.Option("--tune-epochs", help="Passes per block, with --tune blocks or both.")
    ] = 2,
    tune_steps: Annotated[
        int,
        typer.Option(
            "--tune-steps",
            help="Steps of up to four batches, with --tune end-to-end or both.",
        ),
    ] = 200,
    tune_samples: Annotated[
        int | None,
        typer.Option(
            "--tune-samples", help="Pictures to tune on.", show_default="those of the calibration"
        ),
    ] = None,
    tune_rate: Annotated[
        float, typer.Option("--tune-rate", help="Factor on the learning rates, with --tune.")
    ] = 1.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help=f"Activations: {_choices(DTYPES)}")
    ] = "fp32",
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            help=f"Keys and values: {_choices(DTYPES)}",
            show_default="fp16; as --dtype with --method none",
        ),
    ] = None,
    fallback: Annotated[
        str,
        typer.Option(
            "--fallback", help=f"Form without the operator library: {_choices(FALLBACKS)}"
        ),
    ] = "nbits",
    opset: Annotated[int, typer.Option("--opset", help="Version of the standard operators.")] = 23,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    device: DeviceOption = "cpu",
    work_folder: Annotated[
        Path | None,
        typer.Option(
            "--work-folder",
            help="Folder that keeps each finished layer: the same command started again goes on "
            "there, with the same result.",
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the float weights of blocks on disk until they are used.",
            show_default="if they exceed half of the available memory",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing export.")
    ] = False,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """Quantize a vision-language model to two bits per weight or fewer and write it as ONNX.

    The file gets its name only after ONNX Runtime, with and without the operator library, was
    compared with the quantized model in torch on real pictures (the table at the end).

    Examples:
      bivlm-export model.onnx
      bivlm-export small.onnx --bits 1.5 --keep-tokens 0.25
      bivlm-export small.onnx --keep-tokens auto --tolerance 0.5
      bivlm-export smolvlm.onnx --model ./SmolVLM-256M-Instruct --calibration ./pictures
      bivlm-export tuned.onnx --bits 1.25 --tune both
      bivlm-export float.onnx --method none
    """
    # Options are checked before torch loads: a wrong one answers at once.
    check_bits_are_read(method, bits)
    fraction = parse_fraction(keep_tokens)
    check_auto(fraction, tolerance, validation, validation_questions)
    if fraction is None and tolerance is None:
        tolerance = DEFAULT_TOLERANCE
    config = ExportConfig(
        quant=QuantConfig(
            method=method,
            bits=DEFAULT_BITS if bits is None else bits,
            seed=seed,
            calibration_samples=calibration_samples,
            vocabulary_bits=vocabulary_bits,
            grid=grid,  # type: ignore[arg-type]  # checked by QuantConfig
            n_uns=n_uns,
            paper_exact=paper_exact,
            importance=importance,
            without=split_names(without or ()),
            tune=tune,  # type: ignore[arg-type]  # checked by QuantConfig
            tune_signs=tune_signs,
            tune_epochs=tune_epochs,
            tune_steps=tune_steps,
            tune_samples=tune_samples,
            tune_rate=tune_rate,
            device=device,  # type: ignore[arg-type]
        ),
        prune=PruneConfig(
            mode=prune_mode,  # type: ignore[arg-type]  # checked by PruneConfig
            keep_ratio=1.0 if fraction is None else fraction,
            tolerance=tolerance,
            seed=seed,
            score=prune_score,  # type: ignore[arg-type]
            score_layer=score_layer,
            metric=prune_metric,  # type: ignore[arg-type]
            theta=prune_theta,
            keep_rule=keep_rule,
            layer=prune_layer,
            vision_layer=prune_vision_layer,
            positions=positions,  # type: ignore[arg-type]
        ),
        dtype=dtype,  # type: ignore[arg-type]
        fallback=fallback,  # type: ignore[arg-type]
        opset=opset,
        kv_cache_dtype=kv_cache,  # type: ignore[arg-type]
    )
    from transformers.utils import logging

    from bivlm_edge.calibration.batches import calibration_items
    from bivlm_edge.calibration.place import find_place
    from bivlm_edge.distributed import joined
    from bivlm_edge.export.exporter import check_target, export_model, take_part
    from bivlm_edge.models import load_checkpoint

    # no half-written folder stays behind
    unwind_on_sigterm()
    logging.disable_progress_bar()  # one bar is enough
    place = find_place(device)  # refused before anything is loaded
    with joined(place.device) as team:
        if team.rank == 0:
            check_target(target, overwrite=overwrite)
        with progress_by_name() if team.rank == 0 else nullcontext() as tell:
            items = None if calibration is None else calibration_items(calibration)
            vlm = load_checkpoint(resolve_model(model), stream=stream)
            if items is None:
                if team.rank == 0 and model is not None and vlm.training_data is None:
                    _tell_calibration(method)
                items = calibration_items(vlm.training_data)
            if team.rank:
                take_part(vlm, items, config, work_folder)
                return
            choose = None
            if fraction is None and tell is not None:
                of_model = EASY_VQA_NAME if model is None else vlm.training_data
                named = of_model if calibration is None else str(calibration)
                choose = chooser(items, named, validation, validation_questions, config, tell)
            result = export_model(
                vlm,
                items,
                target,
                config,
                overwrite=overwrite,
                progress=tell,
                work_folder=work_folder,
                choose=choose,
            )
    if as_json:
        show_json(_summary(target, result.report))
        return
    show(*export_tables(target.name, result.report))
    if result.report["keep_tokens"] is not None:
        typer.echo(result.report["keep_tokens"]["message"])


def _tell_calibration(method: str) -> None:
    """Say that pictures of one's own would calibrate better."""
    if _calibrates(method):
        typer.echo(
            "bivlm-export: calibrating on the easy-VQA pictures (64x64 shapes). Pictures like "
            "those the model will see serve it better: --calibration FOLDER.",
            err=True,
        )


def _calibrates(method: str) -> bool:
    return method != "none" and "hessian" in methods.declaration(method).needs


def _summary(target: Path, report: dict[str, Any]) -> dict[str, Any]:
    keys = ("model", "true_bits_per_weight", "file_bytes", "skipped", "validation", "seconds")
    summary = {"path": str(target), **{key: report[key] for key in keys}}
    if report["keep_tokens"] is not None:
        summary["keep_tokens"] = report["keep_tokens"]
    return summary


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
