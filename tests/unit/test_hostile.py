"""What strangers may put into a source, a recipe or a compiled checkpoint: one message, in little time and memory.

Damage of single files is in the tests of their readers; here is what was made on purpose. Rows that fuzzing found
(``tests/fuzz``) say so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.files import tree
from support.hostile import RANK, Drawn, Hostile, sealed
from support.run import at_most, run_python
from support.write import LLAMA, write_tiny

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import CHECKSUM, MANIFEST
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.cli.app import main
from mixprec_build.errors import MixprecError, RecipeError, SourceError
from mixprec_build.formats.base import FormatError
from mixprec_build.formats.gptq import Dynamic
from mixprec_build.formats.quantization import Quantization
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.weight_errors import weight_errors
from mixprec_build.patterns.pattern import Pattern, PatternError, PatternReader
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.report.doctor import _checkpoint
from mixprec_build.storage.header import build_header
from mixprec_build.text import printable

Patch = pytest.MonkeyPatch
Change = Callable[[dict[str, Any]], object]

INDEX = "model.safetensors.index.json"
SECRET = "hf_1234567890secret"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """CPU seconds of this process, with a wide margin for a loaded machine; a minute for what only waits."""
    start = time.process_time()
    with at_most(60):
        yield
    assert time.process_time() - start < 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, a recipe, and what it builds: copied, never changed."""
    folder = tmp_path_factory.mktemp("built")
    companions = {"tokenizer.json": "{}", "modeling_x.py": "raise SystemExit('was run')\n", "LICENSE": "as you like"}
    for name, variant in (("bf16", "bf16"), ("fp8", "fp8_block"), ("int4", "gptq_int4")):
        write_tiny(
            folder / name, LLAMA, variant, edit=lambda _, config: config.update(auto_map={"AutoModel": "modeling_x.X"})
        )
        for file, text in companions.items():
            (folder / name / file).write_text(text)
    (folder / "mix.yaml").write_text(
        "model: ./bf16\n"
        "sources: {bf16: ./bf16, fp8: ./fp8, int4: ./int4}\n"
        "weights: {'model.layers.*.self_attn.*': fp8, 'model.layers.*.mlp.*': int4}\n"
    )
    run_plan(plan_recipe(folder / "mix.yaml"), folder / "out")
    return folder


@pytest.fixture
def mix(built: Path, tmp_path: Path) -> Path:
    """A copy of them, to spoil."""
    return Path(shutil.copytree(built, tmp_path / "mix"))


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    code: object
    out: str
    err: str


@pytest.fixture
def mixprec(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the command in this process, as its console script would; ``verify`` without its progress bar."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        quiet = ["--quiet"] if arguments[0] == "verify" else []
        monkeypatch.setattr(sys, "argv", ["mixprec", *map(str, arguments), *quiet])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return Ended(code, *capsys.readouterr())

    return run


def refused(ended: Ended) -> str:
    """The one message of a command that refused."""
    assert ended.code == 1 and ended.out == ""
    assert ended.err.startswith("mixprec: ") and ended.err.count("\n") == 1 and ended.err[:-1].isprintable()
    return ended.err


def change(path: Path, how: Change) -> None:
    """Changes a JSON file; a manifest gets the checksum of what it then holds."""
    document = json.loads(path.read_text())
    replaced = how(document)
    document = replaced if isinstance(replaced, Replaced) else document
    text = json.dumps(document.value if isinstance(document, Replaced) else document)
    data = text.encode(errors="backslashreplace")
    path.write_bytes(sealed(data) if path.name == MANIFEST else data)


class Replaced(NamedTuple):
    """The whole of a document."""

    value: object


# Links


def link(path: Path, target: object) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(str(target))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX, "quantize_config.json"])
def test_a_source_does_not_link_out_of_its_folder(mix: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    shutil.copy(mix / "bf16" / "config.json", outside)
    if file == "model.safetensors":
        shutil.copy(mix / "bf16" / file, outside)
    link(mix / "bf16" / file, outside)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(mix / "bf16"))
    message = f"{mix / 'bf16' / file}: a link to {outside}, outside of the checkpoint; put the file itself there"
    assert str(caught.value) == message


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE", "modeling_x.py"])
def test_a_companion_does_not_link_out_of_its_folder(mix: Path, file: str) -> None:
    link(mix / "bf16" / file, "/etc/passwd")
    with pytest.raises(SourceError, match="a link to /etc/passwd, outside of the checkpoint"):
        plan_recipe(mix / "mix.yaml")


