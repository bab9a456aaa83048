// The dose-response curve of a persona: what it does and what it costs at each gamma, as a drawing and in words.

import { h, minus, percent, svg } from "./dom.js";

const BASE = { margin_shift_median: 0, neutral_ratio: 1, facts_kept: 1 }; // at gamma 1, by definition
const FLAT = 0.05; // a cost that is smaller than this everywhere does not fill the drawing
const isNumber = (value) => typeof value === "number";
const cost = ({ neutral_ratio: ratio }) => (isNumber(ratio) ? 1 - 1 / ratio : null); // of a token's likelihood
const shift = ({ margin_shift_median: median }) => (isNumber(median) ? median : null);

/** The measured points by gamma, and the base. */
function complete(curve) {
  const points = [...curve].sort((a, b) => a.gamma - b.gamma);
  const known = Object.entries(BASE).filter(([name]) => points.some((point) => isNumber(point[name])));
  return points.at(-1).gamma < 1 ? [...points, { gamma: 1, ...Object.fromEntries(known) }] : points;
}

/** The figures at a gamma, by linear interpolation; null where a neighbour is not known. */
function interpolate(points, gamma) {
  const place = points.findIndex((point) => point.gamma >= gamma);
  const [left, right] = [points[place - 1], points[place]];
  if (right.gamma === gamma) return right;
  const part = (gamma - left?.gamma) / (right.gamma - left?.gamma);
  const between = (name) => (isNumber(left?.[name]) && isNumber(right[name]) ? left[name] + part * (right[name] - left[name]) : null);
  return Object.fromEntries(Object.keys(BASE).map((name) => [name, between(name)]));
}

/** Figures in words, such as "shift 0.52, neutral text 3.8 % less likely, 98 % of facts kept". */
function spell(figures) {
  const said = [];
  if (shift(figures) !== null) said.push(`shift ${minus(shift(figures).toFixed(2))}`);
  if (cost(figures) !== null) said.push(`neutral text ${compare(cost(figures))}`);
  if (isNumber(figures.facts_kept)) said.push(`${percent(figures.facts_kept, 0)} of facts kept`);
  return said.join(", ") || "not measured";
}

function compare(loss) {
  const size = percent(Math.abs(loss));
  if (size === percent(0)) return "as likely as without";
  return `${size} ${loss > 0 ? "less likely" : "likelier"}`;
}

/** A figure with the drawing; hidden as long as it has nothing to show. */
export class Curve {
  constructor() {
    this.element = h("figure", { class: "curve", hidden: true });
  }

  clear() {
    this.points = null;
    this.element.hidden = true;
  }

  /** Draw the curve of a persona, if its certificate has one. */
  show({ certificate, certificate_source: source }) {
    if (!certificate.curve?.length) return;
    const points = complete(certificate.curve);
    this.lines = [new Line("shift", shift, points, 0), new Line("cost", cost, points, FLAT)].filter((line) => line.known);
    if (!this.lines.length) return;
    this.points = points;
    this.now = svg("path", { class: "now" });
    this.words = h("figcaption", {});
    const said = points.map((point) => `at ${point.gamma} ${spell(point)}`).join("; ");
    const legend = { shift: (most) => `shift, up to ${minus(most.toFixed(2))} nats a token`, cost: (most) => `cost on neutral text, up to ${percent(most)}` };
    this.element.replaceChildren(
      svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `Effect and cost: ${said}` },
        svg("path", { class: "axis", d: "M0 100H100" }), this.now, this.lines.flatMap((line) => line.paths)),
      this.words,
      h("p", { class: "note" }, this.lines.map(({ name, most }) => h("span", { class: `key ${name}` }, legend[name](most))), source === "claimed" ? h("span", {}, "claimed, not measured here") : null));
    this.element.hidden = false;
  }

  /** Mark a gamma; returns its figures in words, or null without a curve. */
  mark(gamma) {
    if (!this.points) return null;
    const figures = interpolate(this.points, gamma);
    this.now.setAttribute("d", `M${100 * gamma} 0V100`);
    for (const line of this.lines) line.mark(gamma, figures);
    const words = `at gamma ${gamma}: ${spell(figures)}`;
    this.words.textContent = words;
    return words;
  }
}

/** A line over gamma, from 0 (or less, if a value is) to its largest value, and a dot on it. */
class Line {
  constructor(name, read, points, least) {
    Object.assign(this, { name, read });
    const values = points.map(read).filter(isNumber);
    this.known = values.length > 0;
    this.most = Math.max(...values);
    this.low = Math.min(0, ...values);
    this.size = Math.max(least, this.most) - this.low || 1;
    this.dot = svg("path", { class: `dot ${name}` });
    this.paths = [svg("path", { class: name, d: this.draw(points) }), this.dot];
  }

  place(gamma, value) {
    return `${(100 * gamma).toFixed(2)} ${(96 - (92 * (value - this.low)) / this.size).toFixed(2)}`;
  }

  /** A path through the known points; it is broken where a value is not known. */
  draw(points) {
    let pen = "M";
    const step = (point) => {
      const value = this.read(point);
      const drawn = value === null ? "" : `${pen}${this.place(point.gamma, value)}`;
      pen = value === null ? "M" : "L";
      return drawn;
    };
    return points.map(step).join("");
  }

  mark(gamma, figures) {
    const value = this.read(figures);
    this.dot.setAttribute("d", value === null ? "" : `M${this.place(gamma, value)}h0`); // round caps make it a dot
  }
}
