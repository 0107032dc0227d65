"""A build on many machines: parts and their finish make what a plain build makes, or are refused by name."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources
from support.plans import planned
from support.run import Run

import mixprec_build as mp
from mixprec_build.errors import InterruptedBuildError, MissingPartsError, OutputError, SourceError
from mixprec_build.output import parts as parts_module
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.parts import Part, shards_of
from mixprec_build.output.publish import write
from mixprec_build.planning.types import Plan
from mixprec_build.storage.folder import LocalFolder

MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.self_attn.*": "int4"}
"""Experts stay in BF16: files of more than one MiB, the least that a recipe may ask for."""


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder, experts=16)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def plan(mix: Path) -> Plan:
    return planned(mix)


@pytest.fixture(scope="module")
def due(plan: Plan, mix: Path) -> dict[str, bytes]:
    """Every file of a plain build, with those cut for two ranks."""
    write(plan, mix.parent / "due")
    return tree(mix.parent / "due")


def stage(out: Path, part: Part) -> Path:
    return out.with_name(part.stage(out))


@pytest.mark.parametrize("count", [1, 3, 60])
def test_parts_make_the_same_files_as_a_plain_build(
    plan: Plan, due: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    """All of its files, in any order of parts; more parts than files do no harm."""
    out = tmp_path / "there/out"
    numbers = random.Random(count).sample(range(1, count + 1), count)
    for number in numbers:
        folder = run_plan(plan, out, part=Part(number, count))
        assert folder.exists() is bool(shards_of(plan, Part(number, count))) and not out.exists()
    assert run_plan(plan, out, finish=True) == out / "mixprec_manifest.json"
    assert tree(out.parent) == {f"out/{name}": data for name, data in due.items()}


@pytest.mark.parametrize("count", range(1, 40))
def test_parts_are_ranges_of_about_as_many_bytes(plan: Plan, count: int) -> None:
    ranges = [shards_of(plan, Part(number, count)) for number in range(1, count + 1)]
    assert tuple(shard for shards in ranges for shard in shards) == plan.shards
    sizes = [shard.file_bytes(plan.sources) for shard in plan.shards]
    assert all(
        sum(shard.file_bytes(plan.sources) for shard in shards) <= sum(sizes) / count + max(sizes) for shards in ranges
    )


def test_a_part_that_was_stopped_continues_alone(plan: Plan, due: dict[str, bytes], tmp_path: Path) -> None:
    out, part = tmp_path / "out", Part(2, 2)
    run_plan(plan, out, part=Part(1, 2))
    payload = stage(out, part) / "out"

    def stop(_: int) -> None:
        if len([*payload.iterdir()]) > 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedBuildError, match=r"of \d+ files are finished and kept in .*part-2-of-2"):
        run_plan(plan, out, part=part, jobs=1, progress=stop)
    kept = {path.name: path.stat().st_ino for path in payload.iterdir()}
    with pytest.raises(MissingPartsError, match=r"1 of 2 parts is not complete: 2/2 lacks \d+ of \d+ files") as caught:
        run_plan(plan, out, finish=True)
    assert caught.value.parts == ("2/2",) and f"-o {out} --part 2/2`" in str(caught.value)
    run_plan(plan, out, part=part)
    assert kept.items() <= {path.name: path.stat().st_ino for path in payload.iterdir()}.items()
    run_plan(plan, out, finish=True)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in due.items()}


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
def test_parts_run_side_by_side_and_each_only_once(
    plan: Plan, due: dict[str, bytes], tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is written, another runs through, the same one is refused, and so is the finish; none harms it."""

    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
    out, refused = tmp_path / "out", []

    def meanwhile(_: int) -> None:
        if not refused:
            run_plan(plan, out, part=Part(2, 2))
            for again in ({"part": Part(1, 2)}, {"finish": True}):
                with pytest.raises(OutputError, match=r"out\.part-1-of-2: another mixprec build .*writing there") as e:
                    run_plan(plan, out, **again)
                refused.append(e)

    run_plan(plan, out, part=Part(1, 2), jobs=1, progress=meanwhile)
    assert len(refused) == 2
    run_plan(plan, out, finish=True)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in due.items()}


