"""Join the traced parts into one graph: embeddings, pictures in an `If`, pruning, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from bivlm_edge.config import PruneConfig
from bivlm_edge.export import schemas
from bivlm_edge.export.fuse import LAYERS
from bivlm_edge.export.graph_pieces import (
    Part,
    graph_input,
    initializer,
    name_values,
    scalar,
    take_apart,
    vector,
)
from bivlm_edge.export.graph_positions import closed_positions, positions_at
from bivlm_edge.export.leading_layers import (
    Leading,
    Run,
    compacted,
    last_layer,
    leading_layers,
    run_layers,
)
from bivlm_edge.export.tower_parts import Tower, kept_features, placed_features
from bivlm_edge.pruning import KEEP_TOKENS, tokens_to_keep
from bivlm_edge.quant.weights import GroupWeight, pack_bits

IR_VERSION = 10
MICROSOFT = "com.microsoft"
FILLED = -1  # default of past_length: every position of the past tensors holds a token


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """Facts about the model that the joined graph states.

    Attributes:
        image_token_id: Placeholder in input_ids.
        image_tokens: Features of one picture.
        hidden_size: Width of embeddings and features.
        pixel_shape: (3, H, W).
        dtype: Type of activations, FLOAT or FLOAT16.
        opset: Version of the standard operators.
        prune: Token pruning.
        place_features: Of one picture's tokens, ``(image_tokens, width)``, if tokens are compared
            by their places.
        position_axes: 1, or 3 for M-RoPE: position_ids is then ``(3, batch, sequence)``.
        context: Most tokens of a run.
        class_tokens: Rows before the patches inside the vision tower that are none.
    """

    image_token_id: int
    image_tokens: int
    hidden_size: int
    pixel_shape: tuple[int, int, int]
    dtype: ir.DataType
    opset: int
    prune: PruneConfig
    place_features: np.ndarray | None = None
    position_axes: int = 1
    context: int = 0
    class_tokens: int = 0


def join_parts(
    vision: ir.Model,
    decoder: ir.Model,
    embedding: GroupWeight | np.ndarray,
    options: GraphOptions,
    text_scores: ir.Model | None = None,
    rule: ir.Model | None = None,
    leading: ir.Model | None = None,
    last_token: ir.Model | None = None,
    tower_end: ir.Model | None = None,
) -> ir.Model:
    """Return the whole model; the parts are taken apart and must not be used afterwards.

    Args:
        vision: pixel_values to features and, where pictures have them, scores
            (`parts.trace_vision`).
        decoder: The inputs of `DecoderPart` to logits, present (`decoder_parts.trace_decoder`), or
            with `leading` those of `TrailingPart` (`decoder_parts.trace_trailing`).
        embedding: Token table ``(vocab, hidden)``, quantized or float.
        options: The rest.
        text_scores: Merged embeddings to scores, if the text gives them
            (`parts.trace_text_scores`).
        rule: Scores of pictures to their numbers of tokens, if they have numbers of their own
            (`parts.trace_rule`).
        leading: The layers before the pruning (`decoder_parts.trace_leading`), if there are any.
        last_token: Their last attention to scores, if it gives them
            (`decoder_parts.trace_last_token`).
        tower_end: What follows in the vision tower on the patches that are left, if some are
            dropped inside; `vision` is what comes before (`tower_parts.trace_tower`).

    Returns:
        A model with the inputs and outputs of DESIGN.md 8.
    """
    vision_part = take_apart(vision, "vision")
    decoder_part = take_apart(decoder, "decoder")
    layers = None if leading is None else leading_layers(leading)
    before = [] if layers is None else layers.past
    behind = decoder_part.inputs[4 if layers is None else 6 :]
    past = [*before, *behind]
    for value in past:
        value.name = str(value.name).rpartition("/")[2]
    input_ids = graph_input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    pixel_values = graph_input("pixel_values", options.dtype, ["images", *options.pixel_shape])
    axes = [] if options.position_axes == 1 else [options.position_axes]
    position_ids = graph_input("position_ids", ir.DataType.INT64, [*axes, "batch", "sequence"])
    past_length = _with_default("past_length", FILLED)
    keep_tokens = _keep_tokens(options)

    main = Tape()
    embeddings = _embed(main, input_ids, embedding, options.dtype)
    images = main.op("Shape", [pixel_values], {"start": 0, "end": 1})
    has_images = main.op("Greater", [main.op("Squeeze", [images]), scalar(main, 0, "zero")])
    pictures = _Pictures(
        vision_part,
        None if text_scores is None else take_apart(text_scores, "text_scores"),
        None if rule is None else take_apart(rule, "rule"),
        None if last_token is None else take_apart(last_token, "last_token"),
        layers,
        None if tower_end is None else take_apart(tower_end, "tower_end"),
        pixel_values,
        input_ids,
        embeddings,
        position_ids,
        past_length,
        past[0],
        None if layers is None else _cache_lengths(main, past_length, past[0], input_ids),
    )
    branches = (
        _picture_branch(pictures, options, keep_tokens),
        _text_branch(pictures, options),
    )
    found = main.op_multi_out(
        "If",
        [has_images],
        {"then_branch": branches[0], "else_branch": branches[1]},
        num_outputs=len(branches[0].outputs),
        name="pictures",
    )
    hidden, kept = found[:2]
    _describe(hidden, options.dtype, ["batch", "kept", options.hidden_size])
    _describe(kept, ir.DataType.INT64, ["batch", "kept"])
    kept.name = "kept_indices"
    present_before: list[ir.Value] = []
    if layers is not None:
        normed, cos, sin, *present_before = found[2:]
        _describe(normed, options.dtype, ["batch", "kept", options.hidden_size])
        states = [normed, hidden, cos, sin]
    elif len(found) == 3:
        _describe(found[2], ir.DataType.INT64, [*axes, "batch", "kept"])
        states = [hidden, found[2]]
    else:
        states = [hidden, positions_at(main, position_ids, kept, options.position_axes)]
    states += _cache_lengths(main, past_length, past[0], kept)
    for value, given in zip(decoder_part.inputs, states, strict=False):
        ir.convenience.replace_all_uses_with(value, given)
    logits, *present_behind = decoder_part.outputs
    logits.name = "logits"
    present = [*present_before, *present_behind]
    for value, source in zip(present, past, strict=True):
        value.name = str(source.name).replace("past_key_values", "present")
        sizes: list[int | ir.SymbolicDim | str] = list(source.shape or ())
        sizes[2:3] = ["present"]  # past_length and this run decide
        value.shape, value.type = ir.Shape(sizes), source.type
    name_values(main, "main")
    optional = [past_length] if keep_tokens is None else [past_length, keep_tokens]
    graph = ir.Graph(
        [input_ids, pixel_values, position_ids, *optional, *past],
        [logits, *present, kept],
        nodes=[*main.nodes, *decoder_part.nodes],
        initializers=[
            *optional,
            *(value for part in pictures.parts for value in part.initializers),
            *([] if layers is None else layers.initializers),
            *main.initializers,
            *decoder_part.initializers,
        ],
        opset_imports={"": options.opset, schemas.DOMAIN: schemas.OPSET_VERSION, MICROSOFT: 1},
        name="bivlm_edge",
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="bivlm-edge")
    return _clean(model)


def _describe(value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    value.dtype, value.shape = dtype, ir.Shape(shape)


def _with_default(name: str, value: int) -> ir.Value:
    """Return an int64 scalar input with its default: an initializer of the same name."""
    default = ir.tensor(np.array(value, np.int64), name=name)
    return ir.Value(
        name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64), const_value=default
    )


def _keep_tokens(options: GraphOptions) -> ir.Value | None:
    """Return the input that says how many tokens of each image are kept; None without pruning."""
    if not options.prune.is_active:
        return None
    return _with_default(
        KEEP_TOKENS, tokens_to_keep(options.prune.keep_ratio, options.image_tokens)
    )


def set_default_keep(path: Path, tokens: int) -> None:
    """Change how many tokens of each image a written graph keeps unless a run says otherwise."""
    model = onnx.load(path, load_external_data=False)
    (default,) = (value for value in model.graph.initializer if value.name == KEEP_TOKENS)
    default.CopyFrom(onnx.numpy_helper.from_array(np.array(tokens, np.int64), KEEP_TOKENS))
    path.write_bytes(model.SerializeToString())


def _cache_lengths(
    tape: Tape, past_length: ir.Value, past: ir.Value, positions: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return index of the last token, int32 `(B,)`, and number of tokens, int32 `(1,)`.

    Both count the cache with the tokens of this run. A past_length beyond the buffers would make
    GroupQueryAttention read behind their end.
    """
    zero = scalar(tape, 0, "zero")
    capacity = tape.op("Shape", [past], {"start": 2, "end": 3})
    is_filled = tape.op("Less", [past_length, zero])
    filled = tape.op("Where", [is_filled, capacity, tape.op("Min", [past_length, capacity])])
    total = tape.op("Add", [filled, tape.op("Shape", [positions], {"start": 1, "end": 2})])
    total_length = tape.op("Cast", [total], {"to": ir.DataType.INT32})
    last = tape.op("Sub", [total_length, scalar(tape, 1, "one", np.int32)])
    rows = tape.op("Shape", [positions], {"start": 0, "end": 1})
    return tape.op("Expand", [last, rows]), total_length


