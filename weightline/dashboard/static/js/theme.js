// Light and dark: the system's choice until somebody presses the button.
import { icon, put } from "./dom.js";

const KEY = "weightline-theme";
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

/** Wire the button; `onChange` is called after every switch, for what is drawn on canvas. */
export function startTheme(button, onChange) {
  const show = (theme) => {
    root.dataset.theme = theme;
    const other = theme === "dark" ? "light" : "dark";
    put(button, icon(theme === "dark" ? "sun" : "moon"));
    button.setAttribute("aria-label", `Switch to ${other} colors`);
    button.title = `Switch to ${other} colors`;
    onChange();
  };
  button.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    remember(theme);
    show(theme);
  });
  system.addEventListener("change", (event) => {
    if (recall() === null) show(event.matches ? "dark" : "light");
  });
  show(root.dataset.theme);
}

function remember(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // Then it holds for this page.
  }
}

function recall() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** A colour as canvas wants it. */
export function colour(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}