@pytest.mark.parametrize("file", [MANIFEST, "config.json", INDEX, "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_a_compiled_checkpoint_does_not_link_out_of_its_folder(mix: Path, mixprec: Any, file: str) -> None:
    (mix / "out" / file).rename(mix / "away")
    link(mix / "out" / file, mix / "away")
    ended = mixprec("verify", mix / "out")
    text = ended.err if file == "tokenizer.json" else refused(ended)  # what nothing else rests on is a difference
    assert ended.code == 1 and f"out/{file}: a link to {mix / 'away'}, outside of the checkpoint" in text


def test_links_that_are_followed(mix: Path, tmp_path: Path) -> None:
    """Within a folder, and to a folder."""
    (mix / "bf16" / "sub").mkdir()
    (mix / "bf16" / "model.safetensors").rename(mix / "bf16" / "sub" / "weights")
    link(mix / "bf16" / "model.safetensors", "sub/weights")
    link(tmp_path / "alias", mix / "bf16")
    assert open_checkpoint(str(tmp_path / "alias")).tensors


@pytest.fixture
def snapshot(mix: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """``bf16`` as the hub's cache holds ``org/name``."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    repository, commit = tmp_path / "hf" / "hub" / "models--org--name", "0123456789" * 4
    folder = repository / "snapshots" / commit
    for path in (folder, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for i, path in enumerate(sorted((mix / "bf16").iterdir())):
        path.rename(repository / "blobs" / f"{i:040x}")
        link(folder / path.name, f"../../blobs/{i:040x}")
    return folder


def test_links_of_the_hub_cache_are_followed(mix: Path, snapshot: Path) -> None:
    recipe = mix / "hub.yaml"
    recipe.write_text(f"model: {snapshot}\nsources: {{fp8: ./fp8}}\nweights: {{'model.layers.0.mlp.*': fp8}}\n")
    run_plan(plan_recipe(recipe), mix / "new")
    assert (mix / "new" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("target", ["../../../elsewhere", "../../refs/main", "/etc/passwd"])
def test_a_snapshot_links_to_its_blobs_only(snapshot: Path, target: str) -> None:
    (snapshot.parents[2] / "elsewhere").write_text("{}")
    link(snapshot / "config.json", target)
    with pytest.raises(SourceError, match=r"config\.json: a link to .*, outside of the checkpoint"):
        open_checkpoint(str(snapshot))


def test_a_blob_that_is_a_link_itself(snapshot: Path) -> None:
    blob = snapshot / (snapshot / "config.json").readlink()
    link(blob, "/etc/passwd")
    with pytest.raises(SourceError, match="a link to /etc/passwd, outside of the checkpoint"):
        open_checkpoint(str(snapshot))


# Compiled checkpoints


def deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def first_tensor(manifest: dict[str, Any]) -> dict[str, Any]:
    module: dict[str, Any] = next(iter(manifest["modules"].values()))
    tensor: dict[str, Any] = next(iter(module["tensors"].values()))
    return tensor


def first_source(manifest: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = manifest["sources"]["fp8"]
    return source


NO_FILE = {"bytes": 0, CHECKSUM: ""}
ESCAPES = ("../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "C:/x", "\\\\server\\share\\x", "..")

MANIFESTS: dict[str, tuple[Change, str]] = {
    "a list": (lambda m: Replaced([]), "damaged"),
    "null": (lambda m: Replaced(None), "damaged"),
    "nothing": (lambda m: Replaced({"x": 0}), "damaged: KeyError('version')"),
    "another version": (lambda m: m.update(version=2), "version 2; this mixprec reads version 1"),
    "a version that is a list": (lambda m: m.update(version=[1] * 1000), "version [1, 1, 1, 1, 1, 1, ...]; this"),
    "a version that is no number": (lambda m: m.update(version=float("nan")), "version nan; this"),
    "modules null": (lambda m: m.update(modules=None), "modules is NoneType"),
    "modules a list": (lambda m: m.update(modules=[]), "modules is list"),
    "a module null": (lambda m: m["modules"].update(x=None), "damaged"),
    "tensors a list": (lambda m: m["modules"].update(x={"tensors": []}), "tensors is list"),
    "a tensor null": (lambda m: m["modules"].update(x={"tensors": {"x": None}}), "an entry is NoneType"),
    "bytes a text": (lambda m: first_tensor(m).update(bytes="1"), "bytes is str"),
    "bytes a fraction": (lambda m: first_tensor(m).update(bytes=float("inf")), "bytes is float"),
    "bytes below 0": (lambda m: first_tensor(m).update(bytes=-1), "bytes is -1"),
    "bytes of 400 digits": (lambda m: first_tensor(m).update(bytes=10**400), "bytes is 1000"),
    "a shape of lists": (lambda m: first_tensor(m).update(shape=[[1]]), "more than whole numbers"),
    "a shape that is deep": (lambda m: first_tensor(m).update(shape=deep(900)), "more than whole numbers"),
    "a source as a list": (lambda m: first_tensor(m).update(source=[]), "source is list"),
    "a name of 5000": (lambda m: first_tensor(m).update(source="x" * 5000), "source has 5000 characters"),
    "sources a list": (lambda m: m.update(sources=[]), "sources is list"),
    "101 sources": (lambda m: m["sources"].update({str(i): first_source(m) for i in range(101)}), "more than 100"),
    "a location null": (lambda m: first_source(m).update(location=None), "location is NoneType"),
    "a path that is a number": (lambda m: first_source(m).update(path=0), "path is int"),
    "a commit that is a list": (lambda m: first_source(m).update(commit=[]), "commit is list"),
    "unservable an object": (lambda m: m.update(unservable={"x": "x"}), "unservable is dict"),  # found by fuzzing
    "unservable of numbers": (lambda m: m.update(unservable=[1]), "unservable is int"),
    "unservable null": (lambda m: m.update(unservable=None), "unservable is NoneType"),
    **{f"the file {name}": (lambda m, name=name: m["files"].update({name: NO_FILE}), "is not in this folder")  # type: ignore[misc]
       for name in ESCAPES},
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest(mix: Path, mixprec: Any, monkeypatch: Patch, case: str) -> None:
    how, message = MANIFESTS[case]
    change(mix / "out" / MANIFEST, how)
    (mix / "x").write_text("outside")
    opened: list[str] = []
    real = os.open

    def recording(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.path.realpath(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", recording)
    for command in ("verify", "inspect"):
        assert message in refused(mixprec(command, mix / "out"))
    assert str(mix / "x") not in opened and "/etc/passwd" not in opened


@pytest.fixture(scope="module")
def cut(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``built``, with files cut for one rank, which tests leave as they were."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("cut") / "mix"))
    split(folder / "out", Degree(1))
    return folder


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_ends_in_a_message(cut: Path, mixprec: Any, seed: int) -> None:
    """Values of any kind at any place of any file that describes a checkpoint, or files cut for a rank."""
    changed = set()
    for i in range(25):
        with Hostile(cut / "out", Drawn(100 * seed + i)) as hostile:
            changed.add(hostile.file)
            shown = {command: mixprec(command, cut / "out") for command in ("inspect", "verify")}
            list(_checkpoint(cut / "out", None))
        for ended in shown.values():
            assert ended.code in (0, 1) and "Traceback" not in ended.err, (seed, i)
            assert all(line.isprintable() for line in (ended.out + ended.err).split("\n")), (seed, i)
        # A manifest that is changed and vouches for itself may say nothing that matters.
        assert shown["verify"].code == 1 or hostile.file in (MANIFEST, f"{RANK}/index.json"), (seed, i)
    assert len(changed) >= 4
    assert mixprec("verify", cut / "out").code == 0


@pytest.mark.parametrize("source", ["bf16", "fp8", "int4"])
def test_whatever_a_source_says_is_planned_or_refused(cut: Path, mixprec: Any, source: str) -> None:
    for i in range(40):
        with Hostile(cut / source, Drawn(i)):
            ended = mixprec("plan", cut / "mix.yaml")
        assert ended.code in (0, 1) and ended.err.startswith("mixprec: " if ended.code else ""), i
        assert all(line.isprintable() for line in (ended.out + ended.err).split("\n")), i


FP8: dict[str, Any] = {"kind": "fp8_block", "block": [128, 128], "activations": "dynamic"}

DECLARATIONS: dict[str, tuple[Change, str]] = {
    "another version": (lambda q: q.update(version="x" * 5000), "version 'xxxxxxxxxxxx...xxxxxxxxxxxxx'; this mixprec"),
    "formats null": (lambda q: q.update(formats=None), "is damaged"),
    "formats a list": (lambda q: q.update(formats=[]), "is damaged"),
    "a format null": (lambda q: q["formats"].update(x=None), "is damaged"),
    "an unknown kind": (lambda q: q["formats"].update(x={"kind": "x"}), "is damaged: KeyError('x')"),
    "a kind that is a list": (lambda q: q["formats"].update(x={"kind": []}), "is damaged"),
    "a block of 0": (lambda q: q["formats"].update(x=FP8 | {"block": [0, 0]}), "is no pair of positive numbers"),
    "a long block": (lambda q: q["formats"].update(x=FP8 | {"block": [1] * 9999}), "[1, 1, 1, 1, 1, 1, ...] is no"),
    "modules null": (lambda q: q.update(modules=None), "is damaged"),
    "a module alone": (lambda q: q.update(modules=["x"]), "is damaged"),
    "a pattern null": (lambda q: q.update(modules=[[None, "bf16"]]), "is damaged"),
    "a format not declared": (lambda q: q.update(modules=[["*", "x"]]), "format 'x' is not declared"),
    "a default that is a list": (lambda q: q.update(default=[]), "is damaged"),
    "no default": (lambda q: q.pop("default"), "is damaged: KeyError('default')"),
    "a pattern that commands": (lambda q: q.update(modules=[["\x1b[2J", "bf16"]]), "characters that no name has"),
    "2,001 patterns": (lambda q: q.update(modules=[[f"{i}*", "bf16"] for i in range(2001)]), "more than 2000 patterns"),
    "large patterns": (
        lambda q: q.update(modules=[["{0..9999}*", "bf16"]] * 100), "more than 1000000 characters"
    ),
    "a deep list": (lambda q: q.update(modules=deep(70)), "nested deeper than 64 levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARATIONS)
def test_a_hostile_declaration(mix: Path, mixprec: Any, case: str) -> None:
    how, message = DECLARATIONS[case]
    change(mix / "out" / "config.json", lambda config: how(config["quantization_config"]))
    assert message in refused(mixprec("inspect", mix / "out"))


@pytest.mark.parametrize("fmt", ["bf16", "fp8_block", "gptq_int4"])
def test_a_declaration_that_lies(mix: Path, mixprec: Any, fmt: str) -> None:
    """Every module declared to be what most are not. Found by fuzzing."""
    change(mix / "out" / "config.json", lambda c: c["quantization_config"].update(modules=[["*", fmt]]))
    ended = mixprec("inspect", mix / "out")
    assert ended.code == 0 and "not read: " in ended.out
    with suppress(MixprecError):
        list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))


def test_patterns_may_take_seconds_in_all(mix: Path, mixprec: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr("mixprec_build.patterns.budget.Patience.SECONDS", 0.1)
    slow = [[f"*{{m,mo}}*{{l,la}}*{{e,er}}*{i}", "bf16"] for i in range(1000)]
    change(mix / "out" / "config.json", lambda c: c["quantization_config"].update(modules=slow))
    assert "takes more than 0 seconds to match" in refused(mixprec("inspect", mix / "out"))


def test_a_block_larger_than_the_weight(mix: Path) -> None:
    """Its size is a stranger's word; 477 GiB were asked for."""
    formats: Change = lambda c: c["quantization_config"]["formats"]["fp8_block"].update(block=[10**9, 10**9])  # noqa: E731
    change(mix / "out" / "config.json", formats)
    list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))


def test_a_g_idx_that_points_nowhere(mix: Path) -> None:
    """A weight that cannot be dequantized is named."""
    shard = next((mix / "out").glob("*.safetensors"))
    tensors = open_checkpoint(str(mix / "out")).tensors
    g_idx = next(t for name, t in tensors.items() if name.endswith("g_idx"))
    data = bytearray(shard.read_bytes())
    data[g_idx.start : g_idx.start + g_idx.nbytes] = b"\x7f" * g_idx.nbytes
    shard.write_bytes(data)
    with pytest.raises(MixprecError, match=r"cannot be dequantized: index .* is out of bounds"):
        list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))


