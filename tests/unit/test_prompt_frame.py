"""The text round a question: found where the template puts fixed text round it, else refused."""

from __future__ import annotations

from collections.abc import Callable

import jinja2
import pytest

from bivlm_edge.export.prompt_frame import prompt_frame


def rendering(template: str) -> Callable[[str], str]:
    compiled = jinja2.Environment().from_string(template)
    return lambda question: compiled.render(question=question)


def test_what_stands_round_the_question_is_found() -> None:
    found = prompt_frame(rendering("<user><image>{{ question }}<end>\n<assistant>"))
    assert found == {"before": "<user><image>", "behind": "<end>\n<assistant>", "strips": False}


def test_a_template_that_strips_the_question_says_so() -> None:
    found = prompt_frame(rendering("U: {{ question | trim }}\nA:"))
    assert found == {"before": "U: ", "behind": "\nA:", "strips": True}


@pytest.mark.parametrize(
    "template",
    [
        "{{ question | lower }}",
        "{{ question }} again: {{ question }}",
        "{{ question | e }}",
        "{{ question | replace('\n', ' ') }}",
        "{{ question | length }} {{ question }}",
        "no question",
        "{{ question }}{% if question | length > 14 %} in short{% endif %}",
        "{{ question.missing.attribute }}",
    ],
)
def test_a_template_that_does_more_has_no_frame(template: str) -> None:
    assert prompt_frame(rendering(template)) is None
