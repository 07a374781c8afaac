"""Numbers to tables for people and to one line of JSON for machines. Computes none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_MIB = 1 << 20
_DECODE_TOKENS = 8  # up to so many, a product is bound by reading the weights


def to_json(values: Mapping[str, Any]) -> str:
    """Return compact JSON in one line. NaN and infinity are refused (ValueError)."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def human_bytes(size: int | None) -> str:
    """Return a size for people: bytes below 10 KiB, else KiB, else MiB."""
    if size is None:
        return "-"
    if abs(size) < 10_240:
        return f"{size:,} B"
    return f"{size / 1024:,.1f} KiB" if abs(size) < _MIB else f"{size / _MIB:,.1f} MiB"


def _spread(values: Mapping[str, float], form: str = ".2f") -> str:
    return f"{values['median']:{form}} ({values['q1']:{form}}-{values['q3']:{form}})"


def _new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """Accuracy overall, open-ended and per kind; keys as in the JSON of bivlm-eval."""
    table = _new_table("accuracy", ["questions"], ["n", "correct", "accuracy", "95 % interval"])
    rows = [("all", result), *result["per_kind"].items()]
    if result["open_ended"] is not None:
        rows.insert(1, ("open-ended", result["open_ended"]))
    for name, score in rows:
        low, high = score["interval"]
        table.add_row(
            name,
            f"{score['n']:,}",
            f"{score['correct']:,}",
            f"{score['accuracy']:.2%}",
            f"{low:.2%}-{high:.2%}",
        )
    return table


def benchmark_tables(result: Mapping[str, Any]) -> list[Table]:
    """Times, memory and ratios; keys as in the JSON of bivlm-bench."""
    models = result["models"]
    labels = [model["label"] for model in models]
    machine = result["machine"]
    times = _new_table(
        f"{machine['cpu']}, {machine['cores']} cores; onnxruntime {result['onnxruntime']}, "
        f"kernel {result['kernel']}; {result['warmups']} warm-ups, {result['repeats']} repeats: "
        "median (quartiles)",
        ["time"],
        labels,
    )
    automatic = f"automatic ({machine['physical_cores']})"
    times.add_row("operators", *(model["operators"] for model in models))
    times.add_row("threads", *(str(model["threads"] or automatic) for model in models))
    times.add_row(
        "prompt tokens, kept", *(f"{m['prompt_tokens']}, {m['kept_tokens']}" for m in models)
    )
    times.add_row("load, ms (once)", *(f"{model['load_ms']:.1f}" for model in models))
    for name, title in (
        ("ttft_ms", "picture file to first token, ms"),
        ("preprocess_ms", "  preprocessing, ms"),
        ("vision_ms", "  vision and pruning, ms"),
        ("prefill_ms", "  prefill of the decoder, ms"),
        ("decode_ms", "one more token, ms"),
        ("prefill_tokens_per_s", "prefill, tokens/s"),
        ("decode_tokens_per_s", "decode, tokens/s"),
    ):
        times.add_row(title, *(_spread(model[name]) for model in models))
    tables = [times, _memory_table(models, labels)]
    if result["ratios"]:
        ratios = _new_table(
            f"times as long as {labels[0]}: median (quartiles) of paired repeats",
            ["model"],
            ["first token", "prefill", "decode"],
        )
        for row in result["ratios"]:
            names = ("ttft_ms", "prefill_ms", "decode_ms")
            ratios.add_row(row["label"], *(_spread(row[name]) + "x" for name in names))
        tables.append(ratios)
    return tables