# Configurations of sources

TOO_LONG = "x" * 1_000_000
CUT = "'xxxxxxxxxxxx...xxxxxxxxxxxxx'"

GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
GROUPS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"g": GROUP},
}

CONFIGS: dict[str, tuple[str, Change, str]] = {
    "a long method": ("int4", lambda q: q.update(quant_method=TOO_LONG), f"of quant_method {CUT}"),
    "long bits": ("int4", lambda q: q.update(bits=[4] * 500_000), "GPTQ with [4, 4, 4, 4, 4, 4, ...] bits"),
    "a group size of 4000 digits": ("int4", lambda q: q.update(group_size=-(10**4000)), "GPTQ group_size -10000"),
    "a long block": ("fp8", lambda q: q.update(weight_block_size=[1] * 500_000), "[1, 1, 1, 1, 1, 1, ...] is no pair"),
    "a long activation scheme": ("fp8", lambda q: q.update(activation_scheme=TOO_LONG), CUT),
    "long AWQ bits": (
        "int4", lambda q: q.update(quant_method="awq", bits=[4] * 500_000), "AWQ with [4, 4, 4, 4, 4, 4, ...] bits",
    ),
    "a long AWQ version": ("int4", lambda q: q.update(quant_method="awq", version=TOO_LONG), f"AWQ version {CUT}"),
    "an AWQ group size of 4000 digits": (
        "int4", lambda q: q.update(quant_method="awq", version="gemm", group_size=-(10**4000)), "AWQ group_size -10000",
    ),
    "groups that are a list": ("fp8", lambda q: q.update(GROUPS, config_groups=[1] * 500_000), "config_groups [1, 1,"),
    "a group of a long name": (
        "fp8", lambda q: q.update(GROUPS, config_groups={TOO_LONG: {"targets": ["Linear"]}}), "says nothing of its",
    ),
    "a group of 4000 digits": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "weights": {"num_bits": 10**4000}}}),
        "declared by config group 'g'",
    ),
    "a group of long words": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "weights": {"type": TOO_LONG}}}),
        "declared by config group 'g'",
    ),
    "100,000 names to ignore": (
        "fp8", lambda q: q.update(GROUPS, ignore=["x"] * 100_001), "ignore holds more than 100000 names",
    ),
    "a hundred thousand groups": (
        "fp8", lambda q: q.update(GROUPS, config_groups={str(i): GROUP for i in range(1000)}), "are not 1 to 256",
    ),
    "a slow target": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "targets": ["re:(a+)+$"]}}), "holds 're:(a+)+",
    ),
    "100,000 regexes": (
        "int4", lambda q: q.update(dynamic={str(i): {} for i in range(100_000)}), "more than 4096 regular expressions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_quoted_in_few_words(mix: Path, case: str) -> None:
    """There may be as many messages as modules."""
    name, how, message = CONFIGS[case]
    change(mix / name / "config.json", lambda config: how(config["quantization_config"]))
    errors = [str(f) for f in open_source(str(mix / name)).formats.values() if isinstance(f, FormatError)]
    assert errors and all(message in error and len(error) < 500 for error in errors)


REGEXES = [
    # As they are in use: examples of GPTQModel's documentation, and lists of layers
    (r"+:.*\.18\..*gate.*", "model.layers.18.mlp.gate_proj", True),
    (r".*\.19\..*gate.*", "model.layers.18.mlp.gate_proj", False),
    (r"-:.*down.*", "model.layers.18.mlp.down_proj", False),
    (r"model\.layers\.(?:[0-9]|1[0-5])\.mlp\.(gate|up)_proj$", "model.layers.12.mlp.up_proj", True),
    (r"^model\.layers\.\d+\.self_attn\.[qkvo]_proj$", "model.layers.3.self_attn.k_proj", True),
    (r"+:.*\.(?:" + "|".join(map(str, range(94))) + r")\..*(?:gate|up)_proj.*", "model.layers.93.mlp.up_proj", True),
    (r"(?!.*shared_expert).*\.down_proj", "model.layers.0.mlp.shared_expert.down_proj", False),
    ("lm_head", "lm_head", True),
]


def dynamic(declared: dict[str, Any]) -> Dynamic:
    return Quantization(declared).derive(Dynamic)


@pytest.mark.parametrize(("regex", "name", "hit"), REGEXES)
def test_regexes_that_are_in_use(regex: str, name: str, hit: bool) -> None:
    found = dynamic({"bits": 4, "dynamic": {regex: {"bits": 8}}}).resolve(name)
    assert found["bits"] == (8 if hit else 4)


BAD_REGEXES = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){20}b", "(a?){50}a{50}", "a?" * 50 + "a" * 50, "(a|a)" * 40 + "b",
    ".*.*.*.*.*.*b", "(.*)(.*)(.*)(.*)(.*)b", r"(.*)\1b", "(?P<x>a)(?P=x)", "((a*)*)*b", "(?:a{1,99}){1,99}b",
    "a{1,999}" * 9 + "b", "(?i)a", "(?<=a)b", "(a", "a)", "[a", "a**", "a{99999999999}", "*", "[[a]", "\\", "\\N{x}",
    "(" * 1000, "a" * 1001, r"(?(1)a|b)",
]  # fmt: skip


