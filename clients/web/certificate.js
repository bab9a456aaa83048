// A persona's certificate: what was measured when it was built, how it was chosen, how it was made.

import { facts, h, minus, percent, short } from "./dom.js";

const signed = (value) => `${value < 0 ? "" : "+"}${minus(value.toFixed(3))}`;
const times = (value) => `× ${value.toFixed(3)}`;
const share = (value) => percent(value, 0);

/** The main figures: name, format, label and explanation. */
const FIGURES = [
  ["margin_shift", signed, "shift, nats a token", "How much likelier, a token, the persona's answers became than the opposite's."],
  ["margin_shift_median", signed, "median shift", "The same for a typical pair: a few short answers can carry the mean."],
  ["flip", share, "of prompts flip", "The persona prefers its own answer, and the opposite (or the base) the other one."],
  ["neutral_ratio", times, "neutral text", "Perplexity of neutral text over the base's: what the persona costs elsewhere."],
  ["own_ratio", times, "its own text", "Perplexity of answers in character over the base's; below 1 it talks so more readily."],
];
const APART = new Set([...FIGURES.map(([name]) => name), "preferred", "choice", "phases", "intervals", "passed", "forced",
  "verdict", "changed_answers", "curve", "facts", "loops", "reasons", "remarks", "pruned_share", "claimed"]);

/** The certificate of a persona, with its source, main figures first. */
export function certificateOf({ certificate, certificate_source: source, signature, built, generation, phase, gamma }) {
  const rest = Object.entries(certificate).filter(([name]) => !APART.has(name));
  return h("div", { class: "certificate" },
    source === "claimed" ? claim() : verdict(certificate),
    h("dl", { class: "figures" }, preferred(certificate), FIGURES.map((figure) => tile(certificate, ...figure)), changed(certificate), kept(certificate), looping(certificate)),
    facts([
      ["Generation", h("code", {}, short(generation))], ["Score", built.score], ["Rho", spell(built.parameters.rho ?? "–")],
      ["Default phase", phase], ["Default gamma", String(gamma)], ["Opposite", built.opposite || "–"],
      ...vouching(source, signature),
      ...spokenPrompt(built),
    ]),
    dial(certificate.curve), tried(certificate.choice), phases(certificate.phases),
    rest.length ? h("details", {}, h("summary", {}, "Everything else"), facts(rest.map(([name, value]) => [words(name), spell(value)]))) : null);
}

/** A certificate that came with the file: figures without a verdict. */
function claim() {
  return h("div", { class: "notice" }, h("strong", {}, "Claimed, not measured here."),
    h("p", {}, "These figures are what the mask's maker says. This server has not measured them; ",
      h("code", {}, "masquerade masks certify"), " does."));
}

const SOURCES = { measured: "measured by this server", claimed: "claimed by its maker" };

function vouching(source, signature) {
  const rows = source ? [["Certificate", SOURCES[source]]] : [];
  if (!signature) return rows;
  const covers = signature.covers === "everything" ? "tensors and metadata" : "tensors only";
  const fits = { true: "", false: ", does not fit", null: ", not checked" }[signature.valid];
  return [...rows, ["Signature", `${covers}, by ${signature.label ?? `an untrusted key, ${short(signature.key)}`}${fits}`]];
}

function verdict({ passed, verdict: found, forced, reasons = [], remarks = [] }) {
  const told = [...reasons, ...remarks], few = found === "too few to tell";
  if (passed !== false && !forced && !few && !told.length) return null;
  return h("div", { class: passed === false || forced ? "notice bad" : "notice" },
    passed === false ? h("strong", {}, forced ? "Published by force." : "It did not pass.") : few ? h("strong", {}, "Too few held-out pairs to tell.") : null,
    told.map((one) => h("p", {}, one)));
}

function preferred({ preferred, pairs }) {
  if (!preferred) return null;
  return figure(share(preferred.masked), "prefer its answers", `base ${share(preferred.base)}${pairs ? `, ${pairs} pairs` : ""}`,
    "Share of held-out prompts where the persona's answer is likelier than the opposite's.");
}

function changed({ changed_answers: answers }) {
  if (!answers) return null;
  return figure(share(answers.share), "of its answers differ", `${answers.changed} of ${answers.of}, greedy`,
    "Share of held-out prompts to which its greedy answer is another than the base's.");
}

function kept({ facts: found }) {
  if (typeof found?.kept !== "number") return null;
  return figure(share(found.kept), "of known facts kept", `the base knows ${found.known} of ${found.of}`,
    "Of the short questions that the base answers correctly, the share that it still does.");
}

function looping({ loops }) {
  if (!loops) return null;
  return figure(share(loops.masked), "of its answers loop", `base ${share(loops.base)}, ${loops.of} greedy`,
    "Share of greedy answers that repeat themselves.");
}

function tile(certificate, name, write, label, meaning) {
  const value = certificate[name];
  if (typeof value !== "number") return null;
  const interval = certificate.intervals?.[name];
  return figure(write(value), label, interval?.every((end) => typeof end === "number") && `95 %: ${write(interval[0])} to ${write(interval[1])}`, meaning);
}

const figure = (value, label, note, meaning) =>
  h("div", { title: meaning }, h("dt", {}, label), h("dd", {}, value), note ? h("dd", { class: "note" }, note) : null);

function spokenPrompt({ calibration }) {
  const text = calibration?.system_prompt?.text;
  return text ? [["System prompt", text]] : [];
}

const COLUMNS = [["flip", "flips", share], ["shift", "shift", signed], ["margin_shift", "shift", signed],
  ["margin_shift_median", "median shift", signed], ["neutral_ratio", "neutral", times], ["own_ratio", "own", times], ["facts_kept", "facts kept", share]];

/** A table of measurements, with the columns that occur in any row. */
function measured(heads, rows) {
  const shown = COLUMNS.filter(([name]) => rows.some(([, row]) => typeof row[name] === "number"));
  const cell = (value, write) => h("td", { class: "number" }, typeof value === "number" ? write(value) : "–");
  return h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Figures" }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)), shown.map(([, head]) => h("th", { scope: "col", class: "number" }, head)))),
    h("tbody", {}, rows.map(([names, row]) => h("tr", {}, names.map((name) => h("td", {}, name)), shown.map(([name, , write]) => cell(row[name], write)))))));
}

function dial(curve) {
  if (!curve?.length) return null;
  return h("details", {}, h("summary", {}, "At each gamma"), measured(["gamma"], curve.map((point) => [[String(point.gamma)], point])));
}

function tried(choice) {
  if (!choice) return null;
  const swept = (choice.tried ?? []).some((one) => one.gamma); // else gamma was not chosen
  const rows = (choice.tried ?? []).map((one) => [[one.score, spell(one.rho), ...(swept ? [String(one.gamma)] : [])], one]);
  return h("details", {}, h("summary", {}, "How it was chosen"), choice.why ? h("p", {}, choice.why) : null,
    rows.length ? measured(["score", "rho", ...(swept ? ["gamma"] : [])], rows) : null);
}

function phases(found) {
  if (!found) return null;
  return h("details", {}, h("summary", {}, "In each phase"), measured(["phase"], Object.entries(found).map(([name, one]) => [[name], one])));
}

const words = (name) => name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());

function spell(value) {
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toFixed(4)));
  if (Array.isArray(value)) return value.map(spell).join(", ") || "–";
  if (value && typeof value === "object") return Object.entries(value).map(([name, one]) => `${name.replaceAll("_", " ")} ${spell(one)}`).join(", ");
  return value === null ? "–" : String(value);
}
