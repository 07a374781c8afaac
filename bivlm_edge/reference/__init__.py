"""The bundled reference model: a small LLaVA-class checkpoint trained on easy-VQA."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the bundled checkpoint, as `transformers` loads it."""
    return Path(__file__).resolve().parent / "checkpoint"
