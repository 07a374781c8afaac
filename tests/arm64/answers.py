"""Print a model's answers to the first questions of easy-vqa: answers.py MODEL COUNT [COMMAND...].

One line of JSON per question: the question and the token ids of its answer. The Python runtime
answers, which needs what a device needs and the operator library (BIVLM_OPS_LIBRARY); or a command,
such as a `bivlm-device`, that takes MODEL, a question, --image and --json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bivlm_edge.datasets import load_easy_vqa
from bivlm_edge.runtime import Answerer, load

Ask = Callable[[str, Image.Image], list[int]]


def runtime(model: str) -> Ask:
    """The Python runtime, in this process."""
    answerer = Answerer(load(model, threads=1))
    return lambda question, image: list(answerer.ask(question, answerer.picture(image)))


def command(words: list[str], model: str, folder: Path) -> Ask:
    """A program, started for each question."""

    def ask(question: str, image: Image.Image) -> list[int]:
        picture = folder / "picture.png"
        image.save(picture)
        asked = [*words, model, question, "--image", str(picture), "--threads", "1", "--json"]
        done = subprocess.run(asked, stdout=subprocess.PIPE, check=True)
        found: list[int] = json.loads(done.stdout)["token_ids"]
        return found

    return ask


def main() -> None:
    """Answer the questions."""
    model, count, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    with tempfile.TemporaryDirectory() as folder:
        ask = command(words, model, Path(folder)) if words else runtime(model)
        for item in load_easy_vqa("test")[:count]:
            ids = ask(item.question, item.image.open())
            sys.stdout.write(json.dumps([item.question, ids]) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
