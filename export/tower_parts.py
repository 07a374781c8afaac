"""Patches that are dropped inside the vision tower: the tower's two parts, and what joins them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, nn

from bivlm_edge.config import PruneConfig
from bivlm_edge.export import schemas
from bivlm_edge.export.graph_pieces import Part, initializer, scalar, vector
from bivlm_edge.export.tracing import trace
from bivlm_edge.models import VisionLanguageModel, tower_pruning


class TowerStart(nn.Module):
    """pixel_values ``(images, 3, H, W)`` to patches, and scores where the mode has some."""

    def __init__(self, vlm: VisionLanguageModel, prune: PruneConfig) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule
        self._prune = prune

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return patches ``(images, patches, width)`` and scores ``(images, image_tokens)``."""
        prune = self._prune
        assert prune.vision_layer is not None
        patches, scores = tower_pruning.patches_inside(
            self._vlm[0], pixel_values, prune.vision_layer, prune.scores, prune.score_layer
        )
        return (patches,) if scores is None else (patches, scores)


class TowerEnd(nn.Module):
    """Patches ``(images, kept, width)`` to features ``(images, kept, hidden)``."""

    def __init__(self, vlm: VisionLanguageModel, layer: int) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]
        self._layer = layer

    def forward(self, patches: Tensor) -> Tensor:
        """Return the features of the patches, without the class token."""
        return tower_pruning.features_of(self._vlm[0], patches, self._layer)


def trace_tower(
    vlm: VisionLanguageModel, prune: PruneConfig, dtype: torch.dtype, opset: int
) -> tuple[ir.Model, ir.Model]:
    """Trace both parts; their inputs and outputs are those of TowerStart and TowerEnd."""
    assert prune.vision_layer is not None
    images = torch.export.Dim("images", min=1)
    outputs = ["patches"] if prune.scores == "none" else ["patches", "scores"]
    start = trace(
        TowerStart(vlm, prune).eval(),
        (torch.rand(2, *vlm.pixel_shape).to(dtype),),
        {"pixel_values": {0: images}},
        ["pixel_values"],
        outputs,
        opset,
        "vision tower",
    )
    width = int(vlm.module.config.vision_config.hidden_size)
    end = trace(
        TowerEnd(vlm, prune.vision_layer).eval(),
        (torch.rand(2, 5, width, dtype=dtype),),
        {"patches": {0: images, 1: torch.export.Dim("kept", min=2)}},
        ["patches"],
        ["features"],
        opset,
        "vision tower",
    )
    return start, end


@dataclass(frozen=True, slots=True)
class Tower:
    """What the graph knows of a tower that drops patches.

    Attributes:
        end: Of `TowerEnd`.
        class_tokens: Rows before the patches that are none.
        image_tokens: Patches of a picture.
        places: Features of their places ``(image_tokens, width)``, or None.
        prune: Which patches stay.
    """

    end: Part
    class_tokens: int
    image_tokens: int
    places: np.ndarray | None
    prune: PruneConfig


