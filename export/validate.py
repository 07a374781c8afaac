"""Compare an exported graph with the quantized model in torch before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from bivlm_edge import custom_ops_library
from bivlm_edge.config import ExportConfig
from bivlm_edge.errors import ValidationError
from bivlm_edge.export.oracle import Sample, TorchOracle
from bivlm_edge.models import VisionLanguageModel

NEW_TOKENS = 4
# Relative error of the logits (L2 over a step) that a correct export stays under. Int8 activations
# of BinaryMatMul cost about 0.6 % per layer and add up over the depth; float graphs differ only by
# the order of summation (float32) or by rounding to 11 bits (float16,
# which may be the KV cache alone).
BOUNDS = {("none", "fp32"): 1e-3, ("none", "fp16"): 5e-2}
QUANTIZED_BOUND = 0.15
# Int8 rounding moves features by about 1 %, which tips near-ties of the selection.
MIN_KEPT_SAME = 0.9
# How much farther a picture's tokens may be from those that a spreading mode keeps than in torch.
MAX_FARTHER = 1.25
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
RUNTIME_ERRORS = (
    runtime_errors.Fail,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidArgument,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NoSuchFile,
    runtime_errors.EPFail,
    RuntimeError,  # what run_with_iobinding raises
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one way of running the file compares with torch.

    Attributes:
        runtime: "onnxruntime with the library" or "onnxruntime without the library".
        logits_error: Largest relative L2 error of a step's logits.
        bound: What it had to stay under.
        tokens: Greedy tokens compared.
        near_ties: Tokens that differ where torch's own two best are closer than the measured
            error of that step.
        kept_same: Share of the tokens kept by pruning that torch keeps too.
    """

    runtime: str
    logits_error: float
    bound: float
    tokens: int
    near_ties: int
    kept_same: float


@dataclass(frozen=True, slots=True)
class _Run:
    logits: NDArray[np.float32]  # (steps, vocab)
    kept: NDArray[np.int64]
    tokens: list[int]


class OnnxRunner:
    """One session on the exported file, fed by name."""

    def __init__(self, path: Path, *, with_library: bool, contiguous: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if with_library:
            options.register_custom_ops_library(custom_ops_library())
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._contiguous = contiguous
        self._outputs = [output.name for output in self._session.get_outputs()]
        inputs = {value.name: value for value in self._session.get_inputs()}
        pixels = inputs["pixel_values"]
        self._dtype = NUMPY_TYPES[pixels.type]
        self._no_pixels = np.zeros((0, *pixels.shape[1:]), self._dtype)
        self._past = {
            name: (value.shape[1], value.shape[3], NUMPY_TYPES[value.type])
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }

    def run(self, sample: Sample, steps: int, *, in_place: bool) -> _Run:
        """Prefill and decode greedily.

        Args:
            sample: Prompt and picture.
            steps: Tokens.
            in_place: Keep keys and values in buffers that each run writes into; otherwise each
                run returns new tensors, exactly filled.
        """
        length = sample.input_ids.shape[1]
        room = length + steps if in_place else 0
        cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, room, width), kind))
            for name, (heads, width, kind) in self._past.items()
        }
        feed: dict[str, NDArray[Any]] = {
            "input_ids": sample.input_ids.numpy(),
            "pixel_values": sample.pixel_values.numpy().astype(self._dtype),
            "position_ids": sample.position_ids.numpy(),
        }
        logits, tokens = [], []
        kept = np.zeros(0, np.int64)
        for step in range(steps):
            if in_place:
                filled = len(kept) + step - 1 if step else 0
                feed["past_length"] = np.array(filled)
            found = self._run(feed, cache, in_place=in_place)
            logits.append(found["logits"].numpy()[0, -1].astype(np.float32))
            tokens.append(int(logits[-1].argmax()))
            if step == 0:
                kept = found["kept_indices"].numpy()[0]
                _, following = sample.placed(kept, contiguous=self._contiguous)
            feed = {
                "input_ids": np.array([[tokens[-1]]]),
                "pixel_values": self._no_pixels,
                "position_ids": (following + step).numpy(),
            }
            if not in_place:
                cache = {name: found[_present(name)] for name in cache}
        return _Run(np.stack(logits), kept, tokens)

    def _run(
        self,
        feed: Mapping[str, NDArray[Any]],
        cache: Mapping[str, onnxruntime.OrtValue],
        *,
        in_place: bool,
    ) -> dict[str, onnxruntime.OrtValue]:
        binding = self._session.io_binding()
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.require(array, requirements="C"))
            for name, array in feed.items()
        }
        for name, value in (*values.items(), *cache.items()):
            binding.bind_ortvalue_input(name, value)
        buffers = {_present(name): value for name, value in cache.items()} if in_place else {}
        for name in self._outputs:
            if name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def ways_to_run(has_custom_ops: bool, fallback: str) -> dict[str, bool]:
    """Return the names of the ways to run a file, and whether each registers the library."""
    if not has_custom_ops:
        return {"onnxruntime": False}
    ways = {"onnxruntime with the library": True}
    if fallback != "none":
        ways["onnxruntime without the library"] = False
    return ways


