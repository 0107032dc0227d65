"""Coverage-guided fuzzing of all that reads a stranger's file, with atheris (``pip install atheris``).

    export PYTHONPATH=tests
    python tests/fuzz/fuzz_readers.py --seconds 60                   # all targets, a share of the time each
    python tests/fuzz/fuzz_readers.py --seconds 600 --target recipe
    python tests/fuzz/fuzz_readers.py --target recipe --input "b'model: [a'"

A target raises for what no reader may do: anything but its own errors, more than a gigabyte, more than some seconds.
Such an input is printed, for ``--input``, and the exit code is 1. What was found before is a row of
``tests/unit/hostile``.

Bytes that are mutated at random hardly ever become a checkpoint. Targets that read JSON therefore take the bytes as
choices: where in a sound document to put which hostile value.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["mixprec_build"]):
    from mixprec_build.checkpoint import opening as checkpoint
    from mixprec_build.checkpoint.degree import Degree
    from mixprec_build.checkpoint.typed import open_source
    from mixprec_build.errors import MixprecError, RecipeError, SourceError, StatsError
    from mixprec_build.formats import base, registry
    from mixprec_build.formats.gptq import Dynamic
    from mixprec_build.formats.quantization import Quantization
    from mixprec_build.output import verify
    from mixprec_build.output.build import plan_recipe, run_plan
    from mixprec_build.output.split import split
    from mixprec_build.output.weight_errors import weight_errors
    from mixprec_build.patterns import compress, match
    from mixprec_build.patterns import pattern as patterns
    from mixprec_build.recipe import recipe
    from mixprec_build.report import facts as report
    from mixprec_build.report import tables
    from mixprec_build.storage import header
    from mixprec_build.suggesting import activity

import safetensors
from rich.console import Console
from support.hostile import VALUES, Hostile, changed, dump

Target = Callable[[bytes], None]
Choices = atheris.FuzzedDataProvider

SLOWEST = 40  # seconds for one input
MEMORY = 1024  # MiB
FOLDER = Path()  # of the sources and what is built of them: set when a target starts


# Targets


def fuzz_header(data: bytes) -> None:
    """What is accepted is also accepted by the safetensors library."""
    text = data[1:]
    whole = data if not data or data[0] % 2 else len(text).to_bytes(8, "little") + text
    read_header(whole)


def fuzz_header_entries(data: bytes) -> None:
    choices = Choices(data)
    entries = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate("ab")}
    text = dump(changed({"__metadata__": {"format": "pt"}, **entries}, choices))
    read_header(len(text).to_bytes(8, "little") + text + bytes(4))


def read_header(whole: bytes) -> None:
    try:
        end = 8 + header.header_length(whole[:8], path="x", file_size=len(whole))
        found, _ = header.parse_header(whole[:end], path="x", file="x", file_size=len(whole))
    except SourceError:
        return
    if b"\\ud" in whole[:end].lower():  # half a character, which the library refuses; names with one are refused later
        return
    try:
        theirs = safetensors.deserialize(whole)
    except safetensors.SafetensorError as error:
        # In keys that neither of us reads, the library is the stricter.
        if "recursion limit" in str(error) or "number out of range" in str(error):
            return
        raise
    assert found.keys() == {name for name, _ in theirs}, "the library reads other tensors"


def fuzz_recipe(data: bytes) -> None:
    path = FOLDER / "fuzzed.yaml"
    path.write_bytes(data)
    with suppress(RecipeError):
        recipe.load_recipe(path)


ACTIVITY = {
    "expert_stats": {
        f"{layer}.{expert}": {
            "layer_id": layer, "expert_id": expert, "activation_count": 3, "total_tokens_processed": expert
        }
        for layer in (0, 1)
        for expert in (0, 7)
    },
    "layer_stats": {"0": {"routed_tokens": 12}, "1": {"routed_tokens": 0}},
}  # fmt: skip


def fuzz_activity(data: bytes) -> None:
    path = FOLDER / "activity.json"
    choices = Choices(data)
    path.write_bytes(dump(changed(ACTIVITY, choices)) if choices.ConsumeBool() else data)
    with suppress(StatsError):
        json.dumps(activity.activity_facts(activity.read_activity([path]), 3))


def fuzz_plan(data: bytes) -> None:
    """A source whose config.json, index or header is hostile, inspected and planned with."""
    choices = Choices(data)
    name = choices.PickValueInList(["int4", "fp8", "bf16"])
    with Hostile(FOLDER / name, choices):
        inspect(FOLDER / name)
        with suppress(MixprecError):
            tables.show_plan(report.plan_facts(plan_recipe(FOLDER / "mix.yaml")), console())


def fuzz_compiled(data: bytes) -> None:
    """A compiled checkpoint of which one file is hostile, a rank's index or header perhaps, inspected and verified."""
    choices = Choices(data)
    with Hostile(FOLDER / "out", choices):
        inspect(FOLDER / "out")
        with suppress(MixprecError):
            found = verify.verify(FOLDER / "out")
            assert all(line.isprintable() for line in (*found.gone, *found.differences))
        with suppress(MixprecError):
            reference, ours = open_source(str(FOLDER / "bf16")), open_source(str(FOLDER / "out"))
            list(weight_errors(ours, reference))


