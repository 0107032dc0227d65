"""The command line: exit codes, what goes to which stream, and one message for each mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources, write_tiny
from support.run import Run, run_python

from mixprec_build import __version__
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.report.facts import inspect_facts, plan_facts
from mixprec_build.text import human

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside its sources and what it builds, ``out``: not changed by these tests."""
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    recipe = write_recipe(folder / "mix.yaml")
    run_plan(plan_recipe(recipe), folder / "out")
    return recipe


@pytest.fixture
def out(mix: Path, tmp_path: Path) -> Path:
    """A copy of what was built."""
    return Path(shutil.copytree(mix.parent / "out", tmp_path / "out"))


def loads(text: str) -> Any:
    """JSON and nothing else."""
    assert text.endswith("}\n")
    return json.loads(text)


# What succeeds


def test_version(mixprec: Run) -> None:
    assert mixprec("--version") == (0, f"mixprec {__version__}\n", "")


def test_alone_it_explains_itself(mixprec: Run) -> None:
    ended = mixprec()
    text = ended.out + ended.err
    assert "Usage: mixprec" in text
    assert all(command in text for command in ("build", "plan", "inspect", "verify"))
    assert mixprec("--help").code == 0


@pytest.mark.parametrize("command", ["build", "plan", "inspect", "verify"])
def test_each_command_explains_itself(mixprec: Run, command: str) -> None:
    ended = mixprec(command, "--help")
    assert (ended.code, ended.err) == (0, "") and f"Usage: mixprec {command}" in ended.out


