"""A question becomes token ids, and token ids become text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bivlm_edge.bundle import CHAT_TEMPLATE, TOKENIZER, BundlePaths, Manifest
from bivlm_edge.errors import BundleError, RequestError
from bivlm_edge.runtime.preprocess import Picture

_STAND_IN = "\ue000"  # for private use: no template holds it
_UNFINISHED = "�"


class PromptBuilder:
    """The tokenizer and the chat template of one bundle."""

    def __init__(self, paths: BundlePaths, manifest: Manifest) -> None:
        """Read both from the assets folder.

        Raises:
            BundleError: One is missing or malformed.
        """
        self._manifest = manifest
        path = paths.assets / TOKENIZER
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(_read(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        except ValueError as error:
            raise _malformed(path, error) from error
        # `tokenizers` raises plain Exception for what it cannot parse.
        except Exception as error:
            if isinstance(error, BundleError):
                raise
            raise _malformed(path, error) from error
        path = paths.assets / CHAT_TEMPLATE
        try:
            self._template = _environment().from_string(_read(path))
        except jinja2.TemplateError as error:
            raise _malformed(path, error) from error

    def encode(self, question: str, picture: Picture | None = None) -> NDArray[np.int64]:
        """Return the token ids of one user message, ready for the answer.

        Args:
            question: The text.
            picture: Its picture stands before the text; None for a question without one.

        Returns:
            int64 `[tokens]`, with the image placeholder `image_tokens` times per image.

        Raises:
            RequestError: The question is empty or holds the image placeholder.
            BundleError: The chat template fails or drops the image.
        """
        return self._tokens(self._text(question, picture))[0]

    def encode_marked(
        self, question: str, picture: Picture | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the token ids of one user message, and which of them are the question's.

        Args:
            question: The text.
            picture: As for `encode`.

        Returns:
            int64 `[tokens]` and bool `[tokens]`: False for the chat template and the picture.

        Raises:
            RequestError: As for `encode`.
            BundleError: As for `encode`, or the template does more than to put the question in.
        """
        text = self._text(question, picture)
        before, *others = self._text(_STAND_IN, picture).split(_STAND_IN)
        after = others[0] if len(others) == 1 else None
        if after is None or not (text.startswith(before) and text.endswith(after)):
            raise BundleError(
                f"the chat template of '{self._manifest.name}' does more with the question "
                f"{question!r} than to put it in once, so that its tokens cannot be told from the "
                "template's. Correct the template in the assets folder, or export the model again."
            )
        ids, offsets = self._tokens(text)
        start, end = len(before), len(text) - len(after)
        marked = [first < end and start < behind for first, behind in offsets]
        return ids, np.array(marked, dtype=np.bool_)

    def _text(self, question: str, picture: Picture | None) -> str:
        """The message in the template, the picture's placeholders repeated."""
        if not question.strip():
            raise RequestError("the prompt is empty. Give a question, e.g. 'what is this?'.")
        token = self._manifest.image_token
        if token in question:
            raise RequestError(
                f"the prompt holds {token!r}, the mark that stands for a picture in this model. "
                "Leave it out; --image puts the picture before the text."
            )
        text = self._render(question, has_image=picture is not None)
        if text.count(token) != (picture is not None):
            raise BundleError(
                f"the chat template put {text.count(token)} image marks into a prompt with "
                f"{int(picture is not None)} pictures. Export the model again."
            )
        if picture is not None:
            text = text.replace(token, self._expand(picture))
        return text

    def _tokens(self, text: str) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Token ids, and the characters that each stands for (none for a beginning mark)."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = list(encoded.ids), list(encoded.offsets)
        bos = self._manifest.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
            offsets.insert(0, (0, 0))
        return np.array(ids, dtype=np.int64), offsets

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of an answer, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Yield the text as tokens come; what is not yet a whole character waits for the next."""
        seen: list[int] = []
        text = written = ""
        for token in token_ids:
            seen.append(token)
            text = self.decode(seen)
            if text.endswith(_UNFINISHED) or not text.startswith(written):
                continue
            if len(text) > len(written):
                yield text[len(written) :]
                written = text
        if len(text) > len(written) and text.startswith(written):
            yield text[len(written) :]

    def _render(self, question: str, *, has_image: bool) -> str:
        content = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": question})
        # transformers leaves a token that the tokenizer lacks undefined
        manifest = self._manifest
        tokens = {"bos_token": manifest.bos_token, "eos_token": manifest.eos_token}
        try:
            return self._template.render(
                messages=[{"role": "user", "content": content}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **{name: token for name, token in tokens.items() if token},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BundleError(
                f"the chat template of '{manifest.name}' refuses a message of "
                f"{'an image and ' if has_image else ''}a text: {error}. Correct "
                f"{CHAT_TEMPLATE} in the assets folder, or export the model again."
            ) from error

    def _expand(self, picture: Picture) -> str:
        """The text that stands for a picture; with tiles as Idefics3Processor writes it."""
        run = self._manifest.image_token * self._manifest.image_tokens
        whole = self._manifest.image_prompt.replace("{image}", run)
        if not picture.rows:
            return whole
        mark = re.match(r"<[^<>]*>", self._manifest.image_prompt)
        opening = mark.group() if mark else ""
        lines = [
            "".join(
                f"{opening}<row_{row}_col_{column}>{run}"
                for column in range(1, picture.columns + 1)
            )
            for row in range(1, picture.rows + 1)
        ]
        return "\n".join([*lines, "", whole])


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox in which transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the answer for training; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the content of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"'{path}' is missing: it belongs to the exported model. Copy the whole folder "
            f"'{path.parent.name}' next to the .onnx file, or export again."
        ) from error
    except UnicodeDecodeError as error:
        raise _malformed(path, error) from error


def _malformed(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"'{path}' is damaged: {error}. Copy the folder '{path.parent.name}' again, "
        "or export again."
    )