def inspect(folder: Path) -> None:
    with suppress(MixprecError):
        facts = report.inspect_facts(open_source(str(folder)), folder)
        out = console()
        tables.show_inspect(facts, out)
        shown = out.file.getvalue()  # type: ignore[attr-defined]
        assert all(line.isprintable() for line in shown.split("\n")), "what a terminal obeys"
        json.dumps(facts)


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


NAME = "model.layers.11.mlp.experts.111.up_proj"


def fuzz_patterns(data: bytes) -> None:
    choices = Choices(data)
    text = choices.ConsumeUnicode(60)
    names = [choices.ConsumeUnicodeNoSurrogates(30), "a" * 200, NAME]
    with suppress(patterns.PatternError):
        pattern = patterns.Pattern(text)
        segments = [[match.by_length(words) for words in segment] for segment in patterns.segments_of(text)]
        for name in names:
            assert pattern.matches(name) == bool(match.walk(segments, name)), "two ways to match disagree"
    folded = [patterns.Pattern(text) for text in compress.compress([NAME, *filter(str.isidentifier, names)])]
    assert any(pattern.matches(NAME) for pattern in folded)


def fuzz_dynamic(data: bytes) -> None:
    """Regexes in the configuration of a GPTQ checkpoint."""
    choices = Choices(data)
    dynamic = {choices.ConsumeUnicode(40): {"bits": 8} for _ in range(2)}
    for name in (NAME, "a" * 200):
        with suppress(base.FormatError):
            Quantization({"dynamic": dynamic}).derive(Dynamic).resolve(name)


def fuzz_groups(data: bytes) -> None:
    """The config groups of a compressed-tensors checkpoint."""
    choices = Choices(data)

    def value() -> Any:
        return choices.PickValueInList([*VALUES, choices.ConsumeUnicode(20), choices.ConsumeInt(8)])

    weights = {
        key: value() for key in ("num_bits", "type", "strategy", "group_size", "symmetric") if choices.ConsumeBool()
    }
    group = {
        "targets": ["Linear", "re:" + choices.ConsumeUnicode(20)],
        "weights": weights,
        "input_activations": value(),
    }
    groups = {"g": group} if choices.ConsumeBool() else value()
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "ignore": [choices.ConsumeUnicode(20)],
    }
    if choices.ConsumeBool():
        quantization["ignore"] = value()
    tensors = {"weight_packed": ("I32", (64, 16)), "weight_scale": ("BF16", (64, 1)), "weight_shape": ("I64", (2,))}
    infos = {
        leaf: header.TensorInfo(f"{NAME}.{leaf}", dtype, shape, "f", 0, 0) for leaf, (dtype, shape) in tensors.items()
    }
    with suppress(base.FormatError):
        registry.recognise(checkpoint.StoredModule(NAME, infos), quantization)


TARGETS: dict[str, Target] = {
    name.removeprefix("fuzz_"): value for name, value in globals().items() if name.startswith("fuzz_")
}

