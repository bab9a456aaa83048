// The build page: a persona from files, a system prompt or a character card, and the progress of its build.

import { Failure, ask, listen, upload } from "./api.js";
import { certificateOf } from "./certificate.js";
import { alarm, bytes, check, field, h, moment, select } from "./dom.js";
import { inspect, inspectCard, inspectQuestions } from "./jsonl.js";

const STRENGTHS = [["gentle", "gentle: 2 %"], ["normal", "normal: 5 %"], ["strong", "strong: 15 %"]];
const SCORES = ["auto", "refined", "attribution-fisher", "attribution", "signed", "contrastive-wanda", "contrastive-sparse", "sparsegpt", "wanda", "magnitude"];
const OPEN = ["validating_files", "queued", "running"];
const SOURCES = [["examples", "Examples"], ["prompt", "A system prompt"], ["card", "A character card"]];

export async function showBuild(page, signal, job) {
  if (job) return showJob(page, signal, job);
  const { data } = await ask("GET", "v1/fine_tuning/jobs");
  if (signal.aborted) return;
  page.append(h("h2", {}, "Build a persona"), form(signal), h("h3", {}, "Builds"), list(data));
}

function form(signal) {
  const drops = {
    training: new Drop("Answers in character", "One JSON object a line: a chat, prompt and completion, question with both answers, or text."),
    contrast: new Drop("Answers of the opposite (optional)", "A file whose lines have both answers is its own contrast: drop it here too."),
    card: new Drop("Character card", "JSON or PNG, V2 or V3. Its example dialogues are used too.", inspectCard, ".json,.png"),
    questions: new Drop("Or a file of questions", "One JSON object a line, with a prompt, a question or a chat. Answers in it are not read.", inspectQuestions),
    neutral: new Drop("Neutral text (optional)", "What the persona should go on knowing. Without it, the base answers everyday questions, which takes longer."),
  };
  const text = (props = {}) => h("input", { type: "text", pattern: "[a-z0-9][a-z0-9._\\-]{0,63}", autocomplete: "off", ...props });
  const area = (props = {}) => h("textarea", { rows: 3, ...props });
  const fields = {
    name: text({ required: true, title: "Small letters, digits, dot, dash, underscore; a letter or digit first." }), opposite: text(),
    prompt: area({ placeholder: "You are casual." }), contrastPrompt: area(), questions: area({ placeholder: "How was your weekend?" }),
    strength: select(STRENGTHS, "normal"),
    score: select(SCORES.map((one) => [one, one]), "auto"),
    rho: h("input", { type: "text", value: "auto", pattern: "auto|0?\\.[0-9]+", title: "A share such as 0.003, or auto." }),
    replace: h("input", { type: "checkbox" }),
  };
  const outcome = h("div", { "aria-live": "polite" });
  const go = h("button", { class: "primary" }, "Build");
  const prompts = [field("System prompt", fields.prompt, "The base answers the questions under it, and the persona learns to answer so without it."),
    field("Prompt of the opposite (optional)", fields.contrastPrompt, "Left empty: the base without a prompt.")];
  const questions = [h("div", { class: "drop" }, field("Questions", fields.questions, "One a line; a few dozen at least.")), drops.questions.element];
  const parts = {
    examples: [drops.training.element, drops.contrast.element],
    prompt: [h("div", { class: "drop fields" }, prompts), ...questions],
    card: [drops.card.element, ...questions],
  };
  const source = chooser(SOURCES, (chosen) => {
    for (const part of Object.values(parts).flat()) part.hidden = !parts[chosen].includes(part);
  });
  return h("form", {
    class: "build",
    async onsubmit(event) {
      event.preventDefault();
      go.disabled = true;
      try {
        const job = await order(source.chosen, drops, fields, outcome);
        if (!signal.aborted) location.hash = `#/build/${job.id}`; // who has gone elsewhere stays there
      } catch (error) {
        outcome.replaceChildren(alarm(error));
      }
      go.disabled = false;
    },
  }, source.element, h("div", { class: "drops" }, [...new Set(Object.values(parts).flat())], drops.neutral.element), h("div", { class: "fields" },
    field("Name", fields.name, "Small letters, digits, dot, dash, underscore."), field("Opposite (optional)", fields.opposite, "A name: its persona is built too."),
    field("Strength", fields.strength, "What it may cost: how much the perplexity of neutral text may grow.")),
    h("details", {}, h("summary", {}, "Advanced"), h("div", { class: "fields" },
      field("Score", fields.score, "How weights are ranked; auto searches in steps where there is a contrast."), field("Rho", fields.rho, "Share of weights to prune, or auto."))),
    check("Replace a persona of this name", fields.replace, "Makes a new generation of it; the old one stays in its history."),
    outcome, h("div", { class: "buttons" }, go));
}

