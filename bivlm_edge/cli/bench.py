"""bivlm-bench: time and memory of a model, alone or against others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from bivlm_edge import report
from bivlm_edge import synthetic as synthetic_models
from bivlm_edge.bundle import BundlePaths, read_manifest
from bivlm_edge.cli.bench_kernels import (
    DEFAULT_COLD_MB,
    DEFAULT_SHAPES,
    DEFAULT_TOKENS,
    Request,
    new_request,
    run_kernels,
)
from bivlm_edge.cli.common import (
    DebugOption,
    JsonOption,
    NoCustomOpsOption,
    ProviderOption,
    ThreadsOption,
    command_errors,
    new_app,
    progress,
    progress_by_name,
    show,
    show_json,
)
from bivlm_edge.config import DEFAULT_VOCABULARY_BITS, check_vocabulary_bits
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.runtime.bench_worker import Job
from bivlm_edge.runtime.benchmark import Contender, add_profiles, benchmark
from bivlm_edge.runtime.providers import CPU, check_provider

_PICTURE_SIZE = (640, 480)
_FEWEST_PROFILED_TOKENS = 3
_OF_KERNELS = ("shape", "tokens", "cold_mb")
_OF_MODELS = (
    *("model", "compare", "compare_fallback", "image", "prompt", "new_tokens", "context"),
    *("keep_tokens", "profile", "no_custom_ops", "synthetic", "refresh", "provider"),
    "vocabulary_bits",
)

OptionalModelArgument = Annotated[
    str | None, typer.Argument(help="The exported model.onnx.", metavar="[MODEL]")
]
SyntheticOption = Annotated[
    str | None,
    typer.Option(
        "--synthetic",
        help="In place of MODEL: an architecture at its real size with random weights, at two bits "
        f"and, to compare, at four ({', '.join(synthetic_models.NAMES)}). Built on first use into "
        "~/.cache/bivlm-edge/synthetic, which takes minutes and torch.",
    ),
]
RefreshOption = Annotated[
    bool, typer.Option("--refresh", help="Build what --synthetic names anew.")
]

app = new_app()


@app.command()
@command_errors("bivlm-bench")
def run(
    ctx: typer.Context,
    model: OptionalModelArgument = None,
    synthetic: SyntheticOption = None,
    refresh: RefreshOption = False,
    vocabulary_bits: Annotated[
        int | None,
        typer.Option(
            "--vocabulary-bits",
            help="Of the token table and the head of --synthetic, in all its exports: 8 or 4.",
            show_default="8",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Another model to measure in turn; may be repeated."),
    ] = None,
    compare_fallback: Annotated[
        bool,
        typer.Option("--compare-fallback", help="Also measure MODEL without the kernel library."),
    ] = False,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="One picture.", show_default="a made-up JPEG of 640 x 480"),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="The question.")
    ] = "what is shown in the picture?",
    keep_tokens: Annotated[
        list[float] | None,
        typer.Option(
            "--keep-tokens",
            help="Fraction of the image tokens to keep, of a MODEL exported with pruning; may be "
            "repeated: MODEL is then measured with each. With --synthetic the two-bit export.",
            show_default="as exported",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens per answer; end tokens are ignored.")
    ] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured rounds.")] = 10,
    warmups: Annotated[int, typer.Option("--warmups", help="Rounds before, not counted.")] = 2,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens in the KV cache when decoding starts.",
            show_default="those of the prompt",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Also the time by operator, in runs of their own behind the others."
        ),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure single operators instead of a model."),
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NxK",
            help="--kernels: output x input features; may be repeated.",
            show_default=", ".join(DEFAULT_SHAPES),
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            help="--kernels: tokens of a product; may be repeated.",
            show_default=", ".join(map(str, DEFAULT_TOKENS)),
        ),
    ] = None,
    cold_mb: Annotated[
        int | None,
        typer.Option(
            "--cold-mb",
            help="--kernels: weights to cycle through, so that they come from memory; 0: only hot.",
            show_default=str(DEFAULT_COLD_MB),
        ),
    ] = None,
    provider: ProviderOption = CPU,
    no_custom_ops: NoCustomOpsOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """Measure load time, first token, prefill, decode and memory in fresh processes.

    Prints tables, then one line of JSON. With --compare the models take turns
    and ratios are taken within each round: a slow moment of the machine hits
    all alike. --kernels measures the operators by themselves, against ONNX
    Runtime's own, with random weights (it needs the package onnx and free
    memory of about 16 times --cold-mb).

    Examples:
      bivlm-bench model.onnx
      bivlm-bench model.onnx --compare fp32.onnx --threads 1 --json
      bivlm-bench pruned.onnx --keep-tokens 1 --keep-tokens 0.5 --keep-tokens 0.25
      bivlm-bench model.onnx --context 512 --profile
      bivlm-bench --synthetic smolvlm-256m
      bivlm-bench --synthetic llava-ov-0.5b --keep-tokens 1 --keep-tokens 0.25
      bivlm-bench --kernels --shape 4096x4096 --tokens 1 --threads 1
    """
    if kernels:
        _refuse(ctx, _OF_MODELS, "is about a model; --kernels measures operators by themselves")
        _run_kernels(
            new_request(shape, tokens, threads, cold_mb, warmups, repeats), as_json=as_json
        )
        return
    _refuse(ctx, _OF_KERNELS, "is about --kernels; this run measures a model")
    if image is not None and len(image) > 1:
        raise RequestError(
            f"--image is given {len(image)} times; one picture is measured. Give one of them."
        )
    if profile and new_tokens < _FEWEST_PROFILED_TOKENS:
        raise RequestError(
            f"--profile needs --new-tokens {_FEWEST_PROFILED_TOKENS} or more: the prefill's, a "
            "warm-up and one to profile."
        )
    check_provider(provider)
    model, *built = _models(
        model, synthetic, vocabulary_bits, pruned=bool(keep_tokens), refresh=refresh
    )
    compare = [*built, *(compare or [])]
    for path in (model, *compare):
        read_manifest(BundlePaths(Path(path)))
    with _picture(image[0] if image else None) as picture:
        contenders = [
            Contender(
                label,
                Job(
                    *(path, picture, prompt, new_tokens, threads, custom_ops, context, fraction),
                    provider=provider,
                ),
            )
            for label, path, custom_ops, fraction in _entries(
                model, compare, compare_fallback, keep_tokens, custom_ops=not no_custom_ops
            )
        ]
        total = (warmups + repeats) * len(contenders)
        with progress("measurements", total) as on_progress:
            result = benchmark(
                contenders, repeats=repeats, warmups=warmups, on_progress=on_progress
            )
        if profile:
            add_profiles(result, contenders)
    if not as_json:
        show(*report.benchmark_tables(result))
        if profile:
            show(*report.profile_tables(result["models"]))
    show_json(result)


def _run_kernels(request: Request, *, as_json: bool) -> None:
    with progress("rounds", request.rounds) as on_round:
        result = run_kernels(request, on_round)
    if not as_json:
        show(*report.kernel_tables(result), *result["notes"])
    show_json(result)


def _refuse(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options of the command line that would be ignored."""
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise RequestError(f"{option} {why}. Leave one of the two out.")