def kernel_tables(result: Mapping[str, Any]) -> list[Table]:
    """Single operators, one table for each shape; keys as in the JSON of bivlm-bench --kernels."""
    machine = result["machine"]
    head = (
        f"{machine['cpu']} ({' '.join(machine['cpu_flags'])}); onnxruntime "
        f"{result['onnxruntime']}, kernel {result['kernel']}, threads {result['threads']}; "
        f"{result['warmups']} warm-ups, {result['repeats']} repeats: median (quartiles)"
    )
    by_shape: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for entry in result["measurements"]:
        by_shape.setdefault((entry["n"], entry["k"]), []).append(entry)
    tables = []
    for (n, k), entries in by_shape.items():
        first = entries[0]["operators"][0]["label"]
        table = _new_table(
            f"N = {n}, K = {k}; {head}",
            ["tokens", "operator"],
            ["us", "GB/s", "GFLOP/s", f"times {first}", "copies", "copied"],
        )
        for entry in entries:
            _add_kernel_rows(table, entry)
        tables.append(table)
    return tables


def _add_kernel_rows(table: Table, entry: Mapping[str, Any]) -> None:
    where = f"{entry['m']} {'cold' if entry['cold'] else 'hot'}"
    for row in entry["operators"]:
        copied = row["anonymous_bytes"]
        weights = row["weight_bytes"] * row["copies"]
        table.add_row(
            where,
            row["label"],
            _spread(row["us"], ".1f"),
            f"{row['gbs']:.1f}",
            f"{row['gflops']:.0f}" if entry["m"] > _DECODE_TOKENS else "-",
            _spread(row["ratio"]) + "x",
            str(row["copies"]),
            f"{copied / weights:.2f}x" if entry["cold"] and copied is not None else "-",
        )
    for pages, speed in entry["reads"].items():
        label = "plain read" if pages == "mapped" else "plain read, 2 MiB pages"
        table.add_row(where, label, "", _spread(speed, ".1f"))
    table.add_section()


