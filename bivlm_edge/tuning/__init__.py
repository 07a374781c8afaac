"""Fine-tune a quantized model on calibration data: what its packed format leaves open."""
