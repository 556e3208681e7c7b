// The panel of one version.
import { el, icon, put } from "./dom.js";
import * as show from "./format.js";
import { layerPicture } from "./layers.js";
import { figure, fold, mono, pairs, row, section, versionLink } from "./parts.js";
import { samplesSection } from "./samples.js";

/**
 * Draw version `told` into `panel`. `context`: stageClass(stage), onStep(by), onCompare(), onSelect(version),
 * hasEarlier, hasLater, countDiffering(): a promise of the counts, or null where there is nothing to count,
 * readSamples(): a promise of the samples that it was trained on.
 */
export function drawVersion(panel, told, context) {
  const differing = layersSection(told, context);
  put(
    panel,
    title(told, context),
    figures(told),
    differing,
    evaluations(told),
    serving(told),
    samplesSection(context),
    identity(told, context),
    more(told),
  );
}

function title(told, context) {
  const step = (by, name, label, isOn) => el("button", { class: "icon-button", type: "button", "aria-label": label, disabled: !isOn, onclick: () => context.onStep(by) }, icon(name));
  const kind = told.kind === "revert" ? `revert to v${told.reverts_to}` : told.kind;
  return section(
    null,
    el(
      "div",
      { class: "panel-title" },
      el("h2", {}, `v${told.version}`),
      el("span", { class: `badge stage ${context.stageClass(told.stage)}`, title: told.stage }, told.stage),
      el("span", { class: "badge" }, kind),
      told.is_milestone ? el("span", { class: "badge" }, "milestone") : null,
      told.refs.map((name) => el("span", { class: "badge" }, name)),
      el("span", { class: "nav" }, step(-1, "left", "Earlier version", context.hasEarlier), step(1, "right", "Later version", context.hasLater)),
    ),
    el("div", { class: "sub num" }, `step ${show.count(told.global_step)}, committed ${show.ago(told.created_at)}`, el("span", { class: "faint" }, ` \u00b7 ${show.moment(told.created_at)}`)),
    el(
      "div",
      { class: "actions" },
      el("button", { class: "button", type: "button", id: "compare-button", onclick: context.onCompare }, "Compare with\u2026"),
      told.run_url ? el("a", { class: "button", href: told.run_url, target: "_blank", rel: "noopener noreferrer" }, "Open the run") : null,
    ),
  );
}

function figures(told) {
  const isAnchor = told.kind === "anchor";
  return section(
    null,
    el(
      "div",
      { class: "figures" },
      isAnchor
        ? figure("Elements", show.short(told.num_elements), "all of them: a full state")
        : figure("Changed", show.percent(told.changed_fraction), `${show.count(told.num_changed)} of ${show.short(told.num_elements)}`),
      figure("Score", show.score(told.score), told.score === null ? `evaluation ${told.evaluation}` : null),
      figure(isAnchor ? "Anchor" : "Delta", show.bytes(told.payload_nbytes), `${show.percent(told.ratio_to_full)} of ${show.bytes(told.full_nbytes)}`),
      figure("Pause", show.seconds(told.pause_seconds), told.served_at ? `served ${show.seconds(told.lag_seconds)} after the commit` : `serving ${told.serving}`),
    ),
    el("div", { class: "meter", role: "img", "aria-label": `${show.percent(told.ratio_to_full)} of the full state's bytes`, "--share": Math.min(1, told.ratio_to_full).toFixed(5) }, el("i")),
  );
}

function layersSection(told, context) {
  if (!told.layers) {
    return told.kind === "anchor" ? null : section("Where it changed", el("p", { class: "soft" }, "Its base version cannot be read."));
  }
  const host = section("Where it changed");
  const heading = host.firstChild;
  const draw = (layers, isCounted, action) => put(host, heading, layerPicture(layers, isCounted, action));
  const countNow = async () => {
    draw(told.layers, false, el("span", { class: "faint" }, "counting\u2026"));
    try {
      draw((await context.countDiffering()).layers, true, null);
    } catch (error) {
      draw(told.layers, false, null);
      host.append(el("p", { class: "bad" }, error.message));
    }
  };
  draw(told.layers, false, el("button", { class: "button", type: "button", title: "Replays both versions", onclick: countNow }, "Count elements"));
  if (told.counts_unasked) countNow();
  return host;
}

