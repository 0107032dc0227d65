"""Parameters loaded from a rank's own files equal, bit for bit, those that SGLang loads from the merged files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from support.hub import HubServer
from support.serving import DEEPSEEK, QWEN3_MOE
from support.sglang.harness import (
    Changed,
    build,
    experts_at,
    last_json,
    load,
    make,
    rank_of,
    run_python,
    serve,
    server_args,
    sources,
    stage_of,
)
from support.sglang.mixes import EIGHT, FLOATS, MIXES, mix

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.output.split import split
from mixprec_build.ranks.assemble import contents
from mixprec_build.storage.header import TensorInfo
from mixprec_build.storage.reader import FileReader, TensorReader
from mixprec_runtime import launch
from mixprec_runtime.loading import loader
from mixprec_runtime.loading.ledger import DTYPES

pytestmark = pytest.mark.usefixtures("sglang")

DEGREES = [Degree(2), Degree(4), Degree(2, 2), Degree(4, 2)]


CASES = [(name, degree) for name in MIXES for degree in DEGREES if degree.ep == 1 or MIXES[name][0].experts]
CASES += [(name, Degree(tp)) for name in EIGHT for tp in (2, 8)] + [("qwen3_moe_8", Degree(8, ep)) for ep in (4, 8)]
CASES += [(name, degree) for name in FLOATS for degree in (Degree(4), Degree(4, 2))]
# Attention in replicas.
CASES += [("qwen3", Degree(4, 1, 2)), ("qwen3_moe", Degree(4, 2, 2)), ("deepseek", Degree(4, 4, 2))]
CASES += [("qwen3_moe", Degree(2, 1, 2)), ("deepseek", Degree(2, 2, 2)), ("qwen3_moe_8", Degree(8, 4, 2))]


@pytest.mark.parametrize(("name", "degree"), CASES, ids=[f"{name}-{degree}" for name, degree in CASES])
def test_a_ranks_files_hold_what_sglang_would_load(folder: Path, tmp_path: Path, name: str, degree: Degree) -> None:
    merged = mix(folder, name)
    out = shutil.copytree(merged, tmp_path / "out")
    for rank, files in enumerate(split(out, degree)):
        with rank_of(rank, degree.tp, degree.ep, degree.dp):
            due = parameters(serve(merged, load_format="safetensors", **options(degree)))
        held = tensors(files)
        assert held.keys() == due.keys()
        for parameter, tensor in due.items():
            assert held[parameter].shape == tensor.shape, parameter
            same = held[parameter].to(tensor.dtype)
            assert torch.equal(bits(same), bits(tensor)), f"rank {rank}: {parameter}"


SERVED = [
    ("qwen3_moe", Degree(4, 2)), ("qwen3_moe", Degree(4, 2, 2)), ("deepseek", Degree(2)), ("deepseek", Degree(4, 1, 2)),
    ("mixtral", Degree(2)), ("mxfp4", Degree(2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "degree"), SERVED, ids=[f"{name}-{degree}" for name, degree in SERVED])
def test_a_rank_serves_its_share_of_merged_files_and_its_own(
    folder: Path, tmp_path: Path, name: str, degree: Degree
) -> None:
    """The merged files are removed before it reads its own."""
    merged = mix(folder, name)
    out = shutil.copytree(merged, tmp_path / "out")
    split(out, degree, layout="presplit")
    for rank in range(degree.tp):
        with rank_of(rank, degree.tp, degree.ep, degree.dp):
            due = everything(serve(merged, load_format="safetensors", **options(degree)))
            for checkpoint in (merged, out):
                held = everything(read(checkpoint, **options(degree)))
                assert held.keys() == due.keys()
                assert [key for key in due if not torch.equal(bits(held[key]), bits(due[key]))] == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "deepseek"])
def test_a_pipeline_stage_reads_its_layers(folder: Path, tmp_path: Path, name: str) -> None:
    merged = mix(folder, name)
    out = shutil.copytree(merged, tmp_path / "out")
    split(out, Degree(2), layout="presplit")
    for stage in range(2):
        with rank_of(1, 2), stage_of(stage, 2):
            due = everything(serve(merged, load_format="safetensors"))
            for checkpoint in (merged, out):
                held = everything(read(checkpoint))
                assert held.keys() == due.keys()
                assert all(torch.equal(bits(held[name]), bits(due[name])) for name in due)
            assert ("model.embed_tokens.weight" in due) == (stage == 0)


def test_the_last_stage_has_the_tied_embedding(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    tensors = {}
    for path in out.glob("model-*.safetensors"):
        tensors |= load_file(path)
    config = out / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with stage_of(1, 2):
        held = parameters(read(out))
    assert torch.equal(held["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_replicas_that_have_all_of_lm_head(folder: Path) -> None:
    degree = Degree(4, 1, 2)
    for rank in range(4):
        with rank_of(rank, 4, 1, 2):
            due, held = (
                everything(serve_(mix(folder, "qwen3_moe"), enable_dp_lm_head=True, **options(degree), **how))
                for serve_, how in ((serve, {"load_format": "safetensors"}), (read, {}))
            )
        assert held.keys() == due.keys()
        assert all(torch.equal(bits(held[name]), bits(due[name])) for name in due)


FROM_HUB = """
import hashlib, json, sys
from unittest.mock import patch
import torch
from support.sglang import harness
from mixprec_runtime.loading import loader

