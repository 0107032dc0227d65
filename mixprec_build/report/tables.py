"""Prints facts as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from ..text import as_word, counted, human, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..output.weight_errors import WeightError

__all__ = ["show_activity", "show_errors", "show_findings", "show_inspect", "show_plan", "show_suggestion"]


# Bounds of what is printed; --json has everything.
_MAX_LINES = 1000
_MAX_LINE = 10_000
_MAX_NAMES = 500
_MAX_COLUMNS = 40


def show_plan(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the facts of a plan: rules, sources, formats, layer map, notes."""
    rules = _table("line", "pattern", "source", "modules", "decides", title="Rules")
    for rule in facts["rules"][:_MAX_LINES]:
        _add_row(rules, *(str(rule[k]) for k in ("line", "pattern", "source", "matched", "won")))
    if facts["rules"]:
        console.print(rules)
        _say_how_many_more(facts["rules"], console)
    sources = _table("source", "holds", "modules", "bytes", "location", title="Sources")
    for source in facts["sources"]:
        commit = f"@{source['commit'][:12]}" if source["commit"] else ""
        _add_row(
            sources,
            source["name"],
            ", ".join(source["holds"]),
            f"{source['modules']:,}",
            human(source["bytes"]),
            source["location"] + commit,
        )
    console.print(sources)
    _show_formats(facts, console)
    _show_layers(facts, console)
    _show_drafts(facts, console)
    for degree, nbytes in facts["presplit"].items():
        more = max(nbytes / facts["bytes"] - 1, 0)
        _say(f"cut for ranks, {degree}: {human(nbytes)}, {more:.1%} more than the checkpoint", console)
    if facts["layout"] == "presplit":
        _say("the merged files are dropped once these are cut: the build needs space for both", console)
    for left_out in facts["left_out"]:
        _say(
            f"left out of `{left_out['source']}`: {left_out['tensors']:,} tensors, {human(left_out['nbytes'])}, "
            f"{left_out['reason']}",
            console,
            style="dim",
        )
    if "memory" in facts:
        _show_memory(facts["memory"], console)
    _show_notes(facts, console)


