"""Every mix that is refused: what the message says, that its fix works, and that nothing is left on disk.

One case a refusal, in the tables beside this file. Each runs through the command line, `plan` and `build`. Where
`plan --json` proposes a fix, it is applied to the recipe, and `plan` must then pass.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Protocol

import pytest
from support.run import Run
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, write_tiny

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.recipe.fix import RecipeFix

from .case import Case, Spec, drop, sized
from .folded import FOLDED
from .fused import FUSED
from .incomplete import MISSING, OTHER_MODELS
from .kernels import ASYMMETRIC, KERNELS, SHAPES
from .names import NAMES, NEVER_QUANTIZED

SEEDS = 50

CASES = {
    f"{title}: {name}": case
    for title, cases in {
        "fused": FUSED,
        "missing": MISSING,
        "other models": OTHER_MODELS,
        "folded": FOLDED,
        "shapes": SHAPES,
        "kernels": KERNELS,
        "never quantized": NEVER_QUANTIZED,
        "names": NAMES,
    }.items()
    for name, case in cases.items()
}


# Running them


class Shelf(Protocol):
    def __call__(self, case: Case) -> dict[str, Path]: ...


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Writes the sources of a case, each once for all cases."""
    root = tmp_path_factory.mktemp("sources")
    written: dict[Spec, Path] = {}

    def folders(case: Case) -> dict[str, Path]:
        for source in case.sources.values():
            if source not in written:
                written[source] = root / str(len(written))
                write_tiny(written[source], source.model, source.variant, edit=source.edit, **dict(source.options))
        return {name: written[source] for name, source in case.sources.items()}

    return folders


@pytest.fixture
def run(mixprec: Run) -> Run:
    """The command line."""
    return mixprec


def tree(*folders: Path) -> dict[Path, int]:
    """Every file and folder and when it was changed."""
    return {path: path.lstat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}


def apply_fixes(recipe: Path, run: Run) -> str:
    """The recipe's text after the fixes that ``plan --json`` proposes, as a program applies them."""
    refused = json.loads(run("plan", recipe, "--json").out)
    fixes = [problem["fix"] for problem in refused.get("refused", [refused])]
    found = RecipeFix.merged(RecipeFix.from_json(fix) for fix in fixes if fix is not None)
    return found.apply(recipe.read_text())


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    folders = shelf(case)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(folders))
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path, *folders.values())

    planned = run("plan", recipe)
    assert planned.code == 1 and planned.out == ""
    for part in case.says:
        assert part in planned.err
    for weight in case.clash:
        line = case.weights[weight].replace(".weight:", ":")
        assert f"line {case.line_of(weight)} `{line}`" in planned.err
    for source in case.about:
        assert f"(line {list(case.sources).index(source) + 3})" in planned.err
    if name.startswith("names"):
        assert planned.err.startswith(f"mixprec: {recipe}:{case.line_of(0)}: ")
    else:
        problems = planned.err.count("\n  - ")
        assert planned.err.startswith(f"mixprec: refused, {problems} problem{'s' if problems > 1 else ''}:\n")

    for out in (tmp_path / "not" / "yet" / "there", tmp_path / "empty"):
        built = run("build", recipe, "-o", out, *(("--allow", "unservable") if case.hard else ()))
        assert (built.code, built.out, built.err) == (1, "", planned.err)
    assert tree(tmp_path, *folders.values()) == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fixes])
def test_its_fix_works(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(shelf(case)))
    for _ in range(case.fixes):
        assert run("plan", recipe).code == 1
        edited = apply_fixes(recipe, run)
        assert edited != recipe.read_text()
        recipe.write_text(edited)
    passed = run("plan", recipe)
    assert passed.err == "" and passed.code == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fixes])
def test_without_a_fix_nothing_is_edited(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    """So that a case is not marked so by mistake."""
    case = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(shelf(case)))
    assert apply_fixes(recipe, run) == recipe.read_text()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.hard])
