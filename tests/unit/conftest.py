"""A model without weights that answers predictably: the runtime's loop is tested for real.

Its "attention" is a sum over the KV cache, so that a wrong cache, position, picture or pruned
token changes the answer; `MockBundle.answer` computes the same in plain Python.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bivlm_edge.bundle import (
    BUNDLE_VERSION,
    CHAT_TEMPLATE,
    TOKENIZER,
    BundlePaths,
    ImageSpec,
    Manifest,
    file_record,
    write_manifest,
)

# `known_model` is imported by name: --import-mode=importlib leaves this folder off the path
sys.path.insert(0, str(Path(__file__).parent))

SPECIAL_TOKENS = ("<pad>", "</s>", "<image>", "<|user|>", "<|assistant|>")
END, IMAGE = 1, 2
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(ALPHABET)
FIRST_LETTER = len(SPECIAL_TOKENS) + ALPHABET.index("a")
LAYERS, SIZE, IMAGE_TOKENS, CONTEXT = 2, 4, 6, 48
PIXEL_MODULUS, END_EVERY = 50, 11
TEMPLATE = (
    "{%- for message in messages -%}<|user|>"
    "{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endfor -%}{{- '<|assistant|>' if add_generation_prompt -}}"
)


def next_token(state: int) -> int:
    """Row `state` of the model's only weight."""
    return END if state % END_EVERY == 0 else FIRST_LETTER + state % 26


@dataclass(frozen=True)
class MockBundle:
    """A bundle on disk and the model in plain Python."""

    graph: Path
    manifest: Manifest
    prunes: bool

    @property
    def paths(self) -> BundlePaths:
        return BundlePaths(self.graph)

    def answer(self, prompt: Sequence[int], pixel_sum: int, new_tokens: int) -> list[int]:
        """The greedy answer to token ids whose placeholders stand for one picture."""
        values, positions, images = [], [], 0
        for position, token in enumerate(prompt):
            images += token == IMAGE
            if token == IMAGE and images % 2 == 0 and self.prunes:
                continue
            values.append(token + (pixel_sum % PIXEL_MODULUS if token == IMAGE else 0))
            positions.append(position)
        answer: list[int] = []
        last_position = len(prompt) - 1
        while len(answer) < new_tokens:
            state = sum(values) + 2 * sum(value + 1 for value in values)
            state += 3 * sum(positions) + 4 * sum(position + 1 for position in positions)
            state += 5 * last_position
            token = next_token(state % VOCAB_SIZE)
            if token == END:
                break
            answer.append(token)
            last_position += 1
            values.append(token)
            positions.append(last_position)
        return answer


def _tokenizer() -> Tokenizer:
    names = [*SPECIAL_TOKENS, *ALPHABET]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return tokenizer


