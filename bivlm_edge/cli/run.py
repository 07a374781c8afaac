"""bivlm-run: one question, one answer, streamed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bivlm_edge.cli.common import (
    DebugOption,
    JsonOption,
    KeepTokensOption,
    ModelArgument,
    NoCustomOpsOption,
    ProviderOption,
    ThreadsOption,
    command_errors,
    new_app,
    show_json,
)
from bivlm_edge.errors import RequestError
from bivlm_edge.files import write_bytes
from bivlm_edge.memory import keep_no_freed_memory
from bivlm_edge.runtime import Answerer, load, top_p_sampler
from bivlm_edge.runtime.providers import CPU
from bivlm_edge.runtime.token_picture import token_picture

app = new_app()


@app.command()
@command_errors("bivlm-run")
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The question.", metavar="PROMPT")],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="One picture: any format that Pillow reads."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Longest answer.", show_default="the model's own"),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the most likely token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the draws.", show_default="a new one"),
    ] = None,
    keep_tokens: KeepTokensOption = None,
    show_tokens: Annotated[
        Path | None,
        typer.Option(
            "--show-tokens",
            help="Write a PNG of the picture with the image tokens that reach the decoder.",
            metavar="FILE.png",
        ),
    ] = None,
    provider: ProviderOption = CPU,
    no_custom_ops: NoCustomOpsOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """Answer a question about a picture, or a question alone.

    Examples:
      bivlm-run model.onnx --image cat.png "what is this?"
      bivlm-run model.onnx "say hello" --max-new-tokens 20 --json
      bivlm-run pruned.onnx --image cat.png "what is this?" --show-tokens tokens.png
    """
    if image is not None and len(image) > 1:
        raise RequestError(
            f"--image is given {len(image)} times; this command supports one picture per question. "
            "Ask about each picture in a run of its own."
        )
    if show_tokens is not None:
        _check_shown(show_tokens, has_image=bool(image))
    sampler = top_p_sampler(temperature, top_p, seed)
    keep_no_freed_memory()
    session = load(model, provider=provider, custom_ops=not no_custom_ops, threads=threads)
    answerer = Answerer(session.keeping_fraction(keep_tokens))
    start = time.perf_counter()
    picture = answerer.picture(image[0]) if image else None
    generation = answerer.ask(prompt, picture, max_new_tokens=max_new_tokens, sampler=sampler)
    pieces = []
    for piece in answerer.text_of(generation):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if not as_json:
        typer.echo()
    if show_tokens is not None and picture is not None:
        prompt_ids = answerer.prompts.encode(prompt, picture)
        write_bytes(
            show_tokens,
            token_picture(session.manifest, picture, prompt_ids, generation.kept_indices),
        )
    if not as_json:
        return
    show_json(
        {
            "text": "".join(pieces),
            "prompt_tokens": generation.prompt_tokens,
            "kept_tokens": generation.kept_tokens,
            "new_tokens": generation.new_tokens,
            "stop_reason": generation.stop_reason,
            "seconds": round(time.perf_counter() - start, 4),
        }
    )


def _check_shown(path: Path, *, has_image: bool) -> None:
    if not has_image:
        raise RequestError(
            "--show-tokens draws on the picture, and none is given. Add --image, or leave it out."
        )
    if path.suffix.lower() != ".png":
        raise RequestError(f"--show-tokens {path} is no PNG. Give a name that ends in .png.")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
