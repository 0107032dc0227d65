"""SGLang has every name that mixprec uses; what is missing stops a server with its name."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sglang.harness import Lacking, last_json, make, run_python, server_args
from support.sglang.mixes import mix

import mixprec_runtime
import mixprec_runtime.cpu.engine
from mixprec_build.versions import between
from mixprec_runtime.contact import check, names
from mixprec_runtime.contact.flags import FLAGS, missing_flags

ROOT = Path(mixprec_runtime.__file__).parent
DOTTED = re.compile(r"sglang(\.\w+)+")
EXAMINE = "import json; from mixprec_runtime.asking.installed import examine; print(json.dumps(examine()))"


def used_names() -> Iterator[tuple[str, str]]:
    """Each file of the runtime, and what it imports or replaces of SGLang's, as ``module:name``."""
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                for alias in node.names:
                    if is_module(f"{node.module}.{alias.name}"):
                        modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    else:
                        yield path.name, f"{node.module}:{alias.name}"
            elif isinstance(node, ast.Assign | ast.AnnAssign) and (module := imported_by_name(node.value)):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                assert isinstance(target, ast.Name)
                modules[target.id] = module
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                    yield path.name, f"{modules[name]}:{attribute}"
                case ast.Attribute(value=call, attr=attribute) if module := imported_by_name(call):
                    yield path.name, f"{module}:{attribute}"
                case ast.Call(args=[ast.Name(id=name), ast.Constant(value=str(attribute)), *_]) if name in modules:
                    yield path.name, f"{modules[name]}:{attribute}"  # patch.object, getattr
                case ast.Tuple(elts=[ast.Constant(value=str(module)), ast.Constant(value=str(attribute)), *_]):
                    if DOTTED.fullmatch(module):
                        yield path.name, f"{module}:{attribute}"


def imported_by_name(node: ast.AST | None) -> str | None:
    """The module of ``importlib.import_module("sglang...")``."""
    match node:
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module))]):
            return module if DOTTED.fullmatch(module) else None
    return None


def test_strings_that_name_modules_are_understood() -> None:
    """Those that :func:`used_names` reads, of hooks, and of what is not used by a name."""
    from mixprec_runtime import hooks

    hooked = " ".join([hooks._MANAGER, *(target for target, *_ in hooks._hooks())]).split()
    known = {*hooked, *(name.partition(":")[0] for _, name in used_names())}
    known |= {"sglang.launch_server", "sglang.srt.managers.scheduler"}  # run, imported
    known |= {"sglang.srt.configs.model_config"}  # the name of a logger
    known |= {"sglang.srt.layers.quantization"}  # its tables of methods, those that a release has
    found = {
        node.value
        for path in ROOT.rglob("*.py")
        if path.parent.name != "contact"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value)
    }
    assert {"sglang.srt.models.qwen2_moe", "sglang.srt.server_args"} <= found
    assert not found - known


