// The chat page: one persona, or two to four side by side with the same prompts.

import { Failure, ask, key, listen } from "./api.js";
import { certificateOf } from "./certificate.js";
import { Curve } from "./curve.js";
import { alarm, copier, field, h, labelled, select, short } from "./dom.js";

const MAX_COLUMNS = 4;
const BASE = ""; // no persona
const TOUCH = matchMedia("(hover: none)"); // where focus opens a keyboard on the screen

export async function showChat(page, signal, wanted) {
  const [models, personas] = await Promise.all([ask("GET", "v1/models"), ask("GET", "v1/personas")]);
  if (signal.aborted) return;
  personas.data = personas.data.filter((one) => one.served);
  const base = models.data.find((model) => model.parent === null).id;
  const table = h("div", { class: "columns", "data-kept": true });
  const columns = [];
  const options = settings(() => columns.forEach((column) => column.quote()));
  const change = { remove, answer };

  function add(name) {
    const column = new Column(base, personas.data, name, options, change);
    columns.push(column);
    table.append(column.element);
    update();
  }
  function remove(column) {
    column.stop();
    columns.splice(columns.indexOf(column), 1);
    column.element.remove();
    update();
  }
  function update() {
    more.disabled = columns.length === MAX_COLUMNS;
    for (const column of columns) column.closer.hidden = columns.length === 1;
    if (columns.length) table.style.setProperty("--count", columns.length);
  }

  /** Let columns answer; Send and Stop are enabled accordingly. */
  async function answer(asked, text) {
    asking += asked.length;
    show();
    await Promise.all(asked.map((column) => column.say(text).finally(() => {
      asking -= 1;
      show();
    })));
    if (!TOUCH.matches) prompt.focus();
  }
  function show() {
    [say.disabled, stop.disabled] = [asking > 0, asking === 0];
  }

  let asking = 0;
  const prompt = h("textarea", { rows: 2, placeholder: "Say something… Enter sends, Shift+Enter begins a new line.", required: true });
  const stop = h("button", { type: "button", disabled: true, onclick: () => columns.forEach((one) => one.stop()) }, "Stop");
  const say = h("button", { class: "primary" }, "Send");
  const more = h("button", { type: "button", onclick: () => add(next(personas.data, columns)) }, "Compare with another");
  const form = h("form", {
    class: "composer",
    async onsubmit(event) {
      event.preventDefault();
      const text = prompt.value.trim();
      if (!text) return;
      prompt.value = "";
      await answer(columns, text);
    },
  }, options.element, labelled("Message", prompt),
    h("div", { class: "buttons" }, say, stop, h("span", { class: "gap" }), more,
      h("button", { type: "button", onclick: () => columns.forEach((one) => one.clear()) }, "Clear")));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!say.disabled) form.requestSubmit();
    }
  });
  signal.addEventListener("abort", () => columns.forEach((one) => one.stop()));

  const asked = (wanted ?? "").split(",").filter(Boolean);
  const names = asked.filter((name) => personas.data.some((one) => one.id === name));
  const unknown = asked.filter((name) => !names.includes(name));
  for (const name of names.length ? names.slice(0, MAX_COLUMNS) : [personas.data[0]?.id ?? BASE]) add(name);
  page.classList.add("chat");
  page.append(h("h2", { class: "hidden" }, "Chat"), personas.data.length ? "" : nobody(),
    unknown.length ? h("p", { class: "notice" }, `There is no persona ${unknown.join(", ")} here.`) : "", table, form);
  if (!TOUCH.matches) prompt.focus();
}

const nobody = () => h("p", { class: "notice" }, "This server has no personas yet, only its base. ", h("a", { href: "#/build" }, "Build one"), ".");

/** The first persona that no column shows, else the base. */
function next(personas, columns) {
  return personas.find((one) => columns.every((column) => column.persona.value !== one.id))?.id ?? BASE;
}

function settings(onchange) {
  const number = (value, min, max, step) => h("input", { type: "number", value, min, max, step });
  const temperature = number(0.7, 0, 2, "any");
  const limit = number("", 1, 100000, 1);
  const seed = number("", 0, 2 ** 31, 1);
  const system = h("textarea", { rows: 2 });
  const element = h("details", { class: "settings", oninput: onchange }, h("summary", {}, "Settings"), h("div", { class: "fields" },
    field("Temperature", temperature, "0 always takes the likeliest token."), field("Most tokens", limit),
    field("Seed", seed, "The same seed gives the same answer."), field("System prompt", system)));
  return {
    element,
    get system() {
      return system.value.trim();
    },
    get sampling() {
      const chosen = {};
      if (temperature.value) chosen.temperature = Number(temperature.value);
      if (limit.value) chosen.max_tokens = Number(limit.value);
      if (seed.value) chosen.seed = Number(seed.value);
      return chosen;
    },
  };
}

