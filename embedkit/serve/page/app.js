// The page: what is asked stands in the address, what is answered in the grid.
//
// ?id=12&box=0.1,0.1,0.9,0.9&k=20&label=shoe   a picture of the catalog: can be linked and reloaded
// ?k=20                                        an upload: its file is kept in this tab only

import * as api from "./api.js";
import { Compare } from "./compare.js";
import { Region } from "./region.js";
import { cards, nameOf, scoreText, summary } from "./results.js";

const element = (id) => document.getElementById(id);

const uploads = new Map(); // number -> {file, src}: so that "back" finds a former upload
const compare = new Compare();
const region = new Region(() => ask());
let query = null; // {id} or {upload}, with name and, once known, src
let labels = [];
let answer = null;
let asking = null;

// --- asking --------------------------------------------------------------------------------------

function choices() {
  return { k: Number(element("k").value), labels, box: region.text };
}

function address() {
  const parameters = new URLSearchParams();
  if (query?.id !== undefined) parameters.set("id", query.id);
  if (query?.id !== undefined && region.text) parameters.set("box", region.text);
  parameters.set("k", element("k").value);
  labels.forEach((label) => parameters.append("label", label));
  return `${location.pathname}?${parameters}`;
}

async function ask({ remember = true } = {}) {
  if (!query) return;
  if (remember) {
    history.pushState({ upload: query.upload, box: region.text }, "", address());
  }
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  busy(true);
  try {
    const asked = choices();
    const found =
      query.id === undefined
        ? await api.searchFile(uploads.get(query.upload).file, asked, mine.signal)
        : await api.searchPicture(query.id, asked, mine.signal);
    if (found.query) showQueryName(nameOf(found.query), found.query.label);
    showAnswer(found);
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem(error);
  }
  if (asking === mine) busy(false);
}

function askFile(file) {
  const number = uploads.size + 1;
  uploads.set(number, { file, src: URL.createObjectURL(file) });
  query = { upload: number };
  region.set(null);
  showQuery();
  ask();
}

function askPicture(picture) {
  query = { id: picture.id };
  region.set(null);
  showQuery();
  showQueryName(nameOf(picture), picture.label);
  ask();
  window.scrollTo({ top: 0 });
  element("results").focus({ preventScroll: true });
}

// --- showing -------------------------------------------------------------------------------------

function busy(yes) {
  element("results").classList.toggle("busy", yes);
  element("results").setAttribute("aria-busy", yes);
}

function showQuery() {
  element("query").hidden = !query;
  element("drop").hidden = Boolean(query);
  if (!query) return;
  const upload = uploads.get(query.upload);
  const picture = element("picture");
  picture.src = upload ? upload.src : api.imageOf(query.id, "large");
  showQueryName(upload ? upload.file.name || "pasted photo" : `picture ${query.id}`, "");
  element("copy").disabled = Boolean(upload);
  element("copy").title = upload ? "Only a picture of the catalog can be linked: click a result" : "";
}

function showQueryName(name, label) {
  query.name = [label, name].filter(Boolean).join(" · ");
  element("query-name").textContent = query.name;
  element("picture").alt = `The query: ${query.name}`;
}

function showAnswer(found) {
  answer = found;
  say("");
  element("summary").textContent = summary(found, labels);
  element("grid").replaceChildren(
    ...cards(found.hits, { onSearch: askPicture, onCompare: openCompare }),
  );
  announce(
    found.hits.length
      ? `${summary(found, labels)}. Best score ${scoreText(found.hits[0].score)}.`
      : summary(found, labels),
  );
}

function showProblem(error) {
  answer = null;
  element("grid").replaceChildren();
  element("summary").textContent = "Results";
  const text = error instanceof api.ApiError
    ? [error.message, error.facts, error.hint && `Try: ${error.hint}`].filter(Boolean).join("\n")
    : "The server does not answer. Is it still running?";
  say(text, true);
}

function say(text, bad = false) {
  element("message").classList.toggle("bad", bad);
  element("message").textContent = text;
}

/** Read out, but not shown: the heading says it to those who see. */
function announce(text) {
  element("results").setAttribute("aria-description", text);
  spoken.textContent = text;
}

