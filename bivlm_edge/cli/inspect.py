"""bivlm-inspect: what an exported model consists of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from bivlm_edge import report
from bivlm_edge.cli.common import (
    DebugOption,
    JsonOption,
    ModelArgument,
    command_errors,
    new_app,
    show,
    show_json,
)
from bivlm_edge.runtime.inspection import inspect_bundle

app = new_app()


@app.command()
@command_errors("bivlm-inspect")
def run(
    model: ModelArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte of graph and data (SHA-256).")
    ] = False,
    as_json: JsonOption = False,
    _debug: DebugOption = False,
) -> None:
    """List the layers of an exported model, their true bits, and all sizes.

    True bits per weight are the bytes of everything that belongs to a weight,
    divided by its elements. Bytes and shapes come from the export report, as
    the exporter counted them from the written tensors; arithmetic and file
    sizes are checked here, and if one is wrong, the exit code is 1.

    Examples:
      bivlm-inspect model.onnx
      bivlm-inspect model.onnx --verify --json
    """
    found = inspect_bundle(model, verify=verify)
    result = {
        "model": model,
        "name": found.manifest.name,
        "family": found.manifest.family,
        "dtype": found.manifest.dtype,
        "fallback": found.manifest.fallback,
        "true_bits_per_weight": found.true_bits_per_weight,
        "true_bits_all_linear": found.true_bits_all_linear,
        "file_bits_per_parameter": found.file_bits_per_parameter,
        "file_bytes": found.file_bytes,
        "tables": found.tables,
        "layers": [asdict(layer) for layer in found.layers],
        "skipped": found.skipped,
        "verified": found.verified,
    }
    if as_json:
        show_json(result)
    else:
        show(*report.inspection_tables(result))


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
