"""The text that a chat template puts round a question, for devices that cannot render templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from bivlm_edge.bundle import PROMPT
from bivlm_edge.errors import BivlmError
from bivlm_edge.models import VisionLanguageModel

PROMPT_VERSION = 1
_QUESTION = "Sentinel-5d1f"
# what templates could treat specially: spaces round the text, line ends, marks, other scripts
_OTHERS = ("what is this?", "  two\n\nlines \n", "\"a\" {b} <c> 'd' & e\\", "是什么 é 😀")

Render = Callable[[str], str]


def prompt_frame(render: Render) -> dict[str, Any] | None:
    """Return what stands round the question in a rendered prompt.

    Args:
        render: Question to prompt.

    Returns:
        `before` and `behind` the question, and `strips`: whether the template drops white space
        round the question. None if the prompt cannot be put together so, because the template
        refuses a message, repeats the question or changes it.
    """
    try:
        text = render(_QUESTION)
        if text.count(_QUESTION) != 1:
            return None
        before, _, behind = text.partition(_QUESTION)
        rendered = {other: render(other) for other in _OTHERS}
    except (BivlmError, jinja2.TemplateError, TypeError):
        return None
    for strips in (False, True):
        if all(
            prompt == before + (other.strip() if strips else other) + behind
            for other, prompt in rendered.items()
        ):
            return {"before": before, "behind": behind, "strips": strips}
    return None


def write_prompt_frames(vlm: VisionLanguageModel, folder: Path) -> None:
    """Write the frames of questions with and without a picture into the assets folder.

    null stands for a frame that does not exist; so it does for both where the template writes the
    date, which a frozen text would get wrong.
    """
    frames: dict[str, Any] = {"with_image": None, "without_image": None}
    if "strftime_now" not in vlm.chat_template:
        frames["with_image"] = prompt_frame(lambda question: vlm.prompt(question))
        frames["without_image"] = prompt_frame(
            lambda question: vlm.prompt(question, with_image=False)
        )
    text = json.dumps({"version": PROMPT_VERSION, **frames}, indent=2) + "\n"
    (folder / PROMPT).write_text(text, encoding="utf-8")
