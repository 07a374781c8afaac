"""Calibration batches from items and from a user's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bivlm_edge.calibration.batches import calibration_items, items_from_folder, make_batches
from bivlm_edge.datasets import DATA_SETS, DrawnScene, ImageSource, VqaItem
from bivlm_edge.errors import DataError


def save_image(path: Path, color: int) -> ImageSource:
    Image.new("RGB", (4, 4), (color, 0, 0)).save(path)
    return ImageSource(path)


def fake_prepare(image: Any, question: str, answer: str | None) -> dict[str, Tensor]:
    text = question + (answer or "")
    return {
        "input_ids": torch.tensor([[ord(letter) for letter in text]]),
        "pixel_values": torch.full((1, 3, 4, 4), float(image.getpixel((0, 0))[0])),
    }


def test_batches_stack_equal_lengths_and_mark_the_answer(tmp_path: Path) -> None:
    items = [
        VqaItem(save_image(tmp_path / f"{i}.png", i), "q" * (1 + i % 2), "no", "yes_no")
        for i in range(10)
    ]
    batches = make_batches(fake_prepare, items, 10, seed=3, batch_size=4)
    assert sorted(tuple(batch["input_ids"].shape) for batch in batches) == [
        (1, 3), (1, 4), (4, 3), (4, 4),
    ]  # fmt: skip
    drawn = sorted(int(v) for batch in batches for v in batch["pixel_values"][:, 0, 0, 0])
    assert drawn == list(range(10))
    for batch in batches:
        prompt = batch["input_ids"].shape[1] - 2
        assert (batch["labels"][:, :prompt] == -100).all()
        assert (batch["labels"][:, prompt:] == batch["input_ids"][:, prompt:]).all()


def test_a_data_set_calibrates_by_its_name_on_its_train_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scenes = calibration_items("scenes")
    assert {item.image.split for item in scenes if isinstance(item.image, DrawnScene)} == {"train"}
    asked: list[str] = []

    def load(split: str) -> list[VqaItem]:
        asked.append(split)
        return scenes

    monkeypatch.setitem(DATA_SETS, "easy-vqa", replace(DATA_SETS["easy-vqa"], load=load))
    assert calibration_items(None) == calibration_items("easy-vqa") == scenes
    assert asked == ["train", "train"]
    save_image(tmp_path / "own.png", 9)
    assert len(calibration_items(tmp_path)) == 1


def test_the_seed_decides_which_samples_are_drawn(tmp_path: Path) -> None:
    items = [VqaItem(save_image(tmp_path / f"{i}.png", i), "q", "", "other") for i in range(20)]

    def drawn(seed: int) -> list[float]:
        batches = make_batches(fake_prepare, items, 5, seed)
        assert all("labels" not in batch for batch in batches)
        return [float(v) for batch in batches for v in batch["pixel_values"][:, 0, 0, 0]]

    assert len(drawn(1)) == 5
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="no calibration samples"):
        make_batches(fake_prepare, [], 4)


def test_folder_of_images_takes_the_questions_in_turn(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.png"):
        save_image(tmp_path / name, 1)
    (tmp_path / "notes.md").write_text("not an image")
    assert {item.question for item in items_from_folder(tmp_path)} == {"Describe this image."}
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\n")
    items = items_from_folder(tmp_path)
    assert [item.image.path.name for item in items] == ["a.png", "b.png", "c.png"]
    assert [item.question for item in items] == ["first", "second", "first"]


def test_folder_with_one_jsonl_file_is_read_from_it(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    line = json.dumps({"image": "a.png", "question": "color?", "answer": "red"})
    (tmp_path / "set.jsonl").write_text(line + "\n")
    assert items_from_folder(tmp_path)[0].answer == "red"
    (tmp_path / "other.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"other\.jsonl, set\.jsonl"):
        items_from_folder(tmp_path)


@pytest.mark.parametrize("content", [None, "prompts.txt"])
def test_folder_without_images_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).write_text("question")
    with pytest.raises(DataError, match="holds no images"):
        items_from_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        items_from_folder(tmp_path / "missing")


def test_empty_prompts_file_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        items_from_folder(tmp_path)


def test_fewer_items_than_asked_for_are_all_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [VqaItem(save_image(tmp_path / f"{i}.png", i), "q", "", "other") for i in range(3)]
    batches = make_batches(fake_prepare, items, 5)
    assert sum(len(batch["input_ids"]) for batch in batches) == 3
    assert "hold 3 samples, fewer than the 5 asked for" in caplog.text
    caplog.clear()
    make_batches(fake_prepare, items, 3)
    assert not caplog.text
