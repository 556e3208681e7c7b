// Small multiples of everything that is measured by version. One cursor runs through all of them.
import { el, put } from "./dom.js";
import * as show from "./format.js";
import { colour } from "./theme.js";

const OWN = {
  "weightline:score": ["Score", show.score],
  "weightline:changed": ["Changed", show.percent],
  "weightline:bytes": ["Bytes of a delta", show.bytes],
  "weightline:pause": ["Pause of serving", show.seconds],
  "weightline:lag": ["Lag from commit to serving", show.seconds],
};
const USUAL = ["loss", "reward", "eval_loss", "rollout/staleness_mean", "rollout/wait_seconds"];

/** The curves to draw at first: what weightline measures, and loss, reward and the age of samples where they are logged. */
export function usualCurves(metrics) {
  const own = Object.keys(OWN);
  return [own[0], ...USUAL.filter((name) => metrics.includes(name)), ...own.slice(1)];
}

export class Curves {
  /** onSelect(version); onChange(): the set of curves changed. */
  constructor(host, select, { onSelect, onChange, stageColour }) {
    Object.assign(this, { host, select, onSelect, onChange, stageColour, names: [], charts: new Map(), selected: null });
    select.addEventListener("change", () => {
      if (select.value) this.names.push(select.value);
      onChange();
    });
    new ResizeObserver(() => this.resize()).observe(host);
  }

  offer(metrics) {
    const others = metrics.filter((name) => !this.names.includes(name));
    put(this.select, el("option", { value: "" }, "a metric\u2026"), others.map((name) => el("option", { value: name }, name)));
    this.select.disabled = !others.length;
  }

  draw(document_, selected) {
    this.document = document_;
    this.selected = selected;
    for (const chart of this.charts.values()) chart.plot?.destroy();
    this.charts.clear();
    put(this.host, this.names.map((name) => this.chart(name)).filter(Boolean));
    for (const [name, chart] of this.charts) this.plot(name, chart);
  }

  mark(selected) {
    this.selected = selected;
    for (const [name, chart] of this.charts) {
      chart.plot.redraw(false);
      this.tell(name, chart, null);
    }
  }

  resize() {
    for (const { plot, box } of this.charts.values()) plot?.setSize({ width: box.clientWidth, height: 132 });
  }

  chart(name) {
    const values = this.document.series[name];
    if (!values || values.mean.every((value) => value === null)) return null;
    const [title] = OWN[name] ?? [name];
    const chart = { box: el("div", { class: "plot" }), value: el("span", { class: "value" }), at: el("span", { class: "at" }), plot: null };
    this.charts.set(name, chart);
    const remove = name in OWN ? null : el("button", { class: "remove", type: "button", "aria-label": `Remove ${name}`, onclick: () => this.remove(name) }, "\u00d7");
    return el("figure", { class: "chart", "data-series": name, "aria-label": `${title} by version` }, el("header", {}, el("h3", { title: name }, title), chart.at, chart.value, remove), chart.box);
  }

  remove(name) {
    this.names = this.names.filter((other) => other !== name);
    this.onChange();
  }

  plot(name, chart) {
    const { versions, series } = this.document;
    const values = series[name];
    const [, format] = OWN[name] ?? [name, show.number];
    const ink = colour(name === "weightline:score" ? "--accent" : "--text");
    const line = { stroke: ink, width: 1.5, spanGaps: true, points: { show: versions.length <= 60, size: 5, fill: ink } };
    const edge = { stroke: "transparent", points: { show: false }, spanGaps: true };
    const data = [versions, values.mean, ...(values.min ? [values.max, values.min] : [])];
    chart.plot = new uPlot(
      {
        width: chart.box.clientWidth,
        height: 132,
        padding: [8, 8, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: "versions" }, y: false, points: { size: 7 }, drag: { setScale: false, x: false, y: false } },
        scales: { x: { time: false }, y: { range: (_, least, most) => rangeOf(least, most) } },
        axes: [axis({ values: (_, ticks) => ticks.map((v) => (Number.isInteger(v) ? `v${v}` : "")), size: 24 }), axis({ values: (_, ticks) => ticks.map(format), size: 58 })],
        series: [{}, line, ...(values.min ? [edge, edge] : [])],
        bands: values.min ? [{ series: [2, 3], fill: withAlpha(ink, 0.13) }] : [],
        hooks: { drawAxes: [(plot) => this.decorate(plot)], setCursor: [(plot) => this.tell(name, chart, plot.cursor.idx)] },
      },
      data,
      chart.box,
    );
    chart.plot.over.addEventListener("click", () => {
      const at = chart.plot.cursor.idx;
      if (at !== null && at !== undefined) this.onSelect(versions[at]);
    });
    this.tell(name, chart, null);
  }

  /** The value under the cursor; without one, at the selected version or the newest. */
  tell(name, chart, index) {
    const { versions, series } = this.document;
    const { mean } = series[name];
    let at = index ?? versions.findIndex((version) => version >= this.selected);
    if (at < 0 || at === null) at = mean.length - 1;
    while (at > 0 && mean[at] === null) at -= 1;
    const [, format] = OWN[name] ?? [name, show.number];
    chart.value.textContent = format(mean[at]);
    chart.at.textContent = mean[at] === null ? "" : `v${versions[at]}`;
  }

  /** Stages as a line along the bottom, and where the selected version is. */
  decorate(plot) {
    const { ctx, bbox } = plot;
    const { versions, stages } = this.document;
    ctx.save();
    stages.forEach((stage, at) => {
      const from = at === 0 ? versions[0] : versions[at - 1];
      const [left, right] = [plot.valToPos(from, "x", true), plot.valToPos(versions[at], "x", true)];
      ctx.fillStyle = this.stageColour(stage);
      ctx.fillRect(left, bbox.top + bbox.height - 2 * devicePixelRatio, Math.max(right - left, 1), 2 * devicePixelRatio);
    });
    if (this.selected !== null && this.selected >= versions[0] && this.selected <= versions.at(-1)) {
      ctx.fillStyle = withAlpha(colour("--accent"), 0.45);
      ctx.fillRect(plot.valToPos(this.selected, "x", true) - devicePixelRatio / 2, bbox.top, devicePixelRatio, bbox.height);
    }
    ctx.restore();
  }
}

/** Some room above and below; a constant lies in the middle. */
function rangeOf(least, most) {
  if (least === null || most === null) return [0, 1];
  const room = (most - least) * 0.08 || Math.abs(most) * 0.1 || 0.1;
  return [least - (least === 0 ? 0 : room), most + room];
}

function axis(options) {
  return {
    stroke: colour("--faint"),
    font: `11px ${colour("--sans")}`,
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
    gap: 4,
    space: 30,
    ...options,
  };
}

function withAlpha(hex, alpha) {
  const parts = [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${parts.join(", ")}, ${alpha})`;
}
