"""The rooms of both packages: which there are, and which may import which.

Every import is read, those inside of functions and those for type checkers included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mixprec_build.families.registry import FAMILIES

ROOT = Path(__file__).parents[2]

COMPILER = {
    "errors": "every error that a user can cause",
    "text": "words and numbers for messages",
    "versions": "mixprec's own version, and the SGLang releases that checkpoints are served with",
    "patterns": "names with wildcards: parsed, matched, compressed; regular expressions of untrusted files",
    "storage": "bytes: safetensors headers, files and folders, the hub, bounds against untrusted input",
    "families": "what a model is: roles, fused groups, experts, what is never quantized",
    "formats": "how a module is stored: one file a format",
    "checkpoint": "an opened checkpoint, each module with its format; what a compiled one declares and lists",
    "ranks": "a checkpoint cut for ranks, and put together again",
    "recipe": "YAML in, its sources opened",
    "planning": "recipe and sources become a plan, or a refusal with its fixes",
    "output": "a plan becomes files; files are cut for ranks and compared with their sources",
    "suggesting": "a source for every module, within a budget of bytes",
    "report": "facts, tables, pictures; what this machine can serve",
    "api": "the functions of `import mixprec_build as mp`",
    "cli": "the command line: one file a command",
}
"""The rooms of the compiler, from the top. A room imports only those above it."""

RUNTIME = {
    "gpu": "the GPU that torch sees, for `mixprec doctor`",
    "recorder": "dumps of SGLang's recorder as counts, for `mixprec experts`",
    "cpu": "stand-ins for machines without a GPU",
    "contact": "every name of SGLang's that is used and may move, compared with the installed SGLang",
    "launch": "flags of SGLang's that a compiled checkpoint cannot be served with",
    "drafts": "models that draft tokens for speculative decoding: which are served",
    "formats": "how SGLang serves a format, and where it is repaired: one file a format",
    "native": "SGLang's own quantization method for a layer in a format",
    "experts": "MoE layers whose experts are stored in several formats",
    "loading": "loading a checkpoint into the model's parameters, all of it or none",
    "asking": "SGLang's class for a model, asked what it makes of a checkpoint",
    "activity": "how often each expert runs",
    "memory": "what the weights take on a GPU",
    "unnumbered": "layers that SGLang's class for a model names without their number",
    "config": "`--quantization mixprec`: the method of each layer",
    "canary": "SGLang's kernels compared with float64 arithmetic on a few of a checkpoint's weights",
    "hooks": "where SGLang's loading of a model is followed",
    "plugin": "what SGLang finds when it looks for plugins",
}
"""The rooms of the runtime, from the top."""

FOR_THE_RUNTIME = (
    "errors",
    "text",
    "versions",
    "patterns",
    "storage",
    "families",
    "formats",
    "checkpoint",
    "ranks",
)
"""The rooms of the compiler that the runtime imports."""

FOREIGN_TO_THE_COMPILER = ("torch", "sglang", "mixprec_runtime")
COMPUTES_ON_A_GPU = "mixprec_build.suggesting.device"
"""The one module that imports torch, which only `mixprec suggest` imports, and only to measure on a GPU."""

MOST_LINES = 450

ENTRANCES = {"", "__main__"}
"""The package itself and its command line, which are below all rooms."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("mixprec_build", "mixprec_runtime"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[str]:
    """The full names of what a module imports: modules, where it imports from these two packages."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in modules() else origin


def room(module: str) -> str:
    """``"planning"`` of ``mixprec_build.planning.rules``; empty for a package itself."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize(("package", "rooms"), [("mixprec_build", COMPILER), ("mixprec_runtime", RUNTIME)])
def test_every_module_is_in_a_room_and_every_room_is_there(package: str, rooms: dict[str, str]) -> None:
    there = {room(module) for module in modules() if module.partition(".")[0] == package}
    assert there - ENTRANCES - {"site"} == rooms.keys()


@pytest.mark.parametrize(("package", "rooms"), [("mixprec_build", COMPILER), ("mixprec_runtime", RUNTIME)])
def test_a_room_imports_only_the_rooms_above_it(package: str, rooms: dict[str, str]) -> None:
    order = list(rooms)
    upward = [
        f"{module} imports {target}"
        for module in modules()
        if module.startswith(f"{package}.") and room(module) not in ENTRANCES
        for target in imports(module)
        if target.startswith(f"{package}.")
        and room(target) != room(module)
        and order.index(room(target)) > order.index(room(module))
    ]
    assert not upward


def test_no_module_imports_itself_in_the_end() -> None:
    """No cycle, not even one that only functions or type checkers go round."""
    above = {module: {name for name in imports(module) if name in modules()} - {module} for module in modules()}
    left = dict(above)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "these import one another"


def test_what_the_compiler_never_imports() -> None:
    found = [
        f"{module} imports {target}"
        for module in modules()
        if module.partition(".")[0] == "mixprec_build"
        for target in imports(module)
        if target.partition(".")[0] in FOREIGN_TO_THE_COMPILER
    ]
    assert found == [f"{COMPUTES_ON_A_GPU} imports torch"]


