"""The bundled checkpoint, and the parts that its training is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from bivlm_edge.datasets import COLORS, SHAPES, load_easy_vqa, load_scenes
from bivlm_edge.errors import DataError
from bivlm_edge.models import load_checkpoint
from bivlm_edge.reference import REFERENCE_MODELS, checkpoint_path, resolve_model, train
from bivlm_edge.reference.architecture import build_model, build_processor, build_tokenizer
from bivlm_edge.reference.easy_vqa import (
    DESIGN,
    answer_question,
    augment,
    draw_picture,
    implied_labels,
    sample_batch,
    sample_questions,
)
from bivlm_edge.reference.packing import Packer
from bivlm_edge.reference.task import UNKNOWN, Example, Stage
from bivlm_edge.reference.train import Trainee, answer_questions, weight_noise

SIZE_LIMIT_MB = 16
CLASSES = (len(COLORS), len(SHAPES))
WORDINGS = (
    "what color is the shape?",
    "what shape is present?",
    *(f"is there a {color} shape?" for color in COLORS),
    *(f"is no {color} shape present?" for color in COLORS),
    *(f"does the image not contain a {shape}?" for shape in SHAPES),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small take many times longer when threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        checkpoint_path(), local_files_only=True
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        checkpoint_path(), local_files_only=True, dtype=torch.float32
    )


def answer(model: Any, processor: Any, image: Any, question: str) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    text: str = processor.decode(ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_checkpoint_is_small_and_whole(name: str) -> None:
    files = {file.name: file.stat().st_size for file in checkpoint_path(name).iterdir()}
    assert sum(files.values()) <= SIZE_LIMIT_MB * 1e6
    assert files.keys() >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_linear_widths_are_multiples_of_64(model: Any) -> None:
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(shapes) == 4 * 6 + 2 + 4 * 7 + 1
    assert not [shape for shape in shapes if shape[0] % 64 or shape[1] % 64]


def test_chat_template_puts_the_image_before_the_question(processor: Any) -> None:
    content = [{"type": "text", "text": "is there a circle?"}, {"type": "image"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|user|><image>is there a circle?<|assistant|>"
    messages.append({"role": "assistant", "content": "no"})
    text = processor.apply_chat_template(messages)
    assert text == "<|user|><image>is there a circle?<|assistant|>no</s>"


def test_image_becomes_64_tokens_and_normalized_pixels(processor: Any) -> None:
    pixels = draw_picture(np.random.default_rng(0), 0, 0)
    inputs = processor(images=pixels, text="<|user|><image>what?<|assistant|>", return_tensors="np")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"][0] == image_id).sum() == 64
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(inputs["pixel_values"][0], expected, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("text", ["what is the blue shape?", "Ünïcode \U0001f600\n\t!", "", "<x>"])
def test_any_text_survives_the_tokenizer(text: str, processor: Any) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_every_word_of_a_question_is_one_token(processor: Any) -> None:
    assert len(processor.tokenizer.tokenize("does the image not contain a rectangle?")) == 8
    assert [len(processor.tokenizer.tokenize(word)) for word in (*COLORS, *SHAPES)] == [1] * 11


def test_drawn_pictures_are_described_by_greedy_generation(model: Any, processor: Any) -> None:
    rng = np.random.default_rng(11)
    wrong = []
    for color in range(len(COLORS)):
        for shape in range(len(SHAPES)):
            picture = draw_picture(rng, color, shape)
            for question, truth in sample_questions(rng, WORDINGS, color, shape, 2):
                given = answer(model, processor, picture, question)
                if given != truth:
                    wrong.append((COLORS[color], SHAPES[shape], question, given))
    assert len(wrong) <= 2, wrong  # of 48


def test_questions_of_the_test_split_are_answered(model: Any, processor: Any) -> None:
    try:
        items = load_easy_vqa("test")
    except DataError as error:
        pytest.skip(str(error))
    sample = [items[i] for i in np.random.default_rng(5).permutation(len(items))[:60]]
    wrong = [
        (str(item.image), item.question, given)
        for item in sample
        if (given := answer(model, processor, item.image.open(), item.question)) != item.answer
    ]
    assert len(wrong) <= 3, wrong  # 97 % is the promise


def test_scenes_model_finds_things_among_others() -> None:
    """Its card says 68.0 % of the validation questions; by counts of 60, 50 % is 3 deviations."""
    vlm = load_checkpoint(resolve_model("scenes"))
    assert vlm.training_data == "scenes"
    items = load_scenes("validation")
    sample = [items[i] for i in np.random.default_rng(5).permutation(len(items))[:60]]
    llava, own = (
        vlm.module,
        AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint_path("scenes"), local_files_only=True
        ),
    )
    right = [answer(llava, own, item.image.open(), item.question) == item.answer for item in sample]
    assert np.mean(right) > 0.5


def test_model_card_states_the_recorded_figures() -> None:
    card = (checkpoint_path() / "README.md").read_text(encoding="utf-8")
    for words in ("Test accuracy", "open-ended", "MIT", "bivlm_edge.reference.train"):
        assert words in card


@pytest.mark.parametrize("model", REFERENCE_MODELS)
def test_configuration_carries_no_local_paths(model: str) -> None:
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        text = (checkpoint_path(model) / name).read_text(encoding="utf-8")
        assert str(Path.home()) not in text
        assert not [value for value in json.loads(text).values() if str(value).startswith("/")]


def test_packed_questions_score_as_they_do_alone(model: Any, processor: Any) -> None:
    rng = np.random.default_rng(3)
    pairs = sample_questions(rng, WORDINGS, 2, 1, 5)
    pixels = draw_picture(rng, 2, 1)
    packer = Packer(processor.tokenizer, DESIGN.image_tokens)
    example = Example(pixels, np.array([[2, 1]]), pairs, ())
    with torch.no_grad():
        given = answer_questions(Trainee(model, CLASSES), [example], processor, packer)
        for index, (question, truth) in enumerate(pairs):
            text = f"<|user|><image>{question}<|assistant|>{truth}</s>"
            inputs = processor(images=pixels, text=text, return_tensors="pt")
            alone = model(**inputs).logits[0, -3:-1]
            assert (
                given.targets[given.question == index].tolist()
                == inputs["input_ids"][0, -2:].tolist()
            )
            # Float32 sums in another order through eight layers.
            torch.testing.assert_close(
                given.logits[given.question == index], alone, atol=1e-3, rtol=1e-4
            )


def test_weight_noise_is_gone_after_the_block(model: Any) -> None:
    weight = model.lm_head.weight
    before = weight.detach().clone()
    with weight_noise(model, 0.2, torch.Generator().manual_seed(0)):
        change = (weight - before).std(dim=1) / before.std(dim=1)
        assert change.mean().item() == pytest.approx(0.2, rel=0.05)  # 98k draws
    assert torch.equal(weight, before)


def test_resumed_stage_ends_with_the_same_weights(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    stage = Stage("vision", 4, images=4, drawn=4, rate=1e-3, vision_rate=1e-3, noise=0.1)

    def run(trainee: Trainee, resume: dict[str, Any] | None) -> torch.Tensor:
        train.run_stage(
            trainee,
            stage,
            (1, 0),
            lambda batch: train.vision_loss(trainee, batch, processor),
            lambda rng: sample_batch([], WORDINGS, stage, rng),
            resume,
            lambda step, optimizer: train.write_state(trainee, tmp_path, 0, step, optimizer),
        )
        return torch.cat([p.detach().flatten() for p in trainee.parameters()])

    def fresh() -> Trainee:
        torch.manual_seed(0)
        return Trainee(build_model(processor.tokenizer, DESIGN, 0), CLASSES)

    whole = run(fresh(), None)
    state = torch.load(tmp_path / train.STATE_FILE, weights_only=True)
    assert (state["stage"], state["step"]) == (0, 2)
    resumed = fresh()
    resumed.load_state_dict(state["model"])
    assert torch.equal(run(resumed, state), whole)


@pytest.mark.parametrize(
    ("questions", "labels"),
    [
        ([("what is the blue shape?", "circle")], ("blue", "circle")),
        ([("what color is the triangle?", "gray")], ("gray", "triangle")),
        ([("is no teal shape present?", "no")], ("teal", None)),
        ([("is there not a circle?", "no")], (None, "circle")),
        ([("is there a red shape?", "no"), ("is there not a circle?", "yes")], (None, None)),
    ],
)
def test_labels_follow_from_questions(
    questions: list[tuple[str, str]], labels: tuple[str | None, str | None]
) -> None:
    color, shape = labels
    expected = (
        COLORS.index(color) if color else UNKNOWN,
        SHAPES.index(shape) if shape else UNKNOWN,
    )
    assert implied_labels(questions) == expected
    for question, truth in questions:
        assert answer_question(question, color or "black", shape or "rectangle") == truth


def test_augmented_picture_has_the_same_shape_inside_the_frame() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        picture = draw_picture(rng, int(rng.integers(8)), int(rng.integers(3)))
        moved = augment(picture, rng, 24)
        colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        moved_colors, moved_counts = np.unique(moved.reshape(-1, 3), axis=0, return_counts=True)
        np.testing.assert_array_equal(colors, moved_colors)
        np.testing.assert_array_equal(counts, moved_counts)


def test_fresh_tokenizer_reserves_the_special_tokens() -> None:
    processor = build_processor(build_tokenizer(WORDINGS), DESIGN)
    ids = processor.tokenizer.encode("<|user|><image>is there a red shape?<|assistant|>")
    assert processor.tokenizer.convert_ids_to_tokens(ids) == [
        *("<|user|>", "<image>", "is", "Ġthere", "Ġa", "Ġred", "Ġshape", "?"),
        "<|assistant|>",
    ]
