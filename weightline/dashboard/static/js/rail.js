// A window of consecutive versions: their graph, and under it tracks for what each changed, scored and serves.
import { hideHint, hint, put, svg } from "./dom.js";
import { bytes, moment, percent, score } from "./format.js";

const GUTTER = 74;
const RIGHT = 22;
const PITCH = { least: 30, most: 62 };
const Y = { stage: 14, stageLine: 22, top: 30, rail: 50, label: 80, changed: 128, score: 168, served: 188, below: 206 };
const NAME_ROW = 16;

/** How many versions fit into a width. */
export function capacity(width) {
  return Math.max(4, Math.floor((width - GUTTER - RIGHT) / PITCH.least));
}

/**
 * Draw the window into `host`. `view` has: window (the server's document), first, last, selected, compared,
 * stageClass(name), nameOf(chain id), onSelect(version, event), onChain(chain id).
 */
export function drawRail(host, view) {
  hideHint();
  const width = Math.max(280, host.clientWidth - 32);
  const amount = view.last - view.first + 1;
  const pitch = Math.min(PITCH.most, (width - GUTTER - RIGHT) / amount);
  const x = (version) => GUTTER + (version - view.first + 0.5) * pitch;
  const nodes = view.window.nodes;
  const place = { x, pitch, width, view, nodes };
  const rise = headRoom(view.window);
  place.rows = placeNames(nodes, x, width);
  const height = rise + Y.below + 4 + place.rows.length * NAME_ROW;
  put(
    host,
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, height, role: "presentation" },
      stages(place),
      svg("g", { transform: `translate(0 ${rise})` }, gutter(), hits(place, rise), edges(place), forks(place), gaps(place), marks(place), scoreLine(place), names(place)),
    ),
  );
  host.setAttribute("aria-activedescendant", `version-${view.selected}`);
}

/** Room above the rail for arcs and forks, where there are any. */
function headRoom(window) {
  const spans = window.edges.filter(([kind]) => kind !== "delta").map(([, source, target]) => riseOf(target - source));
  const forks = window.nodes.map((node) => (node.forks.length ? 18 + 14 * node.forks.length : 0));
  return Math.max(0, ...spans, ...forks);
}

const riseOf = (distance) => Math.min(64, 12 + Math.sqrt(distance) * 8);

function gutter() {
  return [["changed", Y.changed - 8], ["score", Y.score - 6], ["served", Y.served]].map(([text, y]) =>
    svg("text", { class: "gutter", x: 0, y: y + 4 }, text),
  );
}

/** Every run of one stage: its name, and a line over its versions. */
function stages({ x, pitch, view, nodes }) {
  const runs = [];
  for (const node of nodes) {
    const run = runs.at(-1);
    if (run && run.stage === node.stage) run.last = node.version;
    else runs.push({ stage: node.stage, first: node.version, last: node.version });
  }
  const half = pitch / 2 - 4;
  return runs.map(({ stage, first, last }) => {
    const room = Math.floor(((last - first + 1) * pitch) / 7);
    return svg(
      "g",
      { class: view.stageClass(stage) },
      svg("text", { class: "stage-name", x: x(first) - half, y: Y.stage }, stage.length > room ? `${stage.slice(0, Math.max(1, room - 1))}\u2026` : stage),
      svg("line", { class: "stage-line", x1: x(first) - half, x2: x(last) + half, y1: Y.stageLine, y2: Y.stageLine }),
    );
  });
}

/** The column of a version: its hit area, described for those who do not see it. */
function hits({ x, pitch, view, nodes }, rise) {
  const known = new Map(nodes.map((node) => [node.version, node]));
  const columns = [];
  for (let version = view.first; version <= view.last; version += 1) {
    if (isMissing(view.window, version)) continue;
    const node = known.get(version);
    const column = svg(
      "g",
      {
        id: `version-${version}`,
        role: "option",
        class: version === view.compared ? "version compared" : "version",
        "aria-selected": version === view.selected ? "true" : "false",
        "aria-label": describe(version, node, view.window.broken[version]),
        onclick: (event) => view.onSelect(version, event),
      },
      svg("rect", { class: "hit", x: x(version) - pitch / 2 + 1, y: Y.top - rise, width: pitch - 2, height: rise + Y.below - Y.top - 6, rx: 7 }),
      svg("text", { class: "label", x: x(version), y: Y.label, "text-anchor": "middle" }, labelOf(version, pitch, view)),
    );
    hint(column, () => tell(version, node, view.window.broken[version]));
    columns.push(column);
  }
  return columns;
}