RECIPES = (
    b"model: a\nsources:\n  fp8: b\n  int4: ./c\ndefault: fp8\nweights:\n  model.layers.{0..3}.mlp.*: fp8\n"
    b"  '*.down_proj': int4\noutput: {shard_size: 5GB}\ninference: {a: [1, {b: c}]}\n",
    b"mixed_precision:\n  fp16_path: a\n  gptq_int4_path: b\n  base_model_path: c\n  weight_mapping: {x: int4}\n",
)
HEADERS = (
    b'\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}',
    b"\0{}      ",
)
SEEDS: dict[str, tuple[bytes, ...]] = {
    "header": HEADERS,
    "recipe": RECIPES,
    "patterns": (b"\x01model.layers.{0..3}.*.{a,b}?", b"\x01*a*{0..127}*x*"),
    "dynamic": (b"\x01+:.*\\.1[0-9]\\.(?:gate|up)_proj.*", b"\x01(a+)+$"),
}
WORDS = {
    "header": ('"dtype"', '"shape"', '"data_offsets"', '"F32"', '"BF16"', "[0,4]", '"__metadata__"'),
    "recipe": ("model:", "sources:", "weights:", "default:", "output:", "shard_size:", "mixed_precision:", "&a", "*a"),
    "patterns": ("{0..3}", "{a,aa}", "*", "?", "{0..9999}", "layers.", "}", "[", "..", ","),
    "dynamic": (".*", "(?:a|b)", "(?=", "+", "{1,2}", "\\\\.", "[0-9]", "(?P<", "\\\\1", "-:", "+:"),
}


# Running


def prepare(folder: Path) -> None:
    """Sources and what is compiled of them, for the targets to change."""
    # Not at the top: torch comes with it, whose memory would count as that of a target.
    from support.write import LLAMA, write_tiny

    for name, variant in (("bf16", "bf16"), ("fp8", "fp8_block"), ("int4", "gptq_int4")):
        write_tiny(folder / name, LLAMA, variant, shards=2)
    (folder / "mix.yaml").write_text(
        "model: ./bf16\nsources: {bf16: ./bf16, fp8: ./fp8, int4: ./int4}\n"
        "weights: {'model.layers.*.self_attn.*': fp8, 'model.layers.*.mlp.*': int4}\n"
    )
    run_plan(plan_recipe(folder / "mix.yaml"), folder / "out")
    split(folder / "out", Degree(1))


def run_one(target: str, folder: Path, seconds: int) -> None:
    """Fuzzes one target in this process, which libFuzzer ends."""
    global FOLDER
    FOLDER = folder
    corpus = folder / f"corpus-{target}"
    corpus.mkdir(exist_ok=True)
    for i, seed in enumerate(SEEDS.get(target, (bytes(range(64)), bytes(range(255, 100, -1))))):
        (corpus / f"seed-{i}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", "-max_len=4096"]
    options += [f"-artifact_prefix={folder}/found-{target}-", "-print_final_stats=1", str(corpus)]
    if target in WORDS:
        words = folder / f"words-{target}"
        words.write_text("".join('"' + word.replace('"', '\\"') + '"\n' for word in WORDS[target]))
        options.insert(0, f"-dict={words}")
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


def run_all(targets: list[str], seconds: int) -> int:
    """Each target in a process of its own. Returns the exit code."""
    code = 0
    with tempfile.TemporaryDirectory(prefix="mixprec-fuzz-") as name:
        folder = Path(name)
        prepare(folder)
        for target in targets:
            share = max(1, seconds // len(targets))
            command = [sys.executable, __file__, "--seconds", str(share), "--target", target, "--in", name]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            ended = subprocess.run(command, capture_output=True, text=True, errors="backslashreplace", env=offline)
            found = sorted(folder.glob(f"found-{target}-*"))
            runs = [line for line in ended.stderr.splitlines() if "number_of_executed_units" in line]
            print(f"{target}: {runs[-1].split()[-1] if runs else '?'} inputs", flush=True)
            if ended.returncode or found:
                code = 1
                print(ended.stdout[-4000:] or ended.stderr[-4000:])
                for path in found:
                    print(f"{target}: {path.read_bytes()!r}")
                    path.unlink()
    return code


def main() -> None:
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--input", type=ast.literal_eval, help="bytes, as a finding is printed: only these are tried")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        run_one(given.target, given.folder, given.seconds)
    if given.input is not None:
        with tempfile.TemporaryDirectory(prefix="mixprec-fuzz-") as name:
            prepare(Path(name))
            FOLDER = Path(name)
            TARGETS[given.target](given.input)
        return
    sys.exit(run_all([given.target] if given.target else list(TARGETS), given.seconds))


if __name__ == "__main__":
    main()