def test_what_is_allowed_is_built_and_recorded(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(case.recipe(shelf(case)))
    refused = run("plan", recipe).err
    problems = [line.removeprefix("  - ") for line in refused.splitlines()[1:]]

    planned = run("plan", "--allow", "unservable", "--json", recipe)
    assert planned.code == 0
    assert json.loads(planned.out)["unservable"] == problems

    built = run("build", "--allow", "unservable", recipe, "-o", out)
    assert built.code == 0
    for problem in problems:
        assert f"SGLang cannot serve this: {problem}\n" in built.err
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["unservable"] == problems
    # It is whole: what serves it may be another engine, which reads the declaration.
    declaration = Declaration.from_json(json.loads((out / "config.json").read_text())["quantization_config"])
    formats = {module: manifest["formats"][entry["format"]] for module, entry in manifest["modules"].items()}
    assert {module: declaration.format_of(module).to_json() for module in formats} == formats


@pytest.mark.parametrize("hard_too", [False, True])
def test_hard_problems_come_alone(tmp_path: Path, run: Run, hard_too: bool) -> None:
    """A missing module says nothing yet of what SGLang thinks of the rest, and --allow does not hide it."""
    edit = drop(".1.mlp.down_proj.") if hard_too else None
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", edit=edit, sym=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, int4: int4}\nweights:\n  model.layers.*.mlp.*: int4\n")
    refused = run("plan", recipe)
    assert (ASYMMETRIC in refused.err) is not hard_too
    assert ("has no model.layers.1.mlp.down_proj" in refused.err) is hard_too
    assert run("plan", "--allow", "unservable", recipe).code == int(hard_too)


def test_all_problems_are_told_at_once(tmp_path: Path, run: Run) -> None:
    write_tiny(tmp_path / "bf16", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "int4", QWEN3_MOE, "gptq_int4", also=["model.embed_tokens"], group_size=16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: bf16\nsources: {bf16: bf16, int4: int4}\nweights:\n"
        "  model.layers.*.self_attn.k_proj: int4\n  model.layers.*.mlp.experts.*: int4\n  model.embed_tokens: int4\n"
    )
    refused = run("plan", recipe).err
    assert refused.startswith("mixprec: refused, 4 problems:\n")
    for part in ("parts of qkv_proj", "group size 16", "no quantized embedding"):
        assert part in refused
    recipe.write_text(apply_fixes(recipe, run))
    assert run("plan", recipe).code == 0


def test_a_problem_of_every_layer_is_told_once(tmp_path: Path, run: Run) -> None:
    write_tiny(tmp_path / "bf16", sized(QWEN3_MOE, layers=12, experts=8), "bf16")
    write_tiny(tmp_path / "int4", sized(QWEN3_MOE, layers=12, experts=8), "gptq_int4", sym=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: bf16\nsources: {bf16: bf16, int4: int4}\nweights: {"*.experts.*": int4}\n')
    refused = run("plan", recipe).err
    assert refused.startswith("mixprec: refused, 1 problem:\n")
    assert "model.layers.{0..11}.mlp.experts.{0..7}.{down_proj,gate_proj,up_proj}: gptq_int4" in refused
    assert len(refused) < 700


@pytest.mark.parametrize("model", ["llama", "deepseek"])
def test_advice_leads_to_a_recipe_that_passes(tmp_path: Path, run: Run, model: str) -> None:
    """Whatever lines there are, one after the other or all at once, and never round in circles."""
    shape = {"llama": LLAMA, "deepseek": DEEPSEEK}[model]
    variants = {"base": ("bf16", {}), "fp8": ("fp8_block", {}), "packed": ("gptq_int4", {})}
    variants["awq"] = ("awq_int4", {"fold": 0.7}) if model == "llama" else ("fp8_channel", {})
    for name, (variant, options) in variants.items():
        write_tiny(tmp_path / name, shape, variant, **options)
    attention = (
        ["q_proj", "{k,v}_proj", "o_proj"] if model == "llama" else ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"]
    )
    tails = ["*", "self_attn.*", "mlp.*", "mlp.down_proj", "mlp.{gate,up}_proj", "mlp.up_proj"]
    tails += [f"self_attn.{part}" for part in attention]
    heads = ["model.layers.*.", "model.layers.0.", "model.layers.{0..1}.", "*.1."]
    chance = random.Random(0)
    recipe, refusals = tmp_path / "recipe.yaml", 0
    for _ in range(SEEDS):
        lines = {chance.choice(heads) + chance.choice(tails): chance.choice([*variants]) for _ in range(4)}
        names = chance.sample([*variants], 3)
        text = [f"model: {tmp_path / 'base'}", "sources:", *(f"  {name}: {tmp_path / name}" for name in variants)]
        text += [f"default: {chance.choice(names)}", "weights:", *(f"  '{p}': {s}" for p, s in lines.items())]
        recipe.write_text("\n".join(text))
        seen = set()
        while (ran := run("plan", recipe)).code:
            assert "refused" in ran.err and recipe.read_text() not in seen, "\n".join([*text, *seen, ran.err])
            if "No source of this recipe" in ran.err:
                break
            refusals += 1
            seen.add(recipe.read_text())
            recipe.write_text(apply_fixes(recipe, run))
    assert refusals > SEEDS / 4