@pytest.mark.parametrize("regex", BAD_REGEXES)
def test_regexes_that_are_refused(regex: str) -> None:
    with pytest.raises(FormatError, match=r"^`dynamic` holds '") as caught:
        dynamic({"dynamic": {f"+:{regex}": {"bits": 8}}}).resolve("a" * 256)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("regex", [".*.*.*.*b", ".*a.*a.*a.*b", "(a|a)" * 20 + "b", "a?" * 20 + "a" * 230 + "b"])
def test_the_slowest_regexes_that_are_tried(regex: str) -> None:
    assert "bits" not in dynamic({"dynamic": {regex: {"bits": 8}}}).resolve("a" * 256)


def test_regexes_may_take_seconds_in_all(monkeypatch: Patch) -> None:
    monkeypatch.setattr("mixprec_build.patterns.budget.Patience.SECONDS", 0.1)
    one = dynamic({"dynamic": {".*.*.*b": {"bits": 8}}})
    with pytest.raises(FormatError, match="`dynamic` takes more than 0 seconds to match"):
        for _ in range(1000):
            one.resolve("a" * 256)


# Patterns

SLOW = [
    ("*a*a*a*b", "a" * 256),
    ("*a*a*a*", "b" * 256),
    ("*{a,aa}*{a,aa}*{a,aa}*b", "a" * 256),
    ("{1,11}" * 40 + "x", "1" * 60),
    ("{a,aa,aaa}" * 200 + "b", "a" * 256),
    ("*" + "{a,ab,b}" * 60 + "*" + "{a,aa}" * 60 + "*c", "ab" * 128),
    ("?" * 250 + "*" + "{a,b}" * 100 + "c", "ab" * 128),
    ("*{0..9999}{0..9999}*x", "1" * 256),
    ("{" + ",".join("a" * n for n in range(1, 257)) + "}" * 1 + "{a,aa}" * 100 + "b", "a" * 256),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), SLOW, ids=[text[:20] for text, _ in SLOW])