def _embed(
    tape: Tape,
    input_ids: ir.Value,
    embedding: GroupWeight | np.ndarray,
    dtype: ir.DataType,
) -> ir.Value:
    """Look the tokens up: `(batch, sequence, hidden)`."""
    if isinstance(embedding, GroupWeight):
        codes = initializer(tape, pack_bits(embedding.codes, embedding.bits), "embedding/codes")
        scales = initializer(tape, embedding.scale, "embedding/scales")
        if dtype == ir.DataType.FLOAT:
            scales = tape.op("Cast", [scales], {"to": ir.DataType.FLOAT})
        zero_points = pack_bits(embedding.zero, embedding.bits)
        zero = initializer(tape, zero_points, "embedding/zero_points")
        return tape.op(
            "GatherBlockQuantized",
            [codes, input_ids, scales, zero],
            {
                "bits": embedding.bits,
                "block_size": embedding.group,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=MICROSOFT,
            name="embedding",
        )
    table = initializer(tape, embedding.astype(dtype.numpy()), "embedding/table")
    return tape.op("Gather", [table, input_ids], name="embedding")


def _picture_branch(
    pictures: _Pictures, options: GraphOptions, keep_tokens: ir.Value | None
) -> ir.Graph:
    """Encode the pictures, put their features at the placeholders, drop redundant ones."""
    ir.convenience.replace_all_uses_with(pictures.vision.inputs[0], pictures.pixel_values)
    input_ids = pictures.input_ids
    tape = Tape()
    is_image = tape.op("Equal", [input_ids, scalar(tape, options.image_token_id, "image_token")])
    places = tape.op("Transpose", [tape.op("NonZero", [is_image])], {"perm": [1, 0]})
    if pictures.tower_end is not None and keep_tokens is not None:
        outputs = _prune_in_tower(
            tape, pictures, pictures.tower_end, is_image, places, options, keep_tokens
        )
        return _branch(tape, pictures, outputs)
    row_shape = vector(tape, [-1, options.hidden_size], "row_shape")
    rows = tape.op("Reshape", [pictures.vision.outputs[0], row_shape])
    merged = tape.op("ScatterND", [pictures.embeddings, places, rows], name="merge")
    if keep_tokens is None:
        outputs = [merged, _all_indices(tape, input_ids)]
    else:
        hidden, found = merged, None
        if pictures.leading is not None and pictures.lengths is not None:
            found = run_layers(
                pictures.leading.pictures, merged, pictures.position_ids, *pictures.lengths
            )
            hidden = found.hidden
        scores = _scores(tape, pictures, merged, is_image, places, found)
        keep = keep_tokens
        if pictures.rule is not None:
            keep = _keep_by_rule(tape, pictures, scores, places, options, keep_tokens)
        outputs = _prune(tape, hidden, scores, is_image, options, keep)
        if found is not None:
            kept = outputs[1]
            lengths = _cache_lengths(tape, pictures.past_length, pictures.past, kept)
            normed, cos, sin, present = compacted(tape, found, kept, *lengths)
            outputs += [normed, cos, sin, *present]
        if options.prune.positions == "contiguous":
            outputs.append(_closed(tape, pictures, outputs[1], options))
    return _branch(tape, pictures, outputs)


def _branch(tape: Tape, pictures: _Pictures, outputs: Sequence[ir.Value]) -> ir.Graph:
    leading = [] if pictures.leading is None else pictures.leading.pictures.nodes
    return ir.Graph(
        [],
        outputs,
        # sorted in the end
        nodes=[*tape.nodes, *(node for part in pictures.parts for node in part.nodes), *leading],
        initializers=tape.initializers,
        name="picture",
    )


def _prune_in_tower(
    tape: Tape,
    pictures: _Pictures,
    tower_end: Part,
    is_image: ir.Value,
    places: ir.Value,
    options: GraphOptions,
    keep: ir.Value,
) -> list[ir.Value]:
    """Return what the decoder sees of text and pictures, its indices and, if closed, positions."""
    tower = Tower(
        tower_end,
        options.class_tokens,
        options.image_tokens,
        options.place_features,
        options.prune,
    )
    patches, *scores = pictures.vision.outputs
    features, tokens = kept_features(tape, tower, patches, scores[0] if scores else None, keep)
    outputs = placed_features(
        *(tape, pictures.embeddings, is_image, places, features, tokens),
        (options.image_tokens, options.hidden_size),
    )
    if options.prune.positions == "keep":
        return list(outputs)
    return [*outputs, _closed(tape, pictures, outputs[1], options)]


def _scores(
    tape: Tape,
    pictures: _Pictures,
    merged: ir.Value,
    is_image: ir.Value,
    places: ir.Value,
    found: Run | None,
) -> ir.Value | None:
    """Return the scores of all tokens, `(batch, sequence)`, or None where none are used."""
    if pictures.last_token is not None and found is not None:
        for value, given in zip(pictures.last_token.inputs, last_layer(found), strict=True):
            ir.convenience.replace_all_uses_with(value, given)
        return pictures.last_token.outputs[0]
    if pictures.text_scores is not None:
        for value, given in zip(pictures.text_scores.inputs, (merged, is_image), strict=True):
            ir.convenience.replace_all_uses_with(value, given)
        return pictures.text_scores.outputs[0]
    if len(pictures.vision.outputs) == 1:
        return None
    flat = tape.op("Reshape", [pictures.vision.outputs[1], vector(tape, [-1], "flat")])
    no_scores = tape.op(
        "ConstantOfShape",
        [tape.op("Shape", [pictures.input_ids])],
        {"value": ir.tensor(np.zeros(1, np.float32))},
    )
    return tape.op("ScatterND", [no_scores, places, flat])


def _keep_by_rule(
    tape: Tape,
    pictures: _Pictures,
    scores: ir.Value | None,
    places: ir.Value,
    options: GraphOptions,
    keep_tokens: ir.Value,
) -> ir.Value:
    """Return how many tokens of each picture are kept: `(batch, pictures of a row)`.

    `keep_tokens` is the most; all tokens or more switch the rule off. The first, second, ..
    pictures of all rows of a batch get the largest number among them: rows have equal lengths.
    """
    assert pictures.rule is not None
    assert scores is not None
    tokens = vector(tape, [-1, options.image_tokens], "of_pictures")
    of_pictures = tape.op("Reshape", [tape.op("GatherND", [scores, places]), tokens])
    ir.convenience.replace_all_uses_with(pictures.rule.inputs[0], of_pictures)
    counts = tape.op("Min", [pictures.rule.outputs[0], keep_tokens])
    image_tokens = scalar(tape, options.image_tokens, "all_tokens")
    is_off = tape.op("GreaterOrEqual", [keep_tokens, image_tokens])
    counts = tape.op("Where", [is_off, keep_tokens, counts])
    batch = tape.op("Shape", [pictures.input_ids], {"start": 0, "end": 1})
    rest = vector(tape, [-1], "pictures_of_a_row")
    rows = tape.op("Reshape", [counts, tape.op("Concat", [batch, rest], {"axis": 0})])
    most = tape.op("ReduceMax", [rows, vector(tape, [0], "over_rows")])
    return tape.op("Expand", [most, tape.op("Shape", [rows])])


def _prune(
    tape: Tape,
    merged: ir.Value,
    scores: ir.Value | None,
    is_image: ir.Value,
    options: GraphOptions,
    keep: ir.Value,
) -> list[ir.Value]:
    """Return what is left of `merged`, and its indices."""
    count = tape.op("Cast", [is_image], {"to": ir.DataType.INT32})
    running = tape.op("CumSum", [count, scalar(tape, 1, "sequence_axis")])
    minus_one = scalar(tape, -1, "text_segment", np.int32)
    before = tape.op("Add", [running, minus_one])
    image = tape.op("Div", [before, scalar(tape, options.image_tokens, "image_tokens", np.int32)])
    segments = tape.op("Where", [is_image, image, minus_one])
    metric = None
    if options.place_features is not None:
        table = initializer(tape, options.place_features, "prune/places")
        tokens = scalar(tape, options.image_tokens, "image_tokens", np.int32)
        metric = tape.op("Gather", [table, tape.op("Mod", [before, tokens])])
    prune = options.prune
    pruned, kept, _ = tape.op_multi_out(
        "TokenPrune",
        [merged, scores, segments, keep, metric],
        {"mode": prune.mode, "theta": prune.weight, "seed": prune.seed},
        num_outputs=3,
        domain=schemas.DOMAIN,
        name="prune",
    )
    return [pruned, kept]


def _closed(tape: Tape, pictures: _Pictures, kept: ir.Value, options: GraphOptions) -> ir.Value:
    return closed_positions(
        tape, pictures.position_ids, kept, options.position_axes, options.context
    )


def _text_branch(pictures: _Pictures, options: GraphOptions) -> ir.Graph:
    tape = Tape()
    if pictures.leading is not None and pictures.lengths is not None:
        found = run_layers(
            pictures.leading.text, pictures.embeddings, pictures.position_ids, *pictures.lengths
        )
        outputs = [
            found.hidden,
            _all_indices(tape, pictures.input_ids),
            *(found.normed, found.cos, found.sin),
            *found.present,
        ]
        nodes = [*tape.nodes, *pictures.leading.text.nodes]
        return ir.Graph([], outputs, nodes=nodes, initializers=tape.initializers, name="text")
    outputs = [
        tape.op("Identity", [pictures.embeddings]),
        _all_indices(tape, pictures.input_ids),
    ]
    if options.prune.is_active and options.prune.positions == "contiguous":
        outputs.append(tape.op("Identity", [pictures.position_ids]))
    return ir.Graph([], outputs, nodes=tape.nodes, initializers=tape.initializers, name="text")


def _all_indices(tape: Tape, input_ids: ir.Value) -> ir.Value:
    """Return 0 .. sequence - 1 in every row: int64 `(batch, sequence)`."""
    shape = tape.op("Shape", [input_ids])
    length = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])
    steps = tape.op("Range", [scalar(tape, 0, "start"), length, scalar(tape, 1, "step")])
    return tape.op("Expand", [steps, shape])