def show_inspect(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the facts of a checkpoint."""
    _say(f"{facts['location']} ({facts['model_type']})", console, style="bold")
    _show_formats(facts, console)
    _show_layers(facts, console)
    _show_drafts(facts, console)
    for entry in facts["unread"][:_MAX_LINES]:
        _say(f"not read: {', '.join(entry['modules'][:4])}: {entry['reason']}", console, style="yellow")
    _say_how_many_more(facts["unread"], console)
    for source in facts.get("sources", []):
        where = f"{source['location']}@{source['commit']}" if source["commit"] else source["path"]
        _say(f"source `{source['name']}`: {where}", console)
    by_degree: dict[str, list[int]] = {}
    for rank, nbytes in facts.get("presplit", {}).items():
        by_degree.setdefault(rank.split("/")[1], []).append(nbytes)
    for degree, sizes in by_degree.items():
        _say(f"cut for ranks, {degree}: files of {len(sizes)} ranks, {human(sum(sizes))}", console)
    if facts.get("layout") == "presplit":
        _say(f"merged files: none; restore them: mixprec split {as_word(facts['location'])} --layout both", console)
    if "checksum" in facts:
        _say(f"checksums: {facts['checksum']} of every tensor, {facts['manifest_checksum']} of the manifest", console)
    if "memory" in facts:
        _show_memory(facts["memory"], console)
    _show_notes(facts, console)
    if not facts.get("unservable"):
        _say(f"serve it with: {facts['serve']}", console, soft_wrap=True)


def show_errors(errors: Iterable[WeightError], against: str, console: Console, most: int = 20) -> None:
    """Prints how far modules are from their unquantized weights, worst first."""
    errors = sorted(errors, key=lambda error: -error.relative)
    table = _table("module", "format", "relative error", title=f"‖W−Ŵ‖/‖W‖ against {against}, worst first")
    for error in errors[:most]:
        _add_row(table, error.module, error.kind, f"{error.relative:.5f}")
    console.print(table)
    by_kind: dict[str, list[float]] = {}
    for error in errors:
        by_kind.setdefault(error.kind, []).append(error.relative)
    for kind, values in by_kind.items():
        _say(f"{kind}: mean {sum(values) / len(values):.5f} over {len(values)} modules", console)


def show_suggestion(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the facts of a suggestion: the sources chosen, and the frontier with this mix and the uniform ones."""
    shares = _table("source", "modules", "bytes", "share of the loss", title="Chosen")
    for entry in facts["sources"]:
        share = entry["loss"] / facts["loss"] if facts["loss"] else 0.0
        _add_row(shares, entry["name"], f"{entry['modules']:,}", human(entry["bytes"]), f"{share:.1%}")
    console.print(shares)
    rows = [(point["bytes"], point["loss"], "") for point in facts["frontier"]]
    for entry in facts["uniform"]:
        but = f" ({entry['elsewhere']:,} groups elsewhere)" if entry["elsewhere"] else ""
        rows.append((entry["bytes"], entry["loss"], f"all {entry['source']}{but}"))
    rows.append((facts["bytes"], facts["loss"], "this mix"))
    points = _table("bytes", "loss", "", title=f"Loss ({facts['objective']}) against bytes")
    shown: dict[tuple[str, str], list[str]] = {}
    for nbytes, loss, what in sorted(rows, key=lambda row: (row[0], -row[1])):
        shown.setdefault((human(nbytes), f"{loss:.6g}"), []).extend([what] if what else [])
    for cells, names in shown.items():
        _add_row(points, *cells, ", ".join(names))
    console.print(points)
    gap = "proven the least" if facts["gap"] < 1e-12 else f"at most {facts['gap']:.2g} of it above the least"
    _say(
        f"{facts['choices']:,} choices in {facts['groups']:,} groups; {facts['bytes']:,} bytes, "
        f"{1 - facts['bytes'] / facts['budget']:.2%} under the budget; loss {facts['loss']:.6g}, {gap}",
        console,
    )
    for note in facts["notes"]:
        _say(f"note: {note}", console, style="yellow")


def show_activity(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the facts of expert activity: each layer's balance, all together, and the busiest experts."""
    layers = _table(
        "layer", "experts", "activations", "variation", "Gini", "top 10%", "unused", "busiest", title="Load balance"
    )
    for row in facts["layers"][:_MAX_LINES]:
        _add_row(
            layers,
            str(row["layer"]),
            f"{row['experts']:,}",
            f"{row['activations']:,}",
            f"{row['coefficient_of_variation']:.3f}",
            f"{row['gini']:.3f}",
            f"{row['top_10_percent_coverage']:.1%}",
            f"{row['unused']:,}",
            str(row["busiest"]),
        )
    console.print(layers)
    _say_how_many_more(facts["layers"], console)
    if facts["top_experts"]:
        top = _table("layer", "expert", "activations", "share", title="Busiest experts")
        for row in facts["top_experts"][:_MAX_LINES]:
            _add_row(top, str(row["layer"]), str(row["expert"]), f"{row['activations']:,}", f"{row['share']:.3%}")
        console.print(top)
    tokens = "" if facts["tokens"] is None else f" of {facts['tokens']:,} tokens"
    _say(
        f"{facts['activations']:,} activations{tokens} over {facts['experts']:,} experts in {len(facts['layers'])} "
        f"layers: coefficient of variation {facts['coefficient_of_variation']:.3f}, Gini {facts['gini']:.3f}, the "
        f"busiest tenth got {facts['top_10_percent_coverage']:.1%}, {facts['unused']:,} got none",
        console,
    )


def _show_memory(facts: Mapping[str, Any], console: Console) -> None:
    """Prints what a checkpoint needs on GPUs: where the bytes of a rank go, and what fits into the rest."""
    reserve = facts["reserve"]
    item = "FP8" if facts["kv_cache_dtype"] == "fp8_e4m3" else "16 bits"
    rows = [
        ("weights", facts["weight_bytes"], "of the largest rank, zeros that fill it up included"),
        ("copies", facts["unquantized_copy_bytes"], "w_kc and w_vc, which SGLang makes of kv_b_proj in 16 bits"),
        ("CUDA, NCCL", facts["cuda_bytes"], "assumed"),
        (
            "reserve",
            facts["reserved_bytes"],
            f"activations of {reserve['prefill_tokens']:,} tokens, CUDA graphs up to batch {reserve['graph_batch']}: "
            f"--mem-fraction-static {reserve['mem_fraction_static']:.3f}, SGLang's default",
        ),
        ("cache", facts["cache_bytes"], f"{facts['cache'] or facts['cache_unknown']}, {item}"),
    ]
    title = f"On {counted(facts['gpus'], 'GPU')} of {human(facts['gpu_bytes'])} ({facts['options']}), a rank"
    table = _table("", "bytes", "for", title=title)
    for name, nbytes, text in rows:
        if nbytes or name != "copies":
            _add_row(table, name, human(nbytes), text)
    console.print(table)
    if facts["draft_bytes_left_out"]:
        drafts = human(facts["draft_bytes_left_out"])
        _say(f"without the {drafts} of layers for speculative decoding, which are loaded only for that", console)
    for note in facts["notes"]:
        _say(f"note: {note}", console, style="yellow")
    if facts["tokens"] is None:
        fits = "does not fit: no memory is left for a cache" if facts["fits"] is False else "the cache is not computed"
        _say(f"{fits}; {facts['cache_unknown']}", console, style="yellow")
        return
    state = f" and {facts['bytes_per_sequence']:,} a sequence" if facts["bytes_per_sequence"] else ""
    what = f"{facts['tokens']:,} tokens fit, {facts['bytes_per_token']:,} bytes each{state}"
    if facts["fits"]:
        _say(f"{what}: {counted(facts['sequences'], 'sequence')} of {facts['context']:,}", console, style="green")
        return
    _say(f"{what}: no sequence of {facts['context']:,} fits", console, style="red")
    for change in facts["would_fit"]:
        _say(f"would fit: {_CHANGES[change['change']](change)}", console)
    if not facts["would_fit"]:
        _say("none of up to 16 GPUs, of GPUs up to 288 GB, a shorter context or an FP8 cache would do alone", console)


_CHANGES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "kv_cache_dtype": lambda change: f"a cache in FP8 (--kv-cache-dtype {change['kv_cache_dtype']})",
    "context": lambda change: f"a context of {change['context']:,} tokens",
    "gpus": lambda change: f"{change['gpus']} such GPUs",
    "gpu_bytes": lambda change: f"{counted(change['gpus'], 'GPU')} of {human(change['gpu_bytes'])}",
}


def _show_formats(facts: Mapping[str, Any], console: Console) -> None:
    table = _table("format", "modules", "parameters", "bytes", "bits/weight", "details", title="Formats")
    for entry in facts["formats"][:_MAX_LINES]:
        known = ("name", "kind", "modules", "parameters", "bytes", "bits_per_weight")
        details = ", ".join(f"{k} {str(v).lower()}" for k, v in entry.items() if k not in known)
        _add_row(
            table,
            entry["name"],
            f"{entry['modules']:,}",
            f"{entry['parameters']:,}",
            human(entry["bytes"]),
            f"{entry['bits_per_weight'] or 0:.2f}",
            details,
        )
    console.print(table)
    _say_how_many_more(facts["formats"], console)
    _say(
        f"{facts['modules']:,} modules, {facts['parameters']:,} parameters in {facts['bytes']:,} bytes "
        f"({human(facts['bytes'])}, {facts['bits_per_weight'] or 0:.2f} bits/weight): {facts['compression'] or 0:.2f} "
        f"times smaller than FP16 ({human(facts['fp16_bytes'])}); "
        f"{counted(facts['shards'], 'file')} of {facts['file_bytes']:,} bytes",
        console,
    )


def _show_layers(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the layer map: a row for each run of equal layers, a column for each set of equal projections."""
    layers = [(row["layer"], {k: _cell(v) for k, v in row["projections"].items()}) for row in facts["layers"]]
    if not layers:
        return
    names = dict.fromkeys(name for _, row in layers for name in row)
    if len(layers) > _MAX_LINES or len(names) > _MAX_NAMES:
        _say(f"no layer map: {len(layers):,} layers with {len(names):,} projections", console)
        return
    columns: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        columns.setdefault(tuple(row.get(name, "") for _, row in layers), []).append(name)
    if len(columns) > _MAX_COLUMNS:
        _say(f"no layer map: {len(columns):,} projections differ from one another", console)
        return
    heads = [_joined(names) for names in columns.values()]
    table = _table("layers", *heads, title="Layer map")
    cells = list(zip(*columns, strict=True))
    first = 0
    for i in range(1, len(cells) + 1):
        if i == len(cells) or cells[i] != cells[first]:
            low, high = layers[first][0], layers[i - 1][0]
            _add_row(table, str(low) if low == high else f"{low}-{high}", *cells[first])
            first = i
    console.print(table)


def _show_drafts(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the draft layers as one row; for a plan with their sources."""
    drafts = facts["mtp"]
    if drafts is None:
        return
    if not drafts["modules"]:
        why = "left out with --drop-mtp" if drafts["dropped"] else "none, though config.json declares them"
        _say(f"draft layers (MTP): {why}", console)
        return
    sources = [f"{entry['name']} x{entry['modules']:,}" for entry in drafts.get("sources", [])]
    heads = ("layers", *(["sources"] if sources else []), "formats", "modules", "parameters", "bytes")
    by = f", line {drafts['line']}" if drafts.get("line") else ""
    table = _table(*heads, title=f"Draft layers (MTP){by}")
    formats = sorted(drafts["formats"], key=lambda entry: -entry["bytes"])
    _add_row(
        table,
        "\n".join(drafts["layers"][:_MAX_COLUMNS]),
        *(["\n".join(sources)] if sources else []),
        "\n".join(f"{entry['name']} x{entry['modules']:,}, {human(entry['bytes'])}" for entry in formats),
        f"{drafts['modules']:,}",
        f"{drafts['parameters']:,}",
        human(drafts["bytes"]),
    )
    console.print(table)


def _cell(counts: Mapping[str, int]) -> str:
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _joined(names: list[str]) -> str:
    """``self_attn.q_proj``, ``self_attn.k_proj`` -> ``self_attn.{q,k}_proj``, a line for each parent."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        parents.setdefault(parent, []).append(last)
    lines = []
    for parent, lasts in parents.items():
        prefix = f"{parent}." if parent else ""
        if len(lasts) > 1 and all(last.endswith("_proj") for last in lasts):
            lines.append(f"{prefix}{{{','.join(last.removesuffix('_proj') for last in lasts)}}}_proj")
        else:
            lines.append(prefix + ",".join(lasts))
    return "\n".join(lines)


def _show_notes(facts: Mapping[str, Any], console: Console) -> None:
    for start, style, lines in (
        ("warning", "bold yellow", [warning["message"] for warning in facts.get("warnings", [])]),
        ("note", "yellow", facts.get("notes", [])),
        ("SGLang cannot serve this", "red", facts.get("unservable", [])),
    ):
        for line in lines[:_MAX_LINES]:
            _say(f"{start}: {line}", console, style=style)
        _say_how_many_more(lines, console)


def show_findings(findings: Iterable[tuple[str, str, str]], console: Console) -> None:
    """Prints what ``mixprec doctor`` found: ``(status, subject, text)``; the status is ``ok``, ``warn`` or ``fail``."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for status, subject, text in findings:
        _say(f"{status:4}  {subject}: {text}", console, style=styles[status], soft_wrap=True)


def _say(line: str, console: Console, *, style: str = "", soft_wrap: bool = False) -> None:
    from rich.text import Text

    shown = line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..."
    # Lines that another program reads are not broken.
    console.print(Text(printable(shown), style), soft_wrap=soft_wrap or not console.is_terminal)


def _say_how_many_more(shown: Sized, console: Console) -> None:
    if len(shown) > _MAX_LINES:
        _say(f"... and {len(shown) - _MAX_LINES:,} more, which --json lists", console)


_NUMBERS = frozenset(
    {
        "line", "modules", "decides", "parameters", "bytes", "bits/weight", "relative error",
        "loss", "share of the loss", "activations", "share", "variation", "Gini", "top 10%",
        "unused", "expert", "busiest",
    }
)  # fmt: skip


def _table(*heads: str, title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title), "table.title"), title_justify="left")
    for head in heads:
        number = head in _NUMBERS
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _add_row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(printable(cell)) for cell in cells))