def profile_tables(models: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Operators of a prefill and of a decode step; keys as in the JSON of bivlm-bench."""
    tables = []
    for model in models:
        profile = model["profile"]
        for stage, title in (("prefill", "prefill"), ("decode", "one decode step")):
            found = profile[stage]
            table = _new_table(
                f"{model['label']}: {title}, {found['tokens']} tokens on top of "
                f"{found['cached']} cached; median of {found['runs']} profiled runs",
                ["operator"],
                ["nodes", "us", "share"],
            )
            for row in found["operators"]:
                table.add_row(row["op"], str(row["count"]), *_part(row["us"], found["nodes_us"]))
            table.add_section()
            for key, name in (("matmul_us", "matrix products"), ("other_us", "all others")):
                table.add_row(name, "", *_part(found[key], found["nodes_us"]))
            table.add_row("all nodes", "", *_part(found["nodes_us"], found["nodes_us"]))
            tables.append(table)
    return tables


def _part(value: float, whole: float) -> tuple[str, str]:
    return f"{value:,.0f}", f"{value / whole:.1%}" if whole else "-"


def _memory_table(models: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Table:
    table = _new_table("memory", ["what"], labels)
    table.add_row("weights (graph + data)", *(human_bytes(m["weight_bytes"]) for m in models))
    table.add_row("KV cache at the end", *(human_bytes(m["kv_cache_bytes"]) for m in models))
    allocated = (human_bytes(m["kv_cache_allocated_bytes"]) for m in models)
    table.add_row("KV cache, allocated", *allocated)
    for stage, title in (
        ("before_load", "before load"),
        ("after_load", "after load"),
        ("after_run", "after run"),
    ):
        for key, name in (
            ("rss_anon", "RssAnon"),
            ("rss_file", "RssFile"),
            ("pss", "PSS"),
            ("vm_hwm", "VmHWM (peak)"),
        ):
            sizes = [model["memory"][stage].get(key) for model in models]
            table.add_row(f"{name} {title}", *map(human_bytes, sizes))
    return table


def inspection_tables(result: Mapping[str, Any]) -> list[Table]:
    """Layers and totals; keys as in the JSON of bivlm-inspect."""
    layers = _new_table(
        f"layers of {result['name']}",
        ["layer", "operator", "method"],
        ["n x k", "planes", "Hadamard", "bytes", "true bits", "error"],
    )
    for layer in result["layers"]:
        error = layer["output_error"]
        layers.add_row(
            layer["name"],
            layer["op"],
            layer["method"] or "-",
            f"{layer['n']} x {layer['k']}",
            _planes(layer["planes"]),
            str(layer["hadamard_block"] or "-"),
            f"{layer['bytes']:,}",
            _bits(layer),
            "-" if error is None else f"{error:.4f}",
        )
    totals = _new_table("totals", ["what", "value"], [])
    bits = result["true_bits_per_weight"]
    totals.add_row(
        "bits per BinaryMatMul weight, all counted", "-" if bits is None else f"{bits:.4f}"
    )
    _add_other_bits(totals, result)
    for table in result["tables"]:
        totals.add_row(f"table {table['what']}", human_bytes(table["bytes"]))
    for role, size in result["file_bytes"].items():
        totals.add_row(f"file: {role}", human_bytes(size))
    for name, reason in result["skipped"].items():
        totals.add_row(f"not quantized: {name}", reason)
    check = "every byte (SHA-256)" if result["verified"] else "sizes and probe"
    totals.add_row("compared with the manifest", check)
    return [layers, totals]


def _planes(planes: Sequence[int] | None) -> str:
    return "-" if planes is None else "/".join(map(str, planes))


def _bits(layer: Mapping[str, Any]) -> str:
    """Bits in the file, and what a baseline would store where they differ."""
    stored = f"{layer['true_bits']:.3f}"
    claimed = f"{layer['reported_bits']:.3f}"
    return stored if stored == claimed else f"{stored} (as {claimed})"


def _add_other_bits(table: Table, values: Mapping[str, Any]) -> None:
    """What the exporter counted over more than BinaryMatMul, where it did."""
    for key, title in (
        ("true_bits_all_linear", "bits per weight of all quantized linear layers"),
        ("file_bits_per_parameter", "bits of graph and data per parameter of the checkpoint"),
    ):
        value = values.get(key)
        if value is not None:
            table.add_row(title, f"{value:.4f}")


def export_tables(name: str, report: Mapping[str, Any]) -> list[Table]:
    """What an export wrote and how it was validated; keys as in export_report.json."""
    files = _new_table(f"{name}: {report['model']}", ["what"], ["value"])
    bits = report["true_bits_per_weight"]
    if bits is not None:
        files.add_row("bits per BinaryMatMul weight, all counted", f"{bits:.4f}")
    _add_other_bits(files, report)
    for part, size in report["file_bytes"].items():
        files.add_row(part, human_bytes(size))
    by_reason: dict[str, list[str]] = {}
    for layer, reason in report["skipped"].items():
        by_reason.setdefault(reason, []).append(layer)
    for reason, layers in by_reason.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        files.add_row(f"not quantized: {layers[0]}{more}", reason)
    files.add_row("seconds", f"{report['seconds']:.0f}")
    tables = [files]
    if report.get("keep_tokens") is not None:
        tables.append(_choice_table(report["keep_tokens"]))
    checks = _new_table("validation against torch", ["way"], ["logits error", "bound", "tokens"])
    for way in report["validation"]:
        same = f"{way['tokens'] - way['near_ties']}/{way['tokens']}"
        checks.add_row(way["runtime"], f"{way['logits_error']:.1e}", f"{way['bound']:g}", same)
    return [*tables, checks]


def _choice_table(choice: Mapping[str, Any]) -> Table:
    """What each tested number of image tokens gave, and which one was chosen."""
    table = _new_table(
        f"tokens of each image: {choice['verdict']}; {choice['questions']:,} questions of "
        f"{choice['data']}",
        ["image tokens"],
        ["accuracy", "difference", "at 95 % at least", "passes"],
    )
    for point in reversed(choice["tested"]):
        chosen = " (chosen)" if point["kept"] == choice["kept"] else ""
        table.add_row(
            f"{point['kept']} of {choice['image_tokens']}{chosen}",
            f"{point['accuracy']:.2%}",
            f"{100 * point['difference']:+.2f}",
            f"{100 * point['difference_low']:+.2f}",
            "yes" if point["passes"] else "no",
        )
    table.add_row("another picture", f"{choice['accuracy_shuffled']:.2%}", "", "", "")
    return table