/** Every label where there is room; else every few, and always the selected one. */
function labelOf(version, pitch, view) {
  const every = Math.ceil((7 * `v${view.last}`.length + 6) / pitch);
  return version === view.selected || (version - view.first) % every === 0 ? `v${version}` : "";
}

function describe(version, node, broken) {
  if (broken) return `Version ${version}, broken`;
  if (!node) return `Version ${version}, not read yet`;
  const parts = [`Version ${version}`, node.stage, node.kind === "revert" ? `revert to ${node.reverts_to}` : node.kind];
  if (node.is_milestone) parts.push("milestone");
  if (node.kind !== "anchor") parts.push(`${percent(node.changed_fraction)} changed`);
  parts.push(node.score === null ? `evaluation ${node.evaluation}` : `score ${score(node.score)}`);
  return parts.join(", ");
}

function tell(version, node, broken) {
  if (broken) return [`v${version}`, broken];
  if (!node) return [`v${version}`, "not read yet"];
  const what = node.kind === "revert" ? `revert to v${node.reverts_to}` : node.kind;
  return [
    `v${version}, ${node.stage}, ${what}${node.is_milestone ? ", milestone" : ""}`,
    node.kind === "anchor" ? bytes(node.payload_nbytes) : `${percent(node.changed_fraction)} changed, ${bytes(node.payload_nbytes)}`,
    node.score === null ? `evaluation: ${node.evaluation}` : `score ${score(node.score)}`,
    moment(node.created_at),
  ];
}

function edges({ x, width, view }) {
  const end = (version) => Math.min(Math.max(x(version), GUTTER - 10), width);
  return view.window.edges.map(([kind, source, target]) => {
    if (kind === "delta") return svg("line", { class: "edge delta-edge", x1: end(source), x2: x(target), y1: Y.rail, y2: Y.rail });
    const from = end(source);
    const top = Y.rail - 9 - riseOf(target - source) * 1.3;
    return svg("path", { class: `edge ${kind}-edge`, d: `M${from} ${Y.rail - 9} C${from} ${top} ${x(target)} ${top} ${x(target)} ${Y.rail - 9}` });
  });
}

/** Chains that start here leave the rail upwards; the chain that this one comes from enters on the left. */
function forks({ x, view, nodes }) {
  return nodes.flatMap((node) =>
    node.forks.map((chain, at) => {
      const left = x(node.version);
      const y = Y.rail - 30 - at * 14;
      const name = svg("text", { class: "fork-name", x: left + 16, y: y + 3, onclick: () => view.onChain(chain) }, view.nameOf(chain));
      return svg("g", {}, svg("path", { class: "fork", d: `M${left} ${Y.rail - 8} L${left} ${y + 8} Q${left} ${y} ${left + 12} ${y}` }), name);
    }),
  );
}

function gaps({ x, pitch, view }) {
  return view.window.missing.map(([first, last]) => {
    const [left, right] = [Math.max(first, view.first), Math.min(last, view.last)];
    const middle = (x(left) + x(right)) / 2;
    return svg(
      "g",
      {},
      svg("line", { class: "gap", x1: x(left) - pitch / 2, x2: x(right) + pitch / 2, y1: Y.rail, y2: Y.rail }),
      svg("text", { class: "gap-name", x: middle, y: Y.label, "text-anchor": "middle" }, right - left > 1 ? `${last - first + 1} missing` : "gone"),
    );
  });
}

function marks({ x, pitch, view, nodes }) {
  const most = Math.max(...nodes.filter((node) => node.kind !== "anchor").map((node) => node.changed_fraction), 1e-9);
  const taken = takenBack(nodes);
  const known = nodes.map((node) => {
    const group = svg("g", { class: `${view.stageClass(node.stage)} ${node.kind}${taken.has(node.version) ? " taken-back" : ""}`, "pointer-events": "none" });
    group.append(...markOf(node, x(node.version)), ...tracksOf(node, x(node.version), pitch, most));
    return group;
  });
  const others = [];
  for (let version = view.first; version <= view.last; version += 1) {
    if (nodes.some((node) => node.version === version) || isMissing(view.window, version)) continue;
    others.push(otherMark(x(version), version in view.window.broken));
  }
  return [known, others];
}

