"""Fine-tune a quantized model on calibration data: what its packed format leaves open."""

from bivlm_edge.tuning.tune import (
    TuningReport,
    check_tunable,
    drawn_batches,
    drawn_items,
    quantize_and_tune,
    tune_model,
)

__all__ = [
    "TuningReport",
    "check_tunable",
    "drawn_batches",
    "drawn_items",
    "quantize_and_tune",
    "tune_model",
]
