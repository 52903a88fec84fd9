"use strict";

// Tables: a click, Enter or Space on a heading sorts by it; again, the other way round. Cells without a value stay last.
function keyOf(row, column) {
  const key = row.cells[column].dataset.key;
  return key === undefined ? null : key;
}

function compare(a, b) {
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sort(table, column) {
  const headings = [...table.tHead.rows[0].cells];
  const down = headings[column].getAttribute("aria-sort") === "ascending";
  headings.forEach((heading, i) => heading.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
  const rows = [...table.tBodies[0].rows];
  rows.sort((first, second) => {
    const a = keyOf(first, column), b = keyOf(second, column);
    if (a === null || b === null) return (a === null) - (b === null);
    return down ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (button) button.addEventListener("click", () => sort(table, column));
  });
}

// Drawings and charts: what a block or a mark says is shown at once, by pointer, touch or keyboard. Without this script the titles remain.
const tip = document.getElementById("tip");
let pointedAt = null;

function show(item) {
  const lines = item.getAttribute("aria-label").split("\n");
  tip.replaceChildren(...lines.map((line, i) => Object.assign(document.createElement(i ? "div" : "strong"), { textContent: line })));
  const drawing = item.dataset.name && item.closest(".picture") && drawingOf(item.dataset.name);
  if (drawing) tip.append(drawing);
  tip.hidden = false;
  pointedAt = item;
  place();
}

// The U of a model, from the section that draws them all, without what can be reached by keyboard.
function drawingOf(name) {
  for (const figure of document.querySelectorAll("[data-names]")) {
    if (!JSON.parse(figure.dataset.names).includes(name)) continue;
    const copy = figure.querySelector("svg.u").cloneNode(true);
    copy.setAttribute("aria-hidden", "true");
    copy.querySelectorAll("[tabindex]").forEach((block) => block.removeAttribute("tabindex"));
    return copy;
  }
  return null;
}

// Beside a point of the first picture where there is room; else above its item, or below where there is no room; again while the page scrolls, as it does when an item out of sight is focused.
function place() {
  if (!pointedAt) return;
  const box = pointedAt.getBoundingClientRect(), size = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  if (pointedAt.closest(".picture") && box.right + size.width + 24 <= width) {
    tip.style.left = `${box.right + 16}px`;
    tip.style.top = `${Math.max(8, Math.min(box.top - size.height / 2, innerHeight - size.height - 8))}px`;
    return;
  }
  const left = Math.max(8, Math.min(box.left + box.width / 2 - size.width / 2, width - size.width - 8));
  const over = box.top - size.height - 8, under = Math.max(8, Math.min(box.bottom + 8, innerHeight - size.height - 8));
  tip.style.left = `${left}px`;
  tip.style.top = `${over >= 8 ? over : under}px`;
}

function hide() {
  tip.hidden = true;
  pointedAt = null;
}

for (const drawing of document.querySelectorAll("svg.u, svg.p")) {
  const items = [...drawing.querySelectorAll(".block, .mark")];
  items.forEach((item, i) => {
    const title = item.querySelector("title");
    item.setAttribute("aria-label", title.textContent);
    title.remove();
    item.setAttribute("tabindex", i ? "-1" : "0");
    item.addEventListener("pointerenter", () => show(item));
    item.addEventListener("pointerleave", hide);
    item.addEventListener("focus", () => show(item));
    item.addEventListener("blur", hide);
    item.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      let next = i;
      do next = (next + step + items.length) % items.length; while (next !== i && items[next].hasAttribute("hidden"));
      item.setAttribute("tabindex", "-1");
      items[next].setAttribute("tabindex", "0");
      items[next].focus();
    });
  });
}
document.addEventListener("scroll", place, { capture: true, passive: true });

// The picture of the first screen: another measure, cost or setting moves its marks to where they lie then, and writes its axes anew.
const embedded = JSON.parse(document.getElementById("report-data").textContent);
const form = document.querySelector(".picture form");

function element(parent, tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
}

