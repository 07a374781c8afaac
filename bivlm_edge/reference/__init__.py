"""The bundled reference models: small LLaVA-class checkpoints, named after their training data."""

from pathlib import Path

_FOLDERS = {"easy-vqa": "checkpoint", "scenes": "scenes_checkpoint"}
REFERENCE_MODELS = tuple(_FOLDERS)  # the default first


def checkpoint_path(name: str = REFERENCE_MODELS[0]) -> Path:
    """The folder of a bundled checkpoint, as `transformers` loads it.

    Args:
        name: One of REFERENCE_MODELS.
    """
    return Path(__file__).resolve().parent / _FOLDERS[name]


def resolve_model(model: str | None) -> str:
    """What `--model` says as a folder or hub id: names of bundled checkpoints become folders."""
    name = model or REFERENCE_MODELS[0]
    return str(checkpoint_path(name)) if name in _FOLDERS else name