def kept_features(
    tape: Tape, tower: Tower, patches: ir.Value, scores: ir.Value | None, keep: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Drop patches; return features `(images, kept, hidden)`, and which tokens these are.

    The rest of the tower needs a patch: where none is kept, one runs through it and is left out.

    Args:
        tape: Takes the nodes.
        tower: The tower.
        patches: `(images, patches, width)`.
        scores: `(images, image_tokens)`, or None.
        keep: Tokens to keep, int64 scalar.

    Returns:
        Features, and int64 `(images, kept)`: numbers of their tokens in the picture.
    """
    first, tokens = tower.class_tokens, tower.image_tokens
    images = tape.op("Shape", [patches], {"start": 0, "end": 1})

    def of_all(value: ir.Value, *sizes: int) -> ir.Value:
        shape = tape.op("Concat", [images, vector(tape, list(sizes), "sizes")], {"axis": 0})
        return tape.op("Expand", [value, shape])

    row = np.array([-1] * first + [0] * tokens, np.int32)
    segments = of_all(initializer(tape, row, "prune/segments"), first + tokens)
    if scores is not None and first:
        pads = vector(tape, [0, first, 0, 0], "of_class_token")
        scores = tape.op("Pad", [scores, pads])
    metric = None
    if tower.places is not None:
        table = np.concatenate(
            [np.zeros((first, tower.places.shape[1]), tower.places.dtype), tower.places]
        )
        metric = of_all(initializer(tape, table, "prune/places"), *table.shape)
    least = tape.op("Max", [keep, scalar(tape, 1, "one_patch")])
    pruned, kept, _ = tape.op_multi_out(
        "TokenPrune",
        [patches, scores, segments, least, metric],
        {"mode": tower.prune.mode, "theta": tower.prune.weight, "seed": tower.prune.seed},
        num_outputs=3,
        domain=schemas.DOMAIN,
        name="prune",
    )
    ir.convenience.replace_all_uses_with(tower.end.inputs[0], pruned)
    start, axis = vector(tape, [first], "behind_class"), vector(tape, [1], "patch_axis")
    kept = tape.op("Sub", [kept, scalar(tape, first, "class_tokens")])
    wanted = tape.op("Unsqueeze", [keep, vector(tape, [0], "first_axis")])
    end = tape.op("Add", [wanted, start])
    features = tape.op("Slice", [tower.end.outputs[0], vector(tape, [0], "no_patch"), wanted, axis])
    return features, tape.op("Slice", [kept, start, end, axis])


def placed_features(
    tape: Tape,
    embeddings: ir.Value,
    is_image: ir.Value,
    places: ir.Value,
    features: ir.Value,
    tokens: ir.Value,
    sizes: tuple[int, int],
) -> tuple[ir.Value, ir.Value]:
    """Return the text with the kept features in it, `(B, kept, hidden)`, and its indices.

    Args:
        tape: Takes the nodes.
        embeddings: Of all tokens `(B, S, hidden)`.
        is_image: bool `(B, S)`.
        places: Row and column of each image token, int64 `(images * image_tokens, 2)`.
        features: `(images, kept, hidden)`.
        tokens: Their numbers in each picture, int64 `(images, kept)`.
        sizes: Tokens of a picture, width of the features.
    """
    image_tokens, width = sizes
    images = tape.op("Shape", [tokens], {"start": 0, "end": 1})
    of_picture = vector(tape, [image_tokens], "of_a_picture")
    shape = tape.op("Concat", [images, of_picture], {"axis": 0})
    none = tape.op("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.int32))})
    one = scalar(tape, 1, "is_kept", np.int32)
    ones = tape.op("Expand", [one, tape.op("Shape", [tokens])])
    chosen = tape.op("ScatterElements", [none, tokens, ones], {"axis": 1})
    flat = tape.op("Reshape", [chosen, vector(tape, [-1], "flat_tokens")])
    text = tape.op("Cast", [tape.op("Not", [is_image])], {"to": ir.DataType.INT32})
    stays = tape.op("ScatterND", [text, places, flat])
    columns = tape.op(
        "Gather", [tape.op("NonZero", [stays]), scalar(tape, 1, "column")], {"axis": 0}
    )
    batch = tape.op("Shape", [is_image], {"start": 0, "end": 1})
    rest = vector(tape, [-1], "kept_of_a_row")
    kept = tape.op("Reshape", [columns, tape.op("Concat", [batch, rest], {"axis": 0})])
    at = tape.op("Unsqueeze", [kept, vector(tape, [-1], "index_axis")])
    left = tape.op("GatherND", [embeddings, at], {"batch_dims": 1})
    left_images = tape.op("GatherND", [is_image, at], {"batch_dims": 1})
    targets = tape.op("Transpose", [tape.op("NonZero", [left_images])], {"perm": [1, 0]})
    rows = tape.op("Reshape", [features, vector(tape, [-1, width], "feature_rows")])
    return tape.op("ScatterND", [left, targets, rows]), kept