harness.start()
with harness.rank_of(1, int(sys.argv[2])), patch.object(loader, "load", wraps=loader.load) as used:
    model = harness.serve(sys.argv[1])
bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
sums = {n: hashlib.sha256(bits(p.data)).hexdigest() for n, p in model.named_parameters() if p.numel()}
print(json.dumps([used.called, sums]))
"""


def test_a_rank_fetches_from_the_hub_what_it_reads(folder: Path, tmp_path: Path) -> None:
    """Fetches its own files if there are any, else all merged ones, and finds them in the cache without the hub."""
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    split(out, Degree(2))
    own = {f"{Degree(2).folder(1)}/{path.name}" for path in (out / Degree(2).folder(1)).glob("*.safetensors")}
    merged = {path.name for path in out.glob("*.safetensors")}
    with HubServer() as hub:
        hub.add("org/mix", out)
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        for tp, offline, weights in ((2, "0", own), (2, "1", set()), (4, "0", merged)):
            hub.requests.clear()
            home = {"HF_HOME": str(tmp_path / f"home-{tp}"), "HF_HUB_OFFLINE": offline}
            used, sums = last_json(run_python(FROM_HUB, "org/mix", str(tp), **settings, **home))
            with rank_of(1, tp):
                due = parameters(serve(out))
            assert used and sums == {n: sha256(bits(t).numpy().tobytes()).hexdigest() for n, t in due.items()}
            fetched = {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.requests}
            assert {name for name in fetched if name.endswith(".safetensors")} == weights


def test_shared_experts_that_sglang_fuses_are_read_by_sglang(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Fused, they are one more routed expert, which rank files lack; without merged files, the error names the flag."""
    out = shutil.copytree(mix(folder, "qwen3_moe"), tmp_path / "out")
    model, config = make(out)
    held = loader.rank_share(out, read_manifest(out))
    assert held is not None and loader.mismatch(model, held) is None
    model.model.layers[0].mlp.experts.num_fused_shared_experts = 1
    assert "give --disable-shared-experts-fusion" in str(loader.mismatch(model, held))
    split(out, Degree(1), layout="presplit")
    with pytest.raises(RuntimeError, match="give --disable-shared-experts-fusion"):
        load(model, config)


def test_layers_that_sglang_cuts_otherwise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No zeros are added to uncut layers: SGLang's loader reads them, or the option is refused."""
    shape = DEEPSEEK.of(hidden=512, intermediate=384, expert_intermediate=384, heads=4, layers=2)
    lines = {"model.layers.0.mlp.*": "fp8_block", "model.layers.1.mlp.shared_experts.*": "fp8_block"}
    out = build(sources(folder, shape, ["bf16", "fp8_block"]), lines, tmp_path / "out")
    with rank_of(1, 2):
        held = parameters(read(out))
        assert held["model.layers.0.mlp.down_proj.weight"].shape == (512, 256)
        monkeypatch.setenv("SGLANG_SHARED_EXPERT_TP1", "1")
        with pytest.raises(RuntimeError, match=r"shared_experts.*SGLang gives this rank 384 of its columns.* for 192"):
            make(out)
        monkeypatch.delenv("SGLANG_SHARED_EXPERT_TP1")
        with patch.object(loader, "load") as used, pytest.raises(ValueError, match="192"):
            serve(out, tp_size=2, moe_dense_tp_size=1)  # the files have its shared experts cut for two ranks
        assert not used.called


