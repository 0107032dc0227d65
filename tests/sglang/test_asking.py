"""Compares each family file with the way that SGLang's own class loads a checkpoint.

The class is made on the meta device and loads tensors without values, so this takes no memory and little time even for
models of real sizes. A test fails when a class of a checked family disappears or changes.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sglang.version
import torch
from support import serving
from support.sglang.asked import ASKED, DRAFTED, Asked, answer_of, modules_of
from support.sglang.families import family_mix
from support.sglang.harness import prepare_deepseek_v4

from mixprec_build.families.base import Family
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.parts import Restriction, Role
from mixprec_build.families.registry import FAMILIES
from mixprec_build.report.doctor import examine
from mixprec_runtime.asking.answer import Answer
from mixprec_runtime.asking.comparison import Disagreement, compare

pytestmark = pytest.mark.usefixtures("sglang")


ABSENT = {
    # LongCat's rotary embedding needs another version of transformers than these tests have
    "0.5.15.post1": {
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "LongcatFlashForCausalLM",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
    },
    # they need another version of transformers than these tests have
    "0.5.23": {
        "Mistral3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "PixtralForConditionalGeneration",
    },
}
"""Classes that some supported versions of SGLang lack, or cannot make here."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the calls for a GPU that models make in their constructors, and keeps what they share to themselves."""
    from sglang.srt.layers.rotary_embedding import factory

    monkeypatch.setattr(factory, "_ROPE_DICT", {})  # on the meta device, without values
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: (9, 0))
    prepare_deepseek_v4(monkeypatch)


def disagreements(asked: Asked, answer: Answer, family: Family | None = None) -> list[Disagreement]:
    facts = ModelFacts.of(asked.config)
    facts = facts if family is None else replace(facts, family=family)
    return compare(answer, facts, modules_of(asked))


def test_every_class_of_a_checked_family_is_asked() -> None:
    classes = {architecture for family in FAMILIES if family.checked for architecture in family.architectures}
    assert classes <= ASKED.keys()


@pytest.mark.parametrize("name", ASKED)
def test_a_family_is_as_its_class(name: str, tmp_path: Path) -> None:
    asked = ASKED[name]
    architecture = asked.config["architectures"][0]
    if architecture in ABSENT.get(sglang.version.__version__, ()):
        pytest.skip("this SGLang cannot make the class here")
    answer = answer_of(asked, tmp_path)
    assert answer.model == architecture
    assert ModelFacts.of(asked.config).names_family
    assert disagreements(asked, answer) == []
    assert not answer.stopped
    # Routers are made without a quantization config.
    family = ModelFacts.of(asked.config).family
    routers = [name for name in modules_of(asked) if family.role_by_name(name) is Role.ROUTER]
    assert not {family.sglang_name(name) for name in routers} & answer.offered


@pytest.mark.parametrize("architecture", DRAFTED)
def test_draft_layers_are_as_their_class(architecture: str, tmp_path: Path) -> None:
    if architecture in ABSENT.get(sglang.version.__version__, ()):
        pytest.skip("this SGLang cannot make the class here")
    asked = DRAFTED[architecture]
    draft = Draft.of(ModelFacts.of(asked.config))
    assert draft is not None
    answer = answer_of(asked, tmp_path, draft=True)
    assert answer.model in draft.described.architectures
    assert disagreements(asked, answer) == []
    assert not answer.stopped
    # What the model takes and what its draft takes are the checkpoint, but for copies of what they share.
    model = answer_of(asked, tmp_path)
    copies = tuple(f".{name}.weight" for name in ("shared_head.head", "embed_tokens"))
    assert not [name for name in model.reached.keys() & answer.reached.keys() if not name.endswith(copies)]
    neither = asked.tensors.keys() - model.reached.keys() - answer.reached.keys()
    assert all(name.endswith(copies) or ".visual." in name for name in neither), neither


def test_every_class_for_drafts_is_asked() -> None:
    described = {family.draft_class.architectures for family in FAMILIES if family.draft_class is not None}
    drafts = (Draft.of(ModelFacts.of(asked.config)) for asked in DRAFTED.values())
    assert described == {draft.described.architectures for draft in drafts if draft is not None}


def test_draft_layers_of_another_name_are_noticed(tmp_path: Path) -> None:
    asked = ASKED["Glm4MoeForCausalLM"]
    tensors = {name.replace(".3.eh_proj", ".3.other"): entry for name, entry in asked.tensors.items()}
    changed = asked._replace(tensors=tensors)
    found = disagreements(changed, answer_of(changed, tmp_path, draft=True))
    assert [serious for serious, _ in found] == [True, True]
    assert "model.layers.3.other" in found[0].text and "model.eh_proj.weight" in found[1].text


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


@pytest.mark.parametrize(
    ("stored", "now", "message"),
    [
        ("o_proj", "out_proj", "has no parameter for model.layers.{0..1}.self_attn.o_proj.weight"),
        ("qkv_proj", "q_k_v", "nothing of the checkpoint goes into model.layers.{0..1}.self_attn.q_k_v.weight"),
    ],
)
def test_a_class_that_changed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, now: str, message: str
) -> None:
    """As in a later SGLang: a module of a layer has another name."""
    from sglang.srt.models.llama import LlamaAttention

    asked, init = ASKED["LlamaForCausalLM"], LlamaAttention.__init__

    def changed(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        self._modules[now] = self._modules.pop(stored)
        vars(self)[stored] = self._modules[now]  # 0.5.23 reads it where it makes the model, which knows its new name

    monkeypatch.setattr(LlamaAttention, "__init__", changed)
    found = disagreements(asked, answer_of(asked, tmp_path))
    assert any(serious and message in text for serious, text in found), found


def test_a_class_that_is_gone_is_noticed(tmp_path: Path) -> None:
    asked = ASKED["LlamaForCausalLM"]
    gone = asked._replace(config={**asked.config, "architectures": ["GoneForCausalLM"], "model_type": "llama"})
    with pytest.raises((ValueError, AssertionError, ImportError)):
        assert answer_of(gone, tmp_path).model == "GoneForCausalLM"


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
    """And, without a GPU, has SGLang's names, the repairs, and what a GPU is needed for."""
    findings = examine(family_mix(folder, "qwen3_5_moe"), kernels=True)
    (asked,) = [finding for finding in findings if finding.subject == "model class"]
    assert asked.status == "ok", asked.text
    classes = "Qwen3_5MoeForConditionalGeneration, with Qwen3_5ForCausalLMMTP for its draft layers,"
    assert asked.text.startswith(f"{classes} takes all ")
    told = {(finding.status, finding.subject): finding.text for finding in findings}
    assert re.fullmatch(r"all \d+ names and \d+ arguments are as the plugin uses them", told["ok", "SGLang's names"])
    assert "scales of experts" in told["ok", "repairs: GPTQ"]
    assert told["warn", "GPU"].startswith("torch finds none: kernels of quantized formats need one")
    assert re.match(r"\d+ modules need a GPU for Marlin.*: compute capability 8.0 and up", told["warn", "gptq_int4"])
    assert "GPU" in told["warn", "kernels"]
