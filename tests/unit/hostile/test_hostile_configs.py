"""Configurations of sources: quoted in few words, their regexes matched in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.formats.base import FormatError
from mixprec_build.formats.gptq import Dynamic
from mixprec_build.formats.quantization import Quantization

from .spoil import Change, Patch, change

TOO_LONG = "x" * 1_000_000
CUT = "'xxxxxxxxxxxx...xxxxxxxxxxxxx'"

GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
GROUPS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"g": GROUP},
}

CONFIGS: dict[str, tuple[str, Change, str]] = {
    "a long method": ("int4", lambda q: q.update(quant_method=TOO_LONG), f"of quant_method {CUT}"),
    "long bits": ("int4", lambda q: q.update(bits=[4] * 500_000), "GPTQ with [4, 4, 4, 4, 4, 4, ...] bits"),
    "a group size of 4000 digits": ("int4", lambda q: q.update(group_size=-(10**4000)), "GPTQ group_size -10000"),
    "a long block": ("fp8", lambda q: q.update(weight_block_size=[1] * 500_000), "[1, 1, 1, 1, 1, 1, ...] is no pair"),
    "a long activation scheme": ("fp8", lambda q: q.update(activation_scheme=TOO_LONG), CUT),
    "long AWQ bits": (
        "int4", lambda q: q.update(quant_method="awq", bits=[4] * 500_000), "AWQ with [4, 4, 4, 4, 4, 4, ...] bits",
    ),
    "a long AWQ version": ("int4", lambda q: q.update(quant_method="awq", version=TOO_LONG), f"AWQ version {CUT}"),
    "an AWQ group size of 4000 digits": (
        "int4", lambda q: q.update(quant_method="awq", version="gemm", group_size=-(10**4000)), "AWQ group_size -10000",
    ),
    "groups that are a list": ("fp8", lambda q: q.update(GROUPS, config_groups=[1] * 500_000), "config_groups [1, 1,"),
    "a group of a long name": (
        "fp8", lambda q: q.update(GROUPS, config_groups={TOO_LONG: {"targets": ["Linear"]}}), "says nothing of its",
    ),
    "a group of 4000 digits": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "weights": {"num_bits": 10**4000}}}),
        "declared by config group 'g'",
    ),
    "a group of long words": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "weights": {"type": TOO_LONG}}}),
        "declared by config group 'g'",
    ),
    "100,000 names to ignore": (
        "fp8", lambda q: q.update(GROUPS, ignore=["x"] * 100_001), "ignore holds more than 100000 names",
    ),
    "a hundred thousand groups": (
        "fp8", lambda q: q.update(GROUPS, config_groups={str(i): GROUP for i in range(1000)}), "are not 1 to 256",
    ),
    "a slow target": (
        "fp8", lambda q: q.update(GROUPS, config_groups={"g": {**GROUP, "targets": ["re:(a+)+$"]}}), "holds 're:(a+)+",
    ),
    "100,000 regexes": (
        "int4", lambda q: q.update(dynamic={str(i): {} for i in range(100_000)}), "more than 4096 regular expressions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_quoted_in_few_words(mix: Path, case: str) -> None:
    """There may be as many messages as modules."""
    name, how, message = CONFIGS[case]
    change(mix / name / "config.json", lambda config: how(config["quantization_config"]))
    errors = [str(f) for f in open_source(str(mix / name)).formats.values() if isinstance(f, FormatError)]
    assert errors and all(message in error and len(error) < 500 for error in errors)


@pytest.mark.parametrize("key", ["rope_theta", "hidden_size", "partial_rotary_factor", "an_unknown_key"])
def test_a_number_of_400_digits(mix: Path, mixprec: Any, key: str) -> None:
    """Found by fuzzing."""
    for name in ("fp8", "int4"):
        change(mix / name / "config.json", lambda config: config.update({key: 10**400}))
    ended = mixprec("plan", mix / "mix.yaml")
    assert ended.code in (0, 1) and len(ended.err) < 1000


REGEXES = [
    # As they are in use: examples of GPTQModel's documentation, and lists of layers
    (r"+:.*\.18\..*gate.*", "model.layers.18.mlp.gate_proj", True),
    (r".*\.19\..*gate.*", "model.layers.18.mlp.gate_proj", False),
    (r"-:.*down.*", "model.layers.18.mlp.down_proj", False),
    (r"model\.layers\.(?:[0-9]|1[0-5])\.mlp\.(gate|up)_proj$", "model.layers.12.mlp.up_proj", True),
    (r"^model\.layers\.\d+\.self_attn\.[qkvo]_proj$", "model.layers.3.self_attn.k_proj", True),
    (r"+:.*\.(?:" + "|".join(map(str, range(94))) + r")\..*(?:gate|up)_proj.*", "model.layers.93.mlp.up_proj", True),
    (r"(?!.*shared_expert).*\.down_proj", "model.layers.0.mlp.shared_expert.down_proj", False),
    ("lm_head", "lm_head", True),
]


def dynamic(declared: dict[str, Any]) -> Dynamic:
    return Quantization(declared).derive(Dynamic)


@pytest.mark.parametrize(("regex", "name", "hit"), REGEXES)
def test_regexes_that_are_in_use(regex: str, name: str, hit: bool) -> None:
    found = dynamic({"bits": 4, "dynamic": {regex: {"bits": 8}}}).resolve(name)
    assert found["bits"] == (8 if hit else 4)


BAD_REGEXES = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){20}b", "(a?){50}a{50}", "a?" * 50 + "a" * 50, "(a|a)" * 40 + "b",
    ".*.*.*.*.*.*b", "(.*)(.*)(.*)(.*)(.*)b", r"(.*)\1b", "(?P<x>a)(?P=x)", "((a*)*)*b", "(?:a{1,99}){1,99}b",
    "a{1,999}" * 9 + "b", "(?i)a", "(?<=a)b", "(a", "a)", "[a", "a**", "a{99999999999}", "*", "[[a]", "\\", "\\N{x}",
    "(" * 1000, "a" * 1001, r"(?(1)a|b)",
]  # fmt: skip


@pytest.mark.parametrize("regex", BAD_REGEXES)
def test_regexes_that_are_refused(regex: str) -> None:
    with pytest.raises(FormatError, match=r"^`dynamic` holds '") as caught:
        dynamic({"dynamic": {f"+:{regex}": {"bits": 8}}}).resolve("a" * 256)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("regex", [".*.*.*.*b", ".*a.*a.*a.*b", "(a|a)" * 20 + "b", "a?" * 20 + "a" * 230 + "b"])
def test_the_slowest_regexes_that_are_tried(regex: str) -> None:
    assert "bits" not in dynamic({"dynamic": {regex: {"bits": 8}}}).resolve("a" * 256)


def test_regexes_may_take_seconds_in_all(monkeypatch: Patch) -> None:
    monkeypatch.setattr("mixprec_build.patterns.budget.MatchBudget.SECONDS", 0.1)
    one = dynamic({"dynamic": {".*.*.*b": {"bits": 8}}})
    with pytest.raises(FormatError, match="`dynamic` takes more than 0 seconds to match"):
        for _ in range(1000):
            one.resolve("a" * 256)