const spoken = document.createElement("p");
spoken.className = "unseen";
spoken.setAttribute("role", "status");
document.body.append(spoken);

async function openCompare(hit) {
  const src = await region.cut(element("picture"));
  compare.open({ src, name: query.name }, answer.hits, hit);
}

function showChips() {
  element("chips").replaceChildren(
    ...labels.map((label) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `${label} ✕`;
      button.setAttribute("aria-label", `Remove the label ${label}`);
      button.addEventListener("click", () => chooseLabels(labels.filter((one) => one !== label)));
      item.append(button);
      return item;
    }),
  );
}

// --- the choices ---------------------------------------------------------------------------------

function chooseLabels(chosen) {
  labels = chosen;
  showChips();
  ask();
}

async function offerLabels() {
  const found = await api.labels(element("label").value).catch(() => ({ labels: [] }));
  element("labels").replaceChildren(
    ...found.labels.map(({ label, count }) => {
      const option = document.createElement("option");
      option.value = label;
      option.label = `${label} (${count.toLocaleString()})`;
      return option;
    }),
  );
}

function takeLabel() {
  const label = element("label").value;
  if (!label) return;
  element("label").value = "";
  if (!labels.includes(label)) chooseLabels([...labels, label]);
}

async function copyLink() {
  const link = location.href;
  try {
    await navigator.clipboard.writeText(link);
  } catch {
    // Outside this machine's own address, browsers keep the clipboard to typed copies.
    const text = document.createElement("textarea");
    text.value = link;
    document.body.append(text);
    text.select();
    document.execCommand("copy");
    text.remove();
  }
  say("The link is copied.");
}

// --- the start -----------------------------------------------------------------------------------

/** What the address asks for; also after "back" and "forward". */
function read(state) {
  const parameters = new URLSearchParams(location.search);
  const k = parameters.get("k");
  if ([...element("k").options].some((option) => option.value === k)) element("k").value = k;
  labels = parameters.getAll("label");
  showChips();
  const id = parameters.get("id");
  query = null;
  if (id !== null && /^[0-9]+$/.test(id)) query = { id: Number(id) };
  else if (state?.upload && uploads.has(state.upload)) query = { upload: state.upload };
  region.set(parameters.get("box") ?? state?.box ?? null);
  showQuery();
  if (query) ask({ remember: false });
  else begin();
}

/** Before the first question: a few pictures to start from. */
async function begin() {
  answer = null;
  say("");
  element("summary").textContent = "Or start from a picture of the catalog";
  element("grid").replaceChildren();
  try {
    const { pictures } = await api.somePictures(24);
    if (!query) element("grid").replaceChildren(...cards(pictures, { onSearch: askPicture }));
  } catch (error) {
    showProblem(error);
  }
}

async function introduce() {
  const { index, model } = await api.info();
  document.title = `${index.name} · embedkit`;
  element("home").textContent = index.name;
  element("about").textContent =
    `${index.count.toLocaleString()} pictures · ${model.name}` +
    (index.changed ? " · the index has changed since: restart the server to see it" : "");
  element("filter-field").hidden = index.labels === 0;
}

function firstPicture(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? files[0];
}

element("picture").addEventListener("load", ({ target }) => {
  element("stage").style.setProperty("--ratio", target.naturalWidth / target.naturalHeight);
});
element("file").addEventListener("change", (event) => {
  if (event.target.files.length) askFile(event.target.files[0]);
  event.target.value = "";
});
element("another").addEventListener("click", () => element("file").click());
element("copy").addEventListener("click", copyLink);
element("k").addEventListener("change", () => ask());
element("choices").addEventListener("submit", (event) => {
  event.preventDefault();
  takeLabel();
});
element("label").addEventListener("change", takeLabel);
element("label").addEventListener("focus", offerLabels);
element("label").addEventListener("input", offerLabels);
document.addEventListener("paste", (event) => {
  const file = firstPicture(event.clipboardData);
  if (file) askFile(file);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const file = firstPicture(event.dataTransfer);
  if (file) askFile(file);
  else say("That was no file: save the picture first, then drop it here.", true);
});
window.addEventListener("popstate", (event) => read(event.state));

introduce().catch(showProblem);
read(history.state);
