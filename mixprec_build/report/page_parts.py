"""The parts of a page with a checkpoint's map that do not depend on the checkpoint: style and script.

The page is one file: no network, no library, light or dark as the browser asks. All text of the checkpoint's comes from
the block of JSON and is set as text, never as markup.
"""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d1d9e0;--panel:#f6f8fa;--low:#eef1f4;
--high:#0b3d91}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--line:#3d444d;--panel:#151b23;
--low:#1c232c;--high:#8ec5ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1500px;padding:1.5rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.25rem 0}.dim{color:var(--dim)}
.maps{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;max-width:100%}figcaption{margin-bottom:.25rem}
.scroll{overflow:auto;width:fit-content;max-width:100%;max-height:80vh;border:1px solid var(--line);
background:var(--panel)}
canvas{display:block}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.5rem 0;padding:0;list-style:none}
.legend i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;vertical-align:-.1em;border-radius:2px}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.2rem .6rem;text-align:left;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--high)}
input,.pages button{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;
padding:.25rem .6rem}
.pages{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;margin:.5rem 0}
#tip{position:fixed;display:none;pointer-events:none;z-index:1;max-width:30rem;padding:.3rem .6rem;white-space:pre-line;
background:var(--fg);color:var(--bg);border-radius:6px;font-size:.85rem}
svg{max-width:100%;height:auto}svg text{fill:currentColor;font:12px system-ui,sans-serif}
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.names.map((name, i) => ({name, format: data.formats[data.format[i]].name, f: data.format[i],
  source: data.sources.length ? data.sources[data.source[i]] : "", bytes: data.bytes[i], weights: data.weights[i],
  bits: data.weights[i] ? 8 * data.bytes[i] / data.weights[i] : null, layer: data.layer[i], place: data.place[i],
  expert: data.expert[i], error: data.error ? data.error[i] : null,
  activity: data.activity ? data.activity[i] : null}));
const number = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const short = value => value === null ? "" : value === 0 ? "0" : Math.abs(value) >= 1e-3 ? value.toPrecision(3)
  : value.toExponential(2);
const make = (tag, text, parent) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
const tip = make("div", "", document.body);
tip.id = "tip";

// Cells: one for each layer and column; an expert's projections share one.
function cells(wanted) {
  const found = new Map();
  for (const row of rows) {
    if (row.layer < 0 || (row.expert >= 0) !== wanted) continue;
    const column = wanted ? row.expert : row.place;
    const key = row.layer + ":" + column;
    const cell = found.get(key) || {layer: row.layer, column, rows: []};
    cell.rows.push(row);
    found.set(key, cell);
  }
  return [...found.values()];
}
function mean(cell, key) {
  const values = cell.rows.map(row => row[key]).filter(value => value !== null);
  return values.length ? values.reduce((a, b) => a + b) / values.length : null;
}
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function mixed(low, high, share) {
  const part = at => Math.round(parseInt(low.slice(at, at + 2), 16) * (1 - share)
    + parseInt(high.slice(at, at + 2), 16) * share);
  return `rgb(${part(1)},${part(3)},${part(5)})`;
}
const full = color => color.length === 4 ? "#" + [...color.slice(1)].map(c => c + c).join("") : color;

