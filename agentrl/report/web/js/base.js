"use strict";

/* Elements, words and numbers. Text reaches the page through `h` alone, as text nodes: nothing is parsed as HTML. */

const byId = (id) => document.getElementById(id);

/** Makes an element: attributes, `on*` listeners, and children (nodes, strings, numbers; null is nothing). */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

const put = (element, ...children) => (element.replaceChildren(), add(element, children));

const MINUS = "\u2212", THIN = "\u202f";

/** Three significant digits, with a real minus and thousands apart. */
function num(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1000) text = Math.round(size).toLocaleString("en-US");
  else if (size !== 0 && size < 1e-3) text = size.toExponential(1).replace("e-", "e" + MINUS);
  else text = String(Number(size.toPrecision(digits)));
  return (value < 0 ? MINUS : "") + text;
}

const signed = (value) => (value > 0 ? "+" : "") + num(value);
const count = (value) => (value ?? 0).toLocaleString("en-US");
const plural = (n, one, many = one + "s") => `${count(n)} ${n === 1 ? one : many}`;
const pct = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1).replace(/\.0$/, "")}${THIN}%`);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${num(seconds, 2)}${THIN}s`;
  if (seconds < 600) return `${Math.floor(Math.round(seconds) / 60)}${THIN}min ${Math.round(seconds) % 60}${THIN}s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes}${THIN}min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const last = (values) => values[values.length - 1];

/** Last entry that is a number, and its position; undefined where there is none. */
function lastKnown(values) {
  for (let n = (values || []).length - 1; n >= 0; n--) if (values[n] !== null) return { value: values[n], at: n };
  return undefined;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const sum = (values) => (values || []).reduce((total, value) => total + (value || 0), 0);

/** What is shown where there is nothing: says why, and what would change that. */
const empty = (title, ...words) => h("div", { class: "empty" }, h("h3", {}, title), h("p", {}, ...words));

const say = (text) => put(byId("say"), text);

const theme = {
  get dark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  toggle() {
    document.documentElement.dataset.theme = this.dark ? "light" : "dark";
    this.changed();
  },
  changed: () => {},
};

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
