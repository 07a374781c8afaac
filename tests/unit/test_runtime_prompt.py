"""Chat template, image placeholders, tokens and streamed text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.errors import BundleError, RequestError
from bivlm_edge.reference import checkpoint_path
from bivlm_edge.runtime import Picture, PromptBuilder

PICTURE = Picture(np.zeros((1, 3, 4, 4), dtype=np.float32))
USER, ASSISTANT, IMAGE = 3, 4, 2


@pytest.fixture
def prompts(bundle: Any) -> PromptBuilder:
    return PromptBuilder(bundle.paths, bundle.manifest)


def test_image_stands_before_the_text_once_per_image_token(prompts: PromptBuilder) -> None:
    ids = prompts.encode("hi", PICTURE)
    assert ids.dtype == np.int64
    assert ids[:7].tolist() == [USER, *[IMAGE] * 6]
    assert ids[-1] == ASSISTANT
    assert prompts.decode(ids[7:-1]) == "hi"


def test_padding_and_truncation_of_the_tokenizer_file_are_off(bundle: Any) -> None:
    path = bundle.paths.assets / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    assert len(PromptBuilder(bundle.paths, bundle.manifest).encode("hello")) == 7


def test_text_alone_has_no_placeholder(prompts: PromptBuilder) -> None:
    assert IMAGE not in prompts.encode("hi")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_prompt_is_refused(prompts: PromptBuilder, question: str) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        prompts.encode(question, PICTURE)


def test_placeholder_in_the_question_is_refused(prompts: PromptBuilder) -> None:
    with pytest.raises(RequestError, match="'<image>'"):
        prompts.encode("is <image> a cat?", PICTURE)


def test_bos_is_put_before_a_prompt_that_has_none_and_never_twice(bundle: Any) -> None:
    builder = PromptBuilder(bundle.paths, replace(bundle.manifest, bos_token_id=0))
    assert builder.encode("hi")[:2].tolist() == [0, USER]
    has_one = PromptBuilder(bundle.paths, replace(bundle.manifest, bos_token_id=USER))
    assert has_one.encode("hi").tolist().count(USER) == 1


@pytest.mark.parametrize("bos_token_id", [0, None])
def test_template_that_writes_bos_yields_exactly_one(bundle: Any, bos_token_id: int | None) -> None:
    manifest = replace(bundle.manifest, bos_token_id=bos_token_id, bos_token="<pad>")
    builder = _with_template(bundle.paths, manifest, "{{ bos_token }}hi{{ eos_token }}")
    ids = builder.encode("hi").tolist()
    assert (ids[0], ids.count(0), ids[-1]) == (0, 1, 1)


def test_template_sees_what_transformers_gives_it(bundle: Any) -> None:
    template = (
        "{{ tools is none and documents is none }} {{ bos_token is defined }} {{ eos_token }}"
    )
    builder = _with_template(bundle.paths, bundle.manifest, template)
    ids = builder.encode("hi").tolist()
    assert builder._tokenizer.decode(ids, skip_special_tokens=False) == "True False </s>"


def test_tiles_are_written_as_idefics3_does(bundle: Any) -> None:
    manifest = replace(bundle.manifest, image_prompt="<f><global-img>{image}<f>", image_tokens=2)
    builder = PromptBuilder(bundle.paths, manifest)
    tiles = Picture(np.zeros((3, 3, 4, 4), dtype=np.float32), rows=1, columns=2)
    run = "<image><image>"
    expected = (
        f"<|user|><f><row_1_col_1>{run}<f><row_1_col_2>{run}\n\n<f><global-img>{run}<f>hi"
        "<|assistant|>"
    )
    ids = builder.encode("hi", tiles)
    assert builder._tokenizer.decode(ids.tolist(), skip_special_tokens=False) == expected


def test_stream_holds_back_half_a_character(prompts: PromptBuilder) -> None:
    ids = prompts.encode("né")[1:-1].tolist()
    assert len(ids) == 3  # n and two bytes
    assert list(prompts.stream(ids)) == ["n", "é"]
    assert "".join(prompts.stream(ids[:2])) == "n�"


def test_stream_of_nothing_is_nothing(prompts: PromptBuilder) -> None:
    assert list(prompts.stream([])) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_missing_asset_is_named(bundle: Any, name: str) -> None:
    (bundle.paths.assets / name).unlink()
    with pytest.raises(BundleError, match=f"{name}' is missing"):
        PromptBuilder(bundle.paths, bundle.manifest)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "nonsense"),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_damaged_asset_is_named(bundle: Any, name: str, content: str) -> None:
    (bundle.paths.assets / name).write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=f"{name}' is damaged"):
        PromptBuilder(bundle.paths, bundle.manifest)


def _with_template(paths: BundlePaths, manifest: Any, template: str) -> PromptBuilder:
    (paths.assets / "chat_template.jinja").write_text(template, encoding="utf-8")
    return PromptBuilder(paths, manifest)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no pictures, please') }}",
        "{{ messages[0]['content'] + 'x' }}",
        "text only: {{ messages[0]['content'][-1]['text'] }}",
    ],
)
def test_template_that_cannot_take_a_picture_is_an_error(bundle: Any, template: str) -> None:
    builder = _with_template(bundle.paths, bundle.manifest, template)
    with pytest.raises(BundleError, match="chat template"):
        builder.encode("hi", PICTURE)


def test_template_runs_in_a_sandbox(bundle: Any) -> None:
    builder = _with_template(
        bundle.paths, bundle.manifest, "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with pytest.raises(BundleError, match="chat template"):
        builder.encode("hi")


def test_line_ends_of_template_tags_are_no_text(bundle: Any) -> None:
    template = "{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\n"
    builder = _with_template(bundle.paths, bundle.manifest, template)
    assert builder.decode(builder.encode("hi")) == "x\n"


def test_generation_blocks_loop_controls_and_tojson_work(bundle: Any) -> None:
    template = (
        "{% for m in messages %}{% generation %}"
        "{{ {'é<': 1} | tojson(separators=(',', ':')) }}"
        "{% endgeneration %}{% break %}{% endfor %}"
    )
    builder = _with_template(bundle.paths, bundle.manifest, template)
    assert builder.decode(builder.encode("hi")) == '{"é<":1}'


def test_reference_checkpoint_gives_the_tokens_of_its_processor(
    bundle: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = checkpoint_path()
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the reference checkpoint is not in this tree")
    processor = transformers.LlavaProcessor.from_pretrained(str(folder), backend="pil")
    paths = BundlePaths(tmp_path / "reference.onnx")
    paths.assets.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (paths.assets / name).write_bytes((folder / name).read_bytes())
    builder = PromptBuilder(paths, replace(bundle.manifest, image_tokens=64))
    for question in ("what color is the shape?", "is there a blue square?", "naïve  ☃?\n"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.new("RGB", (64, 64))
        wanted = processor(text=text, images=picture, return_tensors="np")["input_ids"][0]
        assert builder.encode(question, PICTURE).tolist() == wanted.tolist()


@pytest.mark.parametrize("question", ["hi", " a", "user", "is it <|assistant|>?"])
def test_the_tokens_of_the_question_are_told_from_the_template(
    prompts: PromptBuilder, question: str
) -> None:
    ids, marked = prompts.encode_marked(question, PICTURE)
    np.testing.assert_array_equal(ids, prompts.encode(question, PICTURE))
    assert marked.tolist() == [False] * 7 + [True] * (len(ids) - 8) + [False]


def test_a_template_that_changes_the_question_is_refused(bundle: Any) -> None:
    path = bundle.paths.assets / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("part['text']", "part['text'] | upper"), encoding="utf-8")
    prompts = PromptBuilder(bundle.paths, bundle.manifest)
    assert prompts.encode_marked("HI")[1].sum() == 2
    path.write_text(text.replace("part['text']", "part['text'] + part['text']"), encoding="utf-8")
    with pytest.raises(
        BundleError, match="does more with the question 'hi' than to put it in once"
    ):
        PromptBuilder(bundle.paths, bundle.manifest).encode_marked("hi")
