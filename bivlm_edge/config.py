"""What a user may choose, checked when it is made. Plain values: no torch, no onnx."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import check_fraction
from bivlm_edge.quant import methods

Grid = Literal["minmax", "lloyd"]
Importance = Literal["none", "vlmq", "loss"]
Device = Literal["cpu", "cuda"]
Tuning = Literal["none", "blocks", "end-to-end", "both"]
PruneMode = Literal["mmr", "maxmin", "topk_score", "dpp", "coverage", "uniform", "random"]
PruneScore = Literal["attention", "distance", "norm", "text", "last-token", "none"]
PruneMetric = Literal["features", "places"]
PositionMode = Literal["keep", "contiguous"]
Fallback = Literal["nbits", "dense", "none"]
Dtype = Literal["fp32", "fp16"]

METHODS = (*methods.names(), "none")
GRIDS: tuple[str, ...] = get_args(Grid)
IMPORTANCES: tuple[str, ...] = get_args(Importance)
STAGES = methods.declaration("bivlm-edge").stages
DEVICES: tuple[str, ...] = get_args(Device)
TUNINGS: tuple[str, ...] = get_args(Tuning)
PRUNE_MODES: tuple[str, ...] = get_args(PruneMode)
PRUNE_SCORES: tuple[str, ...] = get_args(PruneScore)
PICTURE_SCORES = ("attention", "distance", "norm")  # what the vision tower gives
PRUNE_METRICS: tuple[str, ...] = get_args(PruneMetric)
POSITION_MODES: tuple[str, ...] = get_args(PositionMode)
FALLBACKS: tuple[str, ...] = get_args(Fallback)
DTYPES: tuple[str, ...] = get_args(Dtype)
OPSETS = (21, 22, 23)
DEFAULT_BITS = 2.0
VOCABULARY_BITS = (8, 4)
DEFAULT_VOCABULARY_BITS = 8
SCORELESS_MODES = ("uniform", "random")
SCORE_MODES = ("mmr", "topk_score")  # of the others scores are optional
SIMILARITY_MODES = ("mmr", "maxmin", "dpp", "coverage")
THETA_MODES = ("mmr", "dpp")
# What measured best on easy-VQA's validation pictures at a tenth of the tokens (docs/RESULTS.md).
DEFAULT_SCORES: dict[str, PruneScore] = {"mmr": "distance", "topk_score": "attention"}
DEFAULT_SCORE_LAYER = -2
DEFAULT_METRIC: PruneMetric = "places"
DEFAULT_TOLERANCE = 1.0  # points of accuracy


_READ_BY_TUNINGS: dict[str, tuple[str, ...]] = {
    "tune_signs": ("blocks", "end-to-end", "both"),
    "tune_epochs": ("blocks", "both"),
    "tune_steps": ("end-to-end", "both"),
    "tune_samples": ("blocks", "end-to-end", "both"),
    "tune_rate": ("blocks", "end-to-end", "both"),
}


def _require_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        accepted = ", ".join(str(choice) for choice in choices)
        raise RequestError(f"{option} {value!r} is not known. Accepted: {accepted}.")


def _check_bits(bits: float, method: str) -> None:
    declared = methods.declaration(method)
    if declared.bit_range and not declared.bit_range[0] <= bits <= declared.bit_range[1]:
        least, most = declared.bit_range
        raise RequestError(
            f"--bits {bits:g} is outside {least:g} to {most:g}: every weight has at least one sign "
            "bit plus its share of the scales. Choose a value in that range."
        )
    if declared.bits and bits not in declared.bits:
        raise RequestError(
            f"--bits {bits:g} does not go with --method {method}, which stores whole codes of "
            f"{_listed(declared.bits)} bits. Choose one of these, or --method bivlm-edge."
        )


def takes_bits(method: str) -> bool:
    """Whether a method's bits can be chosen."""
    if method == "none":
        return False
    declared = methods.declaration(method)
    return bool(declared.bits or declared.bit_range)


def check_bits_are_read(method: str, bits: float | None) -> None:
    """Refuse bits given to a method that has its own; None: not given.

    Raises:
        RequestError: They would be ignored, or the method is not known.
    """
    _require_choice("--method", method, METHODS)
    if bits is not None and not takes_bits(method):
        raise RequestError(
            f"--bits {bits:g} does not go with --method {method}, which has bits of its own. "
            "Leave it out, or choose --method bivlm-edge."
        )