def options(degree: Degree) -> dict[str, Any]:
    """SGLang's arguments for replicas of attention."""
    if degree.dp == 1:
        return {}
    return {"tp_size": degree.tp, "dp_size": degree.dp, "enable_dp_attention": True}


def read(checkpoint: Path, **arguments: Any) -> torch.nn.Module:
    """Loads a checkpoint, and checks that SGLang's loader was not used."""
    with patch.object(loader, "load", wraps=loader.load) as used:
        model = serve(checkpoint, **arguments)
    assert used.called
    return model


def test_merged_files_serve_ranks_whose_share_ends_inside_a_block(folder: Path, tmp_path: Path) -> None:
    """SGLang's loader refuses them. Zeros are added to the outputs of gate and up, and to the inputs of down."""
    shape = QWEN3_MOE.of(hidden=256, expert_intermediate=384, heads=4, kv_heads=2, head_dim=128)
    lines = {"model.layers.*.experts.*": "fp8_block", "model.layers.1.mlp.experts.{0,5}.*": "gptq_int4"}
    out = build(sources(folder, shape, ["bf16", "fp8_block", "gptq_int4"]), lines, tmp_path / "narrow")
    alone, ranks = parameters(serve(out)), []
    for rank in range(2):
        with rank_of(rank, 2):
            ranks.append(parameters(serve(out)))
            with pytest.raises(ValueError, match="192"):
                make(out, load_format="safetensors")
    gate, up = alone["model.layers.0.mlp.experts.w13_weight"].split(384, dim=1)
    down = alone["model.layers.0.mlp.experts.w2_weight"]
    for rank, (start, end) in enumerate([(0, 256), (256, 384)]):
        w13, w2 = (ranks[rank][f"model.layers.0.mlp.experts.{name}_weight"] for name in ("w13", "w2"))
        assert w13.shape[1] == 512 and w2.shape[2] == 256
        for held, whole in ((w13[:, :256], gate), (w13[:, 256:], up)):
            assert torch.equal(bits(held[:, : end - start]), bits(whole[:, start:end]))
            assert not held[:, end - start :].float().any()
        assert torch.equal(bits(w2[:, :, : end - start]), bits(down[:, :, start:end]))
        assert not w2[:, :, end - start :].float().any()
    for rank, files in enumerate(split(out, Degree(2))):
        own = tensors(files)
        assert own.keys() == ranks[rank].keys()
        assert all(torch.equal(bits(own[n].to(t.dtype)), bits(t)) for n, t in ranks[rank].items())


def test_added_zeros_do_not_go_with_lora(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = QWEN3_MOE.of(hidden=256, expert_intermediate=384, heads=4, kv_heads=2, head_dim=128)
    out = build(
        sources(folder, shape, ["bf16", "fp8_block"]), {"model.layers.*.experts.*": "fp8_block"}, tmp_path / "o"
    )
    with rank_of(1, 2):
        make(out)
        monkeypatch.setattr(launch, "server_args", lambda: Changed(server_args(out), enable_lora=True))
        with pytest.raises(RuntimeError, match="--enable-lora"):
            make(out)


@pytest.mark.parametrize("own", [False, True])
def test_experts_that_start_elsewhere_are_read_from_the_merged_files(folder: Path, tmp_path: Path, own: bool) -> None:
    """``--init-expert-location``, also beside files of the rank, which have experts in the checkpoint's order."""
    shape = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2)
    out = build(sources(folder, shape, ["bf16"]), {}, tmp_path / "out")
    if own:
        split(out, Degree(1))
    due = parameters(serve(out))
    with experts_at([list(reversed(range(shape.experts)))] * shape.layers):
        held = parameters(serve(out))
    for name, tensor in due.items():
        assert torch.equal(held[name], tensor.flip(0) if ".experts." in name else tensor), name


def test_a_share_is_found_whatever_device_the_model_is_made_on(folder: Path) -> None:
    """Makes the model on a device without arithmetic."""
    out, shape = mix(folder, "qwen3_moe"), MIXES["qwen3_moe"][0]
    with experts_at([list(range(shape.experts))] * shape.layers), torch.device("meta"):
        assert loader.rank_share(out, read_manifest(out)) is not None


