"""SGLang finds the plugin by its entry point, and takes the method from a checkpoint's config.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.hostile import CONFIG, Drawn, Hostile
from support.sglang.harness import last_json, make, run_python, sources
from support.sglang.layers import FORMATS
from support.sglang.mixes import MIXES, mix

from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.versions import between
from mixprec_runtime.contact.names import SESSIONS_SINCE

START = """
import json, sys
import sglang.srt.configs.model_config  # SGLang's main process has it in any case
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
if len(sys.argv) > 2:
    import sglang.version
    sglang.version.__version__ = sys.argv[2]
load_plugins()
"""

MAIN_PROCESS = (
    START
    + """
from sglang.srt.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from sglang.srt.server_args import prepare_server_args
ours = [t for t, hooks in HookRegistry._hooks.items() if any("mixprec" in h.__module__ for _, h, _ in hooks)]
heavy = ["managers.scheduler", "managers.tp_worker", "model_executor.model_runner", "models.llama", "models.qwen3_moe"]
out = {
    "method": QUANTIZATION_METHODS["mixprec"].__name__,
    "same": get_quantization_config("mixprec") is QUANTIZATION_METHODS["mixprec"],
    "heavy": [name for name in heavy if f"sglang.srt.{name}" in sys.modules],
    "hooks": ours,
    "flag": prepare_server_args(
        ["--model-path", sys.argv[1], "--device", "cpu", "--quantization", "mixprec"]
    ).quantization,
    "no flag": prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"]).quantization,
}
import sglang.srt.managers.scheduler
from mixprec_runtime import hooks
HookRegistry.reset()
hooks.register()
HookRegistry.apply_hooks()
out["worker"] = sorted(HookRegistry._patched)
print(json.dumps(out))
"""
)

UNFIT = (
    START
    + """
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import _get_quantization_config
from sglang.srt.server_args import ServerArgs
config = ModelConfig.from_server_args(ServerArgs(model_path=sys.argv[1], device="cpu"))
try:
    _get_quantization_config(config, LoadConfig())
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
)


UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


def test_a_fresh_process_knows_the_method(folder: Path) -> None:
    out = last_json(run_python(MAIN_PROCESS, str(mix(folder, "llama"))))
    assert (out["method"], out["same"], out["flag"], out["no flag"]) == ("MixPrecConfig", True, "mixprec", None)
    assert out["heavy"] == []
    assert not any("Scheduler" in target for target in out["hooks"])
    import sglang.version

    sessions = ["begin", "end"] if between(SESSIONS_SINCE, "", sglang.version.__version__) else []
    assert out["worker"] == [
        "sglang.srt.configs.model_config.ModelConfig._verify_quantization",
        "sglang.srt.eplb.expert_location_updater.update_expert_weights_single_layer",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "sglang.srt.managers.scheduler.Scheduler.expert_distribution_handle",
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        *(f"{UPDATER}.{edge}_weight_update" for edge in sessions),
        *(f"{UPDATER}.update_weights_from_{way}" for way in ("disk", "distributed", "ipc", "tensor")),
        "sglang.srt.model_loader.loader._initialize_model",
        "sglang.srt.model_loader.utils.get_model_architecture",
    ]


def test_a_sglang_that_does_not_fit_is_told_so_when_it_loads_a_checkpoint(folder: Path) -> None:
    message = last_json(run_python(UNFIT, str(mix(folder, "llama")), "0.5.14"))
    assert "serves with SGLang 0.5.15.post1 and newer, tested up to 0.5.23, and this is SGLang 0.5.14" in message
    assert "pip install 'sglang>=0.5.15.post1,<=0.5.23'" in message


