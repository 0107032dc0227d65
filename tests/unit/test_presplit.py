"""Per-rank files: whole again when put together, exact where zeros were added, and vouched for."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cut_models import LINES, MOE, SIZES, VARIANTS
from support.files import tree
from support.run import call
from support.serving import DEEPSEEK, LLAMA, QWEN3, QWEN3_MOE, Shape, write_sources

from mixprec_build.checkpoint.degree import Degree, parse_folder
from mixprec_build.checkpoint.manifest import checksum_of, read_manifest
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import OutputError, RecipeError, SourceError, SplitError, VerifyError
from mixprec_build.families.llama import LLAMA as LLAMA_RULES
from mixprec_build.output import locked as locked_module
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.locked import locked
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.ranks.files import open_rank, read_rank
from mixprec_build.ranks.merged import splitter_of
from mixprec_build.ranks.sample import one_layer_of_each
from mixprec_build.ranks.splitter import Splitter


def build(
    folder: Path,
    shape: Shape,
    lines: Mapping[str, str],
    *,
    output: str = "",
    name: str = "out",
    variants: Sequence[str] = VARIANTS,
) -> Path:
    sources = folder / "sources"
    if not sources.exists():
        write_sources(sources, shape, variants)
    text = [f"model: {sources / 'bf16'}", "sources:", *(f"  {v}: {sources / v}" for v in variants), "default: bf16"]
    text += ["weights:", *(f"  '{pattern}': {variant}" for pattern, variant in lines.items()), output]
    recipe = folder / f"{name}.yaml"
    recipe.write_text("\n".join(text))
    run_plan(plan_recipe(recipe), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("presplit"), MOE, LINES)


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_shares_of_a_block_are_filled_up_with_zeros(out: Path) -> None:
    splitter = splitter_of(open_source(str(out)), Degree(2))
    shares = {name: (share.native, share.columns) for name, share in splitter.padded.items()}
    # Int4 in groups of 128 and FP8 in blocks of 128; FP8 by channel is content with 192.
    assert shares == {"model.layers.0.mlp.experts": (192, 256), "model.layers.1.mlp.experts": (192, 256)}
    assert splitter.remarks()[0].startswith(
        "tp2-ep1: a rank's 192 columns of model.layers.{0..1}.mlp.experts are filled up to 256 with zeros (33% more"
    )


@pytest.mark.parametrize("tp", [2, 4])
def test_experts_in_shares_with_zeros_compute_what_they_did(out: Path, tp: int) -> None:
    """Every expert's output is the sum of the ranks': of their own dequantized weights, whatever their width."""
    source = open_source(str(out))
    folders = split(out, Degree(tp))
    ranks = [tensors(folder) for folder in folders]
    x = torch.randn(5, MOE.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer, groups in ((0, [(0, 1, 2), (3,), (4, 5, 6, 7)]), (1, [(0, 2, 3, 4, 5, 7), (1, 6)])):
        for number, members in enumerate(groups):
            for place, expert in enumerate(members):
                home = f"model.layers.{layer}.mlp.experts"
                name = f"{home}.{expert}."
                due = mlp(x, *(whole(source, name + part) for part in ("gate_proj", "up_proj", "down_proj")))
                fmt = source.format_of(f"{name}gate_proj")
                sum_of_ranks = torch.zeros_like(due)
                for rank in ranks:
                    held = {
                        weight: {
                            key.rpartition(f"{weight}_")[2]: raw(tensor[place])
                            for key, tensor in rank.items()
                            # An input's group has the number that it has in the whole, where kernels look at it.
                            if key.startswith(f"{home}.groups.{number}.{weight}_") and not key.endswith("g_idx")
                        }
                        for weight in ("w13", "w2")
                    }
                    w13, w2 = (torch.from_numpy(fmt.dequantize(held[weight])).double() for weight in ("w13", "w2"))
                    assert w2.shape[1] == 256 if tp == 2 else 128
                    sum_of_ranks += mlp(x, *w13.chunk(2), w2)
                assert torch.allclose(sum_of_ranks, due, rtol=1e-12, atol=1e-12), f"{name} rank sums"


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def whole(source: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(source.dequantize(name).copy()).double()


def raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    import ml_dtypes

    odd = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    if tensor.dtype in odd:
        return np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), odd[tensor.dtype]).reshape(
            tensor.shape
        )
    return tensor.numpy()


def test_dense_shares_put_together_are_the_tensors(tmp_path: Path) -> None:
    """gate and up by rows, down by columns: without the zeros, what was cut."""
    shape = LLAMA.of(**{**SIZES, "intermediate": 640}, layers=1, vocab=100)
    out = build(tmp_path, shape, {"model.layers.0.mlp.*": "fp8_block"})
    merged, ranks = tensors(out), [tensors(folder) for folder in split(out, Degree(2))]
    prefix = "model.layers.0.mlp."
    halves = [rank[f"{prefix}gate_up_proj.weight"].view(torch.uint8).chunk(2) for rank in ranks]
    for part, name in enumerate(("gate_proj", "up_proj")):
        together = torch.cat([half[part] for half in halves])
        assert len(together) == 768 and not together[640:].any()
        assert torch.equal(together[:640], merged[f"{prefix}{name}.weight"].view(torch.uint8))
    for leaf, unit in (("weight", 1), ("weight_scale_inv", 128)):
        together = torch.cat([raw_bytes(rank[f"{prefix}down_proj.{leaf}"]) for rank in ranks], 1)
        due = raw_bytes(merged[f"{prefix}down_proj.{leaf}"])
        assert torch.equal(together[:, : 640 // unit], due)
    # Rows of the vocabulary: 100 in 128.
    together = torch.cat([rank["model.embed_tokens.weight"] for rank in ranks])
    assert torch.equal(together[:100], merged["model.embed_tokens.weight"]) and not together[100:].any()


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


# The command


def test_a_node_cuts_its_own_ranks_only(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("split", out, "--tp", 4, "--ep", 2, "--ranks", "2-3") == 0
    captured = capsys.readouterr()
    assert f"next: python -m sglang.launch_server --model-path {out} --tp 4 --ep-size 2" in captured.out
    home = out / "presplit/tp4-ep2"
    assert sorted(path.name for path in home.iterdir()) == ["rank-2-of-4", "rank-3-of-4"]
    before = tree(home)
    assert call("split", out, "--tp", 4, "--ep", 2, "--quiet") == 0
    after = tree(home)
    assert {name: after[name] for name in before} == before and len(after) == 2 * len(before)
    assert call("inspect", out) == 0
    assert "cut for ranks, tp4-ep2: files of 4 ranks" in capsys.readouterr().out
    assert call("verify", out, "--quiet") == 0


def test_a_recipe_asks_for_degrees(built: Path, capsys: Any) -> None:
    recipe = built.parent / "tp.yaml"
    out = build(built.parent, MOE, LINES, output="output: {tp: [2, 4]}", name="tp")
    plan = plan_recipe(recipe)
    listed = read_manifest(out).ranks
    for degree in ("tp2-ep1", "tp4-ep1"):
        files = list(out.glob(f"presplit/{degree}/*/*.safetensors"))
        # Beside headers, what was planned.
        headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in files)
        assert sum(p.stat().st_size for p in files) - headers == plan.presplit[degree]
    assert list(listed) == [f"presplit/tp{tp}-ep1/rank-{r}-of-{tp}" for tp in (2, 4) for r in range(tp)]
    assert not verify(out).differences
    alone = tree(built)
    cut = Path(shutil.copytree(built, built.parent / "later"))
    for tp in (2, 4):
        split(cut, Degree(tp))
    assert tree(cut / "presplit") == tree(out / "presplit")
    assert tree(built) == alone
    assert call("plan", recipe) == 0
    assert "cut for ranks, tp2-ep1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {tp: [3]}", "tp.yaml:16: tp 3: lm_head: a vocabulary of 128 rows cannot be shared by 3 ranks"),
        ("output: {tp: many}", "tp.yaml:16: tp must be numbers of tensor-parallel ranks, as in `tp: [4, 8]`"),
        ("output: {tp: [2, 2]}", "tp.yaml:16: tp must be numbers"),
    ],
)
def test_degrees_that_cannot_be(built: Path, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "tp.yaml"
    recipe.write_text((built.parent / "out.yaml").read_text().rstrip() + f"\n{text}\n")
    with pytest.raises(RecipeError) as raised:
        plan_recipe(recipe)
    assert message in str(raised.value)


def test_what_cannot_be_cut_is_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="the ranks of tp2-ep1 are 0 to 1"):
        split(out, Degree(2), ranks=[2])
    with pytest.raises(SplitError, match="tp must be a multiple of ep"):
        Degree(4, 3)
    with pytest.raises(SplitError, match="tp must be a multiple of dp"):
        Degree(4, 1, 3)
    with pytest.raises(SplitError, match="4 heads cannot be shared by 8 ranks; tp 1, 2, 4 would do"):
        splitter_of(open_source(str(out)), Degree(8)).parameters(0)
    config = out / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"qwen3_moe"', '"gpt_neo"').replace("Qwen3MoeForCausalLM", "GPTNeoForCausalLM"))
    with pytest.raises(SplitError, match="model_type 'gpt_neo' cannot be cut"):
        splitter_of(open_source(str(out)), Degree(2))
    (tmp_path / "odd").mkdir()
    odd = build(tmp_path / "odd", QWEN3_MOE.of(**SIZES, experts=6), {})
    with pytest.raises(SplitError, match=r"experts: 6 experts cannot be shared by 4 expert-parallel ranks"):
        splitter_of(open_source(str(odd)), Degree(4, 4)).parameters(0)
    (tmp_path / "narrow").mkdir()
    narrow = build(
        tmp_path / "narrow", QWEN3.of(**{**SIZES, "head_dim": 64}), {"model.layers.0.self_attn.*": "fp8_block"}
    )
    with pytest.raises(SplitError, match=r"k_proj \(fp8_block\): a rank's heads have 64 of its 128 columns"):
        splitter_of(open_source(str(narrow)), Degree(2)).parameters(0)


def test_replicas_of_attention_have_all_its_heads_and_vocabulary(out: Path) -> None:
    """Ranks 0 and 1 are one replica, 2 and 3 the other; MLPs and experts are for all four."""
    ranks = [tensors(folder) for folder in split(out, Degree(4, 2, 2))]
    pairs, fours = ([tensors(folder) for folder in split(out, degree)] for degree in (Degree(2), Degree(4, 2)))
    for rank, held in enumerate(ranks):
        assert held.keys() == fours[rank].keys()
        for name, tensor in held.items():
            replica = ".self_attn." in name or "embed_tokens" in name
            due = (pairs[rank % 2] if replica else fours[rank])[name]
            assert tensor.dtype == due.dtype and torch.equal(tensor.view(torch.uint8), due.view(torch.uint8)), name


def test_models_whose_attention_sglang_does_not_replicate(tmp_path: Path) -> None:
    out = build(tmp_path, LLAMA.of(**SIZES, layers=1), {})
    with pytest.raises(SplitError, match=r"tp4-ep1-dp2: SGLang keeps no replicas of llama's attention"):
        splitter_of(open_source(str(out)), Degree(4, 1, 2))


@pytest.mark.parametrize("degree", [Degree(4), Degree(8, 4), Degree(8, 1, 2), Degree(8, 8, 8)])
def test_a_degree_is_read_as_it_is_written(degree: Degree) -> None:
    assert Degree.parse(str(degree)) == degree
    assert parse_folder(degree.folder(3)) == (degree, 3)


@pytest.mark.parametrize(
    "text",
    ["", "tp4", "tp4-ep3", "tp04-ep1", "tp4-ep1-dp1", "tp4-ep1-dp3", "tp0-ep1", "tp4-ep1 ", "tp4-ep1\n", "tp４-ep1",
     "tp-4-ep1", "tp4-ep1-dp2-dp2"],
)  # fmt: skip
def test_other_text_is_no_degree(text: str) -> None:
    with pytest.raises(ValueError):
        Degree.parse(text)
    assert parse_folder(f"presplit/{text}/rank-0-of-4") is None


def test_latent_attention_is_cut_by_heads(tmp_path: Path) -> None:
    out = build(tmp_path, DEEPSEEK.of(**SIZES, layers=1), {})
    merged, ranks = tensors(out), [tensors(folder) for folder in split(out, Degree(2))]
    prefix = "model.layers.0.self_attn."
    for name, dim in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
        parts = [rank[f"{prefix}{name}.weight"] for rank in ranks]
        assert torch.equal(torch.cat(parts, dim), merged[f"{prefix}{name}.weight"])
    joined = torch.cat([merged[f"{prefix}{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")])
    assert all(torch.equal(rank[f"{prefix}fused_qkv_a_proj_with_mqa.weight"], joined) for rank in ranks)


# Trust


def test_every_flipped_bit_is_found(out: Path) -> None:
    """Of tensors, of headers and their lengths, of indices: and the tensor or file is named."""
    split(out, Degree(2))
    draw = random.Random(0)
    for path in sorted(path for path in (out / "presplit").rglob("*") if path.is_file()):
        good = path.read_bytes()
        start = 8 + int.from_bytes(good[:8], "little") if path.suffix == ".safetensors" else len(good)
        regions = [(0, 8), (8, start), (start, len(good))]
        for first, last in regions if path.suffix == ".safetensors" else [(0, len(good))]:
            for at in (first, last - 1, *(draw.randrange(first, last) for _ in range(4))):
                data = bytearray(good)
                data[at] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
                (found,) = verify(out).differences
                name = owner(good, at - start) if at >= start else ""
                assert found.startswith(f"{name} in {path}: " if name else str(path)) or (
                    not name and str(path.parent) in found  # a header that is sound and tells of other tensors
                ), f"{path} byte {at}: {found}"
        path.write_bytes(good)
    assert not verify(out).differences


def owner(data: bytes, at: int) -> str:
    """The tensor with the byte ``at`` of a file's data."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    return next(name for name, entry in header.items() if entry["data_offsets"][0] <= at < entry["data_offsets"][1])


