"""Nothing is run, nothing is written elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from support.files import tree
from support.run import run_python

from mixprec_build.checkpoint.manifest import MANIFEST

from .spoil import Patch

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
