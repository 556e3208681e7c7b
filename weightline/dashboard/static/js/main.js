// The page: which chain and version are shown, what is read for them, and what a key or a click does.
import * as api from "./api.js";
import { drawChoice, drawComparison } from "./compare.js";
import { Curves, usualCurves } from "./curves.js";
import { drawProblem, drawVersion } from "./detail.js";
import { el, put, svg } from "./dom.js";
import { drawMinimap } from "./minimap.js";
import { drawChains, drawEmpty, drawHead, drawNotices } from "./overview.js";
import { capacity, drawRail } from "./rail.js";
import { parseRoute, routeTo } from "./route.js";
import { colour, startTheme } from "./theme.js";

const $ = (id) => document.getElementById(id);
const NUM_COLOURS = 6;
const state = {
  cards: [],
  route: parseRoute(location.hash),
  generation: null,
  shown: { first: 0, last: 0 },
  window: null,
  glance: null,
  range: "all",
  isChoosing: false,
  panelOf: null,
};
const curves = new Curves($("charts"), $("add-curve"), { onSelect: select, onChange: () => refreshCurves(), stageColour: (stage) => colour(`--stage-${stageIndex(stage)}`) });
let curvesOf = null;

/** The chain of the address, the first one where it names none; undefined for a name that is not here. */
const card = () => (state.route.chain === null ? state.cards[0] : state.cards.find((one) => one.id === state.route.chain));
const tip = () => card()?.tip ?? null;
const selected = () => state.route.version ?? tip();
const isFollowing = () => state.route.version === null && state.route.compared === null;
const stageIndex = (stage) => Math.max(0, (card()?.stages ?? []).indexOf(stage)) % NUM_COLOURS;
const stageClass = (stage) => `stage-${stageIndex(stage)}`;
const nameOf = (chain) => state.cards.find((one) => one.id === chain)?.name ?? chain;

function go(route) {
  location.hash = routeTo({ chain: card().id, version: null, compared: null, ...route });
}

function select(version, event) {
  const within = Math.min(Math.max(version, card().first), tip());
  if (state.isChoosing || event?.shiftKey) {
    const other = selected();
    state.isChoosing = false;
    if (within !== other) go({ version: within, compared: other });
    else refreshPanel();
  } else go({ version: within, compared: state.route.compared });
}

/** Read the cards; when the chosen chain changed, all that is drawn of it. */
async function refresh() {
  const told = await api.readChains();
  state.cards = told.chains;
  const chosen = card();
  drawChains($("sidebar"), $("switcher"), told, chosen?.id, (chain) => { location.hash = `#/${chain}`; });
  if (!chosen) return drawNobody(told);
  document.title = chosen.tip === null ? `${chosen.name} \u00b7 weightline` : `v${chosen.tip} ${chosen.name} \u00b7 weightline`;
  drawHead($("head"), chosen);
  const isEmpty = chosen.tip === null;
  for (const id of ["graph", "curves", "panel"]) $(id).hidden = isEmpty;
  $("app").classList.toggle("no-panel", isEmpty);
  if (isEmpty) return drawEmpty($("notices"), chosen);
  drawNotices($("notices"), chosen);
  await refreshChain();
}

/** Nothing is there yet, or the address names a chain that is not among those of this page. */
function drawNobody(told) {
  const text = state.route.chain === null ? `Nothing is at ${told.buckets.join(", ")} yet.` : `There is no chain ${state.route.chain} here. Was it served from another folder, or has it gone?`;
  document.title = "No chain \u00b7 weightline";
  for (const id of ["graph", "curves", "panel"]) $(id).hidden = true;
  $("app").classList.add("no-panel");
  put($("notices"));
  put($("head"), el("h1", {}, "No chain"), el("p", { class: "soft break" }, text), told.chains.length && state.route.chain !== null ? el("p", {}, el("a", { href: "#/" }, "Show the first chain")) : null);
}