@pytest.mark.parametrize("place", ["x", "presplit/x", "presplit/tp2-ep1/x", "presplit/tp2-ep1/rank-0-of-2/x"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_does_not_belong_there_is_found(out: Path, place: str, kind: str) -> None:
    split(out, Degree(2))
    path = out / place
    if kind == "file":
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"")
    found = verify(out).differences[0]
    assert found.startswith((f"{place}: not in the manifest", f"{path}: not in the index"))


def test_a_changed_header_is_found(out: Path) -> None:
    """Also where it says the same of every tensor."""
    (one, _) = split(out, Degree(2))
    (path,) = one.glob("*.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"qt"', 1))
    assert verify(out).differences == (f"{path}: its header was changed",)


def test_missing_foreign_and_swapped_files_are_found(out: Path) -> None:
    one, two = split(out, Degree(2))
    (one / "more.safetensors").write_bytes(b"")
    assert any("more.safetensors: not in the manifest" in d for d in verify(out).differences)
    (one / "more.safetensors").unlink()
    one.rename(out / "aside")
    two.rename(one)
    (out / "aside").rename(two)
    assert any("was changed after it was written" in d for d in verify(out).differences)
    shutil.rmtree(one)
    assert any(f"{one}" in d for d in verify(out).differences)


def test_a_cut_of_other_weights_is_found(out: Path) -> None:
    """Files that are whole in themselves, and not of these merged tensors."""
    (one, _) = split(out, Degree(2))
    (path,) = out.glob("*.safetensors")
    held = load_file(path)
    held["model.norm.weight"] += 1
    save_file(held, path, metadata={"format": "pt"})
    found = verify(out).differences
    assert any("model.norm.weight" in d and "not what the merged tensors would be cut into" in d for d in found), found
    assert one.exists()


def test_a_split_that_stops_leaves_nothing_listed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_build.ranks import assemble as module

    before = (out / "mixprec_manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "pwrite_all", full)
    with pytest.raises(Exception, match="free some space"):
        split(out, Degree(2))
    assert (out / "mixprec_manifest.json").read_bytes() == before
    assert not list(out.glob("presplit/tp2-ep1/rank*"))
    monkeypatch.undo()
    split(out, Degree(2))
    assert not verify(out).differences


def test_a_split_does_not_wait_forever_for_a_locked_folder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked_module, "_PATIENCE", 0.2)
    with (
        locked(out),
        pytest.raises(OutputError, match="another `mixprec split` or build is writing there; wait for it"),
    ):
        split(out, Degree(2))


def test_an_index_of_another_kind_is_refused(out: Path) -> None:
    (one, _) = split(out, Degree(2))
    (one / "index.json").write_text(json.dumps({"parameters": []}))
    with pytest.raises(VerifyError, match=r"index\.json: was changed after it was written"):
        read_rank(out, read_manifest(out), Degree(2), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F3"), ("dtype", ["BF16"]), ("shape", "wide"), ("shape", [2, -1]), ("shape", [True]), ("file", 7),
        ("parameters", []), ("padded", {"a": [1]}), ("padded", {"a": [1, "x"]}), ("padded", 3), (None, None),
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused(out: Path, field: str | None, value: Any) -> None:
    """Even one that the manifest vouches for."""
    (one, _) = split(out, Degree(2))
    index = json.loads((one / "index.json").read_text())
    if field is None:
        index = [index]
    elif field in index:
        index[field] = value
    else:
        index["parameters"]["model.norm.weight"][field] = value
    data = json.dumps(index).encode()
    (one / "index.json").write_bytes(data)
    manifest = read_manifest(out)
    entry = manifest.ranks[Degree(2).folder(0)]
    manifest = manifest.listing({Degree(2).folder(0): entry._replace(checksum=checksum_of(data))}, None)
    with pytest.raises(VerifyError, match=r"index\.json: damaged"):
        read_rank(out, manifest, Degree(2), 0)


@pytest.mark.parametrize("file", ["../../../config.json", "/etc/passwd", "gone.safetensors"])
def test_files_outside_of_a_ranks_folder_are_not_opened(out: Path, file: str) -> None:
    (one, _) = split(out, Degree(2))
    index = read_rank(out, read_manifest(out), Degree(2), 0)
    assert index is not None
    entries = {name: {**entry, "file": file} for name, entry in index.parameters.items()}
    with pytest.raises(SourceError, match=str(one)):
        open_rank(replace(index, parameters=entries))


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A tensor of 600 MB, of which two ranks get the columns, and back: less than 200 MB beyond the interpreter."""
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {name: torch.zeros(15_000, 20_000, dtype=torch.bfloat16), "model.norm.weight": torch.ones(2)}
    save_file(tensors, source / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\n")
    run_plan(plan_recipe(recipe), tmp_path / "out", link=True)
    code = """
import sys
from pathlib import Path
from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.split import split
out = Path(sys.argv[1])
(before,) = (path.stat().st_size for path in out.glob("*.safetensors"))
split(out, Degree(2), layout="presplit")
assert not list(out.glob("*.safetensors"))
split(out, layout="merged")
assert [path.stat().st_size for path in out.glob("*.safetensors")] == [before]
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 260_000, f"{done.stdout.strip()} kB"


# What a cut asks for


def splitter(out: Path, degree: Degree, *, without: tuple[str, ...] = ()) -> Splitter:
    source = open_source(str(out))
    modules = {
        name: (source.format_of(name), module)
        for name, module in source.checkpoint.modules.items()
        if not any(part in name for part in without)
    }
    return Splitter(modules, source.facts, degree)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (("0.mlp.experts.3.up_proj",), "model.layers.0.mlp.experts.3: has no up_proj; take the whole expert from one"),
        (("0.mlp.experts.3.gate_proj", "0.mlp.experts.3.down_proj"), "experts.3: has no gate_proj and no down_proj"),
        (("1.mlp.experts.5.",), "model.layers.1.mlp.experts: expert 5 is missing, and there is an expert 7; take all"),
        (("1.mlp.experts.0.",), "model.layers.1.mlp.experts: expert 0 is missing"),
    ],
)
def test_experts_that_lack_something_are_named(built: Path, without: tuple[str, ...], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        splitter(built, Degree(2), without=without)
    assert len(splitter(built, Degree(2)).experts["model.layers.1.mlp.experts"]) == 8


@pytest.mark.parametrize("degree", [Degree(7), Degree(2), Degree(16)])
def test_the_degrees_that_would_do_are_those_of_the_whole_checkpoint(tmp_path: Path, degree: Degree) -> None:
    """As SmolLM2-135M: 1,536 columns can be shared by 2 ranks and by 4, its 9 heads cannot."""
    sizes = {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 576}
    out = build(tmp_path, LLAMA.of(**sizes, layers=1), {}, variants=["bf16"])
    with pytest.raises(SplitError, match=f"cannot be shared by {degree.tp} ranks; tp 1, 3 would do$"):
        splitter(out, degree).parameters(0)


def test_degrees_that_would_do_keep_the_others(built: Path) -> None:
    """2 key-value heads, of which 4 ranks may hold copies, and 4 others, for 8 experts."""
    with pytest.raises(SplitError, match=r"4 heads cannot be shared by 8 ranks; tp 2, 4 with ep 2 would do$"):
        splitter(built, Degree(8, 2)).parameters(0)
    with pytest.raises(SplitError, match=r"; tp 4, 8 with ep 4 and dp 2 would do$"):
        splitter(built, Degree(12, 4, 2)).parameters(0)
    with pytest.raises(SplitError, match=r"; no tp up to 16 with ep 3 would do$"):
        splitter(built, Degree(3, 3)).parameters(0)


def test_one_layer_of_each_is_tried(built: Path) -> None:
    source = open_source(str(built))
    modules = {name: (source.format_of(name), module) for name, module in source.checkpoint.modules.items()}
    assert one_layer_of_each(modules, LLAMA_RULES) == modules  # two layers of two kinds
    more = {name.replace("layers.1", f"layers.{n}"): held for n in range(1, 9) for name, held in modules.items()}
    assert one_layer_of_each(more, LLAMA_RULES) == modules


@pytest.mark.parametrize(
    ("shape", "lines", "tp", "message"),
    [
        (
            {},
            {"*.o_proj": "awq_int4_g64"},
            8,
            r"o_proj \(awq_int4\): a rank's heads have 64 of its 512 columns,",
        ),
        ({}, {"*.o_proj": "ct_int4_g32"}, 8, "SGLang's kernels take multiples of 128; heads cannot be filled up"),
        ({}, {"*.o_proj": "ct_int4_g32"}, 4, None),
        ({}, {"*.o_proj": "gptq_int4_g64"}, 8, None),  # SGLang's other kernel for GPTQ takes it
        ({}, {"*.o_proj": "fp8_channel"}, 8, None),
        ({}, {"*.{q,k,v}_proj": "ct_int4"}, 8, None),
        # 16 of each of three parts, which run as one.
        ({"head_dim": 16, "kv_heads": 8}, {"*.{q,k,v}_proj": "ct_int4"}, 8, r"qkv_proj \(ct_int4\): .* 48 of its 384"),
        ({"head_dim": 16, "kv_heads": 8}, {"*.{q,k,v}_proj": "ct_int4"}, 2, None),
        ({"head_dim": 16, "kv_heads": 8}, {"*.{q,k,v}_proj": "gptq_int4"}, 8, None),
        ({"head_dim": 16, "kv_heads": 8}, {"*.{q,k,v}_proj": "awq_int4"}, 8, "take multiples of 64"),
    ],
)
def test_attention_is_cut_as_kernels_take_it(
    tmp_path: Path, shape: dict[str, int], lines: dict[str, str], tp: int, message: str | None
) -> None:
    model = QWEN3.of(**{"heads": 8, "head_dim": 64, "layers": 1, **shape})
    out = build(tmp_path, model, lines, variants=["bf16", *lines.values()])
    if message is None:
        assert splitter(out, Degree(tp)).parameters(tp - 1)
    else:
        with pytest.raises(SplitError, match=message):
            splitter(out, Degree(tp)).parameters(tp - 1)


def test_what_a_split_is_asked_for(out: Path, tmp_path: Path, capsys: Any) -> None:
    before = tree(out)
    assert call("split", tmp_path / "nothere", "--tp", 2) == 1
    assert f"{tmp_path / 'nothere'}: no such folder; name one that `mixprec build` wrote" in capsys.readouterr().err
    assert call("split", out / "config.json", "--tp", 2) == 1
    assert call("split", tmp_path, "--tp", 2) == 1
    assert "mixprec_manifest.json: not there" in capsys.readouterr().err
    assert call("split", out, "--tp", 2, "--layout", "merged") == 2
    assert "no files are cut with --layout merged" in capsys.readouterr().err
    tracemalloc.start()
    assert call("split", out, "--tp", 2, "--ranks", "0-9999999") == 2
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert "of 2 ranks the last is 1" in capsys.readouterr().err
    assert tree(out) == before
    assert call("split", out, "--tp", 1) == 0
    assert "presplit/tp1-ep1: files of 1 rank, " in capsys.readouterr().out


def test_experts_of_a_model_without(tmp_path: Path) -> None:
    out = build(tmp_path, LLAMA.of(**SIZES, layers=1), {})
    with pytest.raises(SplitError, match=f"{out}: its model has no experts; leave out --ep"):
        split(out, Degree(3, 3))
