"""The page with a checkpoint's map: sound HTML, every module once, nothing of it run or fetched, drawn by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.llama import write_recipe, write_sources
from support.run import call, invoke

import mixprec_build as mp
from mixprec_build.errors import OutputError, StatsError
from mixprec_build.report.page import Row, map_page, read_errors

EMPTY = {"meta", "input", "br", "img", "link"}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no headless Chromium")


class Page(HTMLParser):
    """A page whose elements are balanced, as data: its elements, attributes, text, and block of JSON."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.json = ""
        self._open: list[str] = []
        self._in_json = False
        self.feed(text)
        self.close()
        assert self._open == [], "elements are left open"
        self.data: dict[str, Any] = json.loads(self.json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += attrs
        self._in_json = ("id", "data") in attrs
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._in_json = False

    def handle_data(self, data: str) -> None:
        if self._in_json:
            self.json += data
        elif not self._open or self._open[-1] not in ("script", "style"):
            self.text.append(data)


def page_at(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'(?s)id="data">.*?</script>', "", text))
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "srcset", "action", "onclick", "onerror"})
    assert "script" in page.elements and page.elements["script"] == 2 and page.elements["style"] == 1
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources with a layer of four experts, and a mix of them, ``out``."""
    folder = tmp_path_factory.mktemp("moe")
    write_sources(folder, experts=4)
    weights = {"model.layers.*.self_attn.*": "fp8", "model.layers.*.mlp.experts.*": "int4"}
    weights["model.layers.*.mlp.experts.2.*"] = "fp8"
    mp.build(write_recipe(folder / "mix.yaml", weights), folder / "out")
    counts = {f"layer_1_expert_{e}": {"layer_id": 1, "expert_id": e, "activation_count": 10 * e} for e in range(4)}
    (folder / "activity.json").write_text(json.dumps({"expert_stats": counts}))
    return folder


def rows_of(page: Page) -> dict[str, dict[str, Any]]:
    data = page.data
    assert len(set(data["names"])) == len(data["names"])
    return {
        name: {
            "format": data["formats"][data["format"][i]]["name"],
            "source": data["sources"][data["source"][i]] if data["sources"] else "",
            **{key: data[key][i] for key in ("bytes", "weights", "layer", "place", "expert")},
            **{key: data[key] and data[key][i] for key in ("activity", "error")},
        }
        for i, name in enumerate(data["names"])
    }


def test_every_module_is_on_the_page_once(folder: Path, tmp_path: Path) -> None:
    assert call("inspect", folder / "out", "--html", tmp_path / "map.html") == 0
    page = page_at(tmp_path / "map.html")
    rows = rows_of(page)
    plan = mp.plan(folder / "mix.yaml")
    assert {n: (r["format"], r["source"], r["bytes"]) for n, r in rows.items()} == {
        name: (module.format.kind, module.source, module.nbytes) for name, module in plan.modules.items()
    }
    text = (tmp_path / "map.html").read_text()
    assert all(text.count(json.dumps(name)) == 1 for name in plan.modules)
    expert = rows["model.layers.1.mlp.experts.2.up_proj"]
    assert (expert["layer"], expert["expert"], expert["weights"]) == (1, 2, 128 * 128)
    assert rows["model.layers.0.self_attn.q_proj"]["place"] == "self_attn.q_proj"
    assert rows["model.layers.1.mlp.gate"]["layer"] == rows["model.norm"]["layer"] == -1
    assert page.data["activity"] is None and page.data["error"] is None


def test_a_plain_checkpoint_has_no_sources(folder: Path, tmp_path: Path) -> None:
    assert call("inspect", folder / "fp8", "--html", tmp_path / "map.html") == 0
    assert page_at(tmp_path / "map.html").data["sources"] == []


def test_activity_and_errors_beside_formats(folder: Path, tmp_path: Path) -> None:
    shown = invoke("verify", folder / "out", "--against", "bf16", "--json").output
    (tmp_path / "errors.json").write_text(shown)
    more = ("--stats", folder / "activity.json", "--errors", tmp_path / "errors.json")
    assert call("inspect", folder / "out", "--html", tmp_path / "map.html", *more) == 0
    rows = rows_of(page_at(tmp_path / "map.html"))
    for error in json.loads(shown)["errors"]:
        assert rows[error["module"]]["error"] == pytest.approx(error["relative"], rel=1e-5)
    assert rows["model.norm"]["error"] is None
    # Half a token more than was counted, of a layer's 60 and one.
    shares = [rows[f"model.layers.1.mlp.experts.{e}.up_proj"]["activity"] for e in range(4)]
    assert shares == pytest.approx([(10 * e + 0.5) / 61 for e in range(4)], rel=1e-5)
    assert rows["model.layers.0.mlp.up_proj"]["activity"] is None


def test_files_of_another_model_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "map.html"
    stats = {"expert_stats": {"a": {"layer_id": 7, "expert_id": 0, "activation_count": 1}}}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    (tmp_path / "errors.json").write_text('{"errors": [{"module": "no.such", "relative": 0.5}]}')
    for option, file in (("--stats", "stats.json"), ("--errors", "errors.json")):
        assert call("inspect", folder / "out", "--html", page, option, tmp_path / file) == 1
        assert "does not have" in capsys.readouterr().err and not page.exists()


NO_ERRORS = [
    "",
    "{}x",
    "[" * 99999,
    '{"errors": 7}',
    '{"errors": [3]}',
    '{"errors": [{"module": "a"}]}',
    '{"errors": [{"module": "a", "relative": "x"}]}',
    '{"errors": [{"module": "a", "relative": NaN}]}',
    '{"errors": [{"module": "a", "relative": -1}]}',
]


@pytest.mark.parametrize("text", NO_ERRORS)
def test_files_that_have_no_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(StatsError, match="verify OUT --against NAME --json"):
        read_errors(tmp_path / "e.json")


def test_a_suggestion_has_its_frontier(folder: Path, tmp_path: Path) -> None:
    command = (
        "suggest",
        folder / "mix.yaml",
        "--budget",
        "700kB",
        "-o",
        tmp_path / "s.yaml",
        "--errors",
        tmp_path / "e",
    )
    more = ("--stats", folder / "activity.json", "--html", tmp_path / "s.html", "--quiet")
    assert call(*command, *more) == 0
    page = page_at(tmp_path / "s.html")
    rows = rows_of(page)
    assert rows.keys() == mp.plan(tmp_path / "s.yaml").modules.keys()
    assert page.elements["svg"] == page.elements["polyline"] == 1
    assert {"this mix", "all fp8", "all int4", "budget"} <= set(page.text)
    by_format: dict[str, list[float]] = {}
    for row in rows.values():
        if row["error"] is not None:
            by_format.setdefault(row["format"], []).append(row["error"])
    assert by_format.keys() > {"fp8_block"} or by_format.keys() > {"gptq_int4"}
    assert max(by_format.get("bf16", [0])) == 0 < min(by_format.get("fp8_block", by_format.get("gptq_int4", [])))
    assert rows["model.layers.1.mlp.experts.3.up_proj"]["activity"] == pytest.approx(30.5 / 61, rel=1e-5)


HOSTILE = [
    "</script><img src=x onerror=document.title='owned'>",
    "<!--<script>",
    "]]>&lt;/script&gt;",
    "a\u2028b\u202e\x00",
    "model.layers.0.</title><svg onload=alert(1)>.mlp.up_proj",
    "https://example.org/x.js",
    "__proto__",
]


def test_hostile_names_are_text() -> None:
    rows = [Row(name, "</script>", "<b>", 8, 4, 0, name, -1) for name in HOSTILE]
    text = map_page(rows, "<b onclick=x>", ["<img src=x>"], FRONTIER)
    page = Page(text)
    assert page.data["names"] == HOSTILE and page.data["place"] == HOSTILE and page.data["sources"] == ["<b>"]
    assert page.elements["script"] == 2 and not page.elements.keys() & {"img", "b", "i"}
    assert {"<b onclick=x>", "<img src=x>", "all <i>"} <= {*page.text}
    assert not {"onerror", "onload", "onclick", "src"} & {name for name, _ in page.attributes}
    block = text.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(block) and block.isascii()


def test_a_hostile_checkpoint(tmp_path: Path) -> None:
    """Names of tensors are bounded by the reader, those of folders and types of models are not."""
    folder = tmp_path / "<b onclick=x>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "</h1><script>alert(1)</script>"}))
    save_file({"a.weight": torch.ones(2, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert call("inspect", folder, "--html", tmp_path / "map.html") == 0
    page = page_at(tmp_path / "map.html")
    assert str(folder) in page.text and any("<script>alert(1)</script>" in text for text in page.text)
    assert "b" not in page.elements


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--html", "map.png"), 2, "pages are written as .html"),
        (("--html", "no/such/map.html"), 2, "there is no folder"),
        (("--html", "."), 2, "is a folder"),
        (("--stats", "a.json"), 2, "--stats"),
        (("--errors", "a.json"), 2, "--errors"),
    ],
)
def test_what_cannot_be_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert call("inspect", "out", *arguments) == code
    assert message in capsys.readouterr().err


def many(layers: int, experts: int) -> list[Row]:
    rows = [Row("model.embed_tokens", "bf16", "", 8, 4), *(Row(name, "bf16", "", 8, 4) for name in HOSTILE)]
    for layer in range(layers):
        rows.append(Row(f"model.layers.{layer}.self_attn.o_proj", "fp8_block", "", 4, 4, layer, "self_attn.o_proj"))
        for expert in range(experts):
            kind = "fp8_block" if (layer + expert) % 5 == 0 else "gptq_int4"
            share = (expert + 1) / experts
            rows += [
                Row(f"model.layers.{layer}.mlp.experts.{expert}.{word}_proj", kind, "", 2, 4, layer, "experts", expert)
                for word in ("gate", "up", "down")
            ]
            for row in rows[-3:]:
                row.activity, row.error = share, 0.1 if kind == "gptq_int4" else 0.026
    return rows


FRONTIER = {
    "frontier": [{"bytes": 10 * i, "loss": 1 / i} for i in range(1, 9)],
    "uniform": [{"source": "<i>", "bytes": 30, "loss": 0.5}],
    "bytes": 40, "loss": 0.25, "budget": 45, "objective": "relative",
}  # fmt: skip


def test_many_layers_with_many_experts(tmp_path: Path) -> None:
    """94 layers of 512 experts: 144,000 modules."""
    rows = many(94, 512)
    started = time.process_time()
    text = map_page(rows, "many", [], FRONTIER)
    assert time.process_time() - started < 20
    assert len(text) < 20_000_000
    page = Page(text)
    assert page.data["names"] == [row.name for row in rows]
    assert sum(page.elements.values()) < 200, "nothing is an element for each module"


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_a_frontier_of_one_point(loss: float) -> None:
    one = {"frontier": [{"bytes": 10, "loss": loss}], "uniform": [], "bytes": 10, "loss": loss, "budget": 10}
    text = map_page(many(1, 1), "one", [], {**one, "objective": "weight"})
    assert Page(text).elements["polyline"] == 1 and "nan" not in text.split("<script")[0]


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *options]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    return subprocess.run([*command, profile, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)


@needs_browser
def test_a_browser_runs_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(map_page(many(4, 16), "<b>title</b>", ["about"], FRONTIER), encoding="utf-8")
    dom = browse(path, "--dump-dom").stdout
    assert dom.count("<canvas") == 3 + 2  # format, activity, error; of other linears no activity
    assert "204 modules, page 1 of 3" in dom.replace("&nbsp;", " ")
    assert dom.count("<tr>") == 101 and "fp8_block: " in dom
    assert "<title>&lt;b&gt;title&lt;/b&gt;</title>" in dom and "owned" not in dom.split("</title>")[0]
    assert (
        "&lt;/script&gt;&lt;img src=x onerror=document.title='owned'&gt;" in dom
        and "<img" not in dom.split('id="table"')[1]
    )


@needs_browser
def test_the_table_is_sorted_and_filtered_by_its_reader(tmp_path: Path) -> None:
    click = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'bytes').click();"
    word = "filter.value = 'SELF_attn'; filter.dispatchEvent(new Event('input'));"
    first = []
    for script in ("", click, word):
        text = map_page([*many(2, 4), Row("zz.large", "bf16", "", 99, 4)], "sorted", [])
        path = tmp_path / "page.html"
        path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        dom = browse(path, "--dump-dom").stdout
        first.append(re.findall(r"<tbody><tr><td>([^<]*)</td>", dom)[0])
    assert first[1:] == ["zz.large", "model.layers.0.self_attn.o_proj"] and first[0] != "zz.large"
    assert "2 modules, page 1 of 1" in dom


@needs_browser
def test_it_is_drawn_light_and_dark(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(map_page(many(12, 64), "map", ["about"], FRONTIER), encoding="utf-8")
    pictures = []
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        browse(path, f"--screenshot={picture}", "--window-size=1200,1000", *scheme)
        pictures.append(picture.read_bytes())
    image = pytest.importorskip("PIL.Image")
    light, dark = (image.open(tmp_path / f"{dark}.png").convert("RGB") for dark in (False, True))
    assert light.size == dark.size == (1200, 1000)
    assert light.getpixel((2, 2)) == (255, 255, 255) and dark.getpixel((2, 2)) == (13, 17, 23)
    for picture in (light, dark):
        colors = {color for _, color in picture.getcolors(1 << 24)}
        assert {(76, 120, 168), (245, 133, 24), (84, 162, 75)} <= colors, "the three formats"


def test_a_page_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    from mixprec_build.report.page import write_page

    with pytest.raises(OutputError, match=r"map\.html"):
        write_page(tmp_path / "none" / "map.html", "x")


@pytest.mark.parametrize("relative", ["NaN", "-1", '"x"', "1" + "0" * 400, "[]"])
def test_errors_that_are_no_numbers(tmp_path: Path, relative: str) -> None:
    from mixprec_build.report.page import read_errors

    path = tmp_path / "errors.json"
    path.write_text(f'{{"errors": [{{"module": "lm_head", "relative": {relative}}}]}}')
    with pytest.raises(StatsError, match="no errors of modules; write them with"):
        read_errors(path)