def test_what_the_runtime_imports_of_the_compiler() -> None:
    found = [
        f"{module} imports {target}"
        for module in modules()
        if module.partition(".")[0] == "mixprec_runtime"
        for target in imports(module)
        if target.startswith("mixprec_build.") and room(target) not in FOR_THE_RUNTIME
    ]
    assert not found


def test_no_module_is_long() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert not {module: length for module, length in lengths.items() if length > MOST_LINES}


def test_packages_of_rooms_hold_no_code() -> None:
    """What a room offers is imported from the file that defines it; a program's way in may be re-exported."""
    for module, path in modules().items():
        if path.name == "__init__.py" and room(module):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                assert isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign), module


READERS = {
    "mixprec_build.families.facts",
    "mixprec_build.families.cache",
    "mixprec_build.families.identity",
    "mixprec_build.families.mistral_config",
}
"""What knows the keys of ``config.json``: all of it, those of caches, two of them side by side, one that is made."""

WHOLE_CONFIG = {
    "mixprec_build.families.facts",
    "mixprec_build.output.companions",
    "mixprec_runtime.asking.__main__",
}
"""What takes it as it was parsed: to make facts of it, to write it again, and to hand it to SGLang's class."""

HANDED_ON = {"mixprec_runtime.asking.answer"}
"""What hands SGLang's class the config object that SGLang made."""

OTHER_KEYS = {
    "dtype": "of a tensor, in headers and manifests",
    "model_type": "of a checkpoint, in what `mixprec inspect --json` prints",
    "architectures": "never",
}
"""Keys of ``config.json`` that are keys elsewhere, of something else."""


def constants(module: str) -> Iterator[ast.Constant]:
    """The strings that a module's code uses, docstrings left out."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node


def looked_up(module: str) -> Iterator[tuple[str, str]]:
    """Keys that a module asks of anything, by subscript, ``get``, ``getattr`` and the like, and how."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("get", "pop", "setdefault", "getattr", "hasattr", "attrgetter", "itemgetter"):
                asked = list(node.args)
        for key in asked:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, f"{module}:{node.lineno}"


def test_config_json_is_read_in_one_place() -> None:
    """No other module asks for one of its keys, or takes what ``ModelFacts`` was made from."""
    readers = ("mixprec_build.families.facts", "mixprec_build.families.cache")
    words = {constant.value for reader in readers for constant in constants(reader)}
    assert {"num_hidden_layers", "text_config", "num_experts_per_tok", "kv_lora_rank"} <= words
    keys = {word for word in words if word.isidentifier()} - OTHER_KEYS.keys()
    asked = [(key, where) for name in modules() if name not in READERS for key, where in looked_up(name)]
    assert not [f"{where} asks for {key}" for key, where in asked if key in keys]
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        handed_on = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ModelFacts.of_loaded"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in handed_on:
                loaded = node.attr in ("hf_config", "hf_text_config", "text_config")
                assert not loaded or name in HANDED_ON, f"{name}:{node.lineno}"
                assert node.attr != "config" or name in WHOLE_CONFIG, f"{name}:{node.lineno}"


OTHER_WORDS = {
    "w2",  # a tensor of SGLang's
    "lm_head",  # a setting of GPTQ's
    "gate", "router", "output", "head",  # plain words
    "wq_a",  # in Mistral's own layout
}  # fmt: skip
"""Modules' names that mean something else, too."""


def test_names_of_modules_stand_in_families() -> None:
    """What a model's modules are called is known to its family alone."""
    words = {word for family in FAMILIES for group in family.fused for word in (group.name, *group.members)}
    words |= {word for family in FAMILIES for projections in family.projections for word in projections.words}
    words |= {word for family in FAMILIES for word in (*family.cuts, *family.embeddings, *family.routers)}
    outside = {}
    for name in modules():
        found = {constant.value for constant in constants(name)} & (words - OTHER_WORDS)
        if found and room(name) != "families":
            outside[name] = found
    assert not outside


def test_the_page_shows_these_rooms() -> None:
    page = (ROOT / "mixprec_build" / "README.md").read_text(encoding="utf-8")
    for rooms in (COMPILER, RUNTIME):
        for name, purpose in rooms.items():
            assert f"| `{name}` | {purpose} |" in page
    shown = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and line.count("|") == 3]
    assert shown == [*COMPILER, *RUNTIME]


def test_torch_is_imported_when_a_gpu_is_looked_for() -> None:
    importing = [module for module in modules() if COMPUTES_ON_A_GPU in imports(module)]
    assert importing == ["mixprec_build.suggesting.distortion"]
    code = (
        "import sys; from mixprec_build.suggesting import allocate, distortion\n"
        "distortion.comparer_on('cpu'); print('torch' in sys.modules)\n"
        "distortion.comparer_on('auto'); print('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.split() == ["False", "True"]


def test_importing_the_compiler_imports_nothing_heavy() -> None:
    code = (
        "import sys; import mixprec_build; import mixprec_build.cli.app\n"
        "heavy = {'torch', 'sglang', 'numpy', 'huggingface_hub', 'transformers'} & sys.modules.keys()\n"
        "print(*sorted(heavy))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "\n"
