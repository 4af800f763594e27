// Shows what a search found: one list of products, or two beside each other with what differs.

import { make } from "./elements.js";

// newest: place of the answer whose release is the later one; onlike(product): "More like this".
export function showAnswers(answers, newest, onlike) {
  return answers.map((answer, place) => {
    const other = answers[1 - place] ?? null;
    return showAnswer(answer, other, place === newest, onlike);
  });
}

function showAnswer(answer, other, isNewer, onlike) {
  const products = answer.results.map((one) => make("li", {}, showProduct(one, other, isNewer, onlike)));
  const list = products.length ? make("ol", {}, ...products) : null;
  if (!other) return make("div", { class: "answer" }, list);
  const id = `answer-${isNewer ? "newer" : "older"}`;
  const nothing = answer.error ?? (list ? null : "No product found.");
  return make("section", { class: "answer", "aria-labelledby": id },
    make("header", {}, make("h3", { id }, answer.name), timing(answer)),
    nothing ? make("p", {}, nothing) : null, list);
}

function timing({ ms }) {
  return ms && make("p", { class: "quiet" }, `${ms.encode.toFixed(1)} ms to encode, ${ms.search.toFixed(1)} ms to search`);
}

function showProduct(product, other, isNewer, onlike) {
  const { title, product_id: id } = product;
  const facts = make("div", { class: "facts" },
    other && !other.error ? showMark(product, isNewer) : null,
    make(other ? "h4" : "h3", {}, title),
    make("p", { class: "line" },
      make("span", { class: "price" }, writePrice(product.price)),
      make("span", { class: "score" }, `score ${product.score.toFixed(3)}`)));
  const button = make("button", { type: "button", "aria-label": `More like this: ${title}`,
    onclick: () => onlike({ id, title }) }, "More like this");
  return make("article", { "data-product": id }, showPicture(product), facts,
    make("div", { class: "foot" }, showColumns(product), button));
}

function writePrice(price) {
  if (typeof price !== "number") return price ?? "";
  const digits = Number.isInteger(price) ? 0 : 2;
  return price.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: 2 });
}

function showPicture({ image, title }) {
  const none = () => make("div", { class: "picture", role: "img", "aria-label": `No picture of ${title}` }, "no picture");
  if (!image) return none();
  const picture = make("img", { class: "picture", src: image, alt: title, loading: "lazy", width: 320, height: 320 });
  picture.addEventListener("error", () => picture.replaceWith(none()));
  return picture;
}

function showMark({ place, other_place: there }, isNewer) {
  if (there === null) {
    return make("p", { class: `mark ${isNewer ? "new" : "gone"}` }, isNewer ? "new here" : "gone");
  }
  if (there === place) return make("p", { class: "mark same" }, "same place");
  return make("p", { class: "mark" }, `${isNewer ? "was" : "now"} ${ordinal(there)}`);
}

function ordinal(place) {
  const last = place % 100 > 10 && place % 100 < 14 ? 0 : place % 10;
  return place + ({ 1: "st", 2: "nd", 3: "rd" }[last] ?? "th");
}

function showColumns({ product_id: id, metadata }) {
  const rows = Object.entries({ product_id: id, ...metadata }).filter(([, value]) => value !== null && value !== "");
  return make("details", {}, make("summary", {}, "All columns"), make("dl", {}, ...rows.flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))])));
}
