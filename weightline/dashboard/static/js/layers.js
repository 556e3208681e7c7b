// The model as a picture: a row a kind of module, a column a layer, darker where more of it changed.
import { el, hint } from "./dom.js";
import { count, percent } from "./format.js";

const SHORT = [
  [/^self_attn\.|^attn\.|^attention\./, ""],
  [/^mlp\.experts\./, "experts "],
  [/^mlp\.|^feed_forward\./, ""],
  [/_proj$/, ""],
  [/^input_layernorm$/, "norm in"],
  [/^post_attention_layernorm$/, "norm mid"],
  [/layernorm/, "norm"],
  [/_/g, " "],
  [/^model\./, ""],
];

const shorten = (name) => SHORT.reduce((text, [pattern, by]) => text.replace(pattern, by), name);

/** How much of a cell changed, 0..1. Counted elements where there are some, else the share of tensors that differ. */
function shareOf(cell) {
  if (cell.num_changed !== null) return cell.num_elements ? cell.num_changed / cell.num_elements : 0;
  return cell.num_tensors ? cell.num_different / cell.num_tensors : 0;
}

function telling(name, cell) {
  if (cell.num_changed !== null) {
    return [name, `${percent(shareOf(cell))} changed: ${count(cell.num_changed)} of ${count(cell.num_elements)}`];
  }
  const different = cell.num_tensors === 1 ? "has other bits" : `${cell.num_different} of ${cell.num_tensors} tensors have other bits`;
  return [name, cell.num_different ? different : "same bits"];
}

/** The picture of a `layers` document, with its legend and the same as a table. */
export function layerPicture(layers, isCounted, action = null) {
  const all = [...layers.layers.flatMap((row) => row.cells.filter(Boolean)), ...layers.outside];
  const most = Math.max(...all.map(shareOf), 0) || 1;
  const rows = layers.columns.map((module, column) => moduleRow(module, layers.layers.map((row) => [row.layer, row.cells[column]]), most));
  const last = layers.layers.at(-1)?.layer;
  const axis = last === undefined ? null : el("div", { class: "prow" }, el("span"), el("div", { class: "axis" }, el("span", {}, `layer ${layers.layers[0].layer}`), last ? el("span", {}, String(last)) : null));
  const outside = layers.outside.map((cell) => moduleRow(cell.name, [[null, cell]], most));
  return [
    el("div", { class: "picture", role: "img", "aria-label": summary(layers, isCounted) }, rows, axis, el("div", { class: "outside" }, outside)),
    el(
      "div",
      { class: "heat-legend num" },
      isCounted ? ["0", el("i"), `${percent(most)} of a tensor's elements`] : ["same bits", el("i"), "other bits"],
      action,
    ),
    el("details", { class: "as-table" }, el("summary", {}, "As a table"), el("div", { class: "scroll" }, asTable(layers))),
  ];
}

function moduleRow(module, cells, most) {
  const drawn = cells.map(([layer, cell]) => {
    if (!cell) return el("span", { class: "cell absent" });
    const element = el("span", { class: "cell", "--share": (shareOf(cell) / most).toFixed(4) });
    hint(element, () => telling(layer === null ? module : `layer ${layer}, ${module}`, cell));
    return element;
  });
  return el(
    "div",
    { class: "prow" },
    el("span", { class: "pname", title: module }, shorten(module)),
    el("div", { class: cells.length > 48 ? "cells dense" : "cells" }, drawn),
  );
}

function summary(layers, isCounted) {
  const cells = layers.layers.flatMap((row) => row.cells.map((cell, at) => [`layer ${row.layer} ${layers.columns[at]}`, cell])).filter(([, cell]) => cell);
  if (!cells.length) return "Tensors by how much of each changed";
  const [name, cell] = cells.reduce((a, b) => (shareOf(b[1]) > shareOf(a[1]) ? b : a));
  return `Changes by layer and module. Most in ${name}: ${isCounted ? percent(shareOf(cell)) : "other bits"}`;
}

function asTable(layers) {
  const inside = layers.layers.flatMap((row) => row.cells.map((cell, at) => [`${row.layer}`, layers.columns[at], cell]));
  const all = [...layers.outside.map((cell) => ["", cell.name, cell]), ...inside].filter(([, , cell]) => cell);
  return el(
    "table",
    {},
    el("thead", {}, el("tr", {}, el("th", {}, "layer"), el("th", {}, "module"), el("th", { class: "right" }, "changed"))),
    el(
      "tbody",
      {},
      all.slice(0, 1500).map(([layer, module, cell]) =>
        el("tr", {}, el("td", {}, layer), el("td", { class: "name" }, module), el("td", { class: "right" }, cell.num_changed === null ? (cell.num_different ? "other bits" : "same bits") : percent(shareOf(cell)))),
      ),
    ),
  );
}