def test_experts_are_read_row_by_row() -> None:
    """In a rank's file, all experts of a layer are one tensor; buffers must stay small."""
    stored = TensorInfo("w13", "BF16", (4, 64, 32), "file", 0, 4 * 64 * 64)
    sizes: list[int] = []

    class Zeros(TensorReader):
        def close(self) -> None: ...

        def read_into(self, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
            sizes.append(len(window))

        def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
            raise NotImplementedError

    for chunk in contents(loader._stored(stored), Zeros(), most=512):
        assert len(chunk) == 512
    assert sum(sizes) == stored.nbytes


def test_a_buffer_is_not_used_again_before_it_was_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies to a GPU, simulated: events record the contents of buffers."""
    waits = 0

    class Event:
        held: tuple[torch.Tensor, torch.Tensor] | None = None

        def record(self) -> None:
            buffer, _ = copies._buffers[-1]
            self.held = buffer, buffer.clone()

        def synchronize(self) -> None:
            nonlocal waits
            if self.held is not None:
                waits += 1
                assert torch.equal(*self.held)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(loader, "_BUFFER", 1 << 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = shutil.copytree(mix(folder, "qwen3_moe"), tmp_path / "out")
    with rank_of(1, 2):
        due = parameters(serve(out))
        held = loader.rank_share(out, read_manifest(out))
    assert held is not None
    with FileReader(held.path_of) as reader:
        copies = loader._Copies(reader)
        for name, parameter in held.parameters.items():
            into = torch.empty(parameter.nbytes, dtype=torch.uint8)
            copies._through_buffers(into, parameter)
            if due[name].dtype == DTYPES[parameter.dtype]:
                assert torch.equal(into, bits(due[name]).reshape(-1)), name
        # A parameter on another kind of device is filled without a buffer.
        copies.fill(torch.empty(parameter.shape, dtype=DTYPES[parameter.dtype], device="meta"), parameter)
    assert waits > 100 and len(copies._buffers) == 2


def test_a_run_that_no_files_are_for_is_told_which_there_are(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    split(out, Degree(4), ranks=[0])
    split(out, Degree(2, 1, 2))
    split(out, Degree(2), layout="presplit")
    with rank_of(1, 4), pytest.raises(RuntimeError) as raised:
        make(out)
    assert "this run is tp4-ep1; it has files cut for tp2-ep1, tp2-ep1-dp2, tp4-ep1: start SGLang with" in str(
        raised.value
    )
    assert "`--tp 2` or `--tp 2 --dp 2 --enable-dp-attention` or `--tp 4`" in str(raised.value)
    assert f"restore the merged files with `mixprec split {out} --layout both`" in str(raised.value)
    with rank_of(0, 4):
        make(out)


def test_files_for_layers_made_in_another_way_are_not_read(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """The merged files are read instead, and the log says why; without them the server stops."""
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    split(out, Degree(2))
    due = parameters(serve(mix(folder, "qwen3")))
    with rank_of(0, 2):
        model, config = make(out)
    (name, parameter), *_ = model.named_parameters()
    parameter.data = parameter.data[:-1]
    reason = f"{name} is "
    with rank_of(0, 2), pytest.raises(Exception, match="size"):
        load(model, config)  # by SGLang's own loader, which fails as well
    assert reason in caplog.text and due
    with rank_of(0, 2):
        model, config = make(out)
        split(out, layout="presplit")
        next(model.parameters()).data = parameter.data
        with pytest.raises(RuntimeError, match=r"are not for this run \(.* in SGLang\)"):
            load(model, config)


def test_a_rank_reads_its_own_bytes_once(folder: Path, tmp_path: Path) -> None:
    """Counted by the operating system for this process, page cache included."""
    out = shutil.copytree(mix(folder, "qwen3_moe"), tmp_path / "out")
    split(out, Degree(2))
    for rank in range(2):
        with rank_of(rank, 2):
            model, config = make(out)
            before = read_so_far()
            load(model, config)
            read = read_so_far() - before
        listed = read_manifest(out).ranks[Degree(2).folder(rank)].nbytes
        assert 0.98 * listed <= read <= 1.02 * listed


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.data for n, p in model.named_parameters() if p.numel() and "sort_indices" not in n}


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, with those that it derives after loading, as DeepSeek does."""
    derived = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    return parameters(model) | derived


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