def test_build_and_what_it_says(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    ended = mixprec("build", mix, "-o", out)
    assert ended.code == 0
    assert ended.out == f"{out}: 21 modules, 221.2 kB in 1 file\nnext: mixprec verify {out}\n"
    assert tree(out) == tree(mix.parent / "out")


def test_build_with_every_option(mixprec: Run, mix: Path, out: Path) -> None:
    ended = mixprec("build", mix, "--output", out, "--force", "--link", "--allow", "unservable", "--jobs", 3, "--quiet")
    assert ended == (0, "", "")
    assert tree(out) == tree(mix.parent / "out")


def test_build_as_json(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    ended = mixprec("build", mix, "-o", out, "--json")
    assert (ended.code, ended.err) == (0, "")
    facts = loads(ended.out)
    assert facts.pop("output") == str(out) and facts.pop("manifest") == str(out / "mixprec_manifest.json")
    assert facts == json.loads(json.dumps(plan_facts(plan_recipe(mix))))


def test_plan_as_text_and_as_json(mixprec: Run, mix: Path) -> None:
    ended = mixprec("plan", mix, "--json")
    assert (ended.code, ended.err) == (0, "")
    facts = loads(ended.out)
    assert facts == json.loads(json.dumps(plan_facts(plan_recipe(mix))))
    text = mixprec("plan", mix).out
    for rule in facts["rules"]:
        cells = [str(rule[key]) for key in ("line", "pattern", "source", "matched", "won")]
        assert any([cell.strip() for cell in line.strip("│").split("│")] == cells for line in text.splitlines())
    for source in facts["sources"]:
        row = [source["name"], *source["holds"], str(source["modules"]), human(source["bytes"]), source["location"]]
        assert any([cell.strip() for cell in line.strip("│").split("│")] == row for line in text.splitlines())
    for entry in facts["formats"]:
        assert f"│ {entry['name']} " in text and human(entry["bytes"]) in text
    assert facts["shards"] == 1 and f"1 file of {facts['file_bytes']:,} bytes" in text
    for left_out in facts["left_out"]:
        assert f"left out of `{left_out['source']}`: {left_out['tensors']:,} tensors" in text
    assert facts["file_bytes"] == sum(p.stat().st_size for p in (mix.parent / "out").glob("*.safetensors"))


def test_plan_writes_nothing(mixprec: Run, mix: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mix.parent.rglob("*")}
    assert mixprec("plan", mix).code == 0
    assert {path: path.stat().st_mtime_ns for path in mix.parent.rglob("*")} == before


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4", "out"])
def test_inspect_as_text_and_as_json(mixprec: Run, mix: Path, name: str) -> None:
    folder = mix.parent / name
    ended = mixprec("inspect", folder, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert loads(ended.out) == inspect_facts(open_source(str(folder)), folder)
    ended = mixprec("inspect", folder)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{folder} (llama)\n") and "Layer map" in ended.out


def test_verify_and_what_it_says(mixprec: Run, mix: Path) -> None:
    ended = mixprec("verify", mix.parent / "out")
    assert ended.code == 0
    assert ended.out == "compared 47 tensors bit for bit with their sources, 0 by checksum\nno difference\n"
    assert mixprec("verify", mix.parent / "out", "--quiet") == (0, "", "")


def test_verify_as_json(mixprec: Run, mix: Path) -> None:
    ended = mixprec("verify", mix.parent / "out", "--against", "bf16", "--json")
    assert (ended.code, ended.err) == (0, "")
    facts = loads(ended.out)
    errors = facts.pop("errors")
    assert facts == {
        "bit_for_bit": 47,
        "by_checksum": 0,
        "gone": [],
        "differences": [],
        "leftovers": [],
        "beside": [],
        "drop_mtp": False,
        "card": None,
    }
    assert len(errors) == 14 and errors[0].keys() == {"module", "format", "relative"}
    assert {error["format"] for error in errors} == {"fp8_block", "gptq_int4"}


@pytest.mark.parametrize("against", ["bf16", "./bf16"])
def test_verify_against_a_source_or_a_folder(mixprec: Run, mix: Path, monkeypatch: Patch, against: str) -> None:
    monkeypatch.chdir(mix.parent)
    ended = mixprec("verify", "out", "--against", against)
    assert ended.code == 0 and f"against {against}, worst first" in ended.out
    means = [line for line in ended.out.splitlines() if ": mean " in line]
    assert [line.partition(":")[0] for line in means] == ["gptq_int4", "fp8_block"], "worst first"
    assert ended.out.endswith("no difference\n")


def test_verify_with_sources_gone_and_moved(mixprec: Run, tmp_path: Path) -> None:
    write_sources(tmp_path)
    run_plan(plan_recipe(write_recipe(tmp_path / "mix.yaml")), tmp_path / "out")
    (tmp_path / "bf16").rename(tmp_path / "elsewhere")
    ended = mixprec("verify", tmp_path / "out")
    assert ended.code == 0
    assert ended.out.startswith(f"compared by checksum only, source `bf16`: {tmp_path / 'bf16'}: no such folder")
    assert "compared 40 tensors bit for bit with their sources, 7 by checksum\n" in ended.out
    moved = ("--source", f"bf16={tmp_path / 'elsewhere'}")
    ended = mixprec("verify", tmp_path / "out", *moved, "--against", "bf16")
    assert ended.code == 0 and "compared 47 tensors bit for bit with their sources, 0 by checksum" in ended.out
    assert mixprec("verify", tmp_path / "out", "--against", "bf16").code == 1


def test_notes_are_for_people(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    recipe = mix.with_name("notes.yaml")
    write_recipe(recipe, {"model.layers.7.*": "fp8"})
    ended = mixprec("build", recipe, "-o", tmp_path / "a")
    assert ended.code == 0 and "note: line 8 `model.layers.7.*: fp8` matches nothing" in ended.err
    silent = mixprec("build", recipe, "-o", tmp_path / "b", "-q")
    assert silent == (0, "", "note: line 8 `model.layers.7.*: fp8` matches nothing\n"), "it may be a misspelt one"
    assert loads(mixprec("build", recipe, "-o", tmp_path / "c", "--json").out)["notes"]


def test_what_sglang_cannot_serve_is_built_on_request(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    recipe = mix.with_name("unservable.yaml")
    write_recipe(recipe, {"model.layers.0.self_attn.q_proj": "fp8"})
    ended = mixprec("build", recipe, "-o", tmp_path / "out")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("mixprec: refused, 1 problem:\n  - model.layers.0.self_attn.{")
    assert list(tmp_path.iterdir()) == []
    ended = mixprec("build", recipe, "-o", tmp_path / "out", "--allow", "unservable")
    assert ended.code == 0 and "SGLang cannot serve this: model.layers.0.self_attn.{" in ended.err
    assert "SGLang cannot serve this: " in mixprec("inspect", tmp_path / "out").out


# What fails


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["build"],
        ["build", "mix.yaml"],
        ["build", "mix.yaml", "-o", "x", "--jobs", "0"],
        ["build", "mix.yaml", "-o", "x", "--jobs", "many"],
        ["build", "mix.yaml", "-o", "x", "--allow", "anything"],
        ["plan", "mix.yaml", "extra"],
        ["inspect", "--no-such-option", "x"],
        ["verify", "x", "--source", "fp8"],
        ["verify", "x", "--source", "=x"],
        ["verify", "x", "--source", "fp8="],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(mixprec: Run, arguments: list[str]) -> None:
    ended = mixprec(*arguments)
    assert (ended.code, ended.out) == (2, "") and "Usage: mixprec" in ended.err


RECIPES = {
    "missing": (None, "{recipe}: ", "No such file or directory"),
    "empty": ("", "{recipe}: ", "empty"),
    "no YAML": ("model: [a\n", "{recipe}:2: ", "not valid YAML"),
    "unknown key": ("model: ./bf16\nwheights: {}\n", "{recipe}:2: ", "`wheights`; did you mean `weights`?"),
    "no such source": ("model: ./nowhere\n", "./nowhere: ", "no such folder ("),
    "wrong claim": ("model: ./bf16\nsources: {int4: ./fp8}\n", "{recipe}:2: ", "`int4` (./fp8) holds fp8_block"),
    "no such module": ("model: ./bf16\nweights: {model.nrom: model}\n", "{recipe}:2: ", "did you mean model.norm?"),
}


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe(mixprec: Run, mix: Path, tmp_path: Path, name: str, command: str) -> None:
    text, where, what = RECIPES[name]
    recipe = mix.with_name("wrong.yaml")
    recipe.unlink(missing_ok=True)
    if text is not None:
        recipe.write_text(text)
    ended = mixprec(command, recipe, *(["-o", tmp_path / "out"] if command == "build" else []))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("mixprec: " + where.format(recipe=recipe)) and what in ended.err
    assert list(tmp_path.iterdir()) == []


def test_commands_that_are_printed_run_as_printed(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    """In a folder whose name a shell would take apart."""
    folder = tmp_path / "it's $HOME & co"
    folder.mkdir()

    def commands(text: str) -> list[list[str]]:
        """Those after `serve: `, `next: `, `--finish: ` and so on, and in backquotes."""
        found = re.findall(r"`(mixprec [^`]+)`|: ((?:mixprec|python -m sglang.launch_server) .+)", text)
        return [[word for word in shlex.split(one or other) if word != "mixprec"] for one, other in found]

    out = folder / "out"
    ended = mixprec("build", mix, "-o", out, "--part", "1/1")
    assert commands(ended.out) == [["build", str(mix), "-o", str(out), "--finish"]]
    ended = mixprec("build", mix, "-o", folder / "other", "--finish")
    ((*begin, part),) = commands(ended.err)[:1]
    assert begin == ["build", str(mix), "-o", str(folder / "other"), "--part"] and part == "1/N"
    ended = mixprec(*commands(mixprec("build", mix, "-o", out, "--part", "1/1").out)[0])
    assert ended.code == 0 and commands(ended.out) == [["verify", str(out)]]
    assert mixprec(*commands(ended.out)[0]).code == 0
    (cut,) = commands(mixprec("split", out, "--tp", 1, "--finish").err)
    assert cut == ["split", str(out), "--tp", "1", "--ranks", "0"]
    finish, serve = commands(mixprec(*cut).out)
    assert finish == ["split", str(out), "--tp", "1", "--finish"] and serve[-3:] == [str(out), "--tp", "1"]
    assert mixprec(*finish).code == 0
    assert mixprec("split", out, "--layout", "presplit").code == 0
    restore, serve = commands(mixprec("inspect", out).out)
    assert restore == ["split", str(out), "--layout", "both"] and str(out) in serve
    assert mixprec(*restore).code == 0 and mixprec("verify", out).code == 0


def test_nothing_else_is_written_into_a_checkpoint(mixprec: Run, mix: Path) -> None:
    """Of which `verify` would say that it differs."""
    out = mix.parent / "out"
    within = f"lies in {out}, a checkpoint that mixprec built"
    for command in (
        ("build", mix, "-o", out / "more"),
        ("build", mix, "-o", out / "more", "--part", "1/2"),
        ("inspect", out, "--html", out / "map.html"),
        ("suggest", mix, "--budget", "1GB", "-o", out / "mix.yaml"),
    ):
        ended = mixprec(*command)
        assert ended.code == 2 and within in ended.err
    assert mixprec("verify", out).code == 0


def test_a_recipe_that_is_a_folder(mixprec: Run, tmp_path: Path) -> None:
    assert mixprec("plan", tmp_path) == (1, "", f"mixprec: {tmp_path}: cannot read the recipe: Is a directory\n")


def test_a_wrong_folder(mixprec: Run, mix: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    ended = mixprec("inspect", tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"mixprec: {tmp_path}/config.json: not valid JSON: ")
    ended = mixprec("inspect", tmp_path / "nothing", "--json")
    assert ended.code == 1 and "no such folder" in ended.err
    assert ended.err == f"mixprec: {json.loads(ended.out)['error']}\n"
    for folder in (tmp_path, mix.parent / "bf16", tmp_path / "nothing"):
        ended = mixprec("verify", folder)
        assert (ended.code, ended.out) == (1, "")
        assert "mixprec_manifest.json: not there; this is for what `mixprec build` wrote" in ended.err


def test_a_folder_that_is_no_text(mixprec: Run, tmp_path: Path) -> None:
    folder = write_tiny(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    ended = mixprec("inspect", folder)
    assert ended.code == 0 and "caf\\udce9 (llama)" in ended.out
    assert loads(mixprec("inspect", folder, "--json").out)["location"] == str(folder)
    ended = mixprec("verify", folder)
    assert ended.code == 1 and "caf\\udce9/mixprec_manifest.json: not there" in ended.err


def test_names_in_messages_do_not_command_the_terminal(mixprec: Run, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "\\u001b[2J\\u009b.safetensors"}}')
    ended = mixprec("inspect", folder)
    assert ended.code == 1 and "the shard \\x1b[2J\\x9b.safetensors is missing" in ended.err


def test_an_output_that_is_there(mixprec: Run, mix: Path, out: Path) -> None:
    before = tree(out)
    for wanted in (out, mix.parent / "fp8", mix):
        ended = mixprec("build", mix, "-o", wanted)
        assert (ended.code, ended.out) == (2, "") and ended.err.startswith(f"mixprec: {wanted}: ")
    (out / "thesis.tex").write_text("...")
    ended = mixprec("build", mix, "-o", out, "--force")
    assert ended.code == 2 and "holds files that mixprec did not write (thesis.tex)" in ended.err
    assert tree(out) == {**before, "thesis.tex": b"..."}


def test_a_full_disk(mixprec: Run, mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    def full(fd: int, data: object, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    ended = mixprec("build", mix, "-o", tmp_path / "out", "--quiet")
    assert (ended.code, ended.out) == (3, "") and ended.err.startswith(f"mixprec: {tmp_path}/")
    assert ": No space left on device; free some space" in ended.err and ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--quiet"], ["--json"]])
def test_differences(mixprec: Run, out: Path, options: list[str]) -> None:
    (out / "LICENSE").write_text("as I like\n")
    ended = mixprec("verify", out, *options)
    assert ended.code == 1
    assert ended.err.endswith("differs: LICENSE: 10 bytes, 12 were written\n")
    if options == ["--json"]:
        assert loads(ended.out)["differences"] == ["LICENSE: 10 bytes, 12 were written"]
    else:
        assert "no difference" not in ended.out and ended.out.endswith("differences: 1\n" if not options else "")
        assert bool(ended.out) == (not options)


def test_a_damaged_output(mixprec: Run, out: Path) -> None:
    (path,) = out.glob("*.safetensors")
    os.truncate(path, 5000)
    for command in ("inspect", "verify"):
        ended = mixprec(command, out)
        assert ended.code == 1 and f"{path}: damaged safetensors file: " in ended.err
        assert ("compared 0 tensors" in ended.out) == (command == "verify")  # which goes on with other files
    (out / "mixprec_manifest.json").write_text("{")
    assert mixprec("verify", out).err.startswith(f"mixprec: {out}/mixprec_manifest.json: damaged: ")


def test_verify_against_nothing(mixprec: Run, mix: Path) -> None:
    out = mix.parent / "out"
    for against, message in (("nowhere", "nowhere: no such folder"), ("fp8", "holds no unquantized")):
        ended = mixprec("verify", out, "--against", against)
        assert ended.code == 1 and message in ended.err
    ended = mixprec("verify", out, "--source", "fp4=x")
    assert ended.code == 1 and "the checkpoint has no source `fp4`; its sources are bf16, fp8, int4" in ended.err


# As another process sees it

START = (
    "import os, signal, sys; from mixprec_build.cli import app as cli; from mixprec_build.output import copier\n"
    "sys.argv[0] = 'mixprec'\n"
)


def test_module_and_console_script_are_one(mix: Path) -> None:
    ended = run_python("-m", "mixprec_build", "verify", str(mix.parent / "out"), "-q")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    ended = run_python("-m", "mixprec_build", "verify", str(mix.parent))
    assert ended.returncode == 1 and ended.stderr.startswith("mixprec: ")


def test_ctrl_c_while_modules_are_imported() -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from mixprec_build.__main__ import main\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# Where a command is when the signal comes, and what it then says.
ON = "the same command goes on from there\n"
KEPT = "mixprec: {out}: interrupted; its one file is finished and kept in {stage}: " + ON
RANKS_KEPT = "mixprec: {out}: interrupted; what is finished is kept: " + ON
MOMENTS = {
    "planning": ("mixprec_build.planning.planner", "lay_out", "build", "mixprec: interrupted\n"),
    "copying": ("mixprec_build.output.copier", "pwrite_all", "build", KEPT),  # one batch of tensors is all there is
    "ending": ("mixprec_build.output.publish", "write_companions", "build", KEPT),
    "verifying": ("mixprec_build.output.verify", "_structure_differences", "verify", "mixprec: interrupted\n"),
    "cutting": ("mixprec_build.ranks.assemble", "pwrite_all", "split", RANKS_KEPT),
}


def command_on(out: Path, command: str, mix: Path) -> list[str]:
    if command == "build":
        return ["build", str(mix), "-o", str(out), "--jobs", "1"]
    shutil.copytree(mix.parent / "out", out)
    return ["split", str(out), "--tp", "1"] if command == "split" else ["verify", str(out)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal(mix: Path, tmp_path: Path, moment: str, number: signal.Signals) -> None:
    """Its message says how to go on; threads that write to open files are waited for; the same command goes on."""
    module, function, command, message = MOMENTS[moment]
    script = START + (
        f"import {module} as module, time; real, signals = module.{function}, [{number:d}]\n"
        "def signalled(*arguments, **options):\n"
        "    if signals:\n"
        "        os.kill(os.getpid(), signals.pop())\n"
        "        time.sleep(0.2)\n"
        "    try: return real(*arguments, **options)\n"
        "    except OSError as error: print('too late:', error)\n"
        f"module.{function} = signalled\n"
        "cli.main()\n"
    )
    out = tmp_path / "out"
    arguments = command_on(out, command, mix)
    ended = run_python("-c", script, *arguments, "-q")
    assert (ended.returncode, ended.stdout) == (SIGNALS[number], "")
    assert ended.stderr == message.format(out=out, stage=tmp_path / ".out.mixprec")
    if command == "build":
        assert not out.exists()
    elif command == "split":
        assert tree(out) == tree(mix.parent / "out")
    ended = run_python("-m", "mixprec_build", *arguments, "-q")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not verify(out).differences


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["copying", "cutting"])
def test_a_second_signal(mix: Path, tmp_path: Path, moment: str, number: signal.Signals) -> None:
    """Ends at once and without a word, whatever a thread waits for."""
    module, function, command, _ = MOMENTS[moment]
    script = START + (
        f"import {module} as module, time\n"
        "def stuck(*_):\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    time.sleep(0.2)\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    time.sleep(600)\n"
        f"module.{function} = stuck\n"
        "cli.main()\n"
    )
    out = tmp_path / "out"
    arguments = command_on(out, command, mix)
    ended = run_python("-c", script, *arguments, "-q")
    assert (ended.returncode, ended.stdout, ended.stderr) == (SIGNALS[number], "", "")
    assert run_python("-m", "mixprec_build", *arguments, "-q").returncode == 0
    assert not verify(out).differences


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_few_letters(mix: Path, monkeypatch: Patch, encoding: str) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    ended = run_python("-m", "mixprec_build", "verify", str(mix.parent / "out"), "--against", "bf16")
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "no difference" in ended.stdout


def test_a_reader_that_goes_away(mix: Path) -> None:
    """As in ``mixprec inspect out | head -1``."""
    command = [sys.executable, "-m", "mixprec_build", "inspect", str(mix.parent / "out"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output(mix: Path) -> None:
    command = [sys.executable, "-m", "mixprec_build", "inspect", str(mix.parent / "out")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert "No space left on device" in ended.stderr
