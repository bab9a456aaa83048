// Creation of DOM elements. Text becomes text nodes only: no text of a server or a file is parsed as HTML.

/** An element. `on…` properties are listeners, the others attributes (true: present, false or null: absent). */
export const h = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);

/** The same for an element of a drawing. */
export const svg = (tag, props = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

let serial = 0;

/** A control with its label and an optional hint. */
export function field(label, control, hint = null) {
  control.id ||= `field-${++serial}`;
  const note = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

/** A control with a label for screen readers only. */
export function labelled(label, control) {
  control.id ||= `field-${++serial}`;
  return h("div", {}, h("label", { for: control.id, class: "hidden" }, label), control);
}

/** A checkbox with its label. */
export function check(label, control, hint) {
  const whole = field(label, control, hint);
  whole.classList.add("check");
  return whole;
}

/** A drop-down of [value, text] pairs. */
export function select(pairs, chosen, props = {}) {
  const options = pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
  return h("select", props, options);
}

/** A message that screen readers announce at once. */
export function alarm(error) {
  return h("p", { class: "error", role: "alert" }, error.message ?? String(error));
}

/** A table of [heading, value] rows. */
export function facts(rows) {
  const body = rows.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)));
  return h("table", { class: "facts" }, h("tbody", {}, body));
}

/** A button that copies the result of `text()`, and confirms it. */
export function copier(label, text) {
  const button = h("button", {
    type: "button",
    async onclick() {
      try {
        await navigator.clipboard.writeText(text());
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select the text and copy it";
      }
      setTimeout(() => (button.textContent = label), 2000);
    },
  }, label);
  return button;
}

export const bytes = (count) => {
  const units = ["B", "kB", "MB", "GB"];
  const power = count < 1 ? 0 : Math.min(3, Math.floor(Math.log10(count) / 3));
  return `${(count / 1000 ** power).toFixed(power && count / 1000 ** power < 100 ? 1 : 0)} ${units[power]}`;
};
export const minus = (text) => text.replace("-", "−");
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const moment = (when) => new Date(typeof when === "number" ? 1000 * when : when).toLocaleString();
export const short = (digest) => digest.slice(0, 8);