@dataclass(frozen=True, slots=True)
class _Pictures:
    """What the branch for pictures is made of.

    Attributes:
        vision: pixel_values to features, and scores where pictures have them.
        text_scores: Merged embeddings and where pictures are to scores, or None.
        rule: Scores of pictures to numbers of tokens, or None.
        last_token: Queries, keys and values of a layer to scores, or None.
        leading: Decoder layers before the pruning, or None.
        tower_end: Of the vision tower, behind the pruning, or None.
        pixel_values: Input of the graph.
        input_ids: Likewise.
        embeddings: Of the tokens, `(batch, sequence, hidden)`.
        position_ids: Input of the graph.
        past_length: Likewise.
        past: Likewise: keys of the first layer.
        lengths: Index of the last token and number of tokens with all of this run in the cache;
            None without `leading`.
    """

    vision: Part
    text_scores: Part | None
    rule: Part | None
    last_token: Part | None
    leading: Leading | None
    tower_end: Part | None
    pixel_values: ir.Value
    input_ids: ir.Value
    embeddings: ir.Value
    position_ids: ir.Value
    past_length: ir.Value
    past: ir.Value
    lengths: tuple[ir.Value, ir.Value] | None

    @property
    def parts(self) -> list[Part]:
        """What stands in the branch once."""
        found = (self.vision, self.tower_end, self.text_scores, self.rule, self.last_token)
        return [part for part in found if part is not None]


def _clean(model: ir.Model) -> ir.Model:
    """Drop what is not used and all metadata (the tracer records stack traces and local paths).

    Fused nodes keep the names of their layers.
    """
    fused = {
        node: node.metadata_props[LAYERS]
        for node in model.graph.all_nodes()
        if LAYERS in node.metadata_props
    }
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.TopologicalSortPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        model = step(model).model
    for node, layers in fused.items():
        node.metadata_props[LAYERS] = layers
    model.producer_version = None
    return model
