"""Compares each family file with the way that SGLang's own class loads a checkpoint.

The class is made on the meta device and loads tensors without values, so this takes no memory and little time even for
models of real sizes. A test fails when a class of a checked family disappears or changes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import sglang.version
import torch
from support import serving
from support.sglang.asked import ASKED, Asked, answer_of, modules_of
from support.sglang.families import family_mix

from mixprec_build.families.base import Family
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.parts import Restriction, Role
from mixprec_build.families.registry import FAMILIES
from mixprec_build.report.doctor import examine
from mixprec_runtime.asking.answer import Answer
from mixprec_runtime.asking.comparison import Disagreement, compare

pytestmark = pytest.mark.usefixtures("sglang")


ABSENT = {
    "0.5.15.post1": {"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"},
    "0.5.23": {"Mistral3ForConditionalGeneration"},  # it needs another version of transformers than these tests have
}
"""Classes that some supported versions of SGLang lack, or cannot make here."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the calls for a GPU that models make in their constructors."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: (9, 0))


def disagreements(asked: Asked, answer: Answer, family: Family | None = None) -> list[Disagreement]:
    facts = ModelFacts.of(asked.config)
    facts = facts if family is None else replace(facts, family=family)
    return compare(answer, facts, modules_of(asked))


def test_every_class_of_a_checked_family_is_asked() -> None:
    classes = {architecture for family in FAMILIES if family.checked for architecture in family.architectures}
    assert classes <= ASKED.keys()


@pytest.mark.parametrize("architecture", ASKED)
def test_a_family_is_as_its_class(architecture: str, tmp_path: Path) -> None:
    if architecture in ABSENT.get(sglang.version.__version__, ()):
        pytest.skip("this SGLang cannot make the class here")
    asked = ASKED[architecture]
    answer = answer_of(asked, tmp_path)
    assert answer.model == architecture
    assert ModelFacts.of(asked.config).names_family
    assert disagreements(asked, answer) == []
    assert not answer.stopped
    # Routers are made without a quantization config.
    family = ModelFacts.of(asked.config).family
    routers = [name for name in modules_of(asked) if family.role_by_name(name) is Role.ROUTER]
    assert not {family.sglang_name(name) for name in routers} & answer.offered


def test_another_family_than_the_classs_is_noticed(tmp_path: Path) -> None:
    asked = ASKED["Qwen3_5MoeForConditionalGeneration"]
    answer = answer_of(asked, tmp_path)
    right = ModelFacts.of(asked.config).family
    joined = disagreements(asked, answer, replace(right, fused=Family().fused))
    assert any("in_proj_qkvz" in text and "as the rules for this model say" in text for _, text in joined)
    renamed = disagreements(asked, answer, replace(right, dropped=()))
    assert any("self_attn.o_proj" in text for _, text in renamed)
    # conv1d is a linear to the class, made without a quantization config
    unquantized = disagreements(asked, answer, replace(right, parameters=frozenset()))
    assert [text for serious, text in unquantized if serious and "conv1d" in text and "without a quant" in text]
    restricted = replace(right, parameters=frozenset(), restrictions=(Restriction(("conv1d",), lambda _: "so it is"),))
    assert not disagreements(asked, answer, restricted)


def test_tensors_that_are_lost_and_parameters_that_none_fills_are_noticed(tmp_path: Path) -> None:
    asked = ASKED["LlamaForCausalLM"]
    tensors = dict(asked.tensors)
    tensors["model.layers.0.self_attn.other.weight"] = tensors.pop("model.layers.0.self_attn.o_proj.weight")
    changed = asked._replace(tensors=tensors)
    found = disagreements(changed, answer_of(changed, tmp_path))
    assert len(found) == 2 and all(serious for serious, _ in found)
    assert "has no parameter for model.layers.0.self_attn.other.weight" in found[0].text
    assert "goes into model.layers.0.self_attn.o_proj.weight" in found[1].text


def test_tensors_that_are_larger_than_their_parameters_are_noticed(tmp_path: Path) -> None:
    """As where a class takes the size of heads from elsewhere than the checkpoint has it."""
    asked = ASKED["Cohere2ForCausalLM"]
    wider = {
        name: (dtype, (2 * shape[0], *shape[1:]) if "self_attn" in name and "o_proj" not in name else shape)
        for name, (dtype, shape) in asked.tensors.items()
    }
    (found,) = disagreements(asked._replace(tensors=wider), answer_of(asked._replace(tensors=wider), tmp_path))
    assert found.serious and "loads only a part of model.layers.{0..2}.self_attn" in found.text


def test_a_model_of_a_real_size_is_asked_in_seconds(tmp_path: Path) -> None:
    asked = ASKED["Qwen3MoeForCausalLM"]
    large = serving.QWEN3_MOE.of(layers=94, experts=128)
    config = {**asked.config, **serving.config_of(large)}
    started = time.process_time()
    asked = Asked(config, {name: ("BF16", size) for name, size in serving.tensors_of(large)}, {})
    answer = answer_of(asked, tmp_path)
    took = time.process_time() - started
    assert len(asked.tensors) > 36_000 and disagreements(asked, answer) == []
    print(f"{len(asked.tensors):,} tensors: {took:.1f} s of CPU")
    assert took < 60


def test_doctor_compares_a_checkpoint_with_the_class_that_serves_it(folder: Path) -> None:
    (asked,) = [finding for finding in examine(family_mix(folder, "qwen3_5_moe")) if finding.subject == "model class"]
    assert asked.status == "ok", asked.text
    assert asked.text.startswith("Qwen3_5MoeForConditionalGeneration takes all ")