def validate(
    path: Path,
    vlm: VisionLanguageModel,
    config: ExportConfig,
    samples: Sequence[Sample],
    ways: Mapping[str, bool],
) -> list[Comparison]:
    """Run the file in each way against torch.

    Each way decodes greedily; torch then computes the logits for the same kept image tokens and
    the same tokens, so that one rounding that tips a tie is seen as what it is.

    Args:
        path: The graph; its data file lies beside it.
        vlm: The quantized model: its float weights hold the dequantized values.
        config: How the file was made.
        samples: Real prompts and pictures; each is prefilled and NEW_TOKENS are decoded.
        ways: As `ways_to_run` gives them.

    Raises:
        ValidationError: A run fails, its logits leave the bound, a greedy token differs from
            torch's that is not a near-tie, or too many kept image tokens differ.
    """
    oracle = TorchOracle(vlm, config)
    bound = BOUNDS.get((config.quant.method, config.kv_cache), QUANTIZED_BOUND)
    comparisons = []
    for name, with_library in ways.items():
        try:
            runner = OnnxRunner(
                path,
                with_library=with_library,
                contiguous=config.prune.positions == "contiguous",
            )
            runs, runs_in_place = (
                [runner.run(sample, NEW_TOKENS, in_place=in_place) for sample in samples]
                for in_place in (False, True)
            )
        except RUNTIME_ERRORS as error:
            raise ValidationError(f"{name} cannot run the exported graph: {error}") from error
        _require_same(name, runs, runs_in_place, BOUNDS["none", config.dtype])
        comparisons.append(_compare(name, runs, samples, oracle, bound, config))
    return comparisons


def _require_same(
    name: str, runs: Sequence[_Run], runs_in_place: Sequence[_Run], bound: float
) -> None:
    """Check that buffers written in place give what tensors returned anew do.

    Both are the same kernels on the same numbers, whatever the weights: float bounds hold.
    """
    for index, (run, other) in enumerate(zip(runs, runs_in_place, strict=True)):
        spread = np.linalg.norm(run.logits - run.logits.mean(axis=1, keepdims=True), axis=1)
        errors = np.linalg.norm(run.logits - other.logits, axis=1) / spread
        is_same = np.array_equal(run.kept, other.kept) and run.tokens == other.tokens
        if not (is_same and errors.max() <= bound):  # also catches NaN
            raise ValidationError(
                f"{name}: with the KV cache written in place sample {index} gives the tokens "
                f"{other.tokens} instead of {run.tokens}, logits differ by {errors.max():.2e} of "
                f"their spread; the bound is {bound:g}. No file was written."
            )


def _least_same(config: ExportConfig) -> float:
    """Return the share of kept tokens that must be torch's.

    By places a score only breaks the ties of a regular grid: from the first one on that rounded
    scores break otherwise, the greedy choice keeps other tokens, spread as well. Such a choice is
    held to torch's by number, by how well it covers the picture and by the logits of the tokens
    that it keeps; float exports hold the selection itself.
    """
    is_exact = config.quant.method == "none" and config.dtype == "fp32"
    follows_ties = config.prune.spreads and config.prune.scores != "none"
    return 0.0 if follows_ties and not is_exact else MIN_KEPT_SAME


def _require_cover(
    where: str,
    oracle: TorchOracle,
    sample: Sample,
    found: NDArray[np.int64],
    wanted: NDArray[np.int64],
) -> None:
    """Check that kept tokens cover the picture about as well as those that torch keeps."""
    uncovered, least = oracle.uncovered(sample, found), oracle.uncovered(sample, wanted)
    if uncovered > MAX_FARTHER * least:
        raise ValidationError(
            f"{where}: the tokens that are kept leave {uncovered:.4f} of the picture uncovered "
            f"(mean of 1 - cosine to the nearest kept place), torch's {least:.4f}; up to "
            f"{MAX_FARTHER} times as much is accepted. No file was written."
        )


def _compare(
    name: str,
    runs: Sequence[_Run],
    samples: Sequence[Sample],
    oracle: TorchOracle,
    bound: float,
    config: ExportConfig,
) -> Comparison:
    worst, near_ties, tokens = 0.0, 0, 0
    kept_same = kept_all = 0
    for index, (run, sample) in enumerate(zip(runs, samples, strict=True)):
        kept = oracle.kept(sample)
        # near the share of a rule one rounding is one token
        if config.prune.mass is None and len(kept) != len(run.kept):
            raise ValidationError(
                f"{name} keeps {len(run.kept)} tokens of sample {index}, torch keeps {len(kept)}. "
                "No file was written."
            )
        if config.prune.mass is None and config.prune.spreads:
            _require_cover(f"{name}: sample {index}", oracle, sample, run.kept, kept)
        kept_same += len(np.intersect1d(kept, run.kept))
        kept_all += max(len(kept), len(run.kept))
        logits = oracle.run(sample, run.kept, run.tokens)
        spread = np.linalg.norm(logits - logits.mean(axis=1, keepdims=True), axis=1)
        errors = np.linalg.norm(run.logits - logits, axis=1) / spread
        if not errors.max() <= bound:  # also catches NaN
            raise ValidationError(
                f"{name}: logits of sample {index}, step {int(errors.argmax())} differ from torch "
                f"by {errors.max():.2e} of their spread; the bound is {bound:g}. "
                "No file was written."
            )
        worst = max(worst, float(errors.max()))
        for step, (token, row) in enumerate(zip(run.tokens, logits, strict=True)):
            tokens += 1
            if token == row.argmax():
                continue
            # two logits that both moved by no more than this step's own error can change places
            margin = float(row.max() - row[token])
            if margin > 2 * errors[step] * spread[step]:
                raise ValidationError(
                    f"{name}: sample {index}, step {step}: token {token} instead of torch's "
                    f"{int(row.argmax())} (margin {margin:.3f}). No file was written."
                )
            near_ties += 1
    same = kept_same / kept_all
    least_same = _least_same(config)
    if same < least_same:
        raise ValidationError(
            f"{name} and torch agree on only {same:.0%} of the tokens that pruning keeps; "
            f"{least_same:.0%} are expected. No file was written."
        )
    return Comparison(name, worst, bound, tokens, near_ties, same)
