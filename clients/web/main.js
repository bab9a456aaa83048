// The frame of the pages: routing, the server's status, and the key.

import { key } from "./api.js";
import { showBuild } from "./build.js";
import { showChat } from "./chat.js";
import { alarm, h } from "./dom.js";
import { showPersona, showPersonas } from "./personas.js";

const ROUTES = [
  [/^#\/chat(?:\/(.+))?$/, "Chat", showChat],
  [/^#\/personas$/, "Personas", showPersonas],
  [/^#\/personas\/(.+)$/, "Persona", showPersona],
  [/^#\/build(?:\/(.+))?$/, "Build", showBuild],
];
const CALM = 5000; // milliseconds between checks of the server
const WORRIED = 1000;
const SILENCE = 10_000; // milliseconds for an answer to such a check

const view = document.getElementById("view");
let leaving = new AbortController(); // aborted when the user leaves the page

async function show(moved = false) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [pattern, title, render] = ROUTES.find(([one]) => one.test(location.hash)) ?? ROUTES[0];
  const subject = pattern.exec(location.hash)?.[1];
  document.title = `${title} · Masquerade`;
  for (const link of document.querySelectorAll("nav a")) {
    const current = (location.hash || "#/chat").startsWith(link.getAttribute("href"));
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  const page = h("div", { class: "page" });
  view.replaceChildren(page);
  if (moved) view.focus({ preventScroll: true }); // for screen readers; a page may move the focus on
  try {
    await render(page, signal, subject && decodeURIComponent(subject));
  } catch (error) {
    if (!signal.aborted) page.append(alarm(error), h("p", {}, h("button", { type: "button", onclick: () => show() }, "Try again")));
  }
}

async function watch() {
  const status = document.getElementById("status");
  let state;
  try {
    const response = await fetch("readyz", { signal: AbortSignal.timeout(SILENCE) });
    state = response.ok ? ["ready", "Ready"] : ["ailing", (await response.json()).error.message];
  } catch (error) {
    state = ["gone", `The server ${error.name === "TimeoutError" ? "does not answer" : "is gone"}; waiting for it`];
  }
  if (status.textContent !== state[1]) {
    const back = ["gone", "ailing"].includes(status.dataset.state) && state[0] === "ready";
    status.dataset.state = state[0];
    status.textContent = state[1];
    if (back) document.dispatchEvent(new CustomEvent("server-back"));
  }
  setTimeout(watch, state[0] === "ready" ? CALM : WORRIED);
}

const dialog = document.getElementById("ask-key");

function askKey(why) {
  if (dialog.open) return; // of several failed requests, only one opens the dialog
  document.getElementById("ask-key-why").textContent = why;
  document.getElementById("key-value").value = key.get();
  dialog.showModal();
}

dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "use") return;
  key.set(document.getElementById("key-value").value.trim());
  if (!view.querySelector(".question, form.build")) show(); // a conversation stays, with its button "Ask again", and so does a form
});
document.getElementById("key").addEventListener("click", () => askKey(""));
document.addEventListener("key-wanted", (event) => askKey(event.detail));
document.addEventListener("server-back", () => view.querySelector(".error") && !view.querySelector("[data-kept], form.build") && show());
document.addEventListener("invalid", (event) => { // the browser can say what is wrong with visible fields only
  const folded = event.target.closest("details");
  if (folded) folded.open = true;
}, true);
document.getElementById("skip").addEventListener("click", () => view.focus());
addEventListener("hashchange", show);
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault()); // a file dropped elsewhere is not opened
show();
watch();
