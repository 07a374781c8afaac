"""ONNX schemas of the operators in OPS.md, and of the one ONNX Runtime operator that we emit.

`register()` makes them known to `onnx` (checker, shape inference) and to onnxscript and the torch
exporter, which refuse to emit a node without one. ONNX Runtime does not see them: its schemas come
from the operator library. Values of attributes and inputs are checked there, too; here only what
follows from types and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import AttributeProto, TensorProto, TypeProto, defs, helper
from onnx.shape_inference import InferenceContext, InferenceError

DOMAIN = "ai.bivlm"
OPSET_VERSION = 1
MICROSOFT_DOMAIN = "com.microsoft"

ATTENTION_INPUTS = (
    *("qkv", "cos", "sin", "past_key", "past_value"),
    *("seqlens_k", "total_sequence_length"),
)
ATTENTION_OUTPUTS = ("output", "present_key", "present_value")
PRUNE_MODES = ("topk_score", "maxmin", "mmr", "dpp", "coverage", "uniform", "random", "none")
PRUNE_SCORE_REDUCTIONS = ("mean", "sum", "max")
PRUNE_FIRST = ("auto", "max_score", "max_norm", "farthest")
PRUNE_SIMILARITIES = ("cosine", "dot")
PRUNE_MERGES = ("none", "mean", "score_weighted")
PRUNE_ORDERS = ("input", "score")

_Dim = int | str | None
_Parameter = defs.OpSchema.FormalParameter
_Attribute = defs.OpSchema.Attribute
_AttrType = defs.OpSchema.AttrType
_FLOATS = ["tensor(float)", "tensor(float16)"]


def register() -> None:
    """Register the six schemas with `onnx.defs`; a second call does nothing."""
    for schema in (
        _binary_matmul_schema(),
        _group_matmul_schema(),
        _attention_schema(),
        _gated_silu_schema(),
        _token_prune_schema(),
        _matmul_nbits_schema(),
    ):
        if not defs.has(schema.name, schema.domain):
            defs.register_schema(schema)


def _binary_matmul_schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        "BinaryMatMul",
        DOMAIN,
        OPSET_VERSION,
        doc=(
            "Y = transform(X) * What^T, What a sum of one to four sign planes with coefficients "
            "per row, packed as FORMAT.md says. transform: pad with zeros to a multiple of 64; "
            "signs and a block Hadamard matrix; reorder the columns. The numbers: OPS.md."
        ),
        inputs=[
            _Parameter("X", "T", "activations [..., K]"),
            _Parameter("codes", "tensor(uint8)", "sign bits [Np/16, 2 * sum(plane_columns)]"),
            _Parameter("coefficients", "tensor(float16)", "[Np/16, coefficients per row, 16]"),
            _optional("signs", "tensor(uint8)", "[Kp/8]; only with hadamard_block > 0"),
            _optional("order", "tensor(uint16)", "permutation of columns [Kp] or chunks [Kp/64]"),
        ],
        outputs=[_Parameter("Y", "T", "[..., N]")],
        type_constraints=[("T", _FLOATS, "float32 or float16")],
        attributes=[
            _Attribute("K", _AttrType.INT, "input features, without padding"),
            _Attribute("N", _AttrType.INT, "output features, without padding"),
            _Attribute("plane_columns", _AttrType.INTS, "columns that plane 0, 1, .. covers"),
            _default("hadamard_block", 0, "0, 64 or 128"),
            _default("format", 1, "number of the packed format"),
        ],
    )
    schema.set_type_and_shape_inference_function(_reported("BinaryMatMul", _infer_binary_matmul))
    return schema


def _group_matmul_schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        "GroupMatMul",
        DOMAIN,
        OPSET_VERSION,
        doc=(
            "Y = X * What^T, What[i, j] = (code[i, j] - 2^(bits - 1)) * scale[i, j / block_size]. "
            "The numbers: OPS.md."
        ),
        inputs=[
            _Parameter("X", "T", "activations [..., K]"),
            _Parameter("codes", "tensor(uint8)", "[N, K / block_size, block_size * bits / 8]"),
            _Parameter("scales", "tensor(float16)", "[N, K / block_size]"),
        ],
        outputs=[_Parameter("Y", "T", "[..., N]")],
        type_constraints=[("T", _FLOATS, "float32 or float16")],
        attributes=[
            _Attribute("K", _AttrType.INT, "input features"),
            _Attribute("N", _AttrType.INT, "output features"),
            _Attribute("bits", _AttrType.INT, "bits per code: 4 or 8"),
            _Attribute("block_size", _AttrType.INT, "input features per scale: 16, 32 or 64"),
        ],
    )
    schema.set_type_and_shape_inference_function(_reported("GroupMatMul", _infer_group_matmul))
    return schema


def _attention_schema() -> defs.OpSchema:
    shapes = {
        "qkv": "[B, S, (num_heads + 2 * kv_num_heads) * d]: queries, keys, values",
        "cos": "[B, S, d / 2]: rotations of queries and keys",
        "sin": "[B, S, d / 2]",
        "past_key": "[B, kv_num_heads, P, d]",
        "past_value": "[B, kv_num_heads, P, d]",
        "seqlens_k": "[B]: index of the last token after this run",
        "total_sequence_length": "one element: the largest of these indices + 1",
    }
    schema = defs.OpSchema(
        "GroupQueryAttention",
        DOMAIN,
        OPSET_VERSION,
        doc=(
            "Rotary embedding and causal attention of grouped heads behind a KV cache, in place "
            "where past and present are one buffer. The numbers: OPS.md."
        ),
        inputs=[
            _Parameter(name, kind, shapes[name])
            for name, kind in zip(ATTENTION_INPUTS, [*"TTTCC", *2 * ["tensor(int32)"]], strict=True)
        ],
        outputs=[
            _Parameter("output", "T", "[B, S, num_heads * d]"),
            _Parameter("present_key", "C", "[B, kv_num_heads, max(P, total), d]"),
            _Parameter("present_value", "C", "[B, kv_num_heads, max(P, total), d]"),
        ],
        type_constraints=[
            ("T", _FLOATS, "float32 or float16"),
            ("C", _FLOATS, "of the cache: T or float16"),
        ],
        attributes=[
            _Attribute("num_heads", _AttrType.INT, "query heads"),
            _Attribute("kv_num_heads", _AttrType.INT, "heads of the cache; divides num_heads"),
            _default("scale", 0.0, "factor on the scores; 0: 1 / sqrt(d)"),
        ],
    )
    schema.set_type_and_shape_inference_function(_reported("GroupQueryAttention", _infer_attention))
    return schema


def _gated_silu_schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        "GatedSiLU",
        DOMAIN,
        OPSET_VERSION,
        doc="Y = gate * sigmoid(gate) * up, gate and up the halves of the last axis of X.",
        inputs=[_Parameter("X", "T", "[..., 2 * I]: gate, up")],
        outputs=[_Parameter("Y", "T", "[..., I]")],
        type_constraints=[("T", _FLOATS, "float32 or float16")],
    )
    schema.set_type_and_shape_inference_function(_reported("GatedSiLU", _infer_gated_silu))
    return schema


def _token_prune_schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        "TokenPrune",
        DOMAIN,
        OPSET_VERSION,
        doc=(
            "Drops prunable tokens or merges them into others; never drops text. How many tokens "
            "of a segment stay, and which ones in each mode: OPS.md."
        ),
        inputs=[
            _Parameter("hidden", "T", "[B, S, D]"),
            _optional("scores", "tensor(float)", "[B, S] or [B, H, S]"),
            _optional("segments", "tensor(int32)", "[B, S]: >= 0 image, -1 text, -2 padding"),
            _optional("keep", "tensor(int64)", "tokens per segment: one number, [B] or [B, G]"),
            _optional("metric", "M", "[B, S, Dm] features for similarity; default hidden"),
        ],
        outputs=[
            _Parameter("pruned", "T", "[B, S', D], padded with 0 on the right"),
            _Parameter("kept_indices", "tensor(int64)", "[B, S'], padded with 0"),
            _optional("lengths", "tensor(int64)", "[B]: tokens kept"),
            _optional("token_map", "tensor(int64)", "[B, S]: slot in pruned, or -1: dropped"),
        ],
        type_constraints=[
            ("T", _FLOATS, "float32 or float16"),
            ("M", [*_FLOATS, "tensor(int8)"], "float32, float16 or int8"),
        ],
        attributes=[
            _default("mode", "mmr", ", ".join(PRUNE_MODES)),
            _default("keep_count", -1, "tokens per segment; before keep_ratio"),
            _default("keep_ratio", -1.0, "fraction of a segment"),
            _default("min_keep", 1, "lower bound for keep_count and keep_ratio"),
            _default("theta", 0.5, "mmr, dpp: weight of the score against similarity"),
            _default("seed", 0, "random"),
            _default("score_reduce", "mean", ", ".join(PRUNE_SCORE_REDUCTIONS)),
            _default("first", "auto", "maxmin: " + ", ".join(PRUNE_FIRST)),
            _default("similarity", "cosine", ", ".join(PRUNE_SIMILARITIES)),
            _default("merge", "none", ", ".join(PRUNE_MERGES)),
            _default("order", "input", ", ".join(PRUNE_ORDERS)),
        ],
    )
    schema.set_type_and_shape_inference_function(_reported("TokenPrune", _infer_token_prune))
    return schema


def _matmul_nbits_schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        "MatMulNBits",
        MICROSOFT_DOMAIN,
        1,
        doc="ONNX Runtime's product with a block-quantized weight; the part of it that we emit.",
        inputs=[
            _Parameter("A", "T1", "[..., K]"),
            _Parameter("B", "T2", "codes [N, K / block_size, block_size * bits / 8]"),
            _Parameter("scales", "T1", "[N, K / block_size]"),
            _optional("zero_points", "T3", "default 2^(bits - 1)"),
            _optional("g_idx", "tensor(int32)", "[K]"),
            _optional("bias", "T1", "[N]"),
        ],
        outputs=[_Parameter("Y", "T1", "[..., N]")],
        type_constraints=[
            ("T1", [*_FLOATS, "tensor(bfloat16)"], "activations"),
            ("T2", ["tensor(uint8)", "tensor(int32)"], "codes"),
            ("T3", ["tensor(uint8)", *_FLOATS, "tensor(bfloat16)"], "zero points"),
        ],
        attributes=[
            _Attribute("K", _AttrType.INT, "input features"),
            _Attribute("N", _AttrType.INT, "output features"),
            _default("bits", 4, "bits per code"),
            _Attribute("block_size", _AttrType.INT, "input features per scale"),
            _default("accuracy_level", 0, "4: activations are rounded to int8"),
        ],
    )
    schema.set_type_and_shape_inference_function(_reported("MatMulNBits", _infer_matmul))
    return schema


def _optional(name: str, type_: str, description: str) -> _Parameter:
    option = defs.OpSchema.FormalParameterOption.Optional
    return _Parameter(name, type_, description, param_option=option)


def _default(name: str, value: int | float | str, description: str) -> _Attribute:
    return _Attribute(name, helper.make_attribute(name, value), description)


def _reported(
    operator: str, infer: Callable[[InferenceContext], None]
) -> Callable[[InferenceContext], None]:
    """Let errors name the operator and its node."""

    def inference(context: InferenceContext) -> None:
        try:
            infer(context)
        except InferenceError as error:
            raise InferenceError(f"{operator}: {error}") from error

    return inference


def _infer_matmul(context: InferenceContext) -> None:
    """[..., K] -> [..., N]."""
    k, n = _attribute(context, "K").i, _attribute(context, "N").i
    x = _dims(context, 0)
    if x is not None:
        if not x:
            raise InferenceError("its first input is a scalar; it needs at least one axis")
        _require_dim(x[-1], k, "the last axis of its first input", f"K = {k}")
        x = [*x[:-1], n]
    _set_output(context, 0, _element(context), x)


def _infer_binary_matmul(context: InferenceContext) -> None:
    k, n = _attribute(context, "K").i, _attribute(context, "N").i
    columns = list(_attribute(context, "plane_columns").ints)
    padded_k, panels = -(-k // 64) * 64, -(-n // 16)
    bounds = [*columns, 0]
    slots = sum(c for c in range(1, len(bounds)) if bounds[c - 1] > bounds[c])
    _require_shapes(
        context,
        "K, N and plane_columns",
        (1, "codes", [panels, 2 * sum(columns)]),
        (2, "coefficients", [panels, slots, 16]),
        (3, "signs", [padded_k // 8]),
    )
    _infer_matmul(context)


def _infer_group_matmul(context: InferenceContext) -> None:
    k, n, bits, block = (_attribute(context, name).i for name in ("K", "N", "bits", "block_size"))
    if bits not in (4, 8) or block not in (16, 32, 64) or k % block:
        raise InferenceError(
            f"bits = {bits}, block_size = {block} and K = {k}; bits must be 4 or 8, block_size 16, "
            "32 or 64 and a divisor of K"
        )
    _require_shapes(
        context,
        "K, N, bits and block_size",
        (1, "codes", [n, k // block, block * bits // 8]),
        (2, "scales", [n, k // block]),
    )
    _infer_matmul(context)


def _require_shapes(
    context: InferenceContext, why: str, *inputs: tuple[int, str, Sequence[int]]
) -> None:
    """Refuse inputs (index, name, shape) of another shape, where it is known."""
    for index, name, shape in inputs:
        dims = _dims(context, index)
        if dims is None:
            continue
        if len(dims) != len(shape):
            raise InferenceError(f"{name} has shape {dims}; {why} need {shape}")
        for dim, wanted in zip(dims, shape, strict=True):
            _require_dim(dim, wanted, f"an axis of {name} {dims}", f"the shape {shape}")


def _infer_attention(context: InferenceContext) -> None:
    heads, kv_heads = _attribute(context, "num_heads").i, _attribute(context, "kv_num_heads").i
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise InferenceError(
            f"num_heads = {heads} is no multiple of kv_num_heads = {kv_heads}, or below 1"
        )
    packed = heads + 2 * kv_heads
    states = _dims(context, 0)
    if states is not None:
        if len(states) != 3:
            raise InferenceError(f"qkv has shape {states}; it needs three axes [B, S, heads * d]")
        width = states[2]
        if isinstance(width, int):
            if width % (2 * packed):
                raise InferenceError(
                    f"the last axis of qkv is {width}; it needs {packed} heads of even size"
                )
            states[2] = width // packed * heads
        else:
            states[2] = None
    _set_output(context, 0, _element(context), states)
    for index in (3, 4):
        past = _dims(context, index)
        if past is not None and len(past) != 4:
            name = ATTENTION_INPUTS[index]
            raise InferenceError(f"{name} has shape {past}; it needs [B, kv_num_heads, P, d]")
        if past is not None:
            _require_dim(past[1], kv_heads, "an axis of the past", f"kv_num_heads = {kv_heads}")
            past[2] = None
        _set_output(context, index - 2, _element(context, index), past)


def _infer_gated_silu(context: InferenceContext) -> None:
    x = _dims(context, 0)
    if x is not None:
        if not x or (isinstance(x[-1], int) and x[-1] % 2):
            raise InferenceError(f"X has shape {x}; its last axis must be even: gate, then up")
        x = [*x[:-1], x[-1] // 2 if isinstance(x[-1], int) else None]
    _set_output(context, 0, _element(context), x)


def _infer_token_prune(context: InferenceContext) -> None:
    words = {}
    for name, default, allowed in (
        ("mode", "mmr", PRUNE_MODES),
        ("score_reduce", "mean", PRUNE_SCORE_REDUCTIONS),
        ("first", "auto", PRUNE_FIRST),
        ("similarity", "cosine", PRUNE_SIMILARITIES),
        ("merge", "none", PRUNE_MERGES),
        ("order", "input", PRUNE_ORDERS),
    ):
        given = _given(context, name)
        words[name] = given.s.decode() if given else default
        if words[name] not in allowed:
            raise InferenceError(f"{name} '{words[name]}' is none of {', '.join(allowed)}")
    for name, needs_scores in (
        ("mode", words["mode"] in ("topk_score", "mmr")),
        ("first", words["mode"] == "maxmin" and words["first"] == "max_score"),
        ("merge", words["merge"] == "score_weighted"),
    ):
        if needs_scores and not context.has_input(1):
            raise InferenceError(f"{name} '{words[name]}' needs the input 'scores'")
    hidden = _dims(context, 0)
    if hidden is not None and len(hidden) != 3:
        raise InferenceError(f"hidden has shape {hidden}; it needs three axes [B, S, D]")
    batch, tokens, width = hidden if hidden is not None else (None, None, None)
    _set_output(context, 0, _element(context), [batch, None, width])
    _set_output(context, 1, TensorProto.INT64, [batch, None])
    for index, dims in ((2, [batch]), (3, [batch, tokens])):
        if context.get_num_outputs() > index:
            _set_output(context, index, TensorProto.INT64, dims)


def _given(context: InferenceContext, name: str) -> AttributeProto | None:
    """Return an attribute of the node, or None where it is left to its default."""
    return context.get_attribute(name)  # the stub of onnx 1.23 leaves the None out


def _attribute(context: InferenceContext, name: str) -> AttributeProto:
    attribute = _given(context, name)
    if attribute is None:
        raise InferenceError(f"its attribute {name} is missing")
    return attribute


def _input_type(context: InferenceContext, index: int) -> TypeProto | None:
    """Return the type of an input, or None where it is absent or not known."""
    if index >= context.get_num_inputs() or not context.has_input(index):
        return None
    return context.get_input_type(index)


def _element(context: InferenceContext, index: int = 0) -> int:
    kind = _input_type(context, index)
    return kind.tensor_type.elem_type if kind else TensorProto.UNDEFINED


def _dims(context: InferenceContext, index: int) -> list[_Dim] | None:
    """Return the dimensions of an input, or None where it is absent or its rank is unknown."""
    kind = _input_type(context, index)
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in kind.tensor_type.shape.dim
    ]


def _require_dim(dim: _Dim, wanted: int, what: str, why: str) -> None:
    if isinstance(dim, int) and dim != wanted:
        raise InferenceError(f"{what} is {dim}; {why} needs {wanted}")


def _set_output(
    context: InferenceContext, index: int, element: int, dims: Sequence[_Dim] | None
) -> None:
    if element != TensorProto.UNDEFINED:
        context.set_output_type(index, helper.make_tensor_type_proto(element, dims))