@pytest.mark.parametrize(
    ("version", "fits", "tested"),
    [
        ("0.5.15", False, True),
        ("0.5.15.post1", True, True),
        ("0.5.17", True, True),
        ("0.5.17.dev3+g12ab", True, True),
        ("0.5.23", True, True),
        ("0.5.23.post1", True, False),
        ("0.5.24rc1", True, False),
        ("0.6.0", True, False),
    ],
)
def test_versions_that_fit(version: str, fits: bool, tested: bool) -> None:
    from mixprec_build.versions import untested, version_problem

    assert (version_problem(version) is None) == fits
    assert (untested(version) is None) == tested


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("flag", [None, "mixprec"])
def test_the_method_is_taken_from_the_checkpoint(folder: Path, flag: str | None) -> None:
    _, config = make(mix(folder, "qwen3"), quantization=flag)
    assert config.quantization == "mixprec"


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("flag", ["fp8", "gptq_marlin", "w8a8_fp8"])
def test_another_method_is_refused(folder: Path, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"mixprec.*{flag}"):
        make(mix(folder, "qwen3"), quantization=flag)


@pytest.mark.usefixtures("sglang")
def test_models_of_other_methods_are_left_alone(folder: Path) -> None:
    model, config = make(sources(folder, MIXES["llama"][0])["fp8_block"])
    assert config.quantization == "fp8"
    method = model.model.layers[0].self_attn.qkv_proj.quant_method
    assert type(method).__name__ == "Fp8LinearMethod" and not vars(method).keys() & {"create_weights", "mixprec_format"}
    assert "load_weights" not in vars(model)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("kind", ["fp8_block", "int8_block", "nvfp4", "w4afp8"])
def test_no_format_is_logged_as_that_of_all_weights(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    from mixprec_runtime.native import NativeFormat, sglang_config

    with caplog.at_level("INFO"):
        NativeFormat(FORMATS[kind])
        assert "Detected" not in caplog.text
        sglang_config(FORMATS[kind])
    assert re.search(r"Detected \w+ checkpoint", caplog.text)  # what SGLang logs for a checkpoint of this format


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_is_refused_in_words(folder: Path, tmp_path: Path, seed: int) -> None:
    """Puts hostile values at random places of config.json and the manifest."""
    from mixprec_runtime import hooks
    from mixprec_runtime.config import MixPrecConfig
    from mixprec_runtime.loading import loader

    checkpoint = Path(shutil.copytree(mix(folder, "qwen3"), tmp_path / "damaged"))
    refused = 0
    for i in range(80):
        with Hostile(checkpoint, Drawn(100 * seed + i), (CONFIG, MANIFEST)):
            model = SimpleNamespace(model_path=str(checkpoint), revision=None)
            try:
                declared = json.loads((checkpoint / CONFIG).read_text())["quantization_config"]
                assert declared["quant_method"] == "mixprec"
            except (ValueError, LookupError, TypeError, RecursionError, AssertionError):
                continue  # SGLang then does not call the plugin
            try:
                config = MixPrecConfig.from_config(declared)
                path, manifest, _ = hooks._checkpoint(model)
                hooks._check_declared(config.bind(manifest.modules), manifest)
                loader.require_merged(path, manifest, "this is a test")
            except (RuntimeError, ValueError) as error:
                assert str(checkpoint) in str(error) or "config.json" in str(error)
                refused += 1
    assert refused > 10


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("damage", [{"version": 2}, {"default": "nothing"}, {"formats": {"x": {"kind": "bogus"}}}])
def test_a_damaged_declaration_is_refused(folder: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    checkpoint = shutil.copytree(mix(folder, "qwen3"), tmp_path / "damaged")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= damage
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json of this checkpoint: quantization_config"):
        make(checkpoint)


@pytest.mark.usefixtures("sglang")
def test_a_draft_from_elsewhere_keeps_its_own_method(folder: Path) -> None:
    """SGLang passes ``--quantization mixprec`` on to the draft; of a draft in BF16 it would make a compiled one."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    paths = sources(folder, MIXES["llama"][0])
    for path, method in ((paths["bf16"], None), (paths["fp8_block"], "fp8"), (mix(folder, "llama"), "mixprec")):
        config = ModelConfig(str(path), quantization="mixprec", is_draft_model=True)
        assert config.quantization == method
        made = loader._get_quantization_config(config, LoadConfig())
        assert (None if made is None else made.get_name()) == method
    assert ModelConfig(str(paths["bf16"]), quantization="mixprec").quantization == "mixprec"
    assert ModelConfig(str(paths["bf16"]), is_draft_model=True).quantization is None
