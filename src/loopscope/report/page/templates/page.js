// Where the reader is, what links open, tables that can be sorted, and commands that can be copied.
(function () {
  "use strict";
  const links = new Map(
    [...document.querySelectorAll(".contents a")].map((link) => [document.querySelector(link.hash), link]),
  );

  // The section that reaches below the upper edge of the window last.
  function markCurrent() {
    const above = [...links.keys()].filter((section) => section?.getBoundingClientRect().top < 120);
    const current = links.get(above.at(-1) ?? links.keys().next().value);
    for (const link of links.values()) {
      if (link === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    const bar = current?.parentElement;
    if (bar) bar.scrollLeft = current.offsetLeft - bar.clientWidth / 2;
  }
  document.addEventListener("scroll", () => requestAnimationFrame(markCurrent), { passive: true });
  markCurrent();

  // A link into what is folded away unfolds it.
  function unfold() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    target?.scrollIntoView();
  }
  window.addEventListener("hashchange", unfold);
  if (location.hash) unfold();

  // ---- tables ----

  const valueOf = (row, column) => row.cells[column].textContent.trim();
  const numberOf = (text) => parseFloat(text.replaceAll(",", "").replace("−", "-"));

  // By number where most cells begin with one; what has none comes last.
  function sort(head) {
    const [table, column] = [head.closest("table"), head.cellIndex];
    const descending = head.getAttribute("aria-sort") === "ascending";
    const rows = [...table.querySelectorAll("tbody tr")];
    const numeric = rows.filter((row) => Number.isFinite(numberOf(valueOf(row, column)))).length > rows.length / 2;
    const key = (row) => (numeric ? numberOf(valueOf(row, column)) : valueOf(row, column));
    rows.sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (numeric && (Number.isNaN(a) || Number.isNaN(b))) return Number.isNaN(a) - Number.isNaN(b);
      const order = numeric ? a - b : a.localeCompare(b);
      return descending ? -order : order;
    });
    table.querySelector("tbody").append(...rows);
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  // Studies side by side are columns: a question sorts them by its number, and those without one come last.
  function sortColumns(button) {
    const [head, row] = [button.closest("th"), button.closest("tr")];
    const descending = head.getAttribute("aria-sort") === "ascending";
    const value = (cell) => parseFloat(cell.dataset.value ?? "NaN");
    const order = [...row.cells].slice(1).map((cell, place) => [value(cell), place]);
    order.sort(([a, i], [b, j]) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || i - j;
      return (descending ? b - a : a - b) || i - j;
    });
    for (const each of row.closest("table").rows) {
      const cells = [...each.cells].slice(1);
      each.append(...order.map(([, place]) => cells[place]));
    }
    for (const other of row.closest("table").querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  document.addEventListener("click", async ({ target }) => {
    const question = target.closest(".side tbody th button");
    if (question) sortColumns(question);
    const head = target.closest(".sortable thead button")?.closest("th");
    if (head) sort(head);
    const copy = target.closest("[data-copies]");
    if (!copy) return;
    const text = document.getElementById(copy.dataset.copies);
    getSelection().selectAllChildren(text); // by hand, where the browser does not let a page copy
    await navigator.clipboard.writeText(text.textContent);
    copy.textContent = "Copied";
  });
})();
