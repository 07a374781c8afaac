"""The loaders of question-answering data."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bivlm_edge import datasets
from bivlm_edge.datasets import ImageSource, load_easy_vqa, load_jsonl, question_kind
from bivlm_edge.errors import DataError

QUESTIONS = [
    ["what color is the shape?", "teal", 1],
    ["is there a circle?", "yes", 0],
    ["what shape is present?", "circle", 1],
]


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Two images and three questions in the layout of easy-VQA."""
    folder = tmp_path / "data"
    (folder / "test" / "images").mkdir(parents=True)
    for number, value in enumerate((10, 200)):
        image = Image.new("RGB", (4, 4), (value, 0, 0))
        image.save(folder / "test" / "images" / f"{number}.png")
    (folder / "test" / "questions.json").write_text(json.dumps(QUESTIONS))
    return folder


@pytest.fixture
def wheel(data_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "easy.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in data_folder.rglob("*.*"):
            archive.write(file, Path("easy_vqa/data") / file.relative_to(data_folder))
    return path


@pytest.mark.parametrize("source", ["data_folder", "wheel"])
def test_folder_and_wheel_give_the_same_items_in_the_order_of_the_file(
    source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(datasets.EASY_VQA_VARIABLE, str(request.getfixturevalue(source)))
    items = load_easy_vqa("test")
    assert [[item.question, item.answer] for item in items] == [row[:2] for row in QUESTIONS]
    assert [item.kind for item in items] == ["color", "yes_no", "shape"]
    assert [item.is_open_ended for item in items] == [True, False, True]
    reds = [int(np.asarray(item.image.open())[0, 0, 0]) for item in items]
    assert reds == [200, 10, 200]
    assert items[0].image == items[2].image


def test_unknown_answer_is_of_kind_other() -> None:
    assert question_kind("a cat") == "other"


def test_variable_naming_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(datasets.EASY_VQA_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"BIVLM_EASY_VQA=.*absent does not exist"):
        load_easy_vqa("train")


@pytest.mark.parametrize("content", [b"no archive", None])
def test_file_that_is_no_easy_vqa_wheel_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other/file", "")
    else:
        path.write_bytes(content)
    monkeypatch.setenv(datasets.EASY_VQA_VARIABLE, str(path))
    with pytest.raises(DataError, match="is not the easy-VQA wheel"):
        load_easy_vqa("train")


@pytest.mark.parametrize("text", ["{", '[["question"]]', "[1]"])
def test_malformed_questions_are_refused(
    text: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_folder / "test" / "questions.json").write_text(text)
    monkeypatch.setenv(datasets.EASY_VQA_VARIABLE, str(data_folder))
    with pytest.raises(DataError, match=r"questions\.json is not a list of"):
        load_easy_vqa("test")


def test_wheel_is_fetched_into_the_cache_once(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def pip_download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / datasets.EASY_VQA.wheel
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv(datasets.EASY_VQA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", pip_download)
    with pytest.raises(DataError, match="has SHA-256"):
        load_easy_vqa("test")
    assert not list((tmp_path / "cache" / "bivlm-edge").iterdir())

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets, "EASY_VQA", replace(datasets.EASY_VQA, sha256=digest))
    assert load_easy_vqa("test") == load_easy_vqa("test")
    assert len(calls) == 2
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [file.name for file in (tmp_path / "cache" / "bivlm-edge").iterdir()] == [
        datasets.EASY_VQA.wheel
    ]


def test_failed_fetch_says_what_pip_said_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.delenv(datasets.EASY_VQA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip_download)
    with pytest.raises(DataError, match="ERROR: no network Fetch it where there is a network"):
        load_easy_vqa("test")


def test_json_lines_are_read_with_images_relative_to_the_file(data_folder: Path) -> None:
    path = data_folder / "mine.jsonl"
    row = {"image": "test/images/1.png", "question": "what color?", "answer": "red"}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "answer": "crimson"}) + "\n")
    items = load_jsonl(path)
    assert [(item.answer, item.kind) for item in items] == [("red", "color"), ("crimson", "other")]
    assert items[0].image.open().size == (4, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"mine\.jsonl:2 is not JSON"),
        ("[]", r"mine\.jsonl:2 is list, expected a JSON object"),
        (
            '{"image": "test/images/1.png", "question": 3, "answer": "a"}',
            r":2 has 'question' = 3, expected a text",
        ),
        ('{"image": "test/images/1.png", "question": "q"}', r":2 has 'answer' = None"),
        (
            '{"image": "gone.png", "question": "q", "answer": "a"}',
            r":2 names the image 'gone\.png', but .* does not exist",
        ),
    ],
)
def test_bad_line_is_refused_with_its_number(line: str, message: str, data_folder: Path) -> None:
    path = data_folder / "mine.jsonl"
    good = '{"image": "test/images/0.png", "question": "q", "answer": "a"}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        load_jsonl(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        load_jsonl(tmp_path / "empty.jsonl")


def test_bytes_that_are_no_image_are_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}')
    (item,) = load_jsonl(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=r"a\.png' cannot be read as a picture"):
        item.image.open()


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_opened_as_bivlm_run_opens_them(tmp_path: Path, zipped: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 4), (10, 20, 30, 0)).save(path, exif=exif)
    source = ImageSource(path)
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(path, "b.png")
        source = ImageSource(tmp_path / "a.zip", "b.png")
    image = source.open()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 8), (255, 255, 255))


def test_missing_and_damaged_members_of_an_archive_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.png", "text")
    with pytest.raises(DataError, match=r"a\.zip!gone\.png cannot be read"):
        ImageSource(path, "gone.png").open()
    with pytest.raises(DataError, match=r"a\.zip!b\.png' cannot be read as a picture"):
        ImageSource(path, "b.png").open()


def test_loaders_import_neither_torch_nor_transformers() -> None:
    code = "import sys, bivlm_edge.datasets; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
