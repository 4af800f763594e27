// The page: holds the question, asks /api/search, keeps the question in the address.

import { make, many } from "./elements.js";
import { Filters } from "./filters.js";
import { showAnswers } from "./products.js";

const byId = (id) => document.getElementById(id);
const form = byId("search"), text = byId("text"), weight = byId("weight"), count = byId("count");
const field = byId("field"), preview = byId("preview"), results = byId("results");
const FIELDS = { image: "pictures", text: "texts", multimodal: "pictures and texts" };
const GONE = "The server doesn't answer. Is vitrine demo still running?";
const ASK = "Search by a photo, words, or both.";

let releases = [], limits = {};
let photo = null, like = null; // a File; a product's {id, title}
let weightMoved = false;       // else each release's own weight is used
let running = null;            // AbortController of the search on its way
let loading = null, early = false; // the fetch of the releases; a search came before its end
let query = location.search;   // what the page shows

const filters = new Filters(byId("filters"), byId("add-filter"), byId("add"), searchAgain);

function tell(status, error = "") {
  byId("status").textContent = status;
  byId("error").textContent = error;
}

// ---- the photo

function setPhoto(file) {
  if (file.size > limits.image_bytes) {
    const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
    clearPhoto();
    results.replaceChildren();
    tell("", `This photo is too large: it has ${megabytes(file.size)} MB, the limit is ${megabytes(limits.image_bytes)} MB.`);
    return;
  }
  clearPhoto();
  setLike(null);
  photo = file;
  preview.src = URL.createObjectURL(file);
  preview.hidden = byId("remove-photo").hidden = false;
  byId("photo-name").textContent = file.name || "pasted photo";
  showWeight();
  search({ jump: true });
}

function clearPhoto() {
  if (photo) URL.revokeObjectURL(preview.src);
  photo = null;
  byId("photo").value = byId("camera").value = "";
  preview.hidden = byId("remove-photo").hidden = true;
  preview.removeAttribute("src");
  byId("photo-name").textContent = "Drop or paste a photo here";
  showWeight();
}

// What can't be drawn has no preview; the server says what is wrong with it.
preview.addEventListener("error", () => { preview.hidden = true; });

for (const id of ["photo", "camera"]) {
  byId(id).addEventListener("change", (event) => {
    if (event.target.files.length) setPhoto(event.target.files[0]);
  });
}
byId("remove-photo").addEventListener("click", () => {
  clearPhoto();
  byId("photo").focus();
  if (canSearch()) search(); else showNothing();
});
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); setPhoto(file); }
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault(); // anywhere: the browser would leave the page for the file
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) setPhoto(event.dataTransfer.files[0]);
});

// ---- the weight

function showWeight() {
  const share = Number(weight.value), words = `${share} % photo, ${100 - share} % words`;
  weight.disabled = !(photo && text.value.trim());
  weight.setAttribute("aria-valuetext", words);
  byId("weight-words").textContent = weight.disabled ? "for a photo and words together" : words;
}
weight.addEventListener("input", () => { weightMoved = true; showWeight(); });
weight.addEventListener("change", searchAgain);
text.addEventListener("input", showWeight);

// ---- more like this

function setLike(product) {
  like = product;
  byId("like").hidden = !like;
  byId("like-words").textContent = like ? `Products like “${like.title}”` : "";
}

function searchLike(product) {
  clearPhoto();
  text.value = "";
  setLike(product);
  showWeight();
  search();
  byId("results-title").focus();
}

byId("remove-like").addEventListener("click", () => {
  setLike(null);
  showNothing();
  text.focus();
});

// ---- the search

function canSearch() { return Boolean(like || photo || text.value.trim()); }

function searchAgain() { if (canSearch()) search(); }

function showNothing() {
  running?.abort();
  results.replaceChildren();
  results.removeAttribute("aria-busy");
  tell(ASK);
  keepInAddress();
}

function readQuestion() {
  const body = new FormData(), words = text.value.trim();
  if (like) body.set("product_id", like.id);
  if (photo) body.set("image", photo, photo.name || "pasted");
  if (words && !like) body.set("text", words);
  if (photo && words && weightMoved) body.set("image_weight", weight.value / 100);
  body.set("field", field.value);
  body.set("k", count.value);
  body.set("filters", JSON.stringify(filters.read()));
  return body;
}