def is_module(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.usefixtures("sglang")
def test_the_table_has_every_name_that_is_used() -> None:
    table = {name.where for name in names.NAMES}
    outer = {":".join(_outer(where)) for where in table}
    unknown = sorted({(file, name) for file, name in used_names() if name not in outer})
    assert not unknown
    assert len(set(used_names())) > 40


def _outer(where: str) -> tuple[str, str]:
    module, _, path = where.partition(":")
    return module, path.partition(".")[0]


def test_the_table_has_every_function_that_is_hooked() -> None:
    from mixprec_runtime import hooks

    table = {name.text for name in names.NAMES}
    assert {target for target, *_ in hooks._hooks()} <= table


def test_uses_are_known() -> None:
    """Formats by their names in the compiler, others by a constant."""
    from mixprec_build.formats.registry import FORMATS

    constants = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    assert {name.use for name in names.NAMES} <= constants | {fmt.name for fmt in FORMATS}


def test_nothing_is_missing() -> None:
    found = last_json(run_python(EXAMINE))
    assert found["problems"] == [] and found["names"] > 90 and found["flags"] == len(FLAGS)
    assert len(found["repairs"]) > 15 and all(repair["source"].startswith("https://") for repair in found["repairs"])


def test_a_name_that_moved_or_changed_is_found(tmp_path: Path) -> None:
    """In a copy of the module, for each name and each way in turn."""
    environment = mixprec_runtime.cpu.engine.environment()
    command = [sys.executable, "-W", "ignore", "-m", "support.sglang.edited", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    results: list[tuple[str, str, list[str]]] = last_json(done)
    assert len([what for _, what, _ in results if what]) > 200
    unchanged = [(name, problems) for name, what, problems in results if not what and problems]
    assert not unchanged, "a copy without edits"
    silent = [(name, what) for name, what, problems in results if what and not any(name in p for p in problems)]
    assert not silent


# A server


@pytest.mark.usefixtures("sglang")
def test_a_server_stops_with_the_name_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.quantization import modelopt_quant
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    checkpoint = mix(folder, "llama")
    make(checkpoint)
    monkeypatch.delattr(modelopt_quant, "ModelOptNvFp4A16LinearMethod")  # of a format that this checkpoint has not
    make(checkpoint)
    monkeypatch.delattr(BaseKVCacheMethod, "create_weights")
    with pytest.raises(check.ContactError, match=r"BaseKVCacheMethod\.create_weights is missing.*pip install"):
        make(checkpoint)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_server_stops_where_an_argument_was_renamed(name: str) -> None:
    args = server_args("dummy")
    assert missing_flags(args) == []
    lacking = missing_flags(Lacking(args, name))
    flag = FLAGS[name]
    assert bool(lacking) == between(flag.since, flag.until, check.installed())
    assert all(name in problem for problem in lacking)


@pytest.mark.usefixtures("sglang")
def test_a_server_stops_where_a_hook_did_not_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_loader import utils
    from sglang.srt.plugins.hook_registry import HookRegistry

    from mixprec_runtime import hooks
    from mixprec_runtime.contact.start import require_all

    monkeypatch.setattr(utils, "get_model_architecture", utils.get_model_architecture.__wrapped__)
    with pytest.raises(check.ContactError, match=r"model_loader\.utils\.get_model_architecture is not hooked"):
        make(mix(folder, "llama"))
    monkeypatch.undo()
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    make(mix(folder, "llama"))
    update = SchedulerWeightUpdaterManager.update_weights_from_disk
    monkeypatch.setattr(SchedulerWeightUpdaterManager, "update_weights_from_disk", inspect.unwrap(update))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", object())
    registered = dict(HookRegistry._hooks)
    try:
        with pytest.raises(check.ContactError, match=r"SchedulerWeightUpdaterManager\.update_weights_from_disk is not"):
            require_all([], server_args("dummy"), hooks._hooks())
    finally:
        HookRegistry._hooks.clear()
        HookRegistry._hooks.update(registered)


@pytest.mark.usefixtures("sglang")
def test_modules_that_are_imported_after_the_plugin_are_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from mixprec_runtime.contact.start import add_late

    made: list[str | None] = []

    class Late:
        def __init__(self) -> None:
            made.append(add_late([(f"{module.__name__}.Late.__init__", after, "AFTER")]))

    def after(result: Any, late: Any) -> None:
        made.append("hooked")

    module: Any = types.ModuleType("mixprec_test_late")
    module.Late = Late
    target = f"{module.__name__}.Late.__init__"
    try:
        assert add_late([(target, after, "AFTER")]) is None and target not in HookRegistry._hooks
        monkeypatch.setitem(sys.modules, module.__name__, module)
        Late()  # its start is not followed any more, that of the next one is
        assert made == [f"{target} began before it was hooked: SGLang loads plugins later than the module"]
        Late()
        assert made[1:] == [None, "hooked"]
    finally:
        HookRegistry._hooks.pop(target, None)
        HookRegistry._patched.discard(target)


def around(original: Any, first: Any, *, second: Any = None) -> Any:
    return original(first, second=second)


@pytest.mark.usefixtures("sglang")
def test_a_hook_must_take_the_parameters_of_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins import hook_registry

    module: Any = types.ModuleType("mixprec_test_hooked")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for function, fits in ((lambda first, *, second: 0, True), (lambda first, third: 0, False)):
        module.function = hook_registry._wrap_fn(function, around, hook_registry.HookType.AROUND)
        problem = check.not_wrapped("mixprec_test_hooked.function", around, passes=1)
        assert (problem is None) == fits
    module.function = lambda first: 0
    assert "is not hooked" in str(check.not_wrapped("mixprec_test_hooked.function", around, passes=1))


@pytest.mark.parametrize(
    ("function", "call", "problem"),
    [
        (lambda a, b, *, c=0: 0, "a b c=", None),
        (lambda a, b, *, c=0: 0, "_ _", None),
        (lambda *args, **kwargs: 0, "a b c=", None),
        (lambda b, a: 0, "a b", "parameter 0 is b, not a"),
        (lambda a, b, d: 0, "a b", "missing a required argument: 'd'"),
        (lambda a, b: 0, "a b c=", "unexpected keyword argument 'c'"),
    ],
)
def test_a_call_must_fit_a_signature(function: Any, call: str, problem: str | None) -> None:
    found = check._unfit_signature(function, call)
    assert found is None if problem is None else problem in (found or "")


UNREGISTERED = """
import json, logging, sys
said = []
class Keep(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
logging.getLogger("mixprec_runtime.plugin").addHandler(Keep())
import sglang.srt.layers.quantization as quantization
import sglang.srt.layers.quantization.fp8 as fp8
del fp8.Fp8Config
from mixprec_runtime.plugin import register
register()
try:
    quantization.QUANTIZATION_METHODS["mixprec"].from_config({})
except RuntimeError as error:
    print(json.dumps([str(error), said]))
"""


def test_a_plugin_that_cannot_be_imported_refuses_with_the_name() -> None:
    message, said = last_json(run_python(UNREGISTERED))
    assert "sglang.srt.layers.quantization.fp8.Fp8Config is missing (FP8" in message and "pip install" in message
    assert any("Fp8Config" in line for line in said)


@pytest.mark.usefixtures("sglang")
def test_a_newer_sglang_is_served_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sglang.version
    from sglang.srt.runtime_context import MoeFlags, RuntimeContext

    def nothing_chosen(self: RuntimeContext, name: str) -> object:
        raise ValueError(f"{name} has no choice of SGLang's")

    checkpoint = mix(folder, "llama")
    make(checkpoint)
    assert "is newer than" not in caplog.text
    monkeypatch.setattr(sglang.version, "__version__", "0.9.1")
    for since in ("config_leaf", "override"):  # what releases from 0.5.18 on have
        if not hasattr(RuntimeContext, since):
            monkeypatch.setattr(RuntimeContext, since, nothing_chosen, raising=False)
    if not hasattr(MoeFlags, "speculative_runner_backend"):  # from 0.5.16 on
        monkeypatch.setattr(MoeFlags, "speculative_runner_backend", None, raising=False)
    make(checkpoint)
    assert caplog.text.count("SGLang 0.9.1 is newer than 0.5.23") == 1