/** A row of radio buttons; `changed` is called with the selected one, at once and on every change. */
function chooser(pairs, changed) {
  const chooser = { chosen: pairs[0][0] };
  const radio = ([value, text]) => h("label", {}, h("input", {
    type: "radio", name: "source", value, checked: value === chooser.chosen,
    onchange: () => changed((chooser.chosen = value)),
  }), text);
  chooser.element = h("fieldset", { class: "chooser" }, h("legend", {}, "Made from"), pairs.map(radio));
  changed(chooser.chosen);
  return chooser;
}

/** Upload the files of a build, then start it. */
async function order(source, drops, fields, outcome) {
  const mask = { strength: fields.strength.value, score: fields.score.value, rho: fields.rho.value === "auto" ? "auto" : Number(fields.rho.value), replace: fields.replace.checked };
  if (fields.opposite.value) mask.contrast_name = fields.opposite.value;
  const training = source === "examples" ? need(drops.training, "Drop or choose a file with answers first.") : asked(fields.questions.value, drops.questions);
  const files = { neutral_file: drops.neutral.given };
  if (source === "examples") files.contrast_file = drops.contrast.given;
  if (source === "card") files.card_file = need(drops.card, "Drop or choose a character card first.");
  if (source === "prompt") {
    mask.system_prompt = fields.prompt.value.trim();
    if (!mask.system_prompt) throw new Error("Say what the system prompt is.");
    if (fields.contrastPrompt.value.trim()) mask.contrast_prompt = fields.contrastPrompt.value.trim();
  }
  const { data } = await ask("GET", "v1/models");
  const model = data.find((one) => one.parent === null).id;
  const deliver = (file) => send(file, outcome).catch(async (error) => {
    if (await isReadable(file)) throw error;
    Object.values(drops).find((drop) => drop.given === file)?.clear();
    throw new Error(`${file.name} has changed since it was chosen, or is gone; choose it again.`);
  });
  const { id } = await deliver(training);
  for (const [name, file] of Object.entries(files)) if (file) mask[name] = (await deliver(file)).id;
  return ask("POST", "v1/fine_tuning/jobs", { model, training_file: id, suffix: fields.name.value, method: { type: "mask", mask } });
}

function need(drop, otherwise) {
  if (!drop.given) throw new Error(drop.file ? `${drop.file.name} is not good yet; what is wrong stands below it.` : otherwise);
  return drop.given;
}

/** The dropped file, or the typed questions as a file. */
function asked(typed, drop) {
  const lines = typed.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!lines.length) return need(drop, "Type some questions, or drop a file of them.");
  return new File(lines.map((prompt) => `${JSON.stringify({ prompt })}\n`), "questions.jsonl");
}

async function send(file, outcome) {
  const bar = h("progress", { max: 1, value: 0, "aria-label": `Uploading ${file.name}` });
  outcome.replaceChildren(h("p", {}, `Uploading ${file.name} `, bar));
  const body = new FormData();
  body.append("purpose", "fine-tune");
  body.append("file", file);
  const sent = await upload("v1/files", body, (share) => (bar.value = share));
  outcome.replaceChildren();
  return sent;
}

/** Whether a file can still be read: browsers refuse one that was written to after it was chosen. */
function isReadable(file) {
  return file.slice(0, 1).arrayBuffer().then(() => true, () => false);
}

/** A drop zone for a file, which is checked when it is dropped. `given` is the file, if it is valid. */
class Drop {
  constructor(label, hint, look = inspect, accept = ".jsonl,.json,.txt") {
    Object.assign(this, { file: null, given: null, look });
    this.found = h("div", { class: "found", "aria-live": "polite" });
    this.input = h("input", { type: "file", accept, onchange: () => this.take(this.input.files[0]) });
    const over = (inside) => (event) => {
      event.preventDefault();
      this.element.classList.toggle("over", inside);
    };
    this.element = h("div", {
      class: "drop",
      ondragover: over(true),
      ondragleave: over(false),
      ondrop: (event) => {
        over(false)(event);
        if (!event.dataTransfer.files.length) return;
        this.input.files = event.dataTransfer.files; // shows its name
        this.take(this.input.files[0]);
      },
    }, field(label, this.input, hint), this.found);
  }

  async take(file) {
    [this.file, this.given] = [file ?? null, null];
    this.found.replaceChildren();
    if (!file) return;
    const { lines, kinds, faults, more } = await this.look(file);
    if (this.file !== file) return; // another file was dropped meanwhile
    const listed = [...kinds].map(([kind, count]) => `${count} × ${kind}`).join(", ");
    this.found.append(h("p", {}, `${file.name}, ${bytes(file.size)}: ${lines} ${lines === 1 ? "line" : "lines"}${listed ? ` (${listed})` : ""}`));
    if (!faults.length) this.given = file;
    else this.complain(faults, more);
  }

