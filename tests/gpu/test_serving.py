"""Compiled checkpoints on a real GPU with SGLang's own kernels, beside the same weights served natively.

    make gpu-test           # or: python -m pytest tests/gpu

Each checkpoint is served in a process of its own, several at a time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.run import ENGINES_AT_ONCE, environment  # noqa: E402
from support.serving import DEEPSEEK, LLAMA, MIXTRAL, QWEN2_MOE, QWEN3, QWEN3_MOE, Shape, write_sources  # noqa: E402
from support.sglang.ask import COMPILED  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
SIZES = {"hidden": 1024, "layers": 4, "heads": 16, "kv_heads": 8, "head_dim": 128, "vocab": 1024}
DENSE = QWEN3.of(**SIZES, intermediate=3072)
MOE = QWEN3_MOE.of(**SIZES, experts=32, top_k=8, expert_intermediate=512)
VARIANTS = [
    "bf16", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_block", "gptq_int4", "gptq_int4_g64",
    "gptq_int8", "auto_round_int4", "awq_int4", "ct_int4", "ct_int4_asym", "ct_int8", "ct_fp8_block", "ct_fp8_weight",
    "nvfp4", "ct_nvfp4", "fp8_e8m0", "fp8_bytes", "fp8_e8m0_32", "ct_mxfp4", "deepseek_mxfp4",
    "w4afp8",
]  # fmt: skip

# name -> (shape, lines of `weights:`)
MIXES: Mapping[str, tuple[Shape, list[str]]] = {
    "attention fp8, experts int4": (MOE, ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.*: gptq_int4"]),
    "attention fp8, experts of auto-round": (
        MOE, ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.experts.*: auto_round_int4"]
    ),
    "shared experts fp8 as well": (
        QWEN2_MOE.of(**{**SIZES, "head_dim": 64}, intermediate=1024, experts=32, top_k=8, expert_intermediate=512),
        ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.shared_expert.*: fp8_block",
         "model.layers.*.mlp.experts.*: auto_round_int4"],
    ),
    "attention fp8, experts nvfp4": (
        MOE, ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.experts.*: nvfp4"]
    ),
    "some experts fp8 beside nvfp4": (
        MOE,
        ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.experts.*: nvfp4",
         "model.layers.*.mlp.experts.{0..3}.*: fp8_block", "model.layers.*.mlp.experts.{8..15}.*: ct_nvfp4",
         "model.layers.1.mlp.experts.{16..23}.down_proj: gptq_int4"],
    ),
    "experts in w4afp8": (
        MOE,
        ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.experts.*: w4afp8",
         "model.layers.1.mlp.experts.{0..3}.*: fp8_block", "model.layers.2.mlp.experts.{0..15}.*: nvfp4",
         "model.layers.2.mlp.experts.{4,20}.*: bf16"],
    ),
    "powers of two as scales": (
        MOE,
        ["model.layers.*.self_attn.*: fp8_e8m0_32", "model.layers.*.mlp.experts.*: fp8_e8m0_32",
         "model.layers.{1,2}.self_attn.*: fp8_bytes", "model.layers.2.mlp.experts.*: fp8_bytes",
         "model.layers.3.mlp.experts.{0..7}.*: gptq_int4"],
    ),
    "some experts fp8 and int4 beside mxfp4": (
        MOE,
        ["model.layers.*.self_attn.*: fp8_block", "model.layers.*.mlp.experts.*: ct_mxfp4",
         "model.layers.*.mlp.experts.{0..3}.*: fp8_block", "model.layers.*.mlp.experts.{8..11}.*: gptq_int4",
         "model.layers.*.mlp.experts.{12,13}.*: bf16", "model.layers.1.mlp.experts.{16..23}.down_proj: fp8_block",
         "model.layers.2.mlp.experts.{16..31}.*: deepseek_mxfp4"],
    ),
    "attention bf16, mlp fp8": (DENSE, ["model.layers.*.mlp.*: fp8_channel"]),
    "layer by layer": (
        DENSE,
        ["model.layers.0.*: fp8_block", "model.layers.1.*: gptq_int4", "model.layers.2.*: fp8_tensor"],
    ),
    "experts in three formats": (
        MOE,
        ["model.layers.*.mlp.experts.*: gptq_int4", "model.layers.*.mlp.experts.{0..7}.*: fp8_block",
         "model.layers.*.mlp.experts.{9,30}.*: bf16"],
    ),
    "gate and up apart from down": (
        MOE,
        ["model.layers.*.mlp.experts.*: fp8_block", "model.layers.*.mlp.experts.{4..31}.down_proj: gptq_int4",
         "model.layers.2.mlp.experts.{0..9}.*: gptq_int4"],
    ),
    "llama": (LLAMA.of(**SIZES, intermediate=2048), ["*: fp8_block", "model.layers.1.*: gptq_int4"]),
    "awq and compressed-tensors": (
        DENSE,
        ["model.layers.0.*: awq_int4", "model.layers.1.*: ct_int4", "model.layers.2.*: ct_fp8_block",
         "model.layers.3.self_attn.*: ct_int4_asym", "model.layers.3.mlp.*: ct_fp8_weight"],
    ),
    "experts in every packed format": (
        MOE,
        ["model.layers.*.mlp.experts.*: awq_int4", "model.layers.*.mlp.experts.{0..7}.*: ct_int4",
         "model.layers.*.mlp.experts.{8..11}.*: ct_int8", "model.layers.*.mlp.experts.{12..15}.*: gptq_int4",
         "model.layers.*.mlp.experts.{16..19}.*: ct_fp8_block"],
    ),
    "mixtral": (
        MIXTRAL.of(**{**SIZES, "head_dim": 64}, expert_intermediate=512),
        ["model.layers.*.block_sparse_moe.*: gptq_int4", "model.layers.2.block_sparse_moe.*: fp8_block"],
    ),
    "deepseek": (
        DEEPSEEK.of(**SIZES, intermediate=2048, expert_intermediate=512),
        ["model.layers.*.self_attn.{q_b,o}_proj: fp8_block", "model.layers.*.mlp.experts.*: gptq_int4",
         "model.layers.*.mlp.experts.{0,1}.*: fp8_block", "model.layers.0.mlp.*: fp8_block"],
    ),
}  # fmt: skip


# CUDA graphs for prefill and decoding, as SGLang has them by default, of the sizes that are asked for.
GRAPHS = {
    "cuda_graph_max_bs_decode": 1, "cuda_graph_bs_decode": [1],
    "cuda_graph_max_bs_prefill": 32, "cuda_graph_bs_prefill": [32],
}  # fmt: skip


class Server:
    """Builds, serves and remembers: what is asked for twice is done once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(ENGINES_AT_ONCE)
        self._sources: dict[Shape, dict[str, Path]] = {}
        self._running: dict[tuple[str, str], Future[dict[str, Any]]] = {}

    def sources(
        self, shape: Shape, variants: Sequence[str] = VARIANTS, *, head: bool = False, **options: Any
    ) -> dict[str, Path]:
        """``variants`` are those that the shape allows, said when it is asked for first; ``head`` likewise, where
        ``lm_head`` is to be quantized too."""
        if shape not in self._sources:
            folder = self._folder / f"sources-{len(self._sources)}"
            self._sources[shape] = write_sources(folder, shape, variants, head=head, **options)
        return self._sources[shape]

    def build(self, shape: Shape, name: str, lines: list[str]) -> Path:
        out = self._folder / f"{shape.family}-{name.replace(' ', '-').replace(',', '')}"
        if not out.exists():
            # In dense models W4AFP8 is FP8 in blocks, and a source of that name is refused.
            sources = {v: p for v, p in self.sources(shape).items() if v != "w4afp8" or shape.experts}
            text = [f"model: {sources['bf16']}", "sources:", *(f"  {v}: {p}" for v, p in sources.items())]
            text += ["default: bf16", "weights:", *(f"  '{a}': {b}" for a, b in (line.split(": ") for line in lines))]
            recipe = out.with_suffix(".yaml")
            recipe.write_text("\n".join(text if lines else text[:-1]))
            subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out], check=True)
        return out

    def ask(self, path: Path, script: str = "ask", **options: Any) -> Future[dict[str, Any]]:
        key = (f"{script} {path}", json.dumps(options, sort_keys=True))
        if key not in self._running:
            # Engines that start together must not find the same port free.
            port = 21000 + 20 * len(self._running)
            self._running[key] = self._pool.submit(self._run, path, script, options, port)
        return self._running[key]

    def end(self) -> None:
        """Nobody waits for what did not start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, path: Path, script: str, options: Mapping[str, Any], port: int) -> dict[str, Any]:
        engine = {
            "mem_fraction_static": 0.6,
            "max_total_tokens": 32768,
            **GRAPHS,
            "nccl_port": port,
            **options.get("engine", {}),
        }
        command = [
            sys.executable,
            "-m",
            f"support.sglang.{script}",
            str(path),
            json.dumps({**options, "engine": engine}),
        ]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=550,
            env={**environment(HERE / "repeatable"), "SHORT_GROUPS": "1"},
        )
        print(f"{path.name} {script} {time.perf_counter() - started:.0f} s")
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("gpu"))
    # All at once, so that engines start side by side; the tests then wait for theirs.
    for item in request.session.items:
        chosen = getattr(item, "callspec", None)
        if chosen is not None and "variant" in chosen.params:
            _identity(server, **chosen.params)
        elif chosen is not None and item.name.startswith("test_a_mix"):
            _mix(server, *MIXES[chosen.params["name"]])
            _native(server, MIXES[chosen.params["name"]][0])
        elif chosen is not None and "mode" in chosen.params:
            _compiled(server, **chosen.params)
    yield server
    server.end()


# Stock SGLang takes FP8 by channels with unquantized activations for Int4 (0.5.17), so that cannot be compared.
EVERYWHERE = (
    "bf16", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_block", "gptq_int4", "gptq_int8",
    "awq_int4", "ct_int4", "ct_int8", "nvfp4", "fp8_e8m0",
)  # fmt: skip
IDENTITIES = [
    *((shape, variant) for shape in (DENSE, MOE) for variant in EVERYWHERE),
    *((DENSE, variant) for variant in ("ct_int4_asym", "ct_fp8_block")),
    (MOE, "w4afp8"),
]


def _identity(server: Server, shape: Shape, variant: str) -> tuple[Future[dict[str, Any]], Future[dict[str, Any]]]:
    # Stock GPTQ experts run in FP16 only.
    options: dict[str, Any] = {"dtype": "half" if variant.startswith("gptq") and shape.experts else "bfloat16"}
    methods = {"fp8_channel": "w8a8_fp8", "int8_channel": "w8a8_int8", "awq_int4": "awq_marlin"}
    methods |= {"nvfp4": "modelopt_fp4", "w4afp8": "w4afp8"}
    engine = {"engine": {"quantization": methods[variant]}} if variant in methods else {}
    native = {**options, **engine}
    lines = [] if variant == "bf16" else [f"*: {variant}"]
    ours = server.build(shape, f"all-{variant}", lines)
    return server.ask(ours, **options), server.ask(server.sources(shape)[variant], **native)


def _mix(server: Server, shape: Shape, lines: list[str]) -> tuple[Future[dict[str, Any]], Future[dict[str, Any]]]:
    name = next(name for name, mix in MIXES.items() if mix == (shape, lines))
    out = server.build(shape, name, lines)
    return server.ask(out, dtype="bfloat16", logits=True), server.ask(out, "reference")


@pytest.mark.parametrize(("shape", "variant"), IDENTITIES, ids=[f"{s.family}-{v}" for s, v in IDENTITIES])
def test_a_uniform_checkpoint_answers_as_natively(server: Server, shape: Shape, variant: str) -> None:
    ours, native = (future.result() for future in _identity(server, shape, variant))
    answers = zip(ours["tokens"], native["tokens"], ours["logprobs"], native["logprobs"], strict=True)
    apart = [number for number, (a, b, p, q) in enumerate(answers) if (a, p) != (b, q)]
    assert not apart, f"prompts {apart} differ"
    manifest = _stored_bytes(server.build(shape, f"all-{variant}", []))
    # Scales and zero points of AWQ take twice their place on a GPU.
    assert ours["memory"]["weight_mb"] * 2**20 == pytest.approx(manifest, rel=0.05 if "awq" in variant else 0.01)


def _compiled(server: Server, name: str, mode: str) -> tuple[Future[dict[str, Any]], Future[dict[str, Any]]]:
    path, engine = server.build(MIXES[name][0], name, MIXES[name][1]), COMPILED[mode]
    cache = {key: value for key, value in engine.items() if key == "kv_cache_dtype"}
    return server.ask(path, dtype="bfloat16", engine=engine), server.ask(path, dtype="bfloat16", engine=cache)


def _stored_bytes(folder: Path) -> int:
    """Without what SGLang frees of symmetric GPTQ once it is loaded."""
    manifest = json.loads((folder / "mixprec_manifest.json").read_text())
    return sum(
        tensor["bytes"]
        for module in manifest["modules"].values()
        for name, tensor in module["tensors"].items()
        if not name.endswith((".qzeros", ".g_idx"))
    )


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_answers_as_its_dequantized_weights(server: Server, name: str) -> None:
    """No further from transformers on the same weights than native all-FP8 serving is from it on its own: FP8 rounds
    activations, and one more expert that routing takes for another moves a whole token."""
    shape, lines = MIXES[name]
    mix = _divergence(*_mix(server, shape, lines))
    native = _divergence(*_native(server, shape))
    print(f"\n{name}: KL mean {mix.mean():.2e} max {mix.max():.2e}; native FP8 {native.mean():.2e}, {native.max():.2e}")
    assert mix.mean() < 1.5 * native.mean() + 1e-3
    assert mix.median() < 1.5 * native.median() + 1e-3


# Under tc_piecewise, SGLang 0.5.17 compiles no block-FP8 linears on Triton.
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("layer by layer", "torch.compile"),
        *((name, mode) for name in ("experts in three formats", "gate and up apart from down") for mode in COMPILED),
    ],
)
def test_compiled_code_answers_as_without(server: Server, name: str, mode: str) -> None:
    """The first two tokens, of prefill and decoding: later ones may follow others."""
    compiled, eager = (future.result() for future in _compiled(server, name, mode))
    answers = zip(compiled["tokens"], eager["tokens"], compiled["logprobs"], eager["logprobs"], strict=True)
    apart = [max(abs(a[n] - b[n]) for n in range(2)) for s, t, a, b in answers if s[:2] == t[:2]]
    print(f"\n{name}, {mode}: {len(apart)} of {len(eager['tokens'])} alike, {max(apart):.3f} nats apart at most")
    assert len(apart) > 24 and max(apart) < 0.2


def test_gptq_that_marlin_has_no_kernel_for_answers_as_its_dequantized_weights(server: Server) -> None:
    """SGLang's other GPTQ kernel, in FP16. It adds atomically: answers to be equal to cannot be had."""
    narrow = DENSE.of(**{**SIZES, "hidden": 1088}, intermediate=3072)
    server.sources(narrow, ["bf16", "gptq_int4_g64"])
    path = server.build(narrow, "for exllama", ["*: gptq_int4_g64"])
    distance = _divergence(server.ask(path, dtype="half", logits=True), server.ask(path, "reference"))
    print(f"\nexllama: KL mean {distance.mean():.2e} max {distance.max():.2e}")
    assert distance.mean() < 1e-3


