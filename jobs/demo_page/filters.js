// The filters of a search: one box a metadata column, with controls for its kind.

import { make } from "./elements.js";

export class Filters {
  // changed() is called when products would pass that did not, or the other way round.
  constructor(list, chooser, button, changed) {
    Object.assign(this, { list, chooser, button, changed, columns: [], made: 0 });
    button.addEventListener("click", () => {
      const column = this.find(chooser.value);
      if (column) this.add(column).querySelector("input").focus();
    });
  }

  find(name) {
    return this.columns.find((column) => column.column === name);
  }

  add(column, state = {}) {
    const id = `filter-${++this.made}`;
    const remove = make("button", { type: "button", "aria-label": `Remove the filter ${column.column}`,
      onclick: () => this.remove(box) }, "Remove");
    const box = make("fieldset", { class: "filter" }, make("legend", {}, column.column), remove,
      CONTROLS[column.kind](column, id, state));
    box.column = column;
    box.addEventListener("change", () => this.changed());
    this.list.append(box);
    this.showChoice();
    return box;
  }

  remove(box) {
    const held = this.read().length;
    box.remove();
    this.showChoice();
    this.chooser.focus();
    if (this.read().length !== held) this.changed();
  }

  // Begin anew, with what the address kept.
  set(states) {
    this.list.replaceChildren();
    for (const state of states) {
      const column = this.find(state?.column);
      if (column) this.add(column, state);
    }
    this.showChoice();
  }

  showChoice() {
    const used = new Set([...this.list.children].map((box) => box.column.column));
    const free = this.columns.filter((column) => !used.has(column.column)).sort((a, b) => rank(a) - rank(b));
    this.chooser.replaceChildren(...free.map((column) => make("option", { value: column.column }, column.column)));
    this.chooser.disabled = this.button.disabled = !free.length;
  }

  // What is filled in, as /api/search takes it.
  read() {
    return [...this.list.children].map(readBox).filter((filter) => Object.keys(filter).length > 1);
  }
}

// What people filter by most comes first: the price, numbers, columns of few values, texts.
function rank({ column, kind }) {
  return column === "price" ? -1 : ["range", "values", "contains"].indexOf(kind);
}

function name(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value.trim() ? value : value ? "(spaces)" : "(empty)";
}

function readBox(box) {
  const filter = { column: box.column.column };
  const checked = [...box.querySelectorAll("input:checked")].map((input) => input.choice);
  if (checked.length) filter.values = checked;
  for (const input of box.querySelectorAll("input[data-key]")) {
    if (input.value === "") continue;
    filter[input.dataset.key] = input.type === "number" ? Number(input.value) : input.value;
  }
  return filter;
}

const CONTROLS = {
  values(column, id, state) {
    const boxes = column.values.map((value, number) => {
      const input = make("input", { type: "checkbox", id: `${id}-${number}` });
      input.checked = state.values?.includes(value) ?? false;
      input.choice = value;
      return make("label", { for: input.id }, input, name(value));
    });
    return make("div", { class: "values" }, ...boxes);
  },

  contains(column, id, state) {
    const input = make("input", { type: "text", id, "data-key": "contains", maxlength: 1000 });
    input.value = state.contains ?? "";
    return make("div", { class: "control" }, make("label", { for: id }, "contains"), input);
  },

  range(column, id, state) {
    const bound = (key, limit) => {
      const input = make("input", { type: "number", id: `${id}-${key}`, "data-key": key,
        step: column.whole ? 1 : "any", placeholder: limit });
      input.value = state[key] ?? "";
      return make("div", { class: "control" }, make("label", { for: input.id }, key), input);
    };
    return make("div", { class: "pair" }, bound("from", column.low), bound("to", column.high));
  },
};