async function refreshChain() {
  const chosen = card();
  if (curvesOf !== chosen.id) {
    curvesOf = chosen.id;
    curves.names = usualCurves(chosen.metrics);
  }
  for (const name of usualCurves(chosen.metrics)) if (name === "loss" || name === "reward") if (!curves.names.includes(name)) curves.names.splice(1, 0, name);
  state.shown = reveal(selected(), capacity($("rail").clientWidth));
  const [glance] = await Promise.all([api.readGlance(chosen.id, 400), refreshWindow(), refreshCurves(), refreshPanel()]);
  state.glance = glance;
  drawGraph();
}

/** The window, moved as little as shows `version`; in the middle when there was none yet. */
function reveal(version, room) {
  const { first, tip: last } = card();
  const low = Math.max(first, last - room + 1);
  const { shown } = state;
  const size = shown.last - shown.first + 1;
  let start = size === room || last - first < room ? shown.first : version - Math.floor(room / 2);
  if (version < start) start = version - Math.floor(room / 8);
  if (version > start + room - 1) start = version - room + 1;
  if (isFollowing()) start = low;
  start = Math.min(Math.max(start, first), low);
  return { first: start, last: Math.min(last, start + room - 1) };
}

async function refreshWindow() {
  state.window = await api.readWindow(card().id, state.shown.first, state.shown.last);
}

function drawGraph() {
  if (!state.window || !state.glance) return;
  $("follow").setAttribute("aria-pressed", String(isFollowing()));
  drawMinimap($("minimap"), state.glance, state.shown, stageClass, moveTo);
  drawRail($("rail"), {
    window: state.window,
    first: state.shown.first,
    last: state.shown.last,
    selected: selected(),
    compared: state.route.compared,
    stageClass,
    nameOf,
    onSelect: select,
    onChain: (chain) => { location.hash = `#/${chain}`; },
  });
}

async function moveTo(version) {
  const room = capacity($("rail").clientWidth);
  const { first, tip: last } = card();
  const start = Math.max(first, Math.min(version - Math.floor(room / 2), last - room + 1));
  state.shown = { first: start, last: Math.min(last, start + room - 1) };
  await refreshWindow();
  drawGraph();
  if (state.range === "window") refreshCurves();
}

async function refreshCurves() {
  const chosen = card();
  const range = state.range === "window" ? state.shown : {};
  const told = await api.readSeries(chosen.id, curves.names, { ...range, points: 400 });
  curves.offer(chosen.metrics);
  curves.draw(told, selected());
}

async function refreshPanel() {
  const { id } = card();
  const { compared } = state.route;
  const version = selected();
  if (state.isChoosing) return drawChoice($("panel"), version, tip(), { onChoose: (other) => select(other), onCancel: () => { state.isChoosing = false; refreshPanel(); } });
  try {
    const told = compared === null ? await api.readVersion(id, version) : await api.readComparison(id, compared, version);
    const isStale = id !== card()?.id || version !== selected() || compared !== state.route.compared || state.isChoosing;
    const drawn = JSON.stringify(told);
    if (isStale || drawn === state.panelOf) return;
    state.panelOf = drawn;
    $("panel").scrollTop = 0;
    if (compared === null) drawVersion($("panel"), told, versionContext(id, told));
    else drawComparison($("panel"), told, { stageClass, onClose: () => go({ version }), onSwap: () => go({ version: compared, compared: version }), countDiffering: () => api.readDiffering(id, compared, version) });
  } catch (error) {
    state.panelOf = null;
    drawProblem($("panel"), version, error.message);
  }
}

function versionContext(id, told) {
  return {
    stageClass,
    onStep: (by) => select(told.version + by),
    onSelect: select,
    onCompare: startChoosing,
    hasEarlier: told.version > card().first,
    hasLater: told.version < tip(),
    countDiffering: () => api.readDiffering(id, told.base_version, told.version),
    readSamples: () => api.readSamples(id, told.version),
  };
}

function startChoosing() {
  state.isChoosing = true;
  state.panelOf = null;
  refreshPanel();
}