// keep: in the address. jump: to the products, where they lie below the screen.
async function search({ keep = true, jump = false } = {}) {
  if (!releases.length && !await loadLate()) return;
  if (!canSearch()) { tell("", "Give a photo, words, or both."); text.focus(); return; }
  if (!form.reportValidity()) return;
  running?.abort();
  const mine = running = new AbortController();
  if (keep) keepInAddress();
  tell("Searching…");
  results.setAttribute("aria-busy", "true");
  try {
    show(await ask("/api/search", { method: "POST", body: readQuestion(), signal: mine.signal }));
    const title = byId("results-title");
    if (jump && title.getBoundingClientRect().top > 0.8 * innerHeight) title.scrollIntoView();
  } catch (error) {
    if (error.name === "AbortError") return;
    results.replaceChildren();
    tell("", error.message);
  } finally {
    if (mine === running) results.removeAttribute("aria-busy");
  }
}

async function ask(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  const answer = isJson ? await response.json() : {};
  if (!response.ok) throw new Error(answer.error ?? `The server answered ${response.status}.`);
  return answer;
}

function show({ answers, shared }) {
  results.className = answers.length > 1 ? "two" : "";
  results.replaceChildren(...showAnswers(answers, newest(), searchLike));
  tell(describe(answers, shared));
}

function newest() {
  return releases.length > 1 && releases[1].created_at > releases[0].created_at ? 1 : 0;
}

function describe(answers, shared) {
  const found = Math.max(...answers.map((answer) => answer.results.length));
  if (!found) return filters.read().length ? "No product found that passes the filters." : "No product found.";
  const ms = answers.reduce((sum, { ms: one }) => (one ? sum + one.encode + one.search : sum), 0);
  const time = `in ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
  if (shared === null) return `${many(found, "product")} ${time}.`;
  return `${shared} of the first ${many(found, "product")} are in both, ${time}.`;
}

// ---- the address: words, product, field and filters can be shared and reloaded, a photo can't

function keepInAddress() {
  if (!releases.length) return;
  const kept = new URLSearchParams(), held = filters.read();
  if (like) { kept.set("like", like.id); kept.set("title", like.title); }
  else if (text.value.trim()) kept.set("q", text.value.trim());
  if (field.value !== releases[0].default_field) kept.set("field", field.value);
  if (count.value !== count.defaultValue) kept.set("k", count.value);
  if (held.length) kept.set("filters", JSON.stringify(held));
  query = kept.size ? `?${kept}` : "";
  if (query !== location.search) history.pushState(null, "", query || location.pathname);
  query = location.search; // as the browser writes it
}

function readAddress() {
  query = location.search;
  const kept = new URLSearchParams(query), product = kept.get("like");
  clearPhoto();
  setLike(product ? { id: product, title: kept.get("title") ?? product } : null);
  text.value = kept.get("q") ?? "";
  const wanted = kept.get("field");
  field.value = releases[0].fields.includes(wanted) ? wanted : releases[0].default_field;
  count.value = kept.get("k") ?? count.defaultValue;
  filters.set(readKept(kept.get("filters")));
  showWeight();
  if (canSearch()) search({ keep: false });
  else { results.replaceChildren(); tell(ASK); }
}

function readKept(json) {
  try {
    const found = JSON.parse(json ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch { // somebody typed it
    return [];
  }
}

// ---- start

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (photo || text.value.trim()) setLike(null);
  search({ jump: true });
});
for (const control of [field, count]) control.addEventListener("change", searchAgain);
// A link to a part of the page fires it too: what is shown stays.
addEventListener("popstate", () => {
  if (releases.length && location.search !== query) readAddress();
});

// Whether the releases are there.
function load() {
  loading ??= fetchReleases().finally(() => { loading = null; });
  return loading;
}

async function fetchReleases() {
  try {
    ({ releases, limits } = await ask("/api/release"));
  } catch (error) {
    tell("", error.message);
    return false;
  }
  byId("releases").textContent = releases.map((one) =>
    `${one.name}: ${many(one.products, "product")}, encoder ${one.encoder.slice(0, 12)}`).join("; ");
  field.replaceChildren(...releases[0].fields.map((name) => make("option", { value: name }, FIELDS[name])));
  filters.columns = releases[0].filters;
  if (!weightMoved) weight.value = Math.round(100 * releases[0].image_weight);
  text.maxLength = limits.text_chars;
  count.max = limits.results;
  showWeight();
  return true;
}

// For a search of a page that came without its releases; whether the search goes on.
async function loadLate() {
  early = true;
  if (!await load()) return false;
  if (!canSearch()) { readAddress(); return false; }
  if (!photo) return true;
  setPhoto(photo); // its size is checked only now; searches
  return false;
}

load().then((there) => { if (there && !early) readAddress(); });
