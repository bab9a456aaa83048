// The pages of personas: the list, and one persona's certificate, pruning, differences and history.

import { ask, download } from "./api.js";
import { certificateOf } from "./certificate.js";
import { alarm, bytes, facts, field, h, moment, percent, select, short } from "./dom.js";

const PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

export async function showPersonas(page, signal) {
  const { data } = await ask("GET", "v1/personas");
  if (signal.aborted) return;
  const number = (value) => h("td", { class: "number" }, value);
  const row = (one) => h("tr", {},
    h("th", { scope: "row" }, h("a", { href: `#/personas/${encodeURIComponent(one.id)}` }, one.id)),
    h("td", {}, h("code", {}, short(one.generation))), number(bytes(one.bytes)), h("td", {}, one.phase), number(one.gamma),
    number(one.requests), h("td", {}, one.resident ? "yes" : "no"), h("td", {}, one.tags.join(", ")),
    h("td", {}, one.served ? h("a", { href: `#/chat/${encodeURIComponent(one.id)}`, "aria-label": `Chat with ${one.id}` }, "Chat")
      : "not served"));
  const heads = ["Name", "Generation", "Size", "Phase", "Gamma", "Requests", "In memory", "Tags", ""];
  const numbers = new Set(["Size", "Gamma", "Requests"]);
  const head = (text) => (text ? h("th", { scope: "col", class: numbers.has(text) && "number" }, text) : h("td", {}));
  page.append(h("h2", {}, "Personas"), data.length
    ? h("div", { class: "card wide", tabindex: 0, role: "region", "aria-label": "Personas" }, h("table", { class: "list" },
        h("thead", {}, h("tr", {}, heads.map(head))), h("tbody", {}, data.map(row))))
    : h("p", { class: "card" }, "There are none yet. ", h("a", { href: "#/build" }, "Build one"), "."));
}

export async function showPersona(page, signal, name) {
  const [persona, all] = await Promise.all([ask("GET", path(name)), ask("GET", "v1/personas")]);
  if (signal.aborted) return;
  const others = all.data.map((one) => one.id).filter((other) => other !== name);
  const outcome = h("div", { "aria-live": "polite" });
  const asked = async (what) => {
    outcome.replaceChildren(await what().then(() => "", alarm));
  };
  page.append(
    h("h2", {}, name),
    about(persona),
    ...(persona.warning ? [h("p", { class: "notice" }, h("strong", {}, persona.served ? "Take care: " : "Not served: "), persona.warning, ".")] : []),
    h("div", { class: "buttons" },
      persona.served && h("a", { class: "button", href: `#/chat/${encodeURIComponent(name)}` }, "Chat with it"),
      h("button", { type: "button", onclick: () => asked(() => download(`${path(name)}/content`, `${name}.safetensors`)) },
        `Download the mask (${bytes(persona.bytes)})`)),
    outcome,
    h("div", { class: "cards" },
      card("Certificate", certificateOf(persona)),
      h("div", { class: "stack" },
        card("What it prunes", later(async () => heatMap(await diff(name, name), (part) => part.a / part.size, "pruned"))),
        card("How it differs", others.length ? differ(name, others, persona.built.opposite) : "There is no other persona."),
        card("History", history(name, persona, asked)))));
}

const path = (name) => `v1/personas/${encodeURIComponent(name)}`;
const diff = (one, other) => ask("GET", `${path(one)}/diff/${encodeURIComponent(other)}`);

/** The persona's notes, if any. */
function about({ notes, tags, aliases }) {
  const said = [notes, aliases.length && `Also called ${aliases.join(", ")}.`, tags.length && `Tags: ${tags.join(", ")}.`].filter(Boolean);
  return said.length ? h("p", { class: "note" }, said.join(" ")) : "";
}

function card(title, ...content) {
  return h("section", { class: "card" }, h("h3", {}, title), ...content);
}

/** A placeholder for content that is being loaded, or for its error. */
function later(make) {
  const place = h("div", { "aria-live": "polite", "aria-busy": "true" }, h("p", { class: "note" }, "Reading…"));
  make().catch(alarm).then((content) => {
    place.replaceChildren(content);
    place.removeAttribute("aria-busy");
  });
  return place;
}

/** A heat map: a row per layer, a column per Linear. The shares are also text for screen readers and tooltips. */
function heatMap(diff, share, verb) {
  const cells = Object.entries(diff.modules).map(([name, part]) => [...place(name), share(part)]);
  const most = Math.max(...cells.map(([, , value]) => value), Number.MIN_VALUE);
  const layers = [...new Set(cells.map(([layer]) => layer))].sort((a, b) => a - b);
  const columns = [...PARTS.filter((part) => cells.some(([, one]) => one === part)),
    ...new Set(cells.map(([, part]) => part).filter((part) => !PARTS.includes(part)))];
  const found = new Map(cells.map(([layer, part, value]) => [`${layer} ${part}`, value]));
  const cell = (layer, part) => {
    const value = found.get(`${layer} ${part}`);
    if (value === undefined) return h("td", {});
    const shown = h("td", { class: "heat", title: `layer ${layer}, ${part}: ${percent(value, 3)} ${verb}` }, (100 * value).toFixed(2));
    shown.style.setProperty("--heat", value / most);
    return shown;
  };
  return h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `Share ${verb}, by layer and Linear` },
    h("table", { class: "heatmap" }, h("caption", {}, `Per cent of weights ${verb}, ${percent(share(diff.total), 2)} in all`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), columns.map((part) => h("th", { scope: "col" }, part.replace("_proj", ""))))),
      h("tbody", {}, layers.map((layer) => h("tr", {}, h("th", { scope: "row" }, layer), columns.map((part) => cell(layer, part)))))));
}

/** `model.layers.3.mlp.up_proj` is layer 3, up_proj. */
function place(name) {
  const match = /\.(\d+)\.(?:.*\.)?([^.]+)$/.exec(name);
  return match ? [match[1], match[2]] : ["–", name];
}

function differ(name, others, opposite) {
  const outcome = h("div", {});
  const other = select(others.map((one) => [one, one]), others.includes(opposite) ? opposite : others[0], { onchange: show });
  function show() {
    outcome.replaceChildren(later(async () => {
      const found = await diff(name, other.value);
      return h("div", {}, facts([["Pruned by both, of what either prunes", percent(found.total.jaccard, 2)],
        ["Attention differs in", percent(found.parts.attention?.differing ?? 0, 2)], ["MLP differs in", percent(found.parts.mlp?.differing ?? 0, 2)]]),
        heatMap(found, (part) => part.differing, "differing"));
    }));
  }
  show();
  return h("div", {}, field("Other persona", other), outcome);
}

function history(name, persona, asked) {
  const row = (past) => h("li", {}, h("span", {}, h("code", {}, short(past.generation)), ` no. ${past.number} `, h("time", {}, moment(past.created_at))),
    past.number === persona.number ? h("strong", {}, "current") : h("button", {
      type: "button",
      onclick: () => asked(async () => {
        await ask("POST", `${path(name)}/rollback`, { to: past.number }, { "If-Match": persona.etag });
        dispatchEvent(new HashChangeEvent("hashchange")); // reload the page
      }),
    }, `Go back to no. ${past.number}`));
  return h("ul", { class: "history" }, persona.history.map(row));
}