function figure(home, title, all, columns, label, key) {
  const layers = [...new Set(all.map(cell => cell.layer))].sort((a, b) => a - b);
  const row = new Map(layers.map((layer, at) => [layer, at]));
  const column = new Map(columns.map((name, at) => [name, at]));
  const wide = columns.length > 300 ? 2 : columns.length > 150 ? 4 : columns.length > 40 ? 6 : 16;
  const high = layers.length > 60 ? 7 : 12;
  const left = 34;
  const node = make("figure", undefined, home);
  make("figcaption", title, node);
  const box = make("div", undefined, node);
  box.className = "scroll";
  const canvas = make("canvas", undefined, box);
  const ratio = window.devicePixelRatio || 1, width = left + columns.length * wide, height = 16 + layers.length * high;
  canvas.width = Math.ceil(width * ratio);
  canvas.height = Math.ceil(height * ratio);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: ${layers.length} layers by ${columns.length} columns`);
  const values = key ? all.map(cell => mean(cell, key)) : [];
  const known = values.filter(value => value !== null);
  const most = known.reduce((a, b) => Math.max(a, b), 0);
  function draw() {
    const pen = canvas.getContext("2d");
    const low = full(css("--low")), top = full(css("--high"));
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = css("--dim");
    pen.font = "10px system-ui,sans-serif";
    pen.textAlign = "right";
    const every = Math.ceil(11 / high);
    layers.forEach((layer, at) => {
      if (at % every === 0) pen.fillText(layer, left - 4, 16 + at * high + Math.min(high, 10));
    });
    pen.textAlign = "left";
    const step = 2 ** Math.ceil(Math.log2(40 / wide));
    if (typeof columns[0] === "number") columns.forEach((name, at) => {
      if (at % step === 0 && left + at * wide + 20 < width) pen.fillText(name, left + at * wide, 10);
    });
    all.forEach((cell, i) => {
      const x = left + column.get(cell.column) * wide, y = 16 + row.get(cell.layer) * high;
      const w = Math.max(1, wide - (wide > 3 ? 1 : 0)), h = high - 1;
      if (key) {
        pen.fillStyle = values[i] === null ? css("--panel") : mixed(low, top, most ? Math.sqrt(values[i] / most) : 0);
        pen.fillRect(x, y, w, h);
        return;
      }
      const kinds = [...new Set(cell.rows.map(row => row.f))].sort((a, b) => a - b);
      kinds.forEach((kind, at) => {  // several formats in one expert lie above one another
        pen.fillStyle = data.formats[kind].color;
        pen.fillRect(x, y + Math.floor(at * h / kinds.length), w, Math.ceil(h / kinds.length));
      });
    });
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const at = new Map(all.map(cell => [row.get(cell.layer) + ":" + column.get(cell.column), cell]));
  canvas.addEventListener("mousemove", event => {
    const cell = at.get(Math.floor((event.offsetY - 16) / high) + ":" + Math.floor((event.offsetX - left) / wide));
    tip.style.display = cell ? "block" : "none";
    if (!cell) return;
    tip.textContent = `layer ${cell.layer}, ${label} ${cell.column}\n` + cell.rows.map(row => {
      const parts = [row.name.split(".").pop(), row.format];
      if (row.source) parts.push("from " + row.source);
      if (row.error !== null) parts.push("error " + short(row.error));
      if (row.activity !== null) parts.push("runs for " + short(100 * row.activity) + " % of tokens");
      return parts.join(", ");
    }).join("\n");
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  if (key) {
    const text = make("p", `from 0 to ${short(most)}; brightness by the square root`, node);
    text.className = "dim";
  }
}

const legend = document.getElementById("legend");
for (const format of data.formats) {
  const item = make("li", undefined, legend);
  make("i", undefined, item).style.background = format.color;
  item.append(`${format.name}: ${number.format(format.modules)} modules, ${format.size}`);
}
for (const [wanted, home] of [[true, "experts"], [false, "others"]]) {
  const all = cells(wanted), node = document.getElementById(home);
  if (!all.length) {
    node.parentElement.remove();
    continue;
  }
  const columns = [...new Set(all.map(cell => cell.column))];
  if (wanted) columns.sort((a, b) => a - b);
  const label = wanted ? "expert" : "";
  figure(node, "format", all, columns, label, "");
  if (data.activity && wanted) figure(node, "activity: share of tokens", all, columns, label, "activity");
  if (data.error) figure(node, "relative error of weights", all, columns, label, "error");
  if (!wanted) make("p", "Columns, from left to right: " + columns.join(", "), node.parentElement).className = "dim";
}

const heads = [["name", "module", false], ["format", "format", false], ["source", "source", false],
  ["bits", "bits a weight", true], ["bytes", "bytes", true], ["weights", "parameters", true],
  ["activity", "share of tokens", true], ["error", "relative error", true]]
  .filter(([key]) => rows.some(row => row[key] !== null && row[key] !== ""));
const table = document.getElementById("table"), filter = document.getElementById("filter");
const perPage = 100;
let order = ["name", 1], page = 0;
const names = new Intl.Collator("en", {numeric: true});
rows.sort((a, b) => names.compare(a.name, b.name));
rows.forEach((row, i) => { row.at = i; });
function show() {
  const word = filter.value.toLowerCase();
  const text = row => (row.name + " " + row.format + " " + row.source).toLowerCase();
  const found = rows.filter(row => !word || text(row).includes(word));
  const [key, sign] = order;
  found.sort((a, b) => {
    const x = a[key], y = b[key];
    if (key === "name") return sign * (a.at - b.at);
    if (x === null || y === null) return (x === null) - (y === null) || a.at - b.at;
    return sign * (typeof x === "number" ? x - y : names.compare(x, y)) || a.at - b.at;
  });
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  page = Math.min(page, pages - 1);
  table.replaceChildren();
  const top = make("tr", undefined, make("thead", undefined, table));
  for (const [name, title, numeric] of heads) {
    const head = make("th", undefined, top);
    if (numeric) head.className = "n";
    const sorted = name === key;
    if (sorted) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const button = make("button", title + (sorted ? (sign > 0 ? " \u25b2" : " \u25bc") : ""), head);
    button.addEventListener("click", () => {
      order = [name, sorted ? -sign : numeric ? -1 : 1];
      page = 0;
      show();
    });
  }
  const body = make("tbody", undefined, table);
  for (const row of found.slice(page * perPage, (page + 1) * perPage)) {
    const line = make("tr", undefined, body);
    for (const [name, , numeric] of heads) {
      const value = row[name];
      const text = !numeric ? value : value === null ? "" : name === "bytes" || name === "weights"
        ? number.format(value) : name === "bits" ? value.toFixed(2) : short(value);
      const cell = make("td", text, line);
      if (numeric) cell.className = "n";
    }
  }
  document.getElementById("count").textContent =
    `${number.format(found.length)} modules, page ${page + 1} of ${number.format(pages)}`;
}
filter.addEventListener("input", () => { page = 0; show(); });
document.getElementById("before").addEventListener("click", () => { page = Math.max(0, page - 1); show(); });
document.getElementById("after").addEventListener("click", () => { page += 1; show(); });
show();
"""