function markOf(node, at) {
  const size = node.kind === "anchor" ? 8 : 6;
  const drawn = [];
  if (node.has_anchor) drawn.push(svg("rect", { class: "ring", x: at - 10, y: Y.rail - 10, width: 20, height: 20, rx: 4 }));
  if (node.is_milestone && node.kind !== "anchor") drawn.push(svg("circle", { class: "ring", cx: at, cy: Y.rail, r: 9.5 }));
  if (node.kind === "anchor") drawn.push(svg("rect", { class: "mark", x: at - size, y: Y.rail - size, width: 2 * size, height: 2 * size, rx: 3.5 }));
  else drawn.push(svg("circle", { class: "mark", cx: at, cy: Y.rail, r: size }));
  return drawn;
}

function tracksOf(node, at, pitch, most) {
  const wide = Math.min(18, pitch * 0.5);
  const full = 34;
  const tall = node.kind === "anchor" ? full : Math.max(1, (full * node.changed_fraction) / most);
  const drawn = [svg("rect", { class: node.kind === "anchor" ? "bar-full" : "bar", x: at - wide / 2, y: Y.changed - tall, width: wide, height: tall, rx: 2 })];
  if (node.score === null) {
    const isFailed = node.evaluation === "failed";
    drawn.push(svg("line", { class: isFailed ? "score-failed" : "score-none", x1: at - 3, x2: at + 3, y1: Y.score, y2: Y.score }));
  }
  const isServed = node.serving === "done";
  drawn.push(svg("rect", { class: isServed ? "served" : "unserved", x: at - wide / 2, y: isServed ? Y.served - 3 : Y.served - 1, width: wide, height: isServed ? 6 : 2, rx: 1 }));
  return drawn;
}

function otherMark(at, isBroken) {
  if (!isBroken) return svg("g", { class: "unread", "pointer-events": "none" }, svg("circle", { class: "mark", cx: at, cy: Y.rail, r: 5 }));
  return svg(
    "g",
    { class: "broken", "pointer-events": "none" },
    svg("rect", { class: "mark", x: at - 8, y: Y.rail - 8, width: 16, height: 16, rx: 3 }),
    svg("text", { class: "bang", x: at, y: Y.rail + 4, "text-anchor": "middle" }, "!"),
  );
}

function scoreLine({ x, nodes }) {
  const scored = nodes.filter((node) => node.score !== null);
  if (!scored.length) return null;
  const [least, most] = [Math.min(...scored.map((n) => n.score)), Math.max(...scored.map((n) => n.score))];
  const y = (value) => Y.score - (most > least ? ((value - least) / (most - least)) * 26 : 13);
  const points = scored.map((node) => `${x(node.version)},${y(node.score)}`);
  return svg(
    "g",
    { "pointer-events": "none" },
    svg("polyline", { class: "score-line", points: points.join(" ") }),
    scored.map((node) => svg("circle", { class: "score-dot", cx: x(node.version), cy: y(node.score), r: 2.5 })),
  );
}

/** Names that stand for a version, and the replicas that answer with it: below it, in rows where they would touch. */
function names({ x, width, rows }) {
  return rows.flatMap((row, number) =>
    row.map(({ kind, text, version, left, wide }) => {
      const at = Math.min(Math.max(x(version), left + wide / 2), width - wide / 2);
      return svg("text", { class: kind, x: at, y: Y.below + 10 + number * NAME_ROW, "text-anchor": "middle" }, text);
    }),
  );
}

/** Each name goes into the first row where it touches no other. */
function placeNames(nodes, x, width) {
  const rows = [];
  for (const node of nodes) {
    const texts = [...node.refs.map((name) => ["ref", name]), ...(node.replicas.length ? [["replica", replicasOf(node.replicas)]] : [])];
    for (const [kind, text] of texts) {
      const wide = text.length * 6.4 + 10;
      const left = Math.min(Math.max(x(node.version) - wide / 2, 0), width - wide);
      const free = rows.find((row) => row.every((other) => left >= other.left + other.wide || left + wide <= other.left));
      const row = free ?? rows[rows.push([]) - 1];
      row.push({ kind, text, version: node.version, left, wide });
    }
  }
  return rows;
}

const replicasOf = (replicas) => (replicas.length > 2 ? `${replicas.length} replicas` : replicas.join(", "));

/** Versions whose state a later revert took back. */
function takenBack(nodes) {
  const taken = new Set();
  for (const revert of nodes.filter((node) => node.kind === "revert")) {
    for (const node of nodes) if (node.version > revert.reverts_to && node.version < revert.version) taken.add(node.version);
  }
  return taken;
}

const isMissing = (window, version) => window.missing.some(([first, last]) => version >= first && version <= last);