def _models(
    model: str | None,
    synthetic: str | None,
    vocabulary_bits: int | None,
    *,
    pruned: bool,
    refresh: bool,
) -> list[str]:
    """The model to measure, and for --synthetic the 4-bit one to compare it with, or `pruned`."""
    if (model is None) == (synthetic is None):
        raise RequestError(
            f"{'neither' if model is None else 'both'} MODEL {'nor' if model is None else 'and'} "
            "--synthetic was given. Give exactly one: the path of an exported model.onnx, or "
            f"--synthetic with one of {', '.join(synthetic_models.NAMES)}; or --kernels alone."
        )
    if synthetic is None:
        if refresh:
            raise RequestError("--refresh goes with --synthetic only. Leave it out.")
        if vocabulary_bits is not None:
            raise RequestError("--vocabulary-bits goes with --synthetic only. Leave it out.")
        return [str(model)]
    bits = DEFAULT_VOCABULARY_BITS if vocabulary_bits is None else vocabulary_bits
    check_vocabulary_bits(bits)
    methods = synthetic_models.METHODS[:1] if pruned else synthetic_models.METHODS
    with progress_by_name() as tell:
        return [
            str(
                synthetic_models.ensure(
                    synthetic,
                    method,
                    pruned=pruned,
                    vocabulary_bits=bits,
                    refresh=refresh,
                    progress=tell,
                )
            )
            for method in methods
        ]


def _entries(
    model: str,
    compare: list[str],
    compare_fallback: bool,
    keep_tokens: list[float] | None,
    *,
    custom_ops: bool,
) -> list[tuple[str, str, bool, float | None]]:
    """Label, path, use of the library and fraction of image tokens of each contender."""
    paths = [model, *compare]
    label = _label(model, paths)
    fractions: dict[str, float | None] = {label: None}
    if keep_tokens:
        fractions = {f"{label} ({fraction:g} kept)": fraction for fraction in keep_tokens}
    entries = [(name, model, custom_ops, fraction) for name, fraction in fractions.items()]
    if compare_fallback:
        entries += [
            (f"{name} (fallback)", model, False, fraction) for name, fraction in fractions.items()
        ]
    return entries + [(_label(path, paths), path, custom_ops, None) for path in compare]


def _label(path: str, paths: list[str]) -> str:
    """The name of the file, with its folder if another file has the same name."""
    resolved = Path(path).resolve()
    same_name = {Path(other).resolve() for other in paths if Path(other).stem == resolved.stem}
    return resolved.stem if len(same_name) == 1 else f"{resolved.parent.name}/{resolved.stem}"


@contextmanager
def _picture(image: str | None) -> Iterator[str]:
    """The path of the picture to ask about: the given one, or made-up colours in a JPEG."""
    if image is not None:
        if not Path(image).is_file():
            raise DataError(f"the picture '{image}' does not exist. Give the path of a file.")
        yield str(Path(image).resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        patches = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(patches).resize(_PICTURE_SIZE, Image.Resampling.BICUBIC).save(path)
        yield str(path)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
