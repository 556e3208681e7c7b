// The panel of two versions side by side.
import { el, icon, put } from "./dom.js";
import * as show from "./format.js";
import { layerPicture } from "./layers.js";
import { section } from "./parts.js";

/** Ask for the second version: by number here, or by a click in the graph. */
export function drawChoice(panel, version, tip, { onChoose, onCancel }) {
  const input = el("input", { type: "number", min: 0, max: tip, value: Math.max(0, version - 1), "aria-label": "Version to compare with", class: "button num" });
  const form = el(
    "form",
    { class: "actions", onsubmit: (event) => { event.preventDefault(); onChoose(Number(input.value)); } },
    input,
    el("button", { class: "button", type: "submit" }, "Compare"),
    el("button", { class: "button quiet", type: "button", onclick: onCancel }, "Cancel"),
  );
  put(panel, section(null, el("div", { class: "panel-title" }, el("h2", {}, `v${version}`), el("span", { class: "soft" }, "compared with\u2026")), el("p", { class: "soft" }, "Choose a version in the graph, or name it."), form));
  input.focus();
  input.select();
}

/** `context`: stageClass(stage), onClose(), onSwap(), countDiffering(): a promise of the counts. */
export function drawComparison(panel, told, context) {
  const close = el("button", { class: "icon-button", type: "button", "aria-label": "Close the comparison", onclick: context.onClose }, icon("close"));
  put(
    panel,
    section(
      null,
      el("div", { class: "panel-title" }, el("span", { class: "soft" }, "Comparison"), el("span", { class: "nav" }, el("button", { class: "button quiet", type: "button", onclick: context.onSwap }, "Swap"), close)),
      el("div", { class: "versus" }, side(told.a, context), el("span", { class: "arrow", "aria-hidden": "true" }, "\u2192"), side(told.b, context)),
    ),
    scores(told),
    weights(told, context),
    metrics(told),
  );
}

function side(node, context) {
  return el("div", { class: "side" }, el("span", { class: "big num" }, `v${node.version}`), el("span", { class: `badge stage ${context.stageClass(node.stage)}` }, node.stage), el("span", { class: "faint num" }, `step ${show.count(node.global_step)}`));
}

function scores(told) {
  if (!told.scores.length) return section("Scores", el("p", { class: "soft" }, "Neither was evaluated."));
  const rows = told.scores.map(({ name, a, b }) => el("div", { class: "row" }, el("span", { class: "break" }, name), change(a, b, show.score), el("span", { class: "under" }, `${show.score(a)} \u2192 ${show.score(b)}`)));
  return section("Scores", el("div", { class: "rows" }, rows));
}

function change(a, b, format) {
  if (!Number.isFinite(a) || !Number.isFinite(b)) return el("span", { class: "faint" }, "\u2013");
  const by = b - a;
  const sign = by > 0 ? "+" : by < 0 ? "\u2212" : "\u00b1";
  return el("span", { class: by > 0 ? "delta-up" : by < 0 ? "delta-down" : "soft" }, `${sign}${format(Math.abs(by))}`);
}

function weights(told, context) {
  const host = section("Where the weights differ");
  const heading = host.firstChild;
  const says = told.is_same_state
    ? "The same state, bit for bit."
    : `${show.count(told.num_different)} of ${show.count(told.num_tensors)} tensors have other bits.`;
  const line = (text) => el("p", { class: "soft num", id: "differing" }, text);
  const draw = (text, layers, isCounted, action) => put(host, heading, line(text), layerPicture(layers, isCounted, action));
  if (told.is_same_state) {
    put(host, heading, line(says));
    return host;
  }
  const countNow = async () => {
    draw(says, told.layers, false, el("span", { class: "faint" }, "counting\u2026"));
    try {
      const counted = await context.countDiffering();
      draw(`${show.percent(counted.num_changed / counted.num_elements)} of all elements: ${show.count(counted.num_changed)} of ${show.count(counted.num_elements)}. ${says}`, counted.layers, true, null);
    } catch (error) {
      draw(says, told.layers, false, null);
      host.append(el("p", { class: "bad" }, error.message));
    }
  };
  draw(says, told.layers, false, el("button", { class: "button", type: "button", title: `Replays both versions of ${show.bytes(told.full_nbytes)}`, onclick: countNow }, "Count elements"));
  if (told.counts_unasked) countNow();
  return host;
}

function metrics(told) {
  const both = told.metrics.filter(({ a, b }) => Number.isFinite(a) && Number.isFinite(b));
  if (!both.length) return null;
  const rows = both.map(({ name, a, b }) => el("tr", {}, el("td", { class: "name" }, name), el("td", { class: "right" }, show.number(a)), el("td", { class: "right" }, show.number(b))));
  return section("Metrics", el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "name"), el("th", { class: "right" }, `v${told.a.version}`), el("th", { class: "right" }, `v${told.b.version}`))), el("tbody", {}, rows))));
}
