// The whole chain at a glance, with a brush over the part that the rail shows.
import { el, put, svg } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 46;

/** Draw into `host`, or hide it when the rail shows everything. onMove(version): centre the rail there. */
export function drawMinimap(host, glance, shown, stageClass, onMove) {
  host.hidden = glance.first === null || (shown.first <= glance.first && shown.last >= glance.last);
  if (host.hidden) return;
  const amount = glance.last - glance.first + 1;
  const x = (version) => ((version - glance.first) / amount) * WIDTH;
  const most = Math.max(...glance.bins.map((bin) => bin.changed ?? 0), 1e-9);
  const wide = WIDTH / (amount / glance.bin_size);
  const bars = glance.bins.map((bin) => barOf(bin, x(bin.first), wide, most, stageClass));
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    bars,
    scoreOf(glance.bins, x),
    svg("rect", { class: "brush", x: x(shown.first), y: 0.5, width: Math.max(4, x(shown.last + 1) - x(shown.first)), height: HEIGHT - 1, rx: 3, "vector-effect": "non-scaling-stroke" }),
  );
  const move = (event) => {
    const { left, width } = picture.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
    onMove(Math.round(glance.first + share * (amount - 1)));
  };
  host.onpointerdown = (event) => {
    host.setPointerCapture(event.pointerId);
    move(event);
  };
  host.onpointermove = (event) => {
    if (host.hasPointerCapture(event.pointerId)) move(event);
  };
  put(host, picture, el("div", { class: "scale" }, el("span", {}, `v${glance.first}`), el("span", {}, `v${glance.last}`)));
}

function barOf(bin, x, wide, most, stageClass) {
  if (bin.is_broken) return svg("rect", { class: "broken", x, y: 0, width: Math.max(wide, 2), height: HEIGHT });
  if (bin.stage === null) return svg("rect", { class: "unread", x, y: 0, width: wide + 0.2, height: HEIGHT });
  const tall = bin.changed === null ? HEIGHT : Math.max(3, (HEIGHT - 8) * Math.sqrt(bin.changed / most));
  return svg("rect", { class: `bin ${stageClass(bin.stage)}`, x, y: HEIGHT - tall, width: wide + 0.2, height: tall });
}

function scoreOf(bins, x) {
  const scored = bins.filter((bin) => bin.score !== null);
  if (scored.length < 2) return null;
  const values = scored.map((bin) => bin.score);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const y = (value) => HEIGHT - 5 - (most > least ? (value - least) / (most - least) : 0.5) * (HEIGHT - 10);
  return svg("polyline", { class: "score", "vector-effect": "non-scaling-stroke", points: scored.map((bin) => `${x(bin.first)},${y(bin.score)}`).join(" ") });
}
