"""Degrees of parallelism: `split` and `plan` refuse those that SGLang's own classes refuse, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.degrees import variants, write_variant
from support.families import TINY
from support.sglang.families import skip_unless_made
from support.sglang.harness import publish, rank_of, server_args

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.checkpoint.typed import Source
from mixprec_build.errors import SplitError
from mixprec_build.families.facts import ModelFacts
from mixprec_build.ranks.merged import splitter_of
from mixprec_build.ranks.splitter import Splitter
from mixprec_build.versions import between
from mixprec_runtime.contact.check import installed
from mixprec_runtime.loading.ledger import default_dtype

pytestmark = pytest.mark.usefixtures("sglang", "streams")

DEGREES = (Degree(3), Degree(4), Degree(16), Degree(16, 16))
REPLICAS = (Degree(12, 1, 4),)
ALIKE = {"qwen3_5_moe_auto_round", "kimi_k25_packed", "deepseek_v3", "kimi_k3"}
"""Of the classes and sizes of others; and Kimi-K3, which is not cut."""
ROWS, FILLED_UP = (" 500", "image_size 448"), "0.5.22"
"""From this release on, classes fill up embeddings for any number of ranks; mixprec does as the releases before."""
WHOLE_ENCODER = "--mm-enable-dp-encoder"


def plan_refuses(checkpoint: Path, degree: Degree) -> tuple[str, Splitter | None]:
    """Why files are not cut for ``degree``; empty, with the splitter, if they are."""
    try:
        splitter = splitter_of(Source.of("", open_checkpoint(str(checkpoint))), degree)
        for rank in {0, 1, degree.tp - 1}:
            splitter.parameters(rank)
    except SplitError as error:
        return str(error), None
    return "", splitter


def class_refuses(checkpoint: Path, degree: Degree, **options: Any) -> tuple[str, torch.nn.Module | None]:
    """Why SGLang's class makes no layers for the last rank, or makes some that compute nothing; else its model."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.models import registry  # noqa: F401  (imports all classes, which make tensors, on the CPU)

    device = "cpu" if "apertus" in str(checkpoint) else "meta"  # its class reads a value
    if degree.dp > 1:
        options |= {"tp_size": degree.tp, "dp_size": degree.dp, "enable_dp_attention": True}
    with rank_of(degree.tp - 1, degree.tp, degree.ep, degree.dp):
        args = server_args(checkpoint, dtype="bfloat16", **options)
        publish(args)
        config = ModelConfig.from_server_args(args)
        try:
            with default_dtype(config.dtype), torch.device(device):
                model = loader._initialize_model(config, LoadConfig(), None)
        except (AssertionError, ValueError) as error:
            return str(error) or "an assertion", None
    return next(_rounded_down(model, degree.attention_tp), ""), model


def _rounded_down(model: torch.nn.Module, ranks: int) -> Iterator[str]:
    """Yields what classes divide by the number of ranks without asking whether they can."""
    for module in model.modules():
        for total, own in (("n_groups", "n_local_groups"), ("n_heads", "n_local_heads")):
            number, share = (getattr(module, name, None) for name in (total, own))
            if isinstance(number, int) and isinstance(share, int) and share not in (number, number / ranks):
                yield f"{type(module).__name__} has {share} of {number} {total}"
        keys = getattr(module, "num_k_heads", 0)  # of a delta net
        if keys and hasattr(module, "attn_tp_size") and keys % ranks:
            yield f"{type(module).__name__} has {keys // ranks} of {keys} num_k_heads"


@pytest.fixture(autouse=True)
def own_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps rotary embeddings on the meta device, which SGLang shares between models, from other tests."""
    from sglang.srt.layers.rotary_embedding import factory

    monkeypatch.setattr(factory, "_ROPE_DICT", {})


@pytest.fixture
def without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has messages name no degrees that would do, which takes longer than all else."""
    monkeypatch.setattr(Splitter, "_advice", lambda _: "")


@pytest.mark.parametrize("name", [name for name in TINY if name not in ALIKE])
def test_plan_refuses_the_degrees_that_the_class_refuses(
    tmp_path: Path, without_advice: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Sizes that all these ranks can share, but for one; shapes of a rank's parameters are compared as well."""
    skip_unless_made(name)
    if name == "deepseek_v4":
        from sglang.srt.models import deepseek_v4

        monkeypatch.setattr(deepseek_v4, "_FP8_WO_A_GEMM", False, raising=False)
    refused = 0
    for number, (label, config) in enumerate(variants(name)):
        checkpoint = write_variant(tmp_path / f"{name}-{number}", name, config)
        family = ModelFacts.of(config).family
        for degree in (*DEGREES, *(REPLICAS if family.attention_replicas else ())):
            (ours, splitter), (theirs, model) = (
                plan_refuses(checkpoint, degree),
                class_refuses(checkpoint, degree, **TINY[name].options),
            )
            if splitter is not None and theirs and any(WHOLE_ENCODER in remark for remark in splitter.remarks()):
                theirs, model = class_refuses(checkpoint, degree, **TINY[name].options, mm_enable_dp_encoder=True)
            if ours and not theirs and label.endswith(ROWS) and between(FILLED_UP, "", installed()):
                continue
            assert bool(ours) == bool(theirs), (label, str(degree), ours, theirs)
            refused += bool(ours)
            if splitter is None or model is None:
                continue
            cut = {parameter.name: parameter.shape for parameter in splitter.parameters(degree.tp - 1)}
            for key, parameter in model.named_parameters():
                if parameter.numel() and not splitter.family.is_left_to_class(key):
                    assert cut.get(key) == tuple(parameter.shape), (label, str(degree), key)
    assert refused