def _model(*, fp16: bool, prunes: bool, domain_node: str | None) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT
    int64 = TensorProto.INT64
    table = np.zeros((VOCAB_SIZE, VOCAB_SIZE), dtype=np.float32)
    for state in range(VOCAB_SIZE):
        table[state, next_token(state)] = 10.0

    def constant(name: str, value: int | Sequence[int] | float) -> onnx.TensorProto:
        array = np.array(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        return numpy_helper.from_array(array, name)

    initializers = [
        numpy_helper.from_array(table, "table"),
        constant("image_id", IMAGE),
        constant("modulus", float(PIXEL_MODULUS)),
        constant("vocabulary", VOCAB_SIZE),
        constant("axis1", 1),
        constant("axes23", [1, 3]),
        constant("zero", [0]),
        constant("two", 2 if prunes else 1 << 40),
        constant("minus_one", [-1]),
        constant("batch", [1]),
        constant("every", [0, 1, 2, 3]),
        constant("two_f", 2.0),
        constant("three_f", 3.0),
        constant("four_f", 4.0),
        numpy_helper.from_array(np.array(1, dtype=np.float16 if fp16 else np.float32), "one"),
        constant("five", 5),
        constant("two_1", [2]),
        constant("end", [1 << 40]),
        constant("past_length", -1),
    ]
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Equal", ["input_ids", "image_id"], "is_image", {}),
        ("Cast", ["is_image"], "is_image_i", {"to": int64}),
        ("CumSum", ["is_image_i", "axis1"], "number", {}),
        ("Mod", ["number", "two"], "number_mod", {}),
        ("Cast", ["number_mod"], "is_odd", {"to": TensorProto.BOOL}),
        ("Not", ["is_odd"], "is_even", {}),
        ("And", ["is_image", "is_even"], "is_dropped", {}),
        ("Not", ["is_dropped"], "is_kept", {}),
        ("Squeeze", ["is_kept", "zero"], "is_kept_row", {}),
        ("NonZero", ["is_kept_row"], "kept_indices", {}),
        ("Squeeze", ["kept_indices", "zero"], "kept", {}),
        ("Gather", ["input_ids", "kept"], "ids", {"axis": 1}),
        ("Gather", ["position_ids", "kept"], "positions", {"axis": 1}),
        ("Gather", ["is_image_i", "kept"], "images", {"axis": 1}),
        ("Cast", ["pixel_values"], "pixels", {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["pixels", "every"], "pixel_sum4", {"keepdims": 0}),
        ("Mod", ["pixel_sum4", "modulus"], "pixel_sum", {"fmod": 1}),
        ("Cast", ["ids"], "ids_f", {"to": TensorProto.FLOAT}),
        ("Cast", ["images"], "images_f", {"to": TensorProto.FLOAT}),
        ("Mul", ["images_f", "pixel_sum"], "light", {}),
        ("Add", ["ids_f", "light"], "value_f", {}),
        ("Cast", ["value_f"], "value_2", {"to": kind}),
        ("Unsqueeze", ["value_2", "axes23"], "value", {}),
        ("Cast", ["positions"], "position_t", {"to": kind}),
        ("Unsqueeze", ["position_t", "axes23"], "position", {}),
        ("Add", ["value", "one"], "value_1", {}),
        ("Add", ["position", "one"], "position_1", {}),
        # past_length < 0: all of past is filled; what lies behind the new tokens stays there
        ("Shape", ["past_key_values.0.key"], "capacity", {"start": 2, "end": 3}),
        ("Less", ["past_length", "zero"], "is_filled", {}),
        ("Where", ["is_filled", "capacity", "past_length"], "filled", {}),
        ("Shape", ["kept"], "count", {}),
        ("Add", ["filled", "count"], "behind", {}),
        *(
            node
            for state, new, part in (
                ("k0", "value", "0.key"),
                ("v0", "position", "0.value"),
                ("k1", "value_1", "1.key"),
                ("v1", "position_1", "1.value"),
            )
            for node in (
                ("Slice", [f"past_key_values.{part}", "zero", "filled", "two_1"], f"{state}_p", {}),
                ("Slice", [f"past_key_values.{part}", "behind", "end", "two_1"], f"{state}_t", {}),
                ("Concat", [f"{state}_p", new], f"{state}_used", {"axis": 2}),
                ("Concat", [f"{state}_used", f"{state}_t"], f"present.{part}", {"axis": 2}),
                ("Cast", [f"{state}_used"], state, {"to": TensorProto.FLOAT}),
            )
        ),
        # other contents and another weight for every tensor of the cache: no two can be swapped
        ("Mul", ["k1", "two_f"], "k1x2", {}),
        ("Mul", ["v0", "three_f"], "v0x3", {}),
        ("Mul", ["v1", "four_f"], "v1x4", {}),
        ("Add", ["k0", "k1x2"], "keys", {}),
        ("Add", ["v0x3", "v1x4"], "values", {}),
        ("Add", ["keys", "values"], "parts", {}),
        ("ReduceSum", ["parts", "every"], "state_f", {"keepdims": 0}),
        ("Cast", ["state_f"], "state_0", {"to": int64}),
        ("Gather", ["position_ids", "minus_one"], "last_2d", {"axis": 1}),
        ("Squeeze", ["last_2d", "zero"], "last", {}),
        ("Mul", ["last", "five"], "last5", {}),
        ("Add", ["state_0", "last5"], "state_1", {}),
        ("Mod", ["state_1", "vocabulary"], "state", {}),
        ("Gather", ["table", "state"], "row", {"axis": 0}),
        ("Unsqueeze", ["row", "zero"], "logits_f", {}),
        ("Cast", ["logits_f"], "logits_t", {"to": kind}),
    ]
    protos = [
        helper.make_node(op, inputs, [output], **attributes)
        for op, inputs, output, attributes in nodes
    ]
    functions = []
    domain = "" if domain_node is None else "ai.bivlm"
    op = "Identity" if domain_node is None else "Probe"
    protos.append(helper.make_node(op, ["logits_t"], ["logits"], domain=domain))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.bivlm", 1)]
    if domain_node == "fallback":
        body = [helper.make_node("Identity", ["x"], ["y"])]
        functions = [helper.make_function("ai.bivlm", "Probe", ["x"], ["y"], body, opsets[:1])]
    past: list[str | int | None] = ["batch", 1, "past", 1]
    parts = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    inputs = [
        helper.make_tensor_value_info("input_ids", int64, ["batch", "tokens"]),
        helper.make_tensor_value_info("pixel_values", kind, ["images", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("position_ids", int64, ["batch", "tokens"]),
        *(helper.make_tensor_value_info(f"past_key_values.{p}", kind, past) for p in parts),
        helper.make_tensor_value_info("past_length", int64, []),
    ]
    present: list[str | int | None] = ["batch", 1, "total", 1]
    outputs = [
        helper.make_tensor_value_info("logits", kind, ["batch", 1, VOCAB_SIZE]),
        *(helper.make_tensor_value_info(f"present.{p}", kind, present) for p in parts),
        helper.make_tensor_value_info("kept_indices", int64, ["batch", "kept"]),
    ]
    used = {name for node in protos for name in node.input}
    graph = helper.make_graph(
        protos, "mock", inputs, outputs, [i for i in initializers if i.name in used]
    )
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., MockBundle]:
    """A function that writes a mock bundle into a folder of its own."""

    def make(
        name: str = "model",
        *,
        fp16: bool = False,
        prunes: bool = False,
        domain_node: str | None = None,
        context: int = CONTEXT,
    ) -> MockBundle:
        """`domain_node`: None, "fallback" (an ai.bivlm node with a function) or "none"."""
        folder = tmp_path / name
        folder.mkdir()
        paths = BundlePaths(folder / "model.onnx")
        # onnx looks for the data file where the tests were started: the README's first command
        # leaves one of this name there
        with contextlib.chdir(folder):
            onnx.save(
                _model(fp16=fp16, prunes=prunes, domain_node=domain_node),
                str(paths.graph),
                save_as_external_data=True,
                location=paths.data.name,
                size_threshold=1024,
            )
        paths.assets.mkdir()
        _tokenizer().save(str(paths.assets / TOKENIZER))
        (paths.assets / CHAT_TEMPLATE).write_text(TEMPLATE, encoding="utf-8")
        manifest = Manifest(
            version=BUNDLE_VERSION,
            name="mock",
            family="llava",
            files={
                "graph": file_record(paths.graph),
                "data": file_record(paths.data),
                "tokenizer": file_record(paths.assets / TOKENIZER),
                "chat_template": file_record(paths.assets / CHAT_TEMPLATE),
            },
            data_name=paths.data.name,
            layers=LAYERS,
            kv_heads=1,
            head_dim=1,
            dtype="fp16" if fp16 else "fp32",
            context_length=context,
            vocab_size=VOCAB_SIZE,
            image_token_id=IMAGE,
            image_token="<image>",
            image_tokens=IMAGE_TOKENS,
            pixel_shape=(3, SIZE, SIZE),
            bos_token_id=None,
            bos_token="",
            eos_token="</s>",
            eos_token_ids=(END,),
            max_new_tokens=12,
            image=ImageSpec("clip", "exact", (SIZE, SIZE), 3, None, None, (), ()),
            image_prompt="{image}",
            uses_custom_ops=domain_node is not None,
            fallback="nbits" if domain_node is None else domain_node.replace("fallback", "nbits"),
        )
        write_manifest(manifest, paths.assets)
        sizes = {"graph": paths.graph.stat().st_size, "data": paths.data.stat().st_size}
        layer = {
            "name": "mock.q_proj",
            "op": "BinaryMatMul",
            "n": 16,
            "k": 64,
            "method": "bivlm-edge",
            "planes": [64, 64],
            "hadamard_block": 64,
            "bytes": 250,
            "true_bits": 250 * 8 / 1024,
            "claimed_bits": 2.0,
            "output_error": 0.02,
        }
        report = {
            "layers": [layer],
            "skipped": {"mock.head": "too small"},
            "true_bits_per_weight": 250 * 8 / 1024,
            "file_bytes": sizes,
            "tables": [{"what": "embedding", "bytes": 1000}],
        }
        (paths.assets / "export_report.json").write_text(json.dumps(report), encoding="utf-8")
        return MockBundle(paths.graph, manifest, prunes)

    return make


@pytest.fixture
def bundle(make_bundle: Callable[..., MockBundle]) -> MockBundle:
    """A mock bundle in float32 that drops no token and needs no library."""
    return make_bundle()