  clear() {
    this.input.value = "";
    return this.take(null);
  }

  complain(faults, more) {
    this.input.value = ""; // otherwise selecting the same file again would fire no event
    const count = faults.length + more;
    const what = count === 1 ? "1 line is bad; mend or remove it" : `${count} lines are bad; mend or remove them`;
    this.found.append(h("p", { class: "error", role: "alert" }, `${what}, and drop the file again:`),
      h("ul", { class: "error" }, faults.map(([line, fault]) => h("li", {}, `line ${line}: ${fault}`)), more ? h("li", {}, `and ${more} more`) : null));
  }
}

function list(jobs) {
  if (!jobs.length) return h("p", { class: "note" }, "None yet.");
  return h("ul", { class: "jobs card" }, jobs.map((job) => h("li", {},
    h("a", { href: `#/build/${job.id}` }, job.fine_tuned_model ?? `${job.model}:${job.persona}`), h("span", { class: "state", "data-state": job.status }, job.status),
    h("time", {}, moment(job.created_at)))));
}

async function showJob(page, signal, id) {
  const at = `v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  let job = await ask("GET", at);
  if (signal.aborted) return;
  const state = h("strong", { class: "state", role: "status" });
  const tell = (status) => (state.textContent = state.dataset.state = status);
  const stages = new Stages();
  const log = h("ol", { class: "events" });
  const outcome = h("div", { "aria-live": "polite" });
  const cancel = h("button", {
    type: "button",
    hidden: !OPEN.includes(job.status),
    onclick: () => ask("POST", `${at}/cancel`, {}).catch((error) => outcome.replaceChildren(alarm(error))),
  }, "Cancel");
  tell(job.status);
  page.append(h("h2", {}, "Build"), h("div", { class: "buttons" }, state, h("strong", {}, job.persona), h("code", {}, id), cancel), outcome, stages.element,
    h("details", { open: true }, h("summary", {}, "Events"), log));
  for await (const event of listen("GET", `${at}/events?stream=true`, undefined, signal)) {
    if (event.data?.stage) stages.advance(event.data, event.created_at);
    else log.append(h("li", { class: event.level }, h("time", {}, moment(event.created_at)), ` ${event.message}`));
    if (event.message === "running" && state.textContent === "queued") tell((await ask("GET", at)).status); // it may be back in the queue
  }
  job = await ask("GET", at);
  tell(job.status);
  cancel.hidden = true;
  stages.end(job.status === "succeeded");
  if (job.error) outcome.replaceChildren(alarm(job.error));
  for (const made of job.personas ?? []) outcome.append(await introduce(made.persona));
}

/** Links to a new persona, with its certificate. If the build is old, the persona may have been removed. */
async function introduce(name) {
  const persona = await ask("GET", `v1/personas/${encodeURIComponent(name)}`).catch((error) => error);
  if (persona instanceof Failure) return alarm(persona);
  return h("section", { class: "card" }, h("h3", {}, name),
    h("div", { class: "buttons" }, h("a", { href: `#/chat/${encodeURIComponent(name)}`, class: "button" }, "Try it now"),
      h("a", { href: `#/personas/${encodeURIComponent(name)}` }, "Everything about it")), certificateOf(persona));
}

/** A progress bar for each stage of a build, with its count and rate. */
class Stages {
  constructor() {
    this.element = h("div", { class: "stages" });
    this.rows = new Map();
  }

  /** `at` is the event's time on the server, in seconds: a page opened late gets all events at once. */
  advance({ stage, step, total_steps: total }, at) {
    if (!this.rows.has(stage)) this.begin(stage, step, at);
    const row = this.rows.get(stage);
    if (total) [row.bar.max, row.bar.value] = [total, step];
    const rate = at > row.since + 1 ? (step - row.first) / (at - row.since) : 0;
    const left = rate && total > step ? `, ${Math.ceil((total - step) / rate)} s left` : "";
    row.told.textContent = `${step}${total ? ` of ${total}` : ""}${rate ? ` · ${rate.toFixed(1)}/s${left}` : ""}`;
  }

  begin(stage, first, since) {
    for (const earlier of this.rows.values()) fill(earlier.bar);
    const row = { bar: h("progress", { "aria-label": stage }), told: h("small", {}), first, since };
    this.rows.set(stage, row);
    this.element.append(h("div", {}, h("span", {}, stage), row.bar, row.told));
  }

  /** Fill all bars; after a failure, stop them. */
  end(succeeded) {
    for (const { bar } of this.rows.values()) {
      if (succeeded) fill(bar);
      else if (!bar.hasAttribute("value")) bar.value = 0;
    }
  }
}

const fill = (bar) => (bar.value = bar.max);
