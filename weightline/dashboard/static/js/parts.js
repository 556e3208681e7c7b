// Parts that the sections of a panel are made of.
import { el } from "./dom.js";

export const section = (title, ...children) => el("section", {}, title ? el("h3", {}, title) : null, children);
export const figure = (name, value, note) => el("div", { class: "figure" }, el("div", { class: "k" }, name), el("div", { class: "v" }, value), note ? el("div", { class: "n" }, note) : null);
export const pairs = (entries) => el("dl", { class: "kv" }, entries.filter(([, value]) => value !== null && value !== "").map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
export const mono = (text) => el("span", { class: "mono break" }, text);

/** A link to a version of the same chain. `children`: what it shows, "v5" by default. */
export function versionLink(version, context, properties = {}, ...children) {
  return el("a", { href: `#v${version}`, ...properties, onclick: (event) => { event.preventDefault(); context.onSelect(version); } }, children.length ? children : `v${version}`);
}

/** A line with a dot, a name and a value, and smaller text below. */
export function row(dot, name, value, under) {
  const below = under.filter(Boolean).join(" \u00b7 ");
  return el("div", { class: "row" }, el("span", { class: "break" }, dot === null ? null : el("i", { class: `dot ${dot}` }), name), el("span", {}, value), below ? el("span", { class: "under" }, below) : null);
}

/** What is shown on request, beside the amount of it; null for nothing. */
export function fold(title, content, amount) {
  return amount ? el("details", {}, el("summary", {}, title), el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": title }, content)) : null;
}
