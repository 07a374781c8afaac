"""Every supported architecture, with small random weights, from checkpoint to validated file.

The exporter itself compares each file with torch, with and without the library: an export that
returns has passed. Here it is also run on two pictures and a text-only prompt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoints import ARCHITECTURES, save_checkpoint  # type: ignore[import-not-found]

from bivlm_edge.calibration import precision
from bivlm_edge.calibration.calls import advance, capture, capture_all
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.export.exporter import export_model
from bivlm_edge.export.validate import NEW_TOKENS
from bivlm_edge.models import load_checkpoint
from bivlm_edge.runtime import Answerer, load

CONFIGS = {
    "float": ExportConfig(QuantConfig(method="none")),
    "3 bits, half the tokens": ExportConfig(QuantConfig(bits=3.0), PruneConfig(keep_ratio=0.5)),
    "3 bits, vocabulary at 4, opset 21": ExportConfig(
        QuantConfig(bits=3.0, vocabulary_bits=4), PruneConfig(keep_ratio=0.5), opset=21
    ),
    "nbits4 and vocabulary at 4 bits in fp16": ExportConfig(
        QuantConfig(method="nbits4", vocabulary_bits=4), dtype="fp16"
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", CONFIGS)
def test_export_agrees_with_torch(
    architecture: str, config: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)
    weights = sum(isinstance(module, kinds) for module in vlm.module.modules())
    result = export_model(vlm, pictures, tmp_path / "model.onnx", CONFIGS[config])
    report = result.report
    ways = report["validation"]
    assert len(ways) == 2  # with and without the library
    assert all(way["tokens"] == NEW_TOKENS * 8 for way in ways)
    quantized = [layer for layer in report["layers"] if "method" in layer]
    assert len(quantized) + len(report["skipped"]) == weights, "a layer is in neither list"
    if "3 bits" in config:
        assert report["true_bits_per_weight"] <= 3.0
    # what the runtime feeds is what was validated, to the token and the pixel
    answerer = Answerer(load(result.paths.graph))
    for item in pictures[:3]:
        image = item.image.open()
        picture = answerer.picture(image)
        ids = answerer.prompts.encode(item.question, picture)
        assert ids.tolist() == vlm.encode(vlm.prompt(item.question))
        np.testing.assert_allclose(picture.pixels[0], vlm.pixels(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibration_runs_every_block_as_the_model_does(
    architecture: str,
    pictures: list[VqaItem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "compute_dtype", lambda: torch.float32)
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path))
    batch = vlm.prepare(pictures[0].image.open(), pictures[0].question, pictures[0].answer)
    for sequence in vlm.block_sequences():
        *others, (_, last) = sequence.blocks
        [call] = capture_all(vlm.module, sequence.blocks, [batch])
        for _, block in others:
            advance(block, [call])
        expected = capture(vlm.module, last, batch)
        # the same functions of the same numbers; attention in windows may add up in another order
        torch.testing.assert_close(call.hidden, expected.hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llava, CLIP and Llama", "llava-onevision", "qwen2.5-vl"])
def test_two_pictures_and_text_only_prompts_run(
    architecture: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    import onnxruntime

    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    pixels = torch.stack([torch.from_numpy(vlm.pixels(item.image.open())) for item in pictures[:2]])
    one = vlm.encode(vlm.prompt("a"))
    ids = torch.tensor([one + one])
    with torch.no_grad():
        both = vlm.module(input_ids=ids, **vlm.family.picture_inputs(vlm.module, pixels, ids))
        both = both.logits[0, -1].numpy()
        text = torch.tensor([vlm.encode("hello")])
        alone = vlm.module(input_ids=text).logits[0, -1].numpy()
    result = export_model(vlm, pictures, tmp_path / "m.onnx", CONFIGS["float"])
    session = onnxruntime.InferenceSession(str(result.paths.graph))
    for tokens, images, want in ((ids, pixels, both), (text, pixels[:0], alone)):
        feed = {
            "input_ids": tokens.numpy(),
            "pixel_values": images.numpy(),
            "position_ids": vlm.positions(tokens[0].tolist())[0].numpy(),
        }
        for value in session.get_inputs():
            if value.name.startswith("past"):
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        got = session.run(["logits"], feed)[0][0, -1]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    answerer = Answerer(load(result.paths.graph))
    answer = answerer.ask("a", answerer.picture(pictures[0].image.open()), max_new_tokens=3)
    tokens = list(answer)
    assert len(tokens) == 3
    for token in tokens:  # without a cache: positions as transformers counts them
        whole = torch.tensor([one])
        with torch.no_grad():
            inputs = vlm.family.picture_inputs(vlm.module, pixels[:1], whole)
            logits = vlm.module(input_ids=whole, **inputs).logits[0, -1]
        assert token == int(logits.argmax())
        one.append(token)


def test_llava_onevision_takes_two_pictures_as_its_own_processor_does(
    pictures: list[VqaItem], tmp_path: Path
) -> None:
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    vlm = load_checkpoint(save_checkpoint("llava-onevision", tmp_path))
    images = [item.image.open() for item in pictures[:2]]
    batch = vlm.image_processor(images=[images], return_tensors="pt")
    processor = object.__new__(LlavaOnevisionProcessor)  # its constructor needs torchvision
    processor.image_token, processor.num_image_tokens = vlm.image_token, vlm.image_tokens - 1
    processor.vision_feature_select_strategy = "full"
    runs = [processor.replace_image_token(batch, index) for index in range(2)]
    assert runs == [vlm.image_token * vlm.image_tokens] * 2
    ids = torch.tensor([vlm.encode("<image>a<image>b")])
    assert vlm.tokenizer.decode(ids[0]) == f"{runs[0]}a{runs[1]}b"
    stack = torch.stack([torch.from_numpy(vlm.pixels(image)) for image in images])
    torch.testing.assert_close(stack, batch["pixel_values"][:, 0], rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = vlm.module(input_ids=ids, **batch).logits
        ours = vlm.module(input_ids=ids, **vlm.family.picture_inputs(vlm.module, stack, ids)).logits
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
