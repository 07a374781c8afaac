"""The file in plain ONNX Runtime, without our runtime: the same answers three ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import AutoModelForImageTextToText, AutoProcessor

import bivlm_edge
from bivlm_edge.bundle import BundlePaths, read_manifest
from bivlm_edge.datasets import VqaItem, load_easy_vqa
from bivlm_edge.export.fuse import LAYERS
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.reference import checkpoint_path

QUESTIONS = 200
END = 1


@pytest.fixture(scope="module")
def items() -> Sequence[VqaItem]:
    every = load_easy_vqa("test")
    return every[:: len(every) // QUESTIONS][:QUESTIONS]


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(checkpoint_path())


def encode(processor: Any, item: VqaItem) -> dict[str, NDArray[Any]]:
    content = [{"type": "image"}, {"type": "text", "text": item.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=item.image.open(), text=text, return_tensors="np")
    return {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}


def answer_in_onnxruntime(
    session: ort.InferenceSession, inputs: dict[str, NDArray[Any]], steps: int = 3
) -> list[int]:
    """Greedy tokens by nothing but numpy and onnxruntime."""
    names = [output.name for output in session.get_outputs()]
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    length = inputs["input_ids"].shape[1]
    feed = {**inputs, **past, "position_ids": np.arange(length)[None]}
    tokens: list[int] = []
    for step in range(steps):
        found = dict(zip(names, session.run(None, feed), strict=True))
        tokens.append(int(found["logits"][0, -1].argmax()))
        if tokens[-1] == END:
            break
        feed = {
            "input_ids": np.array([[tokens[-1]]]),
            "pixel_values": inputs["pixel_values"][:0],
            "position_ids": np.array([[length + step]]),
            **{name: found[name.replace("past_key_values", "present")] for name in past},
        }
    return tokens


def dequantized_checkpoint(paths: BundlePaths) -> Any:
    """The original checkpoint with every weight that the file holds in its place."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_path(), dtype=torch.float32)
    graph = onnx.load(paths.graph).graph
    arrays = {init.name: numpy_helper.to_array(init) for init in graph.initializer}
    branches = [
        attribute.g
        for node in graph.node
        for attribute in node.attribute
        if attribute.HasField("g")
    ]
    nodes = [node for part in (graph, *branches) for node in part.node]
    replaced = 0
    for node in nodes:
        values = [arrays.get(name) for name in node.input]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "BinaryMatMul":
            values += [None] * (5 - len(values))
            weight = BinaryWeight(
                n=attributes["N"],
                k=attributes["K"],
                plane_columns=tuple(attributes["plane_columns"]),
                codes=values[1],
                coefficients=values[2],
                hadamard_block=attributes.get("hadamard_block", 0),
                signs=values[3],
                order=values[4],
            )
            operator = node.name.rsplit("/", 1)[0]
            fused = next((p.value for p in node.metadata_props if p.key == LAYERS), None)
            rows = {operator: weight.n} if fused is None else json.loads(fused)
            ends = (f"module.{operator}.bias", f"{operator}/bias")
            bias = next((key for key in arrays if key.endswith(ends)), None)
            start = 0
            for name, n in rows.items():
                part = slice(start, start + n)
                layer = model.get_submodule(name)
                layer.weight.data = torch.from_numpy(weight.dequantize()[part].copy())
                if bias is not None and layer.bias is not None:
                    layer.bias.data = torch.from_numpy(arrays[bias][part].copy())
                replaced += 1
                start += n
        elif node.op_type == "GatherBlockQuantized":
            table = dequantize_8_bit(values[0], arrays["embedding/scales"])
            model.get_input_embeddings().weight.data = torch.from_numpy(table)
            replaced += 1
        elif node.op_type == "GroupMatMul":
            scales = arrays[node.input[1].replace(".codes", ".scales")]
            codes = values[1].reshape(attributes["N"], -1)
            model.lm_head.weight.data = torch.from_numpy(dequantize_8_bit(codes, scales))
            replaced += 1
    assert replaced == 56  # 54 layers of the blocks and projector, token table, head
    return model.eval()


def dequantize_8_bit(codes: NDArray[np.uint8], scales: NDArray[Any]) -> NDArray[np.float32]:
    rows = len(codes)
    blocks = codes.reshape(rows, scales.size // rows, -1).astype(np.float32) - 128
    return np.asarray((blocks * scales.reshape(rows, -1, 1)).reshape(rows, -1), np.float32)


@torch.no_grad()
def answer_in_torch(model: Any, inputs: dict[str, NDArray[Any]]) -> list[int]:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    mask = torch.ones_like(tensors["input_ids"])
    output = model.generate(**tensors, attention_mask=mask, max_new_tokens=3, do_sample=False)
    return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def test_200_answers_agree_with_library_without_it_and_in_torch(
    two_bit_export: BundlePaths, items: Sequence[VqaItem], processor: Any
) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(bivlm_edge.custom_ops_library())
    with_library = ort.InferenceSession(str(two_bit_export.graph), options)
    without = ort.InferenceSession(str(two_bit_export.graph))
    model = dequantized_checkpoint(two_bit_export)
    ways: dict[str, Callable[[dict[str, NDArray[Any]]], list[int]]] = {
        "with": lambda inputs: answer_in_onnxruntime(with_library, inputs),
        "without": lambda inputs: answer_in_onnxruntime(without, inputs),
        "torch": lambda inputs: answer_in_torch(model, inputs),
    }
    answers: dict[str, list[list[int]]] = {name: [] for name in ways}
    for item in items:
        inputs = encode(processor, item)
        for name, ask in ways.items():
            answers[name].append(ask(inputs))
    differing = {
        name: sum(
            mine != torchs for mine, torchs in zip(answers[name], answers["torch"], strict=True)
        )
        for name in ways
    }
    assert differing == {"with": 0, "without": 0, "torch": 0}
    assert len({tuple(tokens) for tokens in answers["torch"]}) > 5, "the model answers all alike"


def test_pruned_file_keeps_a_quarter_of_the_image_tokens_both_ways(
    pruned_export: BundlePaths, items: Sequence[VqaItem], processor: Any
) -> None:
    manifest = read_manifest(pruned_export)
    options = ort.SessionOptions()
    options.register_custom_ops_library(bivlm_edge.custom_ops_library())
    sessions = [
        ort.InferenceSession(str(pruned_export.graph), options),
        ort.InferenceSession(str(pruned_export.graph)),
    ]
    for item in items[:10]:
        inputs = encode(processor, item)
        feeds = {**inputs, "position_ids": np.arange(inputs["input_ids"].shape[1])[None]}
        for value in sessions[0].get_inputs():
            if value.name.startswith("past"):
                feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        kept = [session.run(["kept_indices"], feeds)[0][0] for session in sessions]
        np.testing.assert_array_equal(kept[0], kept[1])
        is_image = inputs["input_ids"][0][kept[0]] == manifest.image_token_id
        text = inputs["input_ids"].shape[1] - manifest.image_tokens
        assert is_image.sum() == manifest.image_tokens // 4
        assert (~is_image).sum() == text


def test_the_file_holds_no_paths_or_stack_traces_of_the_machine_that_wrote_it(
    float_export: BundlePaths,
) -> None:
    content = float_export.graph.read_bytes()
    for trace in (b"stack_trace", b"site-packages", b"/home/", b"/root/", b"/work/", b"/tmp/"):
        assert trace not in content
