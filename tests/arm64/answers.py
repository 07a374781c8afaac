"""Print a model's answers to the first questions of easy-vqa: python answers.py MODEL COUNT.

One line of JSON per question, the question and the answer. Needs what a device needs, and the
operator library (BIVLM_OPS_LIBRARY).
"""

from __future__ import annotations

import json
import sys

from bivlm_edge.datasets import load_easy_vqa
from bivlm_edge.runtime import Answerer, load


def main() -> None:
    """Answer the questions."""
    model, count = sys.argv[1], int(sys.argv[2])
    answerer = Answerer(load(model, threads=1))
    for item in load_easy_vqa("test")[:count]:
        generation = answerer.ask(item.question, answerer.picture(item.image.open()))
        answer = answerer.prompts.decode(generation)
        sys.stdout.write(json.dumps([item.question, answer]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