def check_vocabulary_bits(bits: int) -> None:
    """Refuse bits that the token table and the head cannot have.

    Raises:
        RequestError: They are not one of VOCABULARY_BITS.
    """
    _require_choice("--vocabulary-bits", bits, VOCABULARY_BITS)


def _check_operator(quant: QuantConfig) -> None:
    """Refuse codes of a width that the exported graph has no operator for."""
    declared = methods.declaration(quant.method)
    if declared.bits and quant.bits not in declared.exported_bits:
        raise RequestError(
            f"--bits {quant.bits:g} with --method {quant.method} cannot be exported: ONNX Runtime "
            f"has no operator for such codes. Choose {_listed(declared.exported_bits)}, or "
            "--method bivlm-edge."
        )


def _listed(values: tuple[float, ...]) -> str:
    *first, last = (f"{value:g}" for value in values)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How the linear layers are quantized.

    Attributes:
        method: One of METHODS. `none` keeps float weights.
        bits: True bits per weight over all quantized layers for `bivlm-edge` (1.0 to 4.0), code
            bits for `gptq` and `rtn` (2, 3, 4 or 8; 3 cannot be exported); the other methods have
            their own and ignore it. What a method accepts is declared in its file
            (`quant/methods`).
        seed: Seed of the Hadamard signs and of everything else that is drawn.
        calibration_samples: Image and prompt pairs that calibrate the Hessians.
        grid: `gptq`: `minmax`, an affine grid per group, or `lloyd`, a codebook per row (compared,
            not deployed).
        n_uns: `bivlm-paper`: number of unsalient groups, 1 to 6.
        paper_exact: `bivlm-paper`: salient codes by equation 14 as printed.
        importance: How much each token counts in the Hessians: `none`, all alike; `vlmq`, by the
            gradient of each attention block's error; `loss`, by that of the answer. None: the
            method's own, `loss` for `bivlm-edge`, `none` for all others.
        device: Where calibration inputs run through the model, one of DEVICES; all else runs on
            the processor.
        vocabulary_bits: Bits of the token table's and the head's codes, 8 or 4; they are counted
            apart from `bits`.
        without: Names of STAGES that are switched off; kept sorted.
        tune: How coefficients, norms and biases are trained on the calibration samples after
            quantization: each block towards the outputs of the float block, all of them towards
            the float model's answers, or one after the other; one of TUNINGS.
        tune_signs: Train the signs of the planes as well.
        tune_epochs: Passes over the samples per block.
        tune_steps: Steps end to end, each of up to four batches (about 2,048 tokens).
        tune_samples: Samples to tune on and judge by; None: the calibration samples.
        tune_rate: Factor on all learning rates of fine-tuning.
    """

    method: str = "bivlm-edge"
    bits: float = DEFAULT_BITS
    seed: int = 0
    calibration_samples: int = 512
    grid: Grid = "minmax"
    n_uns: int = 5
    paper_exact: bool = False
    importance: str | None = None
    device: Device = "cpu"
    vocabulary_bits: int = DEFAULT_VOCABULARY_BITS
    without: Collection[str] = ()
    tune: Tuning = "none"
    tune_signs: bool = False
    tune_epochs: int = 2
    tune_steps: int = 200
    tune_samples: int | None = None
    tune_rate: float = 1.0

    def __post_init__(self) -> None:
        _require_choice("--method", self.method, METHODS)
        object.__setattr__(self, "without", tuple(sorted(set(self.without))))
        if self.method != "none":
            _check_bits(self.bits, self.method)
        self._check_importance()
        self._check_without()
        if self.calibration_samples < 1:
            raise RequestError(
                f"calibration needs at least one sample, got {self.calibration_samples}."
            )
        _require_choice("--grid", self.grid, GRIDS)
        _require_choice("--device", self.device, DEVICES)
        self._check_vocabulary()
        if not 1 <= self.n_uns <= 6:
            raise RequestError(
                f"--n-uns {self.n_uns} is outside 1 to 6, the numbers of unsalient groups that "
                "Bi-VLM has. Choose one of these."
            )
        self._check_owner("grid", self.grid, "minmax")
        self._check_owner("n_uns", self.n_uns, 5)
        self._check_owner("paper_exact", self.paper_exact, False)
        self._check_tuning()

    def _check_owner(self, option: str, value: object, default: object) -> None:
        """Refuse an option that the method would not read."""
        owners = [name for name in methods.names() if option in methods.declaration(name).options]
        if value != default and self.method not in owners:
            raise RequestError(
                f"--{option.replace('_', '-')} does not go with --method {self.method}, which does "
                f"not read it. Leave it out, or choose --method {' or '.join(owners)}."
            )

    @property
    def token_weights(self) -> str:
        """The kind of importance that is used, one of IMPORTANCES."""
        if self.importance is not None:
            return self.importance
        needs = frozenset() if self.method == "none" else methods.declaration(self.method).needs
        return "loss" if "importance" in needs and "importance" not in self.without else "none"

    def _check_vocabulary(self) -> None:
        check_vocabulary_bits(self.vocabulary_bits)
        if self.method == "none" and self.vocabulary_bits != DEFAULT_VOCABULARY_BITS:
            raise RequestError(
                f"--vocabulary-bits {self.vocabulary_bits} does not go with --method none, which "
                "keeps all weights in float. Leave it out, or choose another method."
            )

    def _check_importance(self) -> None:
        if self.importance in (None, "none"):
            return
        _require_choice("--importance", self.importance, IMPORTANCES)
        weighable = [
            name for name in methods.names() if "hessian" in methods.declaration(name).needs
        ]
        if self.method not in weighable:
            raise RequestError(
                f"--importance {self.importance} weighs tokens in Hessians, which --method "
                f"{self.method} does not use. Leave it out, or choose {', '.join(weighable)}."
            )
        if "importance" in self.without:
            raise RequestError(
                f"--importance {self.importance} and --without importance exclude each other. "
                "Give one of them."
            )

    def _check_without(self) -> None:
        stages = () if self.method == "none" else methods.declaration(self.method).stages
        for name in self.without:
            if name not in stages:
                accepted = f"Stages: {', '.join(stages)}." if stages else "It has none."
                raise RequestError(
                    f"--without {name} names no stage of --method {self.method}. {accepted}"
                )

    def _check_tuning(self) -> None:
        _require_choice("--tune", self.tune, TUNINGS)
        for option, value in (
            ("--tune-epochs", self.tune_epochs),
            ("--tune-steps", self.tune_steps),
            ("--tune-samples", self.tune_samples),
        ):
            if value is not None and value < 1:
                raise RequestError(
                    f"{option} {value} is below 1. Use --tune none to train nothing."
                )
        if not 0.0 < self.tune_rate < math.inf:
            raise RequestError(
                f"--tune-rate {self.tune_rate:g} is not a positive factor; 1 is the usual rate."
            )
        self._check_owner("tune", self.tune, "none")
        for field, tunings in _READ_BY_TUNINGS.items():
            value = getattr(self, field)
            if value != QuantConfig.__dataclass_fields__[field].default and (
                self.tune not in tunings
            ):
                raise RequestError(
                    f"--{field.replace('_', '-')} has no effect with --tune {self.tune}. Leave it "
                    f"out, or choose --tune {' or '.join(tunings)}."
                )


@dataclass(frozen=True, slots=True)
class PruneConfig:
    """Which image tokens reach the decoder.

    Attributes:
        mode: One of PRUNE_MODES.
        keep_ratio: Fraction of each image's tokens that is kept unless a run asks for another
            number, 0 < ratio <= 1; 1 keeps all and puts no TokenPrune into the graph.
        theta: `mmr`, `dpp`: weight of the score against similarity, 0 to 1. None: the mode's own.
        seed: `random` only.
        score: What makes a token important (models/saliency.py), one of PRUNE_SCORES: attention
            received in the vision tower, distance from the picture's mean token or norm of the
            projected features, nearness to the question, or (with `layer`) attention received from
            the last token in the layer before. None: the mode's own.
        score_layer: `attention`: block of the vision tower, counted from the last that runs if
            below 0.
        metric: What makes tokens alike, one of PRUNE_METRICS: their features, or their places in
            the picture (models/places.py), so that kept tokens spread over it. None: places.
        keep_rule: `mass:SHARE` keeps of each picture as many tokens as the largest scores need to
            reach that share of their sum, but no more than `keep_ratio` says. None: always as
            many as that.
        positions: One of POSITION_MODES: kept tokens keep their positions, or close the gaps of
            dropped ones (`positions.without_gaps`).
        layer: Decoder layer before which tokens are dropped; those before it see all. 0: before the
            decoder.
        vision_layer: Block of the vision tower behind which patches are dropped: what follows, the
            projector and the decoder see the rest alone. None: the tower sees all.
        tolerance: Points of accuracy that may be lost: the export finds the smallest ratio that
            loses no more on validation data, and `keep_ratio` becomes that. None: `keep_ratio` is
            given.
    """

    mode: PruneMode = "mmr"
    keep_ratio: float = 1.0
    theta: float | None = None
    seed: int = 0
    score: PruneScore | None = None
    score_layer: int = DEFAULT_SCORE_LAYER
    metric: PruneMetric | None = None
    keep_rule: str | None = None
    positions: PositionMode = "keep"
    layer: int = 0
    vision_layer: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        _require_choice("--prune-mode", self.mode, PRUNE_MODES)
        check_fraction(self.keep_ratio)
        if self.tolerance is not None and not 0 < self.tolerance < 100:
            raise RequestError(
                f"--tolerance {self.tolerance:g} is not between 0 and 100 points of accuracy."
            )
        self._check_score()
        self._check_metric()
        self._check_theta()
        self._check_rule()
        self._check_layer()
        self._check_vision_layer()
        _require_choice("--positions", self.positions, POSITION_MODES)
        if self.positions != "keep" and not self.is_active:
            raise RequestError(
                f"--positions {self.positions} changes nothing without pruning. Leave it out, or "
                "add --keep-tokens 0.5 (any fraction below 1)."
            )

    def _check_score(self) -> None:
        if self.score is not None:
            _require_choice("--prune-score", self.score, PRUNE_SCORES)
        if self.mode in SCORELESS_MODES and self.score not in (None, "none"):
            raise RequestError(
                f"--prune-score {self.score} does not go with --prune-mode {self.mode}, which "
                "goes by no score. Leave it out, or choose another mode."
            )
        if self.mode in SCORE_MODES and self.score == "none":
            accepted = ", ".join(score for score in PRUNE_SCORES if score != "none")
            raise RequestError(
                f"--prune-score none does not go with --prune-mode {self.mode}, which goes by a "
                f"score. Choose {accepted}, or another mode."
            )
        if self.score_layer != DEFAULT_SCORE_LAYER and self.scores != "attention":
            raise RequestError(
                f"--score-layer {self.score_layer} is read by --prune-score attention alone; the "
                f"score here is '{self.scores}'. Leave it out."
            )

    def _check_metric(self) -> None:
        if self.metric is None:
            return
        _require_choice("--prune-metric", self.metric, PRUNE_METRICS)
        if self.mode not in SIMILARITY_MODES:
            raise RequestError(
                f"--prune-metric {self.metric} does not go with --prune-mode {self.mode}, which "
                f"compares no tokens. Leave it out, or choose {', '.join(SIMILARITY_MODES)}."
            )

    def _check_theta(self) -> None:
        if self.theta is None:
            return
        if not 0.0 <= self.theta <= 1.0:
            raise RequestError(f"--prune-theta {self.theta:g} is outside 0 to 1.")
        if self.mode not in THETA_MODES:
            raise RequestError(
                f"--prune-theta {self.theta:g} has no effect with --prune-mode {self.mode}. Leave "
                f"it out, or choose {' or '.join(THETA_MODES)}."
            )

    def _check_rule(self) -> None:
        if self.keep_rule is None:
            return
        share = self.mass
        if share is None or not 0.0 < share < 1.0:
            raise RequestError(
                f"--keep-rule {self.keep_rule!r} is no rule. Give mass:SHARE, a share of the "
                "scores between 0 and 1, e.g. mass:0.9."
            )
        if not self.is_active:
            raise RequestError(
                f"--keep-rule {self.keep_rule} needs --keep-tokens below 1, the most that it may "
                "keep of a picture. Add e.g. --keep-tokens 0.5."
            )
        if self.tolerance is not None:
            raise RequestError(
                f"--keep-rule {self.keep_rule} does not go with --keep-tokens auto, which measures "
                "one number of tokens for all pictures. Leave the rule out, or give --keep-tokens "
                "a fraction, the most that the rule may keep."
            )
        if self.scores == "none":
            raise RequestError(
                f"--keep-rule {self.keep_rule} counts scores, and --prune-mode {self.mode} has "
                "none here. Add --prune-score, or choose mmr or topk_score."
            )

    def _check_layer(self) -> None:
        if self.layer < 0:
            raise RequestError(
                f"--prune-layer {self.layer} is below 0. 0 drops tokens before the decoder, 2 "
                "before its layer 2 (the third)."
            )
        if self.scores == "last-token" and self.layer == 0:
            raise RequestError(
                "--prune-score last-token is the attention in the decoder layer before the "
                "pruning, and --prune-layer 0 has none before it. Add --prune-layer 1 or more."
            )
        if self.layer == 0:
            return
        if not self.is_active:
            raise RequestError(
                f"--prune-layer {self.layer} changes nothing without pruning. Leave it out, or add "
                "--keep-tokens 0.5 (any fraction below 1)."
            )
        if self.positions != "keep":
            raise RequestError(
                f"--positions {self.positions} does not go with --prune-layer {self.layer}: the "
                "layers before it have seen all tokens at their own positions. Leave one of them "
                "out."
            )

    def _check_vision_layer(self) -> None:
        if self.vision_layer is None:
            return
        option = f"--prune-vision-layer {self.vision_layer}"
        if self.vision_layer < 0:
            raise RequestError(
                f"{option} is below 0. 0 drops patches behind the first block of the vision tower."
            )
        if not self.is_active:
            raise RequestError(
                f"{option} changes nothing without pruning. Leave it out, or add "
                "--keep-tokens 0.5 (any fraction below 1)."
            )
        if self.layer > 0:
            raise RequestError(
                f"{option} and --prune-layer {self.layer} are two places. Give one of them."
            )
        if self.scores in ("text", "last-token"):
            raise RequestError(
                f"--prune-score {self.scores} does not go with {option}: the vision tower does "
                "not see the text. Choose attention, distance or norm."
            )
        if self.keep_rule is not None:
            raise RequestError(
                f"--keep-rule {self.keep_rule} does not go with {option}: the pictures of a run "
                "go through the tower together, with equally many patches. Leave one of them out."
            )

    @property
    def mass(self) -> float | None:
        """The share of `keep_rule`; None without one."""
        kind, _, share = (self.keep_rule or "").partition(":")
        try:
            return float(share) if kind == "mass" else None
        except ValueError:
            return None

    @property
    def weight(self) -> float:
        """The theta that is used."""
        if self.theta is not None:
            return self.theta
        return 0.1 if self.mode == "mmr" and self.spreads else 0.5

    @property
    def spreads(self) -> bool:
        """Whether tokens are compared by their places."""
        return self.mode in SIMILARITY_MODES and (self.metric or DEFAULT_METRIC) == "places"

    @property
    def scores(self) -> PruneScore:
        """The score that is used."""
        if self.score is not None:
            return self.score
        return DEFAULT_SCORES.get(self.mode, "none")

    @property
    def is_active(self) -> bool:
        """Whether the graph gets a TokenPrune node."""
        return self.keep_ratio < 1.0 or self.tolerance is not None


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Everything that shapes the exported file; stored in the manifest.

    Attributes:
        dtype: Of activations, pixels and logits.
        kv_cache_dtype: Of keys and values; None: as `kv_cache` says.
    """

    quant: QuantConfig = QuantConfig()
    prune: PruneConfig = PruneConfig()
    dtype: Dtype = "fp32"
    fallback: Fallback = "nbits"
    opset: int = 23
    kv_cache_dtype: Dtype | None = None

    def __post_init__(self) -> None:
        _require_choice("--dtype", self.dtype, DTYPES)
        if self.kv_cache_dtype is not None:
            _require_choice("--kv-cache", self.kv_cache_dtype, DTYPES)
        if self.kv_cache_dtype == "fp32" and self.dtype == "fp16":
            raise RequestError(
                "--kv-cache fp32 is wider than the activations of --dtype fp16. Leave one of them "
                "out."
            )
        _require_choice("--fallback", self.fallback, FALLBACKS)
        _require_choice("--opset", self.opset, OPSETS)
        if self.quant.method != "none":
            _check_operator(self.quant)
        if self.prune.is_active and self.prune.mode == "random" and self.fallback != "none":
            raise RequestError(
                "--prune-mode random has no form in standard operators. "
                "Add --fallback none (the file then needs the operator library), or another mode."
            )

    @property
    def kv_cache(self) -> Dtype:
        """Type of keys and values: float16, but that of the activations in float models."""
        if self.kv_cache_dtype is not None:
            return self.kv_cache_dtype
        return self.dtype if self.quant.method == "none" else "fp16"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return asdict(self)