def test_a_match_takes_milliseconds(text: str, name: str) -> None:
    pattern = Pattern(text)
    start = time.process_time()
    assert pattern.matches(name) is (text == "*a*a*a*" and "a" in name)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "name", "matches"),
    [
        ("*{abc,b}*c", "abc", True),  # the match that starts first ends last
        ("*{abc,b}*c", "abcc", True),
        ("*{abc,b}*c", "ab", False),
        ("*{a,ab}*b", "ab", True),
        ("{a,ab}*b", "ab", True),
        ("*.{0..127}.*.x", ".1.2.x", True),
        ("*a.a.a{1,1234}*a*", "a.a.a.a12a", True),
        ("*?{a,aaaa}?*b", "aaab", True),
        ("{1,12}{3,23}", "123", True),
        ("{1,12}.{3,34}", "12.34", True),
        ("*ab{,}", "ab", None),
    ],
)
def test_what_was_found_first_need_not_be_right(text: str, name: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(PatternError):
            Pattern(text)
    else:
        assert Pattern(text).matches(name) is matches


def test_patterns_of_one_file_are_bounded_together() -> None:
    reader = PatternReader()
    for i in range(100_000):
        reader.read(f"model.layers.{i}.mlp")  # exact names are but looked up
    with pytest.raises(PatternError, match="more than 2000 patterns in one file"):
        for i in range(2001):
            reader.read(f"{i}.*")
    with pytest.raises(PatternError, match="have more than 1000000 characters"):
        reader = PatternReader()
        for _ in range(100):
            reader.read("{0..9999}.*")


@pytest.mark.parametrize("text", ["a\x1b[2J*", "a\x9bb", "a\n*", "\ud800*", "a\0"])
def test_a_pattern_does_not_command(text: str) -> None:
    with pytest.raises(PatternError, match="has characters that no name has") as caught:
        Pattern(text)
    assert str(caught.value).isprintable()


def test_a_pattern_is_quoted_in_few_words() -> None:
    for text in ("[" * 10_000, "{" * 10_000, "*a" * 10_000, "a" * 200_001, "{" + "x" * 10_000 + "..}"):
        with pytest.raises(PatternError) as caught:
            Pattern(text)
        assert len(str(caught.value)) < 600


# Recipes

RECIPES: dict[str, tuple[str, str]] = {
    "101 sources": ("model: a\nsources: {" + ",".join(f"s{i}: a" for i in range(101)) + "}\n", "more than 100 sources"),
    "a long source name": (f"model: a\nsources: {{{'x' * 65}: a}}\n", "is no name for a source"),
    "a long location": (f"model: {'x' * 4097}\n", "a word of 4097 characters"),
    "a long key": (f"? {'x' * 100_000}\n: a\nmodel: a\n", "unknown key"),
    "a long key twice": (f"model: a\nweights:\n  {'x' * 900}: a\n  {'x' * 900}: a\n", "is given twice"),
    "a long tag": (f"model: !{'x' * 10_000} a\n", "tags like '!xxx"),
    "many words": ("model: a\nserver: {a: [" + "a," * 500_001 + "]}\n", "more than 500000 words"),
    "many maps": ("model: a\nserver: {a: [" + "{}," * 500_001 + "]}\n", "more than 500000 words"),
    "many globs": (
        "model: a\nweights:\n" + "".join(f"  {i}*: model\n" for i in range(2001)), "more than 2000 patterns",
    ),
    "the home of nobody": ("model: ~nobody-of-that-name/x\n", "cannot be looked at: Could not determine home"),
    "a zero byte": ('model: "a\\0b/c"\n', "no such folder"),
    "half a character": ('model: "\\uD800/c"\n', "not valid YAML"),
    "a value of 10 MB": (f"model: {'x' * 10_000_000}\n", "a word of 10000000 characters"),
    "a key of 10 MB": (f"? {'x' * 10_000_000}\n: a\nmodel: a\n", "unknown key"),
    "a comment of 10 MB": (f"# {'x' * 10_000_000}\n", "is empty"),
    "a list of 10 MB": (f"model: [{'a,' * 5_000_000}]\n", "more than 500000 words"),
    "brackets of 10 MB": ("model: " + "[" * 10_000_000, "nested deeper than 16 levels"),
    "NaN as a size": ("model: a\noutput: {shard_size: .nan}\n", "'.nan' is no size"),
    "NaN as a degree": ("model: a\noutput: {tp: .nan}\n", "tp must be numbers"),
    "NaN as a source": ("model: a\nweights: {x: .nan}\n", "unknown source `.nan`"),
    "a path of 4000": (f"model: {'x' * 4000}\n", "cannot be looked at: File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe(tmp_path: Path, mixprec: Any, case: str) -> None:
    text, message = RECIPES[case]
    (tmp_path / "mix.yaml").write_text(text)
    printed = refused(mixprec("plan", tmp_path / "mix.yaml"))
    assert message in printed and len(printed) < 5000


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_recipe_that_never_ends(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mix.yaml"
    os.mkfifo(path) if kind == "fifo" else link(path, "/dev/zero")
    with pytest.raises(RecipeError, match="cannot read the recipe: not a regular file"):
        load_recipe(path)


# Bombs: small files that would become gigabytes, or hours

LIMITED = """
import resource, sys
memory, seconds = int(sys.argv[1]) << 20, int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
sys.argv[1:3] = []
from mixprec_build.cli.app import main
main()
"""


def limited(*arguments: object, monkeypatch: Patch, mebibytes: int = 1024, seconds: int = 60) -> Ended:
    """Runs a command in a process of so much memory and CPU time."""
    # Neither reserves more address space for each thread than it uses.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    ended = run_python("-c", LIMITED, str(mebibytes), str(seconds), *map(str, arguments), timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def repeated(head: str, unit: str, tail: str, size: int) -> str:
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def distinct(unit: str, size: int) -> str:
    """An object of so many bytes with keys that are all different."""
    return "{" + ",".join(unit % i for i in range(size // (len(unit % 0) + 1))) + "}"


def shard_of(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


def many_tensors(prefix: str, count: int) -> bytes:
    return build_header((f"{prefix}.{i}", "U8", (), 1) for i in range(count)) + bytes(count)


MIB = 1 << 20
MILLION = b'{"version":1,"checksum":"xxh3_128","a":%s}'
BOMBS: dict[str, tuple[str, str, Callable[[], str | bytes], str]] = {
    "config of lists": ("inspect", "config.json", lambda: repeated('{"a":[', "[],", "0]}", 16 * MIB), "more than"),
    "config of maps": ("inspect", "config.json", lambda: repeated('{"a":[', '{"a":0},', "0]}", 16 * MIB), "more than"),
    "config of keys": ("inspect", "config.json", lambda: distinct('"%06x":1', 16 * MIB), "more than 2000000"),
    "config of one text": ("inspect", "config.json", lambda: repeated('{"model_type":"', "x", '"}', 16 * MIB), ""),
    "config of depth": ("inspect", "config.json", lambda: '{"a":' + "[" * 900 + "]" * 900 + "}", "nested deeper"),
    "index of keys": ("inspect", INDEX, lambda: distinct('"%06x":1', 60 * MIB), "more than 4000000"),
    "index of lists": ("inspect", INDEX, lambda: repeated('{"a":[', "[],", "0]}", 60 * MIB), "more than 4000000"),
    "header of lists": (
        "inspect", "model.safetensors", lambda: shard_of(repeated('{"a":[', "[],", "0]}", 32 * MIB)), "more than 4000",
    ),
    "header of keys": (
        "inspect", "model.safetensors", lambda: shard_of(distinct('"%06x":{}', 32 * MIB)), "more than 4000000 values",
    ),
    "header of a long name": (
        "inspect", "model.safetensors", lambda: build_header([("x" * 30 * MIB, "U8", (), 1)]) + b"0", "is longer than",
    ),
    "names that are all different": (
        "inspect", "model.safetensors", lambda: many_tensors("a.%s" % ("b." * 20), 150_000), "",
    ),
    "manifest of lists": ("verify", MANIFEST, lambda: repeated('{"a":[', "[],", "0]}", 127 * MIB), "more than 8000000"),
    "manifest of keys": ("verify", MANIFEST, lambda: distinct('"%06x":1', 127 * MIB), "more than 8000000"),
    "manifest of a million": (
        "verify", MANIFEST, lambda: sealed(MILLION % distinct('"%06x":1', 11 * MIB).encode()), "damaged",
    ),
    "manifest of anything": ("verify", MANIFEST, lambda: bytes(129 * MIB), "at most 134217728 are read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb(mix: Path, monkeypatch: Patch, case: str) -> None:
    command, file, content, message = BOMBS[case]
    folder = mix / ("out" if command == "verify" else "bf16")
    data = content()
    (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)
    ended = limited(command, folder, *["--quiet"] * (command == "verify"), monkeypatch=monkeypatch)
    if message:
        assert message in refused(ended)
    else:
        assert ended.code == 0 and "serve it with" in ended.out and len(ended.out) < 200_000


@pytest.mark.parametrize(
    ("limit", "message"),
    [("_MAX_TENSORS", "more than 1000 tensors"), ("_MAX_HEADERS_BYTES", "headers of more than 1000 bytes in all")],
)
def test_shards_are_bounded_together(tmp_path: Path, monkeypatch: Patch, limit: str, message: str) -> None:
    monkeypatch.setattr(f"mixprec_build.checkpoint.opening.{limit}", 1000)
    (tmp_path / "config.json").write_text("{}")
    files = [f"{i}.safetensors" for i in range(20)]
    for file in files:
        (tmp_path / file).write_bytes(many_tensors(file, 100))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{file}.0": file for file in files}}))
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: {message}"


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE"])
def test_a_companion_of_a_terabyte(mix: Path, monkeypatch: Patch, file: str) -> None:
    """A file may be a hole: what it says of its size costs nothing."""
    for folder in (mix / "bf16", mix / "out"):
        os.truncate(folder / file, 1 << 40)
    change(mix / "out" / MANIFEST, lambda m: m["files"][file].update(bytes=1 << 40))
    for command in (("verify", mix / "out"), ("build", mix / "mix.yaml", "-o", mix / "new")):
        ended = limited(*command, "--quiet", monkeypatch=monkeypatch)
        assert ended.code == 1 and f"{file}: 1099511627776 bytes; at most 268435456 are read\n" in ended.err
    assert not (mix / "new").exists()


# What a terminal shows

COMMANDS = {
    "escape": "\x1b[2J",
    "C1": "\x9b2J",
    "bell": "\a",
    "turned": "\u202e",
    "line": "\nserve it with: rm",
    "half": "\ud800",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_terminal_is_not_commanded(mix: Path, mixprec: Any, command: str) -> None:
    bad = f"a{command}b"
    change(mix / "out" / "config.json", lambda c: c.update(model_type=bad))
    change(
        mix / "out" / MANIFEST,
        lambda m: (
            m.update(unservable=[bad], sources={bad: {"location": bad, "path": None, "commit": bad}}),
            m["files"].update({bad: {"bytes": 0, CHECKSUM: ""}}),
        ),
    )
    ended = mixprec("inspect", mix / "out")
    assert ended.code == 0 and ended.out.count(printable(bad)) >= 3
    assert all(line.isprintable() for line in ended.out.split("\n")) and ended.out.count("\nserve it with: ") == 0
    ended = mixprec("verify", mix / "out")
    assert ended.code == 1 and f"differs: {printable(bad)}: missing" in ended.err
    assert all(line.isprintable() for line in (ended.out + ended.err).split("\n"))


def test_a_folder_name_is_no_command(mix: Path, mixprec: Any) -> None:
    folder = mix / "out; rm -rf $(pwd)"
    (mix / "out").rename(folder)
    assert f"--model-path '{folder}' --quantization" in mixprec("inspect", folder).out


def test_markup_and_emoji_are_shown_as_they_are(mix: Path, mixprec: Any) -> None:
    folder = mix / "[red]x[b] :smile:"
    (mix / "bf16").rename(folder)
    (mix / "mix.yaml").write_text(
        f"model: '{folder}'\nsources: {{a: '{folder}', fp8: ./fp8}}\nweights: {{'model.layers.0.mlp.*': fp8}}\n"
    )
    ended = mixprec("plan", mix / "mix.yaml")
    assert ended.code == 0 and "[red]x[b] :smile:" in ended.out.replace("\n", "")


def test_a_layer_map_of_thousands_is_left_out(tmp_path: Path, mixprec: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = [(f"model.{i}.a{i}.weight", "U8", (1, 1), 1) for i in range(2000)]
    (tmp_path / "model.safetensors").write_bytes(build_header(names) + bytes(2000))
    assert mixprec("inspect", tmp_path).code == 0


# Nothing is run, nothing is written elsewhere

AUDITED = """
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "os.setxattr", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
           "socket.connect")
seen = []
def hook(event, arguments):
    if event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES):
        seen.append(f"{event} {arguments}")
    if event in ("exec", "import", "compile") and any("modeling_x" in str(argument) for argument in arguments):
        seen.append("modeling_x.py was run")
sys.dont_write_bytecode = True
sys.addaudithook(hook)
from mixprec_build.cli.app import main
try:
    main()
finally:
    print("seen:", *seen, file=sys.stderr)
"""


def audited(*arguments: object) -> str:
    """What a command, which must succeed, changed on disk and ran."""
    ended = run_python("-c", AUDITED, *map(str, arguments))
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.partition("seen:")[2]


def test_nothing_but_a_build_writes(mix: Path, snapshot: Path) -> None:
    recipe = mix / "hub.yaml"
    recipe.write_text("model: org/name\nsources: {fp8: ./fp8}\nweights: {'model.layers.0.mlp.*': fp8}\n")
    before = tree(mix)
    for command in (("plan", recipe), ("inspect", mix / "out"), ("inspect", mix / "fp8"), ("verify", mix / "out")):
        assert audited(*command) == "\n"
    assert tree(mix) == before


def test_a_build_writes_only_its_output(mix: Path, snapshot: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    recipe = mix / "hub.yaml"
    recipe.write_text("model: org/name\nsources: {fp8: ./fp8}\nweights: {'model.layers.0.mlp.*': fp8}\n")
    before = tree(tmp_path)
    audited("build", recipe, "-o", mix / "new")
    after = tree(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("mix/new/")} == before
    assert len(after) > len(before)


def test_a_split_writes_only_in_its_folder(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    before = tree(tmp_path)
    audited("split", mix / "out", "--tp", "1", "-q")
    after = tree(tmp_path)
    new = after.keys() - before.keys()
    assert new and all(name.startswith("mix/out/presplit/tp1-ep1/") for name in new)
    assert {name for name in before if after[name] != before[name]} == {f"mix/out/{MANIFEST}"}


def test_python_files_are_copied_and_never_run(mix: Path) -> None:
    assert "was run" not in audited("build", mix / "mix.yaml", "-o", mix / "new")
    assert audited("verify", mix / "new", "--against", "bf16") == "\n"
    assert (mix / "new" / "modeling_x.py").read_bytes() == (mix / "bf16" / "modeling_x.py").read_bytes()
    assert json.loads((mix / "new" / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_x.X"}


# Secrets


def test_a_token_stays_where_it_is(mix: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    printed = []
    for line in (
        "plan mix.yaml",
        "build mix.yaml -o new",
        "inspect new",
        "verify new",
        "verify new --source fp8=org/gone",
    ):
        ended = run_python("-m", "mixprec_build", *line.split(), cwd=mix)
        printed.append(ended.stdout + ended.stderr)
    assert len(tree(mix / "new")) > 5 and "no such" not in printed[0]
    assert not any(SECRET in text for text in printed)
    assert not any(SECRET.encode() in data for data in tree(mix / "new").values())


URL = f"https://user:{SECRET}@huggingface.co/org/name"


@pytest.mark.parametrize(
    "text",
    [
        f"model: {URL}\n",
        f"model: a\nsources: {{fp8: '{URL}'}}\n",
        f"model: a\nweights: {{x: '{URL}'}}\n",
        f"model: a\ndefault: {URL}\n",
        f"mixed_precision: {{fp16_path: '{URL}'}}\n",
    ],
)
def test_a_recipe_holds_no_password(tmp_path: Path, mixprec: Any, text: str) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    message = refused(mixprec("plan", tmp_path / "mix.yaml"))
    assert "a URL with a password; write org/name, and log in with `hf auth login` or HF_TOKEN" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", URL),
        ("verify", URL),
        ("verify", "out", "--source", f"fp8={URL}"),
        ("verify", "out", "--against", URL),
    ],
)
def test_a_password_is_not_echoed(mix: Path, mixprec: Any, monkeypatch: Patch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(mix)
    ended = mixprec(*arguments)
    assert ended.code == 1 and "://***@huggingface.co" in ended.err.replace(":/*", "://*")
    assert SECRET not in ended.out + ended.err


def test_a_url_is_no_location() -> None:
    with pytest.raises(
        SourceError, match=r"^https://huggingface\.co/org/name: a URL; write a local folder or a hub id"
    ):
        open_checkpoint("https://huggingface.co/org/name")
