"""What lies beside model.onnx: tokenizer, chat template, manifest, report, README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bivlm_edge import bundle
from bivlm_edge.bundle import BundlePaths, ImageSpec, Manifest
from bivlm_edge.config import ExportConfig
from bivlm_edge.errors import CheckpointError, UnsupportedModelError
from bivlm_edge.export.decoder_parts import kv_geometry
from bivlm_edge.export.prompt_frame import write_prompt_frames
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.models.families import mean_color


def write_assets(vlm: VisionLanguageModel, folder: Path) -> None:
    """Write tokenizer, chat template and the text that it puts round a question.

    Raises:
        UnsupportedModelError: The tokenizer has no form that the `tokenizers` library reads.
    """
    backend = getattr(vlm.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"the tokenizer {type(vlm.tokenizer).__name__} has no tokenizer.json. "
            "Convert it with transformers (AutoTokenizer.from_pretrained(..).save_pretrained(..))."
        )
    (folder / bundle.TOKENIZER).write_text(backend.to_str(pretty=True), encoding="utf-8")
    (folder / bundle.CHAT_TEMPLATE).write_text(vlm.chat_template, encoding="utf-8")
    write_prompt_frames(vlm, folder)


def write_manifest(
    vlm: VisionLanguageModel, paths: BundlePaths, config: ExportConfig, *, uses_custom_ops: bool
) -> None:
    """Write the manifest for the graph, data and assets that lie at `paths`."""
    layers, kv_heads, head_dim = kv_geometry(vlm)
    manifest = Manifest(
        version=bundle.BUNDLE_VERSION,
        name=vlm.name,
        family=vlm.family.name,
        files={
            "graph": bundle.file_record(paths.graph),
            "data": bundle.file_record(paths.data),
            "tokenizer": bundle.file_record(paths.assets / bundle.TOKENIZER),
            "chat_template": bundle.file_record(paths.assets / bundle.CHAT_TEMPLATE),
            "prompt": bundle.file_record(paths.assets / bundle.PROMPT),
        },
        data_name=paths.data.name,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=config.dtype,
        context_length=int(vlm.text_config.max_position_embeddings),
        vocab_size=int(vlm.module.get_output_embeddings().out_features),
        image_token_id=vlm.image_token_id,
        image_token=vlm.image_token,
        image_tokens=vlm.image_tokens,
        pixel_shape=vlm.pixel_shape,
        bos_token_id=vlm.prepended_bos,
        bos_token=vlm.tokenizer.bos_token or "",
        eos_token=vlm.tokenizer.eos_token or "",
        eos_token_ids=vlm.end_token_ids,
        max_new_tokens=vlm.max_new_tokens,
        image=image_spec(vlm),
        image_prompt=vlm.image_prompt,
        uses_custom_ops=uses_custom_ops,
        fallback=config.fallback,
        config=config.to_json(),
        image_grid=vlm.image_grid,
        contiguous=config.prune.positions == "contiguous",
    )
    bundle.write_manifest(manifest, paths.assets)


def image_spec(vlm: VisionLanguageModel) -> ImageSpec:
    """Return the preprocessing of the checkpoint's image processor.

    Raises:
        CheckpointError: Its pictures do not come out in the size that the vision tower takes.
    """
    processor = vlm.image_processor
    if getattr(processor, "do_pad", False) and vlm.family.image_spec_family == "clip":
        raise CheckpointError(
            "the image processor pads pictures to squares (do_pad = true), which is not supported. "
            "Set do_pad to false in preprocessor_config.json, if the model takes cropped pictures."
        )
    size = _sizes(processor.size)
    if vlm.family.image_spec_family == "idefics3":
        edge = size["longest_edge"]
        tile = _sizes(processor.max_image_size)["longest_edge"]
        resize_mode, resize, crop = "longest_edge", (edge, edge), (tile, tile)
        produced = crop
    elif vlm.family.side is not None:
        resize_mode, crop = "exact", None
        resize = produced = (vlm.family.side, vlm.family.side)
    else:
        resize_mode, resize = _resize_rule(size)
        crop = None
        if getattr(processor, "do_center_crop", False):
            crop = _pair(_sizes(processor.crop_size))
        produced = crop or resize
        if not processor.do_resize:
            raise CheckpointError("the image processor has do_resize = false; it must resize.")
    if produced != vlm.pixel_shape[1:]:
        raise CheckpointError(
            f"the image processor makes pictures of {produced}, the vision tower takes "
            f"{vlm.pixel_shape[1:]}. Correct size and crop_size in preprocessor_config.json."
        )
    do_normalize = bool(processor.do_normalize)
    background = None
    if vlm.family.image_spec_family == "square":
        background = mean_color(processor)
    return ImageSpec(
        family=vlm.family.image_spec_family,
        resize_mode=resize_mode,
        resize=resize,
        resample=int(processor.resample),
        crop=crop,
        rescale=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=tuple(float(value) for value in processor.image_mean) if do_normalize else (),
        std=tuple(float(value) for value in processor.image_std) if do_normalize else (),
        background=background,
        split_tiles=False,  # calibrated and validated on whole pictures (models/families.py)
    )


def _sizes(size: Any) -> dict[str, int]:
    names = ("height", "width", "shortest_edge", "longest_edge")
    found = {name: size.get(name) for name in names}
    return {name: int(value) for name, value in found.items() if value is not None}


def _pair(size: dict[str, int]) -> tuple[int, int]:
    edge = size.get("shortest_edge")
    return (edge, edge) if edge is not None else (size["height"], size["width"])


def _resize_rule(size: dict[str, int]) -> tuple[str, tuple[int, int]]:
    mode = "shortest_edge" if "shortest_edge" in size else "exact"
    return mode, _pair(size)


def write_report(report: dict[str, Any], folder: Path, graph: str) -> None:
    """Write export_report.json and a README for whoever finds the files.

    Args:
        report: Content of the report.
        folder: The assets folder.
        graph: File name of the graph.
    """
    files = report["file_bytes"]
    (folder / bundle.REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    bits = report["true_bits_per_weight"]
    size = "" if bits is None else f"- Bits per weight of its BinaryMatMul operators: {bits:.3f}\n"
    note = f"- {report['note']}\n" if "note" in report else ""
    (folder / "README.md").write_text(
        f"# {report['model']}, exported by bivlm-edge\n\n"
        f"- Graph: `{graph}`, weights: `{graph}.data`, both needed side by side\n"
        f"- Family: {report['family']}; method: {report['config']['quant']['method']}\n"
        f"- Pictures: {report['pictures']}\n"
        f"{size}"
        f"{note}"
        f"- Data file: {files['data']:,} bytes\n\n"
        f'Ask it: `bivlm-run {graph} --image picture.png "what is this?"`.\n'
        "Layers, sizes and validation: `export_report.json`; preprocessing: `manifest.json`.\n",
        encoding="utf-8",
    )
