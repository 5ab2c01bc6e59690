"use strict";

// A legend's button hides and shows its method in every figure of the page.
const buttons = [...document.querySelectorAll(".legend button")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    const method = button.dataset.method;
    const shown = button.getAttribute("aria-pressed") === "false";
    for (const twin of buttons.filter((other) => other.dataset.method === method))
      twin.setAttribute("aria-pressed", String(shown));
    for (const curve of document.querySelectorAll(`svg [data-method="${CSS.escape(method)}"]`))
      curve.style.display = shown ? "" : "none";
  });
}

// The head of a table's column sorts its rows by that column: numbers as numbers, the rest as words.
const collator = new Intl.Collator("en", { numeric: true });
const value = (row, column) => row.cells[column].firstChild?.textContent.trim() ?? "";
const number = (text) => parseFloat(text.replace("−", "-").replace(/^[^\d.-]+/, ""));

function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) || collator.compare(a, b) : x - y;
}

function sort(head, column) {
  const body = head.closest("table").tBodies[0];
  const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = [...body.rows].sort((a, b) => order * compare(value(a, column), value(b, column)));
  body.append(...rows);
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, column));
    head.append(button);
  });
}