/** One conversation: a persona, its gamma, and the messages. */
class Column {
  constructor(base, personas, name, options, change) {
    Object.assign(this, { base, options, change, history: [], answering: null });
    const pairs = [[BASE, "no persona"], ...personas.map((one) => [one.id, one.id])];
    const defaults = new Map(personas.map((one) => [one.id, one.gamma]));
    this.persona = select(pairs, name, { onchange: () => this.reset(defaults) });
    this.gamma = h("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => this.move() });
    this.shown = h("output", {});
    this.curve = new Curve();
    this.log = h("div", { class: "log", "data-empty": "Nothing has been said yet.", role: "log", "aria-label": "Conversation", tabindex: 0 });
    this.stats = h("p", { class: "stats" });
    this.closer = h("button", { type: "button", "aria-label": "Close this column", class: "quiet", onclick: () => change.remove(this) }, "×");
    this.certificate = h("details", { ontoggle: () => this.certify() }, h("summary", {}, "Certificate"));
    this.code = h("details", { ontoggle: () => this.quote() }, h("summary", {}, "This request as code"));
    this.element = h("section", { class: "column" },
      h("div", { class: "head" }, field("Persona", this.persona), this.closer),
      this.dial(),
      this.log, this.stats, this.certificate, this.code);
    this.reset(defaults);
  }

  /** The slider of gamma, with labels at its ends and the persona's curve below; it applies from the next answer on. */
  dial() {
    this.gamma.id = `gamma-${++serial}`;
    this.gamma.setAttribute("aria-describedby", `${this.gamma.id}-hint`);
    return h("div", { class: "gamma", title: "Counts from the next answer." },
      h("label", { for: this.gamma.id }, "Gamma"), h("small", { "aria-hidden": "true" }, "persona"), this.gamma,
      h("small", { "aria-hidden": "true" }, "base"), this.shown,
      h("span", { class: "hidden", id: `${this.gamma.id}-hint` }, "0 is the whole persona, 1 the base; counts from the next answer."),
      this.curve.element);
  }

  reset(defaults) {
    const name = this.persona.value;
    this.gamma.disabled = name === BASE;
    this.gamma.value = this.own = defaults.get(name) ?? 0;
    this.certificate.hidden = name === BASE;
    this.certificate.open = this.code.open = false;
    this.element.setAttribute("aria-label", name || "no persona");
    this.curve.clear();
    this.showGamma();
    if (name !== BASE) this.trace(name);
  }

  /** Draw the persona's curve. Without its certificate, the slider does as well. */
  async trace(name) {
    const persona = await details(name).catch((error) => {
      if (!(error instanceof Failure)) throw error;
    });
    if (!persona || this.persona.value !== name) return; // another one was selected meanwhile
    this.curve.show(persona);
    this.showGamma();
  }

  /** The slider's gamma; the persona's own, which may lie between its steps, until it is moved. */
  get strength() {
    return this.own ?? Number(this.gamma.value);
  }

  move() {
    this.own = null;
    this.showGamma();
  }

  showGamma() {
    const gamma = this.strength;
    this.shown.textContent = this.persona.value === BASE ? "" : gamma.toFixed(2);
    const words = this.curve.mark(gamma);
    words ? this.gamma.setAttribute("aria-valuetext", words) : this.gamma.removeAttribute("aria-valuetext");
    if (this.code.open) this.quote();
  }

  bodyFor(history) {
    const system = this.options.system ? [{ role: "system", content: this.options.system }] : [];
    const persona = this.persona.value === BASE ? {} : { persona: this.persona.value, gamma: this.strength };
    return { model: this.base, messages: [...system, ...history], ...persona, ...this.options.sampling };
  }

  async say(text) {
    const kept = this.history.length;
    for (const past of this.log.querySelectorAll(".notice button")) past.remove(); // only the last question can be repeated
    this.history.push({ role: "user", content: text });
    const question = h("p", { class: "question" }, text);
    const answer = h("p", { class: "answer", "aria-busy": "true" });
    this.log.append(question, answer);
    this.log.scrollTop = this.log.scrollHeight;
    this.answering = new AbortController();
    const started = performance.now();
    let [first, last, usage, generation, thoughts] = [null, started, null, null, null];
    try {
      const asked = { ...this.bodyFor(this.history), stream: true, stream_options: { include_usage: true } };
      for await (const chunk of listen("POST", "v1/chat/completions", asked, this.answering.signal)) {
        const { content, reasoning_content: thought } = chunk.choices[0]?.delta ?? {};
        if (content || thought) {
          last = performance.now();
          first ??= last;
          const low = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
          if (content) answer.append(content);
          if (thought) (thoughts ??= this.think(answer)).append(thought);
          if (low) this.log.scrollTop = this.log.scrollHeight;
        }
        usage = chunk.usage ?? usage;
        generation = chunk.generation;
      }
    } catch (error) {
      if (error instanceof Failure) answer.after(this.failed(error, text, kept, [question, thoughts, answer].filter(Boolean)));
      else if (!this.answering.signal.aborted) throw error;
    }
    answer.removeAttribute("aria-busy");
    if (this.history.length <= kept) return; // cleared meanwhile
    if (answer.textContent) this.history.push({ role: "assistant", content: answer.textContent });
    else this.history.length = kept; // remove the failed question
    this.report(started, first, last, usage, generation);
    if (this.code.open) this.quote();
  }

  /** A place for the thoughts before an answer, which are no part of it. */
  think(answer) {
    const thoughts = h("details", { class: "thoughts" }, h("summary", {}, "Thoughts"));
    answer.before(thoughts);
    return thoughts;
  }

  /** An error message, with a button that repeats the question. */
  failed(error, text, kept, said) {
    const again = h("button", {
      type: "button",
      onclick: () => {
        this.history.length = Math.min(kept, this.history.length);
        for (const one of [...said, notice]) one.remove();
        this.change.answer([this], text);
      },
    }, "Ask again");
    const notice = h("div", { class: "notice bad" }, alarm(error), again);
    return notice;
  }

  report(started, first, last, usage, generation) {
    const parts = [];
    if (first !== null) parts.push(`first token ${(first - started).toFixed(0)} ms`);
    if (usage && last > first) parts.push(`${((1000 * (usage.completion_tokens - 1)) / (last - first)).toFixed(1)} tokens/s`);
    if (usage) parts.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
    if (usage?.prompt_tokens_details?.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} cached`);
    if (usage) parts.push(generation ? `generation ${short(generation)}` : "base");
    this.stats.textContent = parts.join(" · ");
  }

  stop() {
    this.answering?.abort();
  }

  clear() {
    this.stop();
    this.history = [];
    this.log.replaceChildren();
    this.stats.textContent = "";
  }

  async certify() {
    if (!this.certificate.open) return;
    const summary = this.certificate.firstChild;
    const name = this.persona.value;
    const shown = await details(name).then(certificateOf).catch(alarm);
    if (name === this.persona.value) this.certificate.replaceChildren(summary, shown); // not that of one that was chosen before
  }

  quote() {
    if (!this.code.open) return;
    const answered = this.history.findLastIndex((message) => message.role === "user") + 1;
    const asked = this.history.slice(0, answered);
    const body = this.bodyFor(asked.length ? asked : [{ role: "user", content: "…" }]);
    const [curl, python] = [asCurl(body), asPython(body)];
    this.code.replaceChildren(this.code.firstChild, h("h4", {}, "curl"), h("pre", { tabindex: 0 }, curl), copier("Copy curl", () => curl),
      h("h4", {}, "Python"), h("pre", { tabindex: 0 }, python), copier("Copy Python", () => python));
  }
}

let serial = 0;
const details = (name) => ask("GET", `v1/personas/${encodeURIComponent(name)}`);
const here = () => new URL("v1", location.href).href;

function asCurl(body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const secret = key.get() ? `  -H "Authorization: Bearer $MASQUERADE_KEY" \\\n` : "";
  return `curl ${here()}/chat/completions \\\n${secret}  -H 'Content-Type: application/json' \\\n  -d '${json}'`;
}

function asPython({ persona, gamma, ...body }) {
  const extra = persona === undefined ? "" : `    extra_body=${literal({ persona, gamma })},\n`;
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const secret = key.get() ? 'os.environ["MASQUERADE_KEY"]' : '"none"';
  const imports = key.get() ? "import os\n\nfrom openai import OpenAI" : "from openai import OpenAI";
  return `${imports}\n\nclient = OpenAI(base_url="${here()}", api_key=${secret})\n` +
    `answer = client.chat.completions.create(\n${fields}${extra})\nprint(answer.choices[0].message.content)\n`;
}

/** A Python literal; strings, numbers, lists and objects are written as in JSON. */
const literal = (value) => JSON.stringify(value);
