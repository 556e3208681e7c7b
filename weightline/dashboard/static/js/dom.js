// Elements made without HTML: text from a bucket only ever becomes text nodes and attribute values.
const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `on*` properties are listeners; children are nodes, strings, or null for nothing. */
export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what an element holds. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

/** An icon of the set below. */
export function icon(name) {
  const shapes = {
    sun: [["circle", { cx: 8, cy: 8, r: 3 }], ["path", { d: "M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1" }]],
    moon: [["path", { d: "M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7z" }]],
    left: [["path", { d: "M10 3 5 8l5 5" }]],
    right: [["path", { d: "m6 3 5 5-5 5" }]],
    close: [["path", { d: "m4 4 8 8M12 4l-8 8" }]],
  };
  return svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, shapes[name].map(([tag, shape]) => svg(tag, shape)));
}

const tooltip = document.getElementById("tooltip");

/** Show lines beside the pointer while it is over the element. */
export function hint(element, lines) {
  element.addEventListener("pointermove", (event) => {
    put(tooltip, lines().map((line) => el("div", {}, line)));
    tooltip.hidden = false;
    const { width, height } = tooltip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    const top = event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18;
    tooltip.style.left = `${Math.max(8, left)}px`;
    tooltip.style.top = `${top}px`;
  });
  element.addEventListener("pointerleave", () => {
    tooltip.hidden = true;
  });
}

/** A tooltip whose element was replaced under the pointer would stay. */
export function hideHint() {
  tooltip.hidden = true;
}