function evaluations(told) {
  if (!told.evaluations.length) return section("Evaluations", el("p", { class: "soft" }, "None yet."));
  const rows = told.evaluations.map((record) => {
    const isDone = record.status === "done";
    const under = isDone
      ? [record.num_problems === undefined ? null : `${show.count(record.num_problems)} problems`, record.seconds === undefined ? null : show.seconds(record.seconds), Object.keys(record.metrics ?? {}).join(", ")]
      : [record.newer_version === undefined ? null : `v${record.newer_version} was newer`, record.reason ?? record.error];
    return row(statusDot(record.status), record.name, isDone ? show.score(record.score) : record.status, under);
  });
  return section("Evaluations", el("div", { class: "rows" }, rows));
}

function serving(told) {
  const now = new Map(told.replicas.map((replica) => [replica.name, replica]));
  const rows = told.refreshes.map((record) => {
    const replica = now.get(record.name);
    now.delete(record.name);
    const isNow = replica && !replica.is_expired;
    const under = [
      record.served_at ? `since ${show.moment(record.served_at)}` : null,
      record.pause_seconds === undefined ? null : `pause ${show.seconds(record.pause_seconds)}`,
      record.newer_version === undefined ? null : `went on to v${record.newer_version}`,
      replica?.is_expired ? "it is gone" : null,
    ];
    return row(isNow ? "good" : statusDot(record.status), record.name, isNow ? "serves it now" : record.status, under);
  });
  for (const replica of now.values()) {
    rows.push(row(replica.is_expired ? "" : "good", replica.name, replica.is_expired ? "gone" : "serves it now", [replica.since ? `since ${show.moment(replica.since)}` : null, replica.engine]));
  }
  return section("Replicas", rows.length ? el("div", { class: "rows" }, rows) : el("p", { class: "soft" }, "None has served it."));
}

const statusDot = (status) => ({ done: "good", failed: "bad" })[status] ?? "";

function identity(told, context) {
  const base = told.base_version === null ? null : versionLink(told.base_version, context);
  const ways = told.shortcuts_in.map((from) => (from === null ? "an anchor" : `v${from}`));
  return section(
    "Identity",
    pairs([
      ["run", told.run_id],
      ["base", base],
      ["also from", ways.join(", ")],
      ["forked from", told.forked_from ? `v${told.forked_from.version} of ${told.forked_from.chain}` : null],
      ["adapter of", told.base_model ? told.base_model.name_or_path : null],
      ["state", mono(told.state_digest)],
      ["commit", mono(told.commit_id)],
      ["coding", told.coding],
      ["ranks", String(told.world_size)],
    ]),
  );
}

function more(told) {
  const metrics = Object.entries(told.metrics);
  const provenance = Object.entries(told.provenance);
  return section(
    null,
    fold(`Metrics (${metrics.length})`, pairs(metrics.map(([name, value]) => [name, show.number(value)])), metrics.length),
    fold(`Provenance (${provenance.length})`, pairs(provenance), provenance.length),
    fold(`Payloads (${told.payloads.length})`, table(["rank", "bytes", "sha256"], told.payloads.map((p) => [String(p.rank), show.bytes(p.nbytes), mono(p.sha256.slice(0, 16))])), told.payloads.length),
    fold(
      `Tensors (${told.num_tensors})`,
      table(["tensor", "shape", "digest"], told.tensors.map((t) => [t.name, `${t.shape.join("\u00d7") || "scalar"} ${t.dtype}`, mono(t.digest.slice(0, 12))])),
      told.num_tensors,
    ),
  );
}

function table(columns, rows) {
  return el("table", {}, el("thead", {}, el("tr", {}, columns.map((name) => el("th", {}, name)))), el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, at) => el("td", { class: at === 0 ? "name" : null }, cell))))));
}

/** A version that cannot be shown. */
export function drawProblem(panel, version, message) {
  put(panel, section(null, el("div", { class: "panel-title" }, el("h2", {}, `v${version}`), el("span", { class: "badge bad" }, "broken")), el("p", { class: "break" }, message)));
}