/** A new address: another chain is read anew, another version moves the selection. */
async function follow() {
  const before = card()?.id;
  state.route = parseRoute(location.hash);
  state.isChoosing = false;
  state.panelOf = null;
  if (before !== card()?.id || !card()) {
    Object.assign(state, { shown: { first: 0, last: 0 }, glance: null, window: null });
    return guarded(refresh)();
  }
  const { shown } = state;
  state.shown = reveal(selected(), capacity($("rail").clientWidth));
  if (shown.first !== state.shown.first || shown.last !== state.shown.last) await refreshWindow();
  drawGraph();
  curves.mark(selected());
  await refreshPanel();
}

const KEYS = {
  ArrowLeft: (at) => at - 1,
  ArrowRight: (at) => at + 1,
  PageUp: (at) => at - (state.shown.last - state.shown.first),
  PageDown: (at) => at + (state.shown.last - state.shown.first),
  Home: () => card().first,
  End: () => tip(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS) {
    event.preventDefault();
    select(KEYS[event.key](selected()), { shiftKey: false });
  } else if (event.key === "c") startChoosing();
  else if (event.key === "Escape" && (state.isChoosing || state.route.compared !== null)) go({ version: selected() });
}

/** One run at a time; what is asked meanwhile runs once more afterwards. */
function guarded(work) {
  let running = null;
  let isAsked = false;
  return async () => {
    isAsked = true;
    if (running) return running;
    running = (async () => {
      while (isAsked) {
        isAsked = false;
        try {
          await work();
        } catch (error) {
          put($("notices"), el("div", { class: "notice bad" }, el("strong", {}, "This page could not be drawn."), el("span", {}, error.message)));
        }
      }
    })();
    await running;
    running = null;
  };
}

function drawLegend() {
  const shape = (...shapes) => svg("svg", { viewBox: "0 0 14 14" }, shapes);
  const entries = [
    ["anchor", shape(svg("rect", { x: 1.5, y: 1.5, width: 11, height: 11, rx: 3 }))],
    ["delta", shape(svg("circle", { cx: 7, cy: 7, r: 4.5 }))],
    ["milestone", shape(svg("circle", { cx: 7, cy: 7, r: 3.5 }), svg("circle", { class: "hollow", cx: 7, cy: 7, r: 6.5 }))],
    ["revert", shape(svg("path", { class: "dashed", d: "M1 11C1 2 13 2 13 11" }))],
    ["shortcut", shape(svg("path", { class: "hollow", d: "M1 11C1 2 13 2 13 11" }))],
  ];
  put($("legend"), entries.map(([name, picture]) => el("span", {}, picture, name)));
}

function start() {
  drawLegend();
  startTheme($("theme"), () => { if (curves.document) curves.draw(curves.document, selected()); });
  const refreshAll = guarded(refresh);
  let isWaiting = false;
  api.listen(
    (generations) => {
      const now = JSON.stringify(generations);
      if (now === state.generation || isWaiting) return;
      isWaiting = true;
      // A chain that is being read changes several times a second.
      setTimeout(() => { isWaiting = false; refreshAll(); }, state.generation === null ? 0 : 700);
      state.generation = now;
    },
    (isOn) => {
      $("live").className = isOn ? "live on" : "live off";
      $("live").textContent = isOn ? "Live" : "Server away";
    },
  );
  window.addEventListener("hashchange", follow);
  $("rail").addEventListener("keydown", onKey);
  $("follow").addEventListener("click", () => go({ version: isFollowing() ? tip() : null }));
  document.querySelectorAll("[data-range]").forEach((button) => button.addEventListener("click", () => setRange(button.dataset.range)));
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs($("rail").clientWidth - width) < 2) return;
    width = $("rail").clientWidth;
    if (state.window) follow();
  }).observe($("rail"));
  refreshAll();
}

function setRange(range) {
  state.range = range;
  document.querySelectorAll("[data-range]").forEach((button) => button.setAttribute("aria-checked", String(button.dataset.range === range)));
  refreshCurves();
}

start();
