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

// Drawings: what the blocks' titles say is shown at once, by pointer, touch or keyboard. Without this script the titles remain.
const tip = document.getElementById("tip");
let shownBlock = null;

function show(block) {
  const lines = block.getAttribute("aria-label").split("\n");
  tip.replaceChildren(...lines.map((line, i) => Object.assign(document.createElement(i ? "div" : "strong"), { textContent: line })));
  tip.hidden = false;
  shownBlock = block;
  place();
}

// Above its block, or below where there is no room; again while the page scrolls, as it does when a block out of sight is focused.
function place() {
  if (!shownBlock) return;
  const box = shownBlock.getBoundingClientRect(), size = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(box.left + box.width / 2 - size.width / 2, width - size.width - 8));
  const over = box.top - size.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${over >= 8 ? over : box.bottom + 8}px`;
}

function hide() {
  tip.hidden = true;
  shownBlock = null;
}

for (const drawing of document.querySelectorAll("svg.u")) {
  const blocks = [...drawing.querySelectorAll(".block")];
  blocks.forEach((block, i) => {
    const title = block.querySelector("title");
    block.setAttribute("aria-label", title.textContent);
    title.remove();
    block.setAttribute("tabindex", i ? "-1" : "0");
    block.addEventListener("pointerenter", () => show(block));
    block.addEventListener("pointerleave", hide);
    block.addEventListener("focus", () => show(block));
    block.addEventListener("blur", hide);
    block.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const next = blocks[(i + step + blocks.length) % blocks.length];
      block.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}
document.addEventListener("scroll", place, { capture: true, passive: true });

// Texts to copy; the JSON is the one that the page carries.
const copyStatus = document.getElementById("status");
for (const pre of document.querySelectorAll("pre[data-from]")) {
  pre.textContent = document.getElementById(pre.dataset.from).textContent.replaceAll("\\u003c", "<");
}
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const pre = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(pre);
    try {
      await navigator.clipboard.writeText(pre.textContent);
      copyStatus.textContent = "Copied.";
    } catch {
      document.execCommand("copy");
      copyStatus.textContent = "Selected; copied where the browser allows it.";
    }
  });
}