SMALL = [DENSE.of(layers=3), MOE.of(layers=3, experts=8, top_k=2)]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_compressed_tensors_nvfp4_answers_as_its_dequantized_weights(server: Server, shape: Shape) -> None:
    """Alone in its format: 0.5.17 has no kernels of its own for it on this GPU that it could be compared with."""
    server.sources(shape, ["bf16", "ct_nvfp4"])
    path = server.build(shape, "all ct_nvfp4", ["*: ct_nvfp4"])
    distance = _divergence(server.ask(path, dtype="bfloat16", logits=True), server.ask(path, "reference"))
    print(f"\n{shape.family} in ct_nvfp4: KL mean {distance.mean():.2e} max {distance.max():.2e}")
    # A token that BF16 sends to another expert than float32 does moves the mean, not the median.
    assert distance.median() < 5e-3 and distance.mean() < 5e-2


EXPERTS_ALONE = MOE.of(layers=2)
MXFP4 = ("mxfp4", "ct_mxfp4", "deepseek_mxfp4")


@pytest.mark.parametrize("layout", MXFP4)
def test_experts_in_mxfp4_answer_as_natively(server: Server, layout: str) -> None:
    """To the bit: SGLang's class for compressed-tensors' MXFP4, which finds weights by Quark's names, on Marlin."""
    sources = server.sources(EXPERTS_ALONE, ["bf16", *MXFP4], skip=["*.self_attn.*"])
    native = sources["mxfp4"].with_name("native-mxfp4")
    if not native.exists():
        shutil.copytree(sources["mxfp4"], native)
        config = json.loads((native / "config.json").read_text())
        declared = json.loads((sources["ct_mxfp4"] / "config.json").read_text())["quantization_config"]
        (native / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    ours = server.build(EXPERTS_ALONE, f"experts-{layout}", [f"model.layers.*.mlp.experts.*: {layout}"])
    marlin = {"engine": {"moe_runner_backend": "marlin"}}
    asked = server.ask(ours, dtype="bfloat16"), server.ask(native, dtype="bfloat16", **marlin)
    found, due = (future.result() for future in asked)
    answers = zip(found["tokens"], due["tokens"], found["logprobs"], due["logprobs"], strict=True)
    apart = [number for number, (a, b, p, q) in enumerate(answers) if (a, p) != (b, q)]
    assert not apart, f"prompts {apart} differ: {found['tokens'][apart[0]]}, {due['tokens'][apart[0]]}"
    assert found["memory"]["weight_mb"] * 2**20 == pytest.approx(_stored_bytes(ours), rel=0.01)


HEADS = [
    "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "gptq_int4", "awq_int4", "ct_int4", "ct_fp8_weight",
    "nvfp4",
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_quantized_head_answers_as_its_dequantized_weight(server: Server, head: str) -> None:
    """Alone in its format, so that all of the distance is the head's: of activations rounded to 8 bits, or none."""
    shape = DENSE.of(layers=2)
    server.sources(shape, ["bf16", *HEADS], head=True)
    path = server.build(shape, f"head in {head}", [f"lm_head: {head}"])
    distance = _divergence(server.ask(path, dtype="bfloat16", logits=True), server.ask(path, "reference"))
    print(f"\nlm_head in {head}: KL mean {distance.mean():.2e} max {distance.max():.2e}")
    assert distance.mean() < 5e-3


def _native(server: Server, shape: Shape) -> tuple[Future[dict[str, Any]], Future[dict[str, Any]]]:
    # Stock Llama drops the scales of block FP8.
    llama = shape.family == "llama"
    path = server.sources(shape)["fp8_channel" if llama else "fp8_block"]
    engine = {"engine": {"quantization": "w8a8_fp8"}} if llama else {}
    return server.ask(path, dtype="bfloat16", logits=True, **engine), server.ask(path, "reference")


def _divergence(served: Future[dict[str, Any]], reference: Future[dict[str, Any]]) -> torch.Tensor:
    """The Kullback-Leibler divergence at every position of every prompt."""
    p, q = (torch.tensor(future.result()["distributions"], dtype=torch.float64) for future in (reference, served))
    return (p.exp() * (p - q)).sum(-1).flatten()