def test_parts_link_as_a_plain_build_does(mix: Path, tmp_path: Path) -> None:
    """The source's files are shared, and stay as they are."""
    copied = Path(shutil.copytree(mix.parent / "bf16", tmp_path / "bf16"))
    recipe, before = tmp_path / "copy.yaml", tree(copied)
    recipe.write_text("model: bf16\n")
    mp.build(recipe, tmp_path / "plain", link=True)
    for number in (1, 2):
        mp.build(recipe, tmp_path / "out", part=(number, 2), link=True)
    mp.build(recipe, tmp_path / "out", finish=True, link=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "plain") and tree(copied) == before
    linked = {path.stat().st_nlink for path in (tmp_path / "out").glob("*.safetensors")}
    assert linked == {path.stat().st_nlink for path in (tmp_path / "plain").glob("*.safetensors")}


# Plans that differ


@pytest.fixture
def own(mix: Path, tmp_path: Path) -> Path:
    """A recipe with sources that a test may change, of which part 1 of 2 is built."""
    shutil.copytree(mix.parent, tmp_path / "in", ignore=shutil.ignore_patterns("due"))
    mp.build(tmp_path / "in/mix.yaml", tmp_path / "out", part=(1, 2))
    return tmp_path / "in/mix.yaml"


def another_recipe(recipe: Path) -> None:
    write_recipe(recipe, {**MIX, "model.layers.0.mlp.*": "int4"})


def another_shard_size(recipe: Path) -> None:
    write_recipe(recipe, MIX, shard_size="1025KiB")


def a_source_that_was_written_again(recipe: Path) -> None:
    for path in (recipe.parent / "fp8").glob("*.safetensors"):
        path.write_bytes(path.read_bytes())


def degrees(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("output: {", "output: {tp: 2, "))


@pytest.mark.parametrize("finish", [False, True], ids=["part", "finish"])
@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (another_recipe, {}, "differs in what the recipe takes from its sources"),
        (another_shard_size, {}, r"differs in `shard_size` of the recipe \(1048576 there, 1049600 here\)"),
        (a_source_that_was_written_again, {}, r"differs in the source `fp8` \(files, sizes, headers and times"),
        (degrees, {}, r"differs in `tp` of the recipe \(\[\] there, \[2\] here\)"),
        (None, {"link": True}, r"differs in --link \(False there, True here\)"),
        (None, {"sglang": "0.5.16"}, r"differs in the release of SGLang .*there, 0\.5\.16 here"),
        (None, {"version": "9.9"}, r"differs in the version of mixprec .*9\.9 here"),
    ],
)
def test_another_plan_is_refused_by_name(
    own: Path, tmp_path: Path, change: object, options: dict[str, object], named: str, finish: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if callable(change):
        change(own)
    if "version" in options:
        monkeypatch.setattr(parts_module, "__version__", options["version"])
        options = {}
    out, before = tmp_path / "out", tree(tmp_path)
    which = {"finish": True} if finish else {"part": (2, 2)}
    with pytest.raises(
        OutputError, match=rf"out\.part-1-of-2\.mixprec: part 1/2 was built from another plan: .*{named}"
    ):
        mp.build(own, out, **options, **which)  # type: ignore[arg-type]
    after = tree(tmp_path)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {".out.part-1-of-2.mixprec/lock"}


def test_another_number_of_parts_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"parts of 2 and of 3 do not belong together \(.*part-1-of-2\.mixprec"):
        mp.build(own, tmp_path / "out", part=(3, 3))


