"""Operators that read the same value become one, which computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import bivlm_edge
from bivlm_edge.errors import OpsLibraryError
from bivlm_edge.export import reference
from bivlm_edge.export.fuse import LAYERS, fuse_shared_inputs
from bivlm_edge.export.sizes import layer_sizes, table_sizes

Array = NDArray[Any]
K = 192
PLANES = (192, 128)
OPSETS = [
    helper.make_opsetid("", 23),
    helper.make_opsetid("ai.bivlm", 1),
    helper.make_opsetid("com.microsoft", 1),
]


@dataclass
class Draft:
    """Nodes and initializers of a graph from "x" `[2, 3, K]` to one output per layer."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def binary(self, name: str, packed: Any, bias: Array | None = None, x: str = "x") -> None:
        """Add a BinaryMatMul, its bias, and a Relu, behind which the result is returned."""
        given = {key: value for key, value in packed.inputs.items() if value is not None}
        self.constants |= {f"{name}.{key}": value for key, value in given.items()}
        inputs = [f"{name}.{key}" if key in given else "" for key in packed.inputs]
        self._layer("BinaryMatMul", "ai.bivlm", name, [x, *inputs], bias, packed.attributes)

    def nbits(
        self, name: str, n: int, seed: int, bias: Array | None = None, *, zeros: bool = True
    ) -> None:
        """Add a MatMulNBits of 4 bits whose float16 scales are cast, as the exporter does."""
        rng = np.random.default_rng(seed)
        scales = rng.uniform(0.01, 0.1, (n, K // 32)).astype(np.float16)
        self.constants[f"{name}.codes"] = rng.integers(0, 256, (n, K // 32, 16), dtype=np.uint8)
        self.constants[f"{name}.scales"] = scales
        cast = helper.make_node("Cast", [f"{name}.scales"], [f"{name}.wide"], to=TensorProto.FLOAT)
        self.nodes.append(cast)
        inputs = ["x", f"{name}.codes", f"{name}.wide"]
        if zeros:
            packed = rng.integers(0, 256, (n, K // 64), dtype=np.uint8)
            self.constants[f"{name}.zeros"] = packed
            inputs.append(f"{name}.zeros")
        attributes = {"K": K, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
        self._layer("MatMulNBits", "com.microsoft", name, inputs, bias, attributes)

    def _layer(
        self,
        operator: str,
        domain: str,
        name: str,
        inputs: Sequence[str],
        bias: Array | None,
        attributes: dict[str, Any],
    ) -> None:
        last = f"{name}.y"
        node = helper.make_node(
            operator, inputs, [last], name=f"{name}/{operator}", domain=domain, **attributes
        )
        self.nodes.append(node)
        if bias is not None:
            self.constants[f"{name}.bias"] = bias
            self.nodes.append(helper.make_node("Add", [last, f"{name}.bias"], [f"{name}.sum"]))
            last = f"{name}.sum"
        self.nodes.append(helper.make_node("Relu", [last], [f"{name}.out"]))
        self.outputs.append(f"{name}.out")

    def model(self) -> onnx.ModelProto:
        return helper.make_model(
            helper.make_graph(
                self.nodes,
                "layers",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, K])],
                [_output(name) for name in self.outputs],
                [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
            ),
            opset_imports=OPSETS,
            ir_version=10,
        )

    def inside_if(self) -> onnx.ModelProto:
        """The same in the branch of an If; initializers stay outside, as in an export."""
        zero = helper.make_node(
            "Constant", [], ["none"], value=numpy_helper.from_array(np.zeros((1, 1, 1), np.float32))
        )
        empty = [helper.make_node("Identity", ["none"], [f"{name}.no"]) for name in self.outputs]
        node = helper.make_node(
            "If",
            ["wanted"],
            [f"{name}.given" for name in self.outputs],
            then_branch=helper.make_graph(
                self.nodes, "then", [], [_output(name) for name in self.outputs]
            ),
            else_branch=helper.make_graph(
                [zero, *empty], "else", [], [_output(f"{name}.no") for name in self.outputs]
            ),
        )
        return helper.make_model(
            helper.make_graph(
                [node],
                "branches",
                [
                    helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, K]),
                    helper.make_tensor_value_info("wanted", TensorProto.BOOL, []),
                ],
                [_output(f"{name}.given") for name in self.outputs],
                [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
            ),
            opset_imports=OPSETS,
            ir_version=10,
        )


def _output(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3)


@pytest.fixture
def layers(make_packed: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Packed weights of the given rows that share planes, signs and order."""

    def draw(*rows: int) -> list[Any]:
        rng = np.random.default_rng(rows)
        drawn = [
            make_packed(rng, n, K, PLANES, hadamard_block=64, signs=True, order="chunks")
            for n in rows
        ]
        transform = {"signs": drawn[0].signs, "order": drawn[0].order}
        return [type(one)(**{**vars(one), **transform}) for one in drawn]

    return draw


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.serde.deserialize_model(model)
    fuse_shared_inputs(found)
    changed: onnx.ModelProto = ir.serde.serialize_model(found)
    onnx.checker.check_model(changed)
    return changed


def operators(model: onnx.ModelProto) -> list[str]:
    """Types of all nodes, those of branches included, without constants and Relu."""
    names: list[str] = []
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            if node.op_type not in ("Constant", "Relu", "If", "Identity", "Cast"):
                names.append(node.op_type)
    return names


def x_of(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((2, 3, K)).astype(np.float32)


def by_reference(model: onnx.ModelProto, **more: Array) -> list[Array]:
    evaluator = ReferenceEvaluator(model, new_ops=[reference.BinaryMatMul])
    outputs: list[Array] = evaluator.run(None, {"x": x_of(), **more})
    return outputs


def assert_same(before: Sequence[Array], after: Sequence[Array]) -> None:
    for one, other in zip(before, after, strict=True):
        # the reference sums in float64 and rounds once: a sum in another order moves one ulp
        np.testing.assert_allclose(other, one, rtol=2.0**-23, atol=1e-7)


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return bivlm_edge.custom_ops_library()
    except OpsLibraryError as error:
        pytest.skip(str(error))


def biased(n: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("rows", [(48, 16, 16), (32, 32), (16, 5), (64, 16, 33)])
def test_layers_of_one_input_become_one_operator(rows: tuple[int, ...], layers: Any) -> None:
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        draft.binary(f"m.{number}", packed)
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "Split"]
    assert_same(by_reference(model), by_reference(changed))


@pytest.mark.parametrize("rows", [(48, 16, 16), (64, 16, 33)])
def test_kernels_give_the_same_bits(
    rows: tuple[int, ...], layers: Any, library: str, run: Callable[..., list[Array]]
) -> None:
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        draft.binary(f"m.{number}", packed, biased(rows[number], number))
    model = draft.model()
    before, after = (
        run(one, {"x": x_of()}, library=library, threads=2) for one in (model, fused(model))
    )
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_biases_become_one_and_missing_ones_zero(which: str, layers: Any) -> None:
    rows = (32, 16, 16)
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        has_bias = which == "all" or number == {"first": 0, "last": 2}[which]
        draft.binary(f"m.{number}", packed, biased(rows[number]) if has_bias else None)
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "Add", "Split"]
    assert_same(by_reference(model), by_reference(changed))


@pytest.mark.parametrize(
    ("order", "axis", "left"),
    [
        ((0, 1, 2), -1, []),
        ((0, 2, 1), -1, ["Split", "Concat"]),
        ((0, 1), -1, ["Split", "Concat"]),
        ((0, 1, 2), 1, ["Split", "Concat"]),
    ],
)
def test_a_concat_of_all_parts_falls_away(
    order: tuple[int, ...], axis: int, left: list[str], layers: Any
) -> None:
    rows = (16, 16, 16)
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        draft.binary(f"m.{number}", packed, biased(rows[number]))
    parts = [node.input[0] for node in draft.nodes if node.op_type == "Relu"]
    joined = [parts[number] for number in order]
    unused = [f"m.{number}.out" for number in {0, 1, 2} - set(order)]
    draft.nodes = [
        *(node for node in draft.nodes if node.op_type != "Relu" or node.output[0] in unused),
        helper.make_node("Concat", joined, ["joined"], axis=axis),
        helper.make_node("Relu", ["joined"], ["out"]),
    ]
    draft.outputs = ["out", *unused]
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "Add", *left]
    assert_same(by_reference(model), by_reference(changed))


def test_residual_additions_are_no_biases(layers: Any) -> None:
    draft = Draft()
    for number, packed in enumerate(layers(16, 16)):
        draft.binary(f"m.{number}", packed)
    draft.nodes[1] = helper.make_node("Add", ["m.0.y", "m.1.y"], ["m.0.out"])
    draft.nodes.append(draft.nodes.pop(1))
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "Split", "Add"]
    assert_same(by_reference(model), by_reference(changed))


def test_weights_in_a_branch_of_an_if_are_fused(layers: Any) -> None:
    rows = (16, 16)
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        draft.binary(f"m.{number}", packed, biased(rows[number]))
    model = draft.inside_if()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "Add", "Split"]
    wanted = np.array(True)
    assert_same(by_reference(model, wanted=wanted), by_reference(changed, wanted=wanted))
    assert {value.name for value in changed.graph.initializer} == {
        "m.0+1/codes", "m.0+1/coefficients", "m.0+1/bias", "m.0.signs", "m.0.order",
    }  # fmt: skip


def with_other_signs(packed: Any) -> Any:
    return type(packed)(**{**vars(packed), "signs": ~packed.signs})


def with_other_order(packed: Any) -> Any:
    return type(packed)(**{**vars(packed), "order": np.roll(packed.order, 1)})


def without_order(packed: Any) -> Any:
    return type(packed)(**{**vars(packed), "order": None})


@pytest.mark.parametrize("change", [with_other_signs, with_other_order, without_order])
def test_layers_with_another_transform_stay_apart(
    change: Callable[[Any], Any], layers: Any
) -> None:
    first, second = layers(16, 16)
    draft = Draft()
    draft.binary("m.a", first)
    draft.binary("m.b", change(second))
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["BinaryMatMul", "BinaryMatMul"]
    assert_same(by_reference(model), by_reference(changed))


def test_other_planes_and_other_inputs_stay_apart(layers: Any, make_packed: Any) -> None:
    first, second = layers(16, 16)
    rng = np.random.default_rng(0)
    planes = make_packed(rng, 16, K, (192, 64), hadamard_block=64)
    plain = make_packed(rng, 16, K, (192, 64))
    draft = Draft()
    draft.nodes.append(helper.make_node("Neg", ["x"], ["negative"]))
    draft.binary("m.a", first)
    draft.binary("m.b", second, x="negative")
    draft.binary("m.c", planes)
    draft.binary("m.d", plain)
    assert operators(fused(draft.model())) == ["Neg", *["BinaryMatMul"] * 4]


def test_a_part_that_fills_no_panel_is_fused_only_as_the_last(layers: Any) -> None:
    for rows, count in (((20, 16), 2), ((16, 20), 1), ((16, 20, 16), 3)):
        draft = Draft()
        for number, packed in enumerate(layers(*rows)):
            draft.binary(f"m.{number}", packed)
        assert operators(fused(draft.model())).count("BinaryMatMul") == count


def test_a_weight_that_is_used_twice_is_not_copied(layers: Any) -> None:
    first, second = layers(16, 16)
    draft = Draft()
    draft.nodes.append(helper.make_node("Neg", ["x"], ["negative"]))
    draft.binary("m.a", first)
    draft.binary("m.b", second)
    inputs = ["negative", *draft.nodes[1].input[1:]]
    again = helper.make_node(
        "BinaryMatMul", inputs, ["again"], name="m.a/BinaryMatMul_1", domain="ai.bivlm",
        **first.attributes,
    )  # fmt: skip
    draft.nodes.append(again)
    draft.outputs.append("again")
    assert operators(fused(draft.model())).count("BinaryMatMul") == 3


def test_a_result_that_the_graph_returns_stays(layers: Any) -> None:
    first, second = layers(16, 16)
    draft = Draft()
    draft.binary("m.a", first)
    draft.binary("m.b", second)
    draft.outputs.append("m.a.y")
    assert operators(fused(draft.model())).count("BinaryMatMul") == 2


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_four_bit_layers_are_fused_with_scales_zero_points_and_bias(
    zeros: bool, has_bias: bool, run: Callable[..., list[Array]]
) -> None:
    rows = (24, 7, 8)  # any rows: the format has no panels
    draft = Draft()
    for number, n in enumerate(rows):
        bias = biased(n) if has_bias else None
        draft.nbits(f"m.{number}", n, seed=number, bias=bias, zeros=zeros)
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["MatMulNBits", *["Add"] * has_bias, "Split"]
    assert {value.name: value.data_type for value in changed.graph.initializer}[
        "m.0+1+2/scales"
    ] == TensorProto.FLOAT16
    before, after = (run(one, {"x": x_of()}) for one in (model, changed))
    for one, other in zip(before, after, strict=True):
        # ONNX Runtime sums the last columns of a weight in another order
        np.testing.assert_allclose(other, one, rtol=0, atol=K * 2.0**-23 * np.abs(one).max())


def test_four_bit_layers_with_and_without_zero_points_stay_apart() -> None:
    draft = Draft()
    draft.nbits("m.a", 16, seed=0, zeros=True)
    draft.nbits("m.b", 16, seed=1, zeros=False)
    assert operators(fused(draft.model())) == ["MatMulNBits", "MatMulNBits"]


def test_casts_behind_four_bit_layers_become_one(run: Callable[..., list[Array]]) -> None:
    """In a float16 graph MatMulNBits runs in float32: cast and bias stand behind it."""
    rows = (16, 8)
    draft = Draft()
    for number, n in enumerate(rows):
        name = f"m.{number}"
        draft.nbits(name, n, seed=number, bias=biased(n).astype(np.float16))
        draft.nodes.insert(
            -2, helper.make_node("Cast", [f"{name}.y"], [f"{name}.half"], to=TensorProto.FLOAT16)
        )
        draft.nodes[-2].input[0] = f"{name}.half"
        back = helper.make_node("Cast", [f"{name}.out"], [f"{name}.last"], to=TensorProto.FLOAT)
        draft.nodes.append(back)
    draft.outputs = [f"m.{number}.last" for number in range(len(rows))]
    model = draft.model()
    changed = fused(model)
    assert operators(changed) == ["MatMulNBits", "Add", "Split"]
    to_half = [n for n in changed.graph.node if n.op_type == "Cast" and n.attribute[0].i == 10]
    assert len(to_half) == 1
    before, after = (run(one, {"x": x_of()}) for one in (model, changed))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(other, one)


def test_names_say_which_layers_an_operator_computes(layers: Any) -> None:
    first, second, third, fourth = layers(16, 16, 16, 16)
    draft = Draft()
    draft.binary("layers.0.attn.q_proj", first)
    draft.binary("layers.0.attn.k_proj", second)
    draft.nodes.append(helper.make_node("Neg", ["x"], ["negative"]))
    draft.binary("layers.0.attn.v_proj", third, x="negative")
    draft.binary("layers.0.mlp.fc1", fourth, x="negative")
    changed = fused(draft.model())
    nodes = [node for node in changed.graph.node if node.op_type == "BinaryMatMul"]
    assert [node.name for node in nodes] == [
        "layers.0.attn.q_proj+k_proj/BinaryMatMul",
        "layers.0.attn.v_proj+layers.0.mlp.fc1/BinaryMatMul",
    ]
    stated = {prop.key: prop.value for prop in nodes[1].metadata_props}
    assert json.loads(stated[LAYERS]) == {"layers.0.attn.v_proj": 16, "layers.0.mlp.fc1": 16}


def test_sizes_list_every_layer_and_all_bytes_once(layers: Any) -> None:
    rows = (48, 16, 20)
    draft = Draft()
    for number, packed in enumerate(layers(*rows)):
        draft.binary(f"m.{number}", packed)
    draft.nbits("m.four", 24, seed=0)
    draft.nbits("m.bits", 8, seed=1)
    before = layer_sizes(ir.serde.deserialize_model(draft.model()))
    model = ir.serde.deserialize_model(fused(draft.model()))
    after = layer_sizes(model)
    assert [(size.name, size.n, size.k) for size in after] == [
        (size.name, size.n, size.k) for size in before
    ]
    transform = K // 8 + 2 * (K // 64)  # signs and order: with the first layer only
    expected = [before[0].bytes, *(size.bytes - transform for size in before[1:3])]
    assert [size.bytes for size in after] == [*expected, before[3].bytes, before[4].bytes]
    assert sum(size.bytes for size in after) == table_sizes(model)["layers"]
    assert {size.node for size in after} == {"m.0+1+2", "m.four+bits"}


def test_a_second_pass_changes_nothing(layers: Any) -> None:
    draft = Draft()
    for number, packed in enumerate(layers(16, 16)):
        draft.binary(f"m.{number}", packed)
    once = fused(draft.model())
    assert fused(once).SerializeToString() == once.SerializeToString()
