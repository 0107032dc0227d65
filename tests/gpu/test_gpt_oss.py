"""gpt-oss in small, compiled, against its release in stock SGLang on Marlin: tokens and logprobs to the bit. With some
experts in BF16, of the same values, it answers almost the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.gpt_oss import Sizes, dequantized, tensors, write  # noqa: E402
from support.run import answer_of  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
# Neither a multiple of 128, as gpt-oss's own: SGLang pads both.
SIZES = Sizes(experts=16, hidden=576, columns=576, heads=8, keys=2, vocab=1024, layers=4)
GRAPHS = {
    "mem_fraction_static": 0.2, "max_total_tokens": 16384, "cuda_graph_max_bs_decode": 1, "cuda_graph_bs_decode": [1],
    "cuda_graph_max_bs_prefill": 32, "cuda_graph_bs_prefill": [32],
}  # fmt: skip


def ask(path: Path, port: int, **engine: Any) -> dict[str, Any]:
    options = {"dtype": "bfloat16", "logits": True, "engine": {**GRAPHS, "nccl_port": port, **engine}}
    return answer_of(path, options, HERE / "repeatable")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Of servers that start side by side: compiled, with experts in BF16, and the release, twice."""
    home, made = tmp_path_factory.mktemp("gpt-oss"), tensors(SIZES)
    release = write(home / "release", made, SIZES)
    plain = write(home / "plain", dequantized(made), SIZES, quantization_config=None)
    recipes = {
        "compiled": f"model: {release}\n",
        "with BF16": f"model: {release}\nsources: {{mx: {release}, bf16: {plain}}}\ndefault: mx\n"
        "weights: {'model.layers.0.mlp.experts.*': bf16, 'model.layers.{1..3}.mlp.experts.{1,2,8..11}.*': bf16}\n",
    }
    outs = {name: home / name.replace(" ", "-") for name in recipes}
    for name, text in recipes.items():
        recipe = outs[name].with_suffix(".yaml")
        recipe.write_text(text)
        subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", outs[name]], check=True)
    with ThreadPoolExecutor(4) as pool:
        yield {
            "compiled": pool.submit(ask, outs["compiled"], 26000),
            "with BF16": pool.submit(ask, outs["with BF16"], 26060),
            "native": pool.submit(ask, release, 26020, moe_runner_backend="marlin"),
            "by default": pool.submit(ask, release, 26040),
        }


def test_it_answers_as_natively_on_marlin(answers: dict[str, Future[dict[str, Any]]]) -> None:
    """SGLang chooses triton_kernels for gpt-oss, which is not asked of the user: the compiled server starts."""
    found, due = answers["compiled"].result(), answers["native"].result()
    each = zip(found["tokens"], due["tokens"], found["logprobs"], due["logprobs"], strict=True)
    apart = [number for number, (a, b, p, q) in enumerate(each) if (a, p) != (b, q)]
    first = apart[0] if apart else 0
    assert not apart, (
        f"prompts {apart} differ; the first: tokens {found['tokens'][first]} and {due['tokens'][first]}, logprobs "
        f"{found['logprobs'][first][:4]} and {due['logprobs'][first][:4]}"
    )
    print(f"\nmemory: {found['memory']}")


def test_it_answers_alike_with_experts_in_bf16(answers: dict[str, Future[dict[str, Any]]]) -> None:
    """A layer of them and layers of both. MXFP4 has no values that BF16 has not: kernels round otherwise, no more."""
    found, due = (
        torch.tensor(answers[which].result()["distributions"], dtype=torch.float64)
        for which in ("with BF16", "compiled")
    )
    apart = (due.exp() * (due - found)).sum(-1).flatten()
    between = (due[:, 1:].exp() * (due[:, 1:] - due[:, :-1])).sum(-1).mean()
    print(f"\nKL mean {apart.mean():.1e}, median {apart.median():.1e}, between positions {between:.1e}")
    assert apart.median() < 1e-3 * between and apart.mean() < 0.02 * between


def test_it_is_near_what_sglang_chooses_for_it(answers: dict[str, Future[dict[str, Any]]]) -> None:
    """The first tokens, by kernels that multiply otherwise, where their package is installed."""
    pytest.importorskip("triton_kernels.numerics_details.mxfp")
    found, due = answers["compiled"].result(), answers["by default"].result()
    each = zip(found["tokens"], due["tokens"], found["logprobs"], due["logprobs"], strict=True)
    apart = [abs(p[0] - q[0]) for a, b, p, q in each if a[0] == b[0]]
    print(f"\n{len(apart)} of {len(found['tokens'])} first tokens alike, {max(apart):.3f} nats apart at most")
    assert len(apart) > 20 and max(apart) < 0.3
