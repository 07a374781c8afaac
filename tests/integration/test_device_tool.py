"""bivlm-device, the tool without Python, against the Python runtime: pixels, ids, tokens, JSON."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from random_checkpoints import save_checkpoint  # type: ignore[import-not-found]
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from typer.testing import CliRunner

from bivlm_edge import bundle
from bivlm_edge._ops_library import custom_ops_library
from bivlm_edge.bundle import BundlePaths, ImageSpec, Manifest, file_record, read_manifest
from bivlm_edge.cli import bench
from bivlm_edge.config import ExportConfig, QuantConfig
from bivlm_edge.datasets import VqaItem, load_easy_vqa
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint
from bivlm_edge.pictures import open_picture
from bivlm_edge.runtime import Answerer, load, preprocess

ROOT = Path(__file__).parents[2]
TOOL_VARIABLE = "BIVLM_DEVICE"  # a build of the tool to test in place of one made here
ORT_VARIABLE = "BIVLM_ONNXRUNTIME"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool, built once."""
    if built := os.environ.get(TOOL_VARIABLE):
        return Path(built)
    folder = tmp_path_factory.mktemp("device_build")
    options = ["-DBIVLM_BUILD_TOOLS=AUTO", "-DCMAKE_BUILD_TYPE=Release", "-DBIVLM_WERROR=ON"]
    configured = subprocess.run(
        ["cmake", "-S", ROOT / "custom_ops", "-B", folder, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in configured.stdout.splitlines():
        if "bivlm-device is not built" in line:
            pytest.skip(line.removeprefix("-- "))
    build = ["cmake", "--build", folder, "--target", "bivlm-device", "--parallel", "2"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return folder / "bivlm-device"


@pytest.fixture(scope="session")
def run(tool: Path) -> Run:
    """A function that runs the tool with the wheel's ONNX Runtime and our operator library."""
    runtime = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))

    def call(
        *arguments: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        variables = {
            **os.environ,
            ORT_VARIABLE: str(runtime),
            "BIVLM_OPS_LIBRARY": custom_ops_library(),
            **(environment or {}),
        }
        command = [str(tool), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, env=variables, check=False)

    return call


def succeeded(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def answer(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeeded(done))
    return found


def refusal(done: subprocess.CompletedProcess[bytes], exit_code: int) -> str:
    """The one sentence of an error."""
    message = done.stderr.decode()
    assert done.returncode == exit_code, message
    assert message.startswith("bivlm-device: ")
    assert message.count("\n") == 1
    return message


def wanted_answer(
    answerer: Answerer, question: str, image: Path | None, limit: int | None
) -> dict[str, Any]:
    """What the tool must print, as bivlm-run computes it; without the time that it took."""
    picture = None if image is None else answerer.picture(image)
    generation = answerer.ask(question, picture, max_new_tokens=limit)
    ids = list(generation)
    return {
        "text": "".join(answerer.prompts.stream(ids)),
        "prompt_tokens": generation.prompt_tokens,
        "kept_tokens": generation.kept_tokens,
        "new_tokens": generation.new_tokens,
        "stop_reason": generation.stop_reason,
        "token_ids": ids,
    }


def agree(
    run: Run,
    model: Path,
    question: str,
    image: Path | None,
    *,
    keep: float | None = None,
    limit: int | None = None,
) -> None:
    answerer = Answerer(load(model, threads=1).keeping_fraction(keep))
    options: list[object] = ["--threads", 1, "--json"]
    options += [] if image is None else ["--image", image]
    options += [] if keep is None else ["--keep-tokens", keep]
    options += [] if limit is None else ["--max-new-tokens", limit]
    found = answer(run(model, question, *options))
    assert found.pop("seconds") > 0
    assert found == wanted_answer(answerer, question, image, limit)


def easy_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of easy-VQA as PNG, JPEG and PPM, with questions about them."""
    cases = []
    for index, item in enumerate(load_easy_vqa("test")[:600:100]):
        suffix = ("png", "jpg", "ppm")[index % 3]
        path = folder / f"{index}.{suffix}"
        item.image.open().convert("RGB").save(path)
        cases.append((path, item.question))
    return cases


def test_tokens_are_those_of_bivlm_run(
    run: Run, two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    assert load(two_bit_export.graph).cache_dtype is np.float16
    for image, question in easy_pictures(tmp_path):
        agree(run, two_bit_export.graph, question, image)
    agree(run, two_bit_export.graph, "what color is it? say more, please", None, limit=9)


@pytest.mark.parametrize("keep", [None, 0.1, 1.0])
def test_tokens_agree_with_pruning(
    run: Run, pruned_export: BundlePaths, tmp_path: Path, keep: float | None
) -> None:
    for image, question in easy_pictures(tmp_path)[:3]:
        agree(run, pruned_export.graph, question, image, keep=keep)


def test_token_ids_stand_for_the_prompt(
    run: Run, two_bit_export: BundlePaths, pictures: list[VqaItem], tmp_path: Path
) -> None:
    model, image = two_bit_export.graph, pictures[0].image.path
    ids = json.loads(succeeded(run(model, "is it red?", "--image", image, "--show", "token-ids")))
    answerer = Answerer(load(model, threads=1))
    assert ids == answerer.prompts.encode("is it red?", answerer.picture(str(image))).tolist()
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(map(str, ids)), encoding="utf-8")
    asked = answer(run(model, "is it red?", "--image", image, "--json"))
    for given in (",".join(map(str, ids)), file):
        found = answer(run(model, "--token-ids", given, "--image", image, "--json"))
        assert {**found, "seconds": 0} == {**asked, "seconds": 0}
    streamed = succeeded(run(model, "is it red?", "--image", image)).decode()
    assert streamed == asked["text"] + "\n"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llava, CLIP and Llama", ExportConfig(QuantConfig(method="none"))),
        ("llava-onevision", ExportConfig(QuantConfig(method="nbits4"), dtype="fp16")),
        ("qwen2.5-vl", ExportConfig(QuantConfig(method="none"))),
        ("smolvlm", ExportConfig(QuantConfig(bits=3.0))),
    ],
)
def test_families_agree(
    run: Run, architecture: str, config: ExportConfig, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    model = export_model(vlm, pictures, tmp_path / "model.onnx", config).paths.graph
    image = Path(str(pictures[3].image.path))
    assert same_pixels(run, model, image)
    for question in ("what is 1", "  Größe?\n你好 😀 "):
        agree(run, model, question, image, limit=12)
    agree(run, model, "hello", None, limit=12)


def same_pixels(run: Run, model: Path, image: Path) -> bool:
    """Whether pixel_values are equal to the last bit."""
    found = np.frombuffer(succeeded(run(model, "--image", image, "--show", "pixels")), np.float32)
    wanted = preprocess(open_picture(image), read_manifest(BundlePaths(model)).image).pixels
    return np.array_equal(found, wanted.ravel())


@pytest.fixture
def copied(two_bit_export: BundlePaths, tmp_path: Path) -> BundlePaths:
    """A copy of the reference export, to be changed."""
    paths = BundlePaths(tmp_path / "copy" / "model.onnx")
    shutil.copytree(two_bit_export.graph.parent, paths.graph.parent)
    return paths


def rewrite(paths: BundlePaths, **changes: Any) -> Manifest:
    """Change fields of the manifest."""
    manifest = replace(read_manifest(paths), **changes)
    bundle.write_manifest(manifest, paths.assets)
    return manifest


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    blocks = rng.integers(0, 256, (size[1] // 5 + 2, size[0] // 5 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        grey = np.asarray(picture.convert("L")).astype(np.uint16)
        return Image.fromarray(grey * 255 + 77)
    if mode == "PA":  # a palette with transparency
        return picture.convert("RGBA").quantize(40)
    if "A" in mode:
        picture = picture.convert(mode)
        alpha = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8))
        picture.putalpha(alpha)
        return picture
    return picture.convert(mode)


SPECS = {
    "clip": ImageSpec("clip", "shortest_edge", (32, 32), 3, (32, 32), 1 / 255, MEAN, STD),
    "wide crop": ImageSpec("clip", "exact", (20, 24), 2, (27, 17), None, (), ()),
    "square": ImageSpec("square", "exact", (32, 32), 3, None, 1 / 255, MEAN, STD, (122, 116, 104)),
    "idefics3": ImageSpec(
        "idefics3", "longest_edge", (96, 96), 1, (32, 32), 1 / 255, (0.5,) * 3, (0.5,) * 3
    ),
    "tiles": ImageSpec(
        "idefics3",
        "longest_edge",
        (96, 96),
        1,
        (32, 32),
        1 / 255,
        (0.5,) * 3,
        (0.5,) * 3,
        None,
        True,
    ),
    "box": ImageSpec("clip", "exact", (30, 50), 4, None, 1 / 255, (), ()),
    "hamming": ImageSpec("clip", "exact", (30, 50), 5, None, None, MEAN, STD),
}


@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_equal_for_all_processors(
    run: Run, copied: BundlePaths, tmp_path: Path, name: str
) -> None:
    spec = SPECS[name]
    sizes = [(32, 32), (31, 33), (64, 48), (1, 1), (200, 31), (640, 481)]
    height, width = spec.crop or spec.resize
    rewrite(copied, image=spec, pixel_shape=(3, height, width))
    for size in sizes:
        path = tmp_path / "picture.png"
        noise(size).save(path)
        assert same_pixels(run, copied.graph, path), size


FILES = {
    "grey.png": ("L", {}),
    "bits.png": ("1", {}),
    "alpha.png": ("RGBA", {}),
    "grey_alpha.png": ("LA", {}),
    "palette.png": ("P", {}),
    "palette_alpha.png": ("PA", {}),
    "sixteen.png": ("I;16", {}),
    "colour_key.png": ("RGB", {"transparency": (10, 20, 30)}),
    "plain.jpg": ("RGB", {}),
    "fine.jpg": ("RGB", {"quality": 98, "subsampling": 0}),
    "rough.jpg": ("RGB", {"quality": 20, "subsampling": 2}),
    "half.jpg": ("RGB", {"subsampling": 1}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "grey.jpg": ("L", {}),
    "colour.ppm": ("RGB", {}),
    "grey.pgm": ("L", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_pillow_reads_them(
    run: Run, copied: BundlePaths, tmp_path: Path, name: str
) -> None:
    mode, options = FILES[name]
    size = (63, 45)  # no resizing: every byte shows
    spec = ImageSpec("clip", "exact", (45, 63), 3, None, None, (), ())
    rewrite(copied, image=spec, pixel_shape=(3, 45, 63))
    path = tmp_path / name
    noise(size, mode).save(path, **options)
    assert same_pixels(run, copied.graph, path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_upright(
    run: Run, two_bit_export: BundlePaths, tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    noise((40, 30)).save(path, exif=exif)
    assert same_pixels(run, two_bit_export.graph, path)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
CORPUS = [
    "the quick brown fox jumps over the lazy dog's back, isn't it?",
    "what is shown in the picture? a blue triangle and 12345 circles",
    "Größe über naïve café 你好世界 привет мир 😀😀",
    "  indented\n\n\tcode = [1, 22, 333]; // ...\r\n",
] * 3
HARD = [
    "what is this?",
    " leading and trailing ",
    "two  spaces   three\tand tabs\t\t",
    "lines\n\nand\r\nreturns \n \n x",
    "digits 1234567 3.14 ½ ² ٣٤٥ Ⅷ",
    "It's WE'LL they'd I'M 'quoted' ''",
    "naïve café Größe ǅ ß \u017f's",
    "cafe\u0301 a\u030a \u1100\u1161 \u212b \ufb01",
    "你好\uff0c世界\uff01什么颜色\uff1f",
    "emoji 😀👍🏽 👨‍👩‍👧 \u200d",
    "\u00a0\u2003wide\u3000spaces\u180e\u0085",
    "!!!??? -- ... <s> <image> </s> <pad>x <|im_end|> y",
    "▁already ▁▁ marked",
    "\x00\x07 control",
    "العربية עברית हिन्दी ไทย",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def _trained(pre_tokenizer: Any, **options: Any) -> models.BPE:
    """A small BPE model on text that `pre_tokenizer` has cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        if not options.get("byte_fallback")
        else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    if options.get("byte_fallback"):
        for text in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
            vocabulary[text] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    return models.BPE(vocabulary, merges, **options)


def _byte_level(pre_tokenizer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(_trained(pre_tokenizer, **options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def smolvlm() -> Tokenizer:
    parts = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    return _byte_level(pre_tokenizers.Sequence(parts))


def qwen2() -> Tokenizer:
    tokenizer = _byte_level(_split(QWEN2))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama3() -> Tokenizer:
    return _byte_level(_split(LLAMA3), ignore_merges=True)


def _characters() -> Tokenizer:
    cut = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(_trained(cut, **options))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def llama2() -> Tokenizer:
    tokenizer = _characters()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def mistral() -> Tokenizer:
    tokenizer = _characters()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


TOKENIZERS = {
    "gpt2": gpt2,
    "smolvlm": smolvlm,
    "qwen2": qwen2,
    "llama3": llama3,
    "llama2": llama2,
    "mistral": mistral,
}


def put_tokenizer(paths: BundlePaths, tokenizer: Tokenizer) -> None:
    """Give a bundle another tokenizer, and prompts that are the question alone."""
    (paths.assets / bundle.TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    frame = {"before": "", "behind": "", "strips": False}
    prompt = {"version": 1, "with_image": None, "without_image": frame}
    (paths.assets / bundle.PROMPT).write_text(json.dumps(prompt), encoding="utf-8")
    files = dict(read_manifest(paths).files)
    files["tokenizer"] = file_record(paths.assets / bundle.TOKENIZER)
    files["prompt"] = file_record(paths.assets / bundle.PROMPT)
    rewrite(paths, files=files, image_token="<no such token>", bos_token_id=None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_tokenizers_library(run: Run, copied: BundlePaths, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<pad>", normalized=True, rstrip=True)])
    put_tokenizer(copied, tokenizer)
    for text in HARD:
        if "\x00" in text:
            text = text.replace("\x00", "")  # no argument of a process holds it
        found = json.loads(succeeded(run(copied.graph, text, "--show", "token-ids")))
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == wanted, (text, tokenizer.encode(text, add_special_tokens=False).tokens)


def test_what_the_tokenizer_lacks_is_named(run: Run, copied: BundlePaths) -> None:
    tokenizer = gpt2()
    tokenizer.normalizer = normalizers.Lowercase()
    put_tokenizer(copied, tokenizer)
    message = refusal(run(copied.graph, "hello", "--show", "token-ids"), 2)
    assert "the tokenizer has the normalizer Lowercase" in message
    assert "--token-ids" in message
    found = answer(run(copied.graph, "--token-ids", "3,35,4", "--json", "--max-new-tokens", 2))
    assert found["text"] is None
    assert len(found["token_ids"]) == found["new_tokens"]


def keys(values: Mapping[str, Any]) -> set[str]:
    return set(values)


def test_the_benchmark_has_the_keys_of_bivlm_bench(
    run: Run, pruned_export: BundlePaths, pictures: list[VqaItem]
) -> None:
    image = pictures[0].image.path
    quick = ["--repeats", "3", "--warmups", "1", "--new-tokens", "4", "--threads", "1"]
    asked = [str(pruned_export.graph), "--image", str(image), "--keep-tokens", "0.5", *quick]
    done = CliRunner().invoke(bench.app, [*asked, "--prompt", "what is 1", "--json"])
    wanted = json.loads(done.stdout)
    found = answer(run(asked[0], "what is 1", *asked[1:], "--bench"))
    assert keys(found) == keys(wanted) | {"device"}
    assert keys(found["machine"]) == keys(wanted["machine"])
    ours, theirs = found["models"][0], wanted["models"][0]
    assert keys(ours) == keys(theirs)
    assert ours["memory"].keys() == theirs["memory"].keys()
    for name in ("before_load", "after_load", "after_run"):
        assert keys(ours["memory"][name]) == keys(theirs["memory"][name])
    same = ("prompt_tokens", "kept_tokens", "weight_bytes", "kv_cache_bytes_per_token")
    same += ("kv_cache_bytes", "kv_cache_allocated_bytes", "dtype", "operators", "keep_tokens")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert found["machine"]["physical_cores"] == wanted["machine"]["physical_cores"]
    assert found["machine"]["cpu_flags"] == wanted["machine"]["cpu_flags"]
    times = ("ttft_ms", "first_run_ms", "prefill_ms", "decode_ms", "decode_tokens_per_s")
    for name in times:
        spread = ours[name]
        assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]
    assert ours["memory"]["after_run"]["vm_hwm"] >= ours["memory"]["after_load"]["rss_anon"] > 0


def test_jetson_sensors_are_read(run: Run, two_bit_export: BundlePaths, tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "proc/meminfo": "MemTotal:  7900000 kB\nMemAvailable:  6000000 kB\n",
        "sys/class/hwmon/hwmon0/name": "thermal\n",
        "sys/class/hwmon/hwmon1/name": "ina3221\n",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon1/in1_input": "5000\n",
        "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
        "sys/class/hwmon/hwmon1/in2_label": "NC\n",  # not connected: no readings
        "sys/kernel/debug/nvmap/iovmm/clients": (
            "CLIENT   PROCESS   PID   SIZE\nuser   gnome-shell   2015   1024K\ntotal   4096K\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    quick = ["--bench", "--repeats", 1, "--warmups", 0, "--new-tokens", 2, "--threads", 1]
    root = {"BIVLM_SYSTEM_ROOT": str(tmp_path / "root")}
    device = answer(run(two_bit_export.graph, "what is it", *quick, environment=root))["device"]
    assert device["board"] == "NVIDIA Jetson Orin Nano"
    assert device["power_mw"] == {"VDD_IN": {"median": 6000.0, "q1": 6000.0, "q3": 6000.0}}
    assert device["unified_memory"]["after_run"] == {
        "total_bytes": 7_900_000 * 1024,
        "available_bytes": 6_000_000 * 1024,
        "nvmap_bytes": 4 << 20,
        "nvmap_own_bytes": 0,
    }
    nothing = {"BIVLM_SYSTEM_ROOT": str(tmp_path / "empty")}
    device = answer(run(two_bit_export.graph, "what is it", *quick, environment=nothing))["device"]
    assert device["board"] is None
    assert device["power_mw"] is None
    assert device["unified_memory"]["after_run"] is None


REQUESTS: dict[str, tuple[Sequence[object], str]] = {
    "no prompt": ([], "PROMPT is missing"),
    "two prompts": (["a", "--token-ids", "1"], "were both given"),
    "three words": (["a", "b"], "'b' is one word too many"),
    "unknown option": (["a", "--temperature", "1"], "'--temperature' is no option"),
    "no value": (["a", "--image"], "--image needs a value"),
    "no number": (["a", "--threads", "two"], "--threads takes a whole number, not 'two'"),
    "no threads": (["a", "--threads", "0"], "--threads 0 is not a number of threads"),
    "empty prompt": ([" \n"], "the prompt is empty"),
    "no tokens": (["a", "--max-new-tokens", "0"], "--max-new-tokens 0 leaves nothing"),
    "too long": (["what is it? " * 400], "the model takes"),
    "placeholder": (["is <image> red?"], "'<image>', the mark that stands for a picture"),
    "placeholder ids": (["--token-ids", "3,2,2"], "the prompt has 2 image placeholders"),
    "foreign ids": (["--token-ids", "3,99999"], "token id 99999 is outside the vocabulary"),
    "no ids": (["--token-ids", "1,x"], "is no file of token ids"),
    "no pruning": (["a", "--keep-tokens", "0.5"], "was exported without pruning"),
    "no fraction": (["a", "--keep-tokens", "1.5"], "--keep-tokens 1.5 is not a fraction"),
    "two pictures": (["a", "--image", "x", "--image", "y"], "--image is given twice"),
    "other provider": (["a", "--provider", "gpu"], "--provider 'gpu' is not known. Accepted: cpu"),
    "bench option": (["a", "--repeats", "3"], "--repeats is about --bench"),
    "no ONNX Runtime": (["a", "--onnxruntime", "nowhere.so"], "does not load as ONNX Runtime"),
    "no library": (["a", "--library", "nowhere.so"], "'nowhere.so' is not there"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_requests_get_one_sentence(run: Run, two_bit_export: BundlePaths, name: str) -> None:
    arguments, sentence = REQUESTS[name]
    code = 3 if name == "no ids" else 2
    assert sentence in refusal(run(two_bit_export.graph, *arguments), code)


DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { (void)flags; return atoi(getenv("FAKE_INIT")); }
int cuDeviceGetCount(int* count) { *count = atoi(getenv("FAKE_COUNT")); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &device; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void* context) { (void)context; return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemAlloc_v2(void) { return 2; }
int cuMemFree_v2(void) { return 0; }
int cuMemsetD8_v2(void) { return 0; }
int cuMemcpyDtoD_v2(void) { return 0; }
"""


@pytest.mark.parametrize(
    ("start", "gpus", "sentence"),
    [
        (100, 0, "the NVIDIA driver finds no GPU"),
        (0, 0, "the NVIDIA driver finds no GPU"),
        (803, 1, "the NVIDIA driver fails (CUDA error 803)"),
        (0, 1, "was built without CUDAExecutionProvider"),
    ],
)
def test_what_cuda_lacks_is_said(
    run: Run, two_bit_export: BundlePaths, tmp_path: Path, start: int, gpus: int, sentence: str
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a driver that answers as told")
    source = tmp_path / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    done = run(
        *(two_bit_export.graph, "hi", "--provider", "cuda"),
        environment={
            "LD_LIBRARY_PATH": str(tmp_path),
            "FAKE_INIT": str(start),
            "FAKE_COUNT": str(gpus),
        },
    )
    message = refusal(done, 2)
    assert f"--provider cuda: {'this ONNX Runtime' if start == 0 and gpus else 'the'}" in message
    assert sentence in message


def test_no_driver_is_said(run: Run, two_bit_export: BundlePaths) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        message = refusal(run(two_bit_export.graph, "hi", "--provider", "cuda"), 2)
        assert "--provider cuda: no NVIDIA driver is installed here (libcuda.so.1" in message
    else:
        pytest.skip("this machine has an NVIDIA driver")


def test_a_library_that_is_none_is_refused(run: Run, two_bit_export: BundlePaths) -> None:
    model = two_bit_export.graph
    libc = next(path for path in Path("/lib").rglob("libm.so.6"))
    message = refusal(run(model, "a", "--onnxruntime", libc), 2)
    assert "is no ONNX Runtime: it has no OrtGetApiBase" in message
    message = refusal(run(model, "a", "--library", libc), 2)
    assert "does not load into ONNX Runtime" in message
    forced = {"BIVLM_FORCE_KERNEL": "fast"}
    assert "BIVLM_FORCE_KERNEL" in refusal(run(model, "a", environment=forced), 2)


def test_bad_pictures_are_refused(run: Run, two_bit_export: BundlePaths, tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return refusal(run(two_bit_export.graph, "a", "--image", path), 3)

    files = {}
    for suffix, options in (("png", {}), ("jpg", {"quality": 95}), ("gif", {}), ("ppm", {})):
        noise((64, 64)).save(tmp_path / f"whole.{suffix}", **options)
        files[suffix] = (tmp_path / f"whole.{suffix}").read_bytes()
    assert "is no picture that can be read" in refused("missing.png", None)
    assert "another format" in refused("a.gif", files["gif"])
    assert "truncated" in refused("a.ppm", files["ppm"][:-9])
    assert "truncated" in refused("a.jpg", files["jpg"][: len(files["jpg"]) // 2])
    assert "cannot be read as a picture" in refused("a.png", files["png"][: len(files["png"]) // 2])
    noise((64, 64)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert "4 colour components" in refused("cmyk.jpg", None)


def test_bad_bundles_are_refused(run: Run, copied: BundlePaths) -> None:
    assert "is not there" in refusal(run("nowhere.onnx", "a"), 3)
    manifest = copied.assets / bundle.MANIFEST
    text = manifest.read_text(encoding="utf-8")
    data = copied.data.read_bytes()

    copied.data.write_bytes(data[:-1])
    assert "the manifest says" in refusal(run(copied.graph, "a"), 3)
    copied.data.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "does not have the checksum" in refusal(run(copied.graph, "a"), 3)
    copied.data.write_bytes(data)

    manifest.write_text(text.replace('"version": 2', '"version": 9'), encoding="utf-8")
    assert "has bundle version 9; this build reads 2" in refusal(run(copied.graph, "a"), 3)
    manifest.write_text("{", encoding="utf-8")
    assert "is not a manifest" in refusal(run(copied.graph, "a"), 3)
    manifest.unlink()
    assert "manifest.json' is missing" in refusal(run(copied.graph, "a"), 3)
    manifest.write_text(text, encoding="utf-8")

    prompt = copied.assets / bundle.PROMPT
    files = {
        role: record for role, record in read_manifest(copied).files.items() if role != "prompt"
    }
    rewrite(copied, files=files)  # an export of an older version
    prompt.unlink()
    assert "was exported before" in refusal(run(copied.graph, "a"), 3)
    frames = {"version": 1, "with_image": None, "without_image": None}
    prompt.write_text(json.dumps(frames), encoding="utf-8")
    assert "does not put fixed text round a question" in refusal(run(copied.graph, "a"), 2)


def test_stock_operators_give_the_same_tokens(
    run: Run, two_bit_export: BundlePaths, pictures: list[VqaItem]
) -> None:
    """Without the library, as bivlm-run --no-custom-ops."""
    image = Path(str(pictures[1].image.path))
    answerer = Answerer(load(two_bit_export.graph, custom_ops=False, threads=1))
    options = ["--image", image, "--no-custom-ops", "--threads", 1, "--json"]
    found = answer(run(two_bit_export.graph, "what is 1", *options))
    assert found.pop("seconds") > 0
    assert found == wanted_answer(answerer, "what is 1", image, None)