def test_a_plan_that_mixprec_did_not_write_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.part-1-of-2.mixprec/plan").write_text("[")
    with pytest.raises(OutputError, match=r"part-1-of-2\.mixprec/plan: is no file that mixprec wrote; remove"):
        mp.build(own, tmp_path / "out", part=(2, 2))


def test_a_plain_build_does_not_leave_parts_behind(own: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"1 part of a build in parts wait.*--finish, or remove these folders"):
        mp.build(own, tmp_path / "out")


def test_sources_that_each_machine_would_download_are_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFolder, "cached", lambda *_: None)
    with pytest.raises(SourceError, match=r"must be downloaded before a build in parts; run `hf download .*HF_HOME"):
        run_plan(plan, tmp_path / "out", part=Part(1, 2))
    assert not [*tmp_path.iterdir()]


# Finishing


def test_a_half_written_file_of_a_plain_build_is_not_taken_for_a_shard(
    plan: Plan, due: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the shard's name and size, and the finish is killed before it has moved the shard there."""
    out = tmp_path / "out"
    (tmp_path / ".out.mixprec/out").mkdir(parents=True)
    shard = plan.shards[0]
    (tmp_path / ".out.mixprec/names").write_text(json.dumps([shard.file]))
    (tmp_path / ".out.mixprec/out" / shard.file).write_bytes(bytes(shard.file_bytes(plan.sources)))
    for number in (1, 2):
        run_plan(plan, out, part=Part(number, 2))

    def killed(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mixprec_build.storage.owned.OwnedFolder.rename", rename_until(killed, shard.file))
        with pytest.raises(mp.WriteError, match="out of memory"):
            run_plan(plan, out, finish=True, take_over=True)
    run_plan(plan, out, finish=True, take_over=True)
    assert tree(out) == due


def rename_until(killed: object, name: str) -> object:
    from mixprec_build.storage.owned import OwnedFolder

    real = OwnedFolder.rename

    def rename(self: OwnedFolder, old: str, new: str) -> None:
        if new.endswith(f"/out/{name}"):
            killed()  # type: ignore[operator]
        real(self, old, new)

    return rename


# The command


def test_the_command(mix: Path, tmp_path: Path, mixprec: Run) -> None:
    out, every = tmp_path / "out", len(plan_recipe(mix).shards)
    ended = mixprec("build", mix, "-o", out, "--finish", "--json")
    assert ended.code == 2 and json.loads(ended.out)["missing_parts"] == []
    assert "no part of it is there; build each part before --finish" in ended.err and not [*tmp_path.iterdir()]
    first = mixprec("build", mix, "-o", out, "--part", "1/2")
    assert first.code == 0 and f"mixprec build {mix} -o {out} --finish" in first.out
    ended = mixprec("build", mix, "-o", out, "--finish", "--json")
    assert ended.code == 2 and json.loads(ended.out)["missing_parts"] == ["2/2"]
    second = json.loads(mixprec("build", mix, "-o", out, "--part", "2/2", "--json").out)
    assert second["part"] == "2/2" and 0 < len(second["files"]) < every
    assert {path.name for path in (Path(second["folder"]) / "out").iterdir()} == {*second["files"]}
    assert mixprec("build", mix, "-o", out, "--finish").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and mixprec("verify", out).code == 0
    nothing = mixprec("build", mix, "-o", tmp_path / "other", "--part", f"1/{20 * every}")
    assert nothing.code == 0 and "nothing to do, there are more parts than files" in nothing.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "a/b", "1/2/3", "-1/2", "1/10000", "١/٢"])
def test_what_is_no_part(mix: Path, tmp_path: Path, mixprec: Run, text: str) -> None:
    ended = mixprec("build", mix, "-o", tmp_path / "out", f"--part={text}")
    assert ended.code == 2 and "--part" in ended.err and not [*tmp_path.iterdir()]


def test_a_part_is_no_finish(mix: Path, tmp_path: Path, mixprec: Run) -> None:
    assert mixprec("build", mix, "-o", tmp_path / "out", "--part", "1/2", "--finish").code == 2
    with pytest.raises(ValueError, match="not both"):
        mp.build(mix, tmp_path / "out", part=(1, 2), finish=True)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