function drawAxes(svg, { box: [x0, y0, x1, y1], titles, x, y, rules }) {
  svg.querySelector(".heading").textContent = titles[0];
  svg.querySelector(".axis.x").textContent = titles[1];
  const ticks = svg.querySelector(".ticks"), ruled = svg.querySelector(".rules");
  ticks.replaceChildren();
  ruled.replaceChildren();
  for (const [at, text] of x) {
    element(ticks, "line", { x1: at, x2: at, y1: y0, y2: y1 });
    element(ticks, "text", { x: at, y: y1 + 10, dy: ".35em", "text-anchor": "middle" }, text);
  }
  for (const [at, text] of y) {
    element(ticks, "line", { x1: x0, x2: x1, y1: at, y2: at });
    element(ticks, "text", { x: x0 - 5, y: at, dy: ".35em", "text-anchor": "end" }, text);
  }
  for (const [at, text, anchor, row] of rules) {
    const top = y0 - 13 * (row + 1);
    element(ruled, "line", { class: "rule", x1: at, x2: at, y1: top, y2: y1 });
    element(ruled, "text", { class: "small", x: at + (anchor === "end" ? -4 : 4), y: top + 6, dy: ".35em", "text-anchor": anchor }, text);
  }
}

function move(mark, place, text) {
  mark.toggleAttribute("hidden", !place);
  if (!place) return;
  const [x, y, low, high, labelX, labelY, anchor] = place;
  const set = (selector, attributes) => Object.entries(attributes).forEach(([k, v]) => mark.querySelector(selector).setAttribute(k, v));
  set(".interval", { x1: x, x2: x, y1: low, y2: high });
  set(".shape", { transform: `translate(${x} ${y})` });
  set(".label", { x: labelX, y: labelY, "text-anchor": anchor });
  mark.setAttribute("aria-label", text);
}

function redraw() {
  const { texts, views } = embedded.picture, reading = form.elements.reading.selectedIndex;
  for (const option of form.elements.measure.options) option.disabled = !Object.keys(views).some((key) => key.startsWith(`${reading}/${option.value}/`));
  if (form.elements.measure.selectedOptions[0].disabled) form.elements.measure.value = [...form.elements.measure.options].find((o) => !o.disabled).value;
  const view = views[`${reading}/${form.elements.measure.value}/${form.elements.cost.value}`];
  for (const [layout, shown] of Object.entries(view)) {
    const svg = form.parentElement.querySelector(`.${layout} svg`);
    drawAxes(svg, shown);
    svg.querySelectorAll(".mark").forEach((mark) => move(mark, shown.marks[mark.dataset.name], texts[reading][mark.dataset.name]));
    svg.setAttribute("aria-label", `${shown.titles.join(" against ")}. Arrow keys move between points.`);
  }
  document.querySelectorAll(".reading").forEach((table, i) => { table.hidden = i !== reading; });
}

if (form) {
  const { measures, costs, readings } = embedded.picture;
  const choices = { measure: Object.entries(measures), cost: Object.entries(costs), reading: readings.map((text, i) => [i, text]) };
  for (const [name, options] of Object.entries(choices)) {
    form.elements[name].replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    form.elements[name].parentElement.hidden = options.length < 2;
  }
  form.hidden = false;
  form.addEventListener("change", redraw);
}

// What is wider than its place says so until its end is reached.
const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => hint(target)));

function hint(box) {
  box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
}

for (const box of document.querySelectorAll(".scroll, nav")) {
  sizes.observe(box);
  box.addEventListener("scroll", () => hint(box), { passive: true });
}

// A link into a folded section opens it; paper shows everything.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
}

let closed = [];
addEventListener("hashchange", openTarget);
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")].filter((details) => !details.closest("#copy"));
  closed.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
document.querySelectorAll('a[href^="#"]').forEach((link) => link.addEventListener("click", () => setTimeout(openTarget)));
openTarget();

// On a phone the first screen has room for verdicts; their numbers are a touch away.
const phone = matchMedia("(max-width: 40rem)");
function foldNumbers() {
  document.querySelectorAll(".numbers").forEach((details) => { details.open = !phone.matches; });
}
phone.addEventListener("change", foldNumbers);
foldNumbers();

// Texts to copy; the JSON is the one that the page carries.
const copyStatus = document.getElementById("status");
document.getElementById("json").textContent = JSON.stringify(embedded.results, null, 2);
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre, code");
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      copyStatus.textContent = "Copied.";
    } catch {
      document.execCommand("copy");
      copyStatus.textContent = "Selected; copied where the browser allows it.";
    }
  });
}
