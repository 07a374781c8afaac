"""Training of a reference model on each data set, at a tiny scale."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from bivlm_edge import scenes
from bivlm_edge.datasets import COLORS, SHAPES
from bivlm_edge.models import load_checkpoint
from bivlm_edge.reference import easy_vqa, scenes_task, train
from bivlm_edge.reference.architecture import Design, build_model, build_tokenizer
from bivlm_edge.reference.task import UNKNOWN, Example, Stage, Task

WORDINGS = tuple(f"is there a {word}?" for word in (*COLORS, *SHAPES))


def tiny(design: Design) -> Design:
    """The same picture and patches, one thin layer each."""
    return replace(
        design,
        vision_width=64,
        vision_layers=1,
        text_width=64,
        text_mlp_width=64,
        text_layers=1,
    )


VISION = Stage("vision", 4, images=2, drawn=2, rate=3e-3, vision_rate=3e-3, noise=0.0)
DECODER = replace(VISION, name="decoder", vision_rate=0.0)


class TinyEasyVqa:
    """easy-VQA's drawn pictures alone, always the same ones: the wheel is not needed."""

    name = "easy-vqa"
    design = tiny(easy_vqa.DESIGN)
    stages: Sequence[Stage] = (VISION, DECODER)
    classifiers = easy_vqa.EasyVqaTask.classifiers
    words = easy_vqa.EasyVqaTask.words

    def texts(self) -> list[str]:
        return [*WORDINGS, "yes", "no"]

    def batch(self, stage: Stage, _rng: np.random.Generator) -> list[Example]:
        return easy_vqa.sample_batch([], WORDINGS, stage, np.random.default_rng(1))

    def validation(self) -> list[Example]:
        return [replace(e, kinds=("yes_no",) * 10) for e in self.batch(VISION, RNG)]

    test = validation


class TinyScenes(scenes_task.ScenesTask):
    """Always the same two pictures."""

    design = replace(tiny(scenes_task.DESIGN), text_layers=3)
    stages: Sequence[Stage] = (
        VISION,
        replace(DECODER, name="words"),
        replace(DECODER, name="lookups", kinds=("color", "mark"), pointing=0.2),
        DECODER,
    )

    def texts(self) -> list[str]:
        return [text for _, *texts in all_questions(20) for text in texts]

    def batch(self, stage: Stage, _rng: np.random.Generator) -> list[Example]:
        return [
            scenes_task.example("train", index, kinds=stage.kinds) for index in range(stage.images)
        ]

    def validation(self) -> list[Example]:
        return [scenes_task.example("validation", index) for index in range(2)]

    test = validation


RNG = np.random.default_rng(0)


def all_questions(pictures: int) -> list[tuple[str, str, str]]:
    described = (scenes.describe("validation", index) for index in range(pictures))
    return [question for scene in described for question in scenes.questions(scene)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [TinyEasyVqa, lambda: TinyScenes(0)], ids=["easy-vqa", "scenes"])
def test_training_lowers_the_loss_and_writes_a_checkpoint(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    task: Task = make()
    with caplog.at_level("INFO", logger="bivlm_edge.reference.train"):
        train.train(task, tmp_path, seed=3, scale=1.0, resume=False, test=True)
    losses = {
        stage.name: [
            float(record.getMessage().split("loss ")[1].split(",")[0])
            for record in caplog.records
            if record.getMessage().startswith(f"{stage.name} ")
        ]
        for stage in task.stages
    }
    for name, (early, late) in losses.items():
        assert late < early - 0.1, name
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["validation"].keys() == figures["test"].keys() >= {"overall"}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True)
    assert load_checkpoint(tmp_path).training_data == task.name  # what calibrates its export
    assert model.config.image_seq_length == task.design.image_tokens
    processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        tmp_path, local_files_only=True
    )
    size = processor.image_processor.crop_size
    assert (size["height"], size["width"]) == (task.design.image_size,) * 2


def test_resumed_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.train(TinyScenes(0), whole, seed=3, scale=1.0, resume=False, test=False)

    written = train.write_state

    def killed_after_writing(*arguments: Any) -> None:
        written(*arguments)
        if arguments[2:4] == (2, 2):  # the third stage, half-way
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "write_state", killed_after_writing)
    with pytest.raises(KeyboardInterrupt):
        train.train(TinyScenes(0), halves, seed=3, scale=1.0, resume=False, test=False)
    train.train(TinyScenes(0), halves, seed=3, scale=1.0, resume=True, test=False)
    name = "model.safetensors"
    assert (halves / name).read_bytes() == (whole / name).read_bytes()


def test_every_word_of_scenes_is_one_token() -> None:
    tokenizer = build_tokenizer(scenes_task.ScenesTask(0).texts())
    for _, question, answer in all_questions(50):
        assert len(tokenizer.tokenize(question)) == len(question.split()) + 1  # "?" is one, too
        assert len(tokenizer.tokenize(answer)) == 1


def test_token_labels_name_what_each_patch_shows() -> None:
    shape, color = "square", "blue"
    things = (
        scenes.Thing(shape, color, "dot", 18, 36, 60),  # 15.75 pixels to each side: 4x4 patches
        scenes.Thing("star", "red", "none", 9, 100, 101),
    )
    labels = scenes_task.token_labels(scenes.Scene("validation", 0, things, shape, color))
    grid = labels.reshape(16, 16, 7)
    square = grid[7, 4]
    assert square[:6].tolist() == [
        1 + scenes.COLORS.index(color),
        1 + scenes.SHAPES.index(shape),
        1 + scenes.MARKS.index("dot"),
        1 + scenes.RADII.index(18),
        1 + 36 // 8,
        1 + 60 // 8,
    ]
    assert square[6] == 1
    assert np.argwhere(grid[..., 6] == 1).tolist() == [[7, 4], [12, 12]]
    assert (grid[0] == 0).all()
    assert (grid[6:9, 3:6, :6] == square[:6]).all()
    assert (labels == UNKNOWN).any()


def test_scenes_decoder_costs_four_times_its_tower() -> None:
    design = scenes_task.DESIGN
    tokenizer = build_tokenizer(("a",))
    model = build_model(tokenizer, design, 0)
    tower, decoder = (
        sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))
        for part in (model.model.vision_tower, model.model.language_model)
    )
    assert design.image_tokens == 256
    assert decoder >= 4 * tower
    assert sum(p.numel() for p in model.parameters()) * 2 < 16e6  # bytes in bfloat16
