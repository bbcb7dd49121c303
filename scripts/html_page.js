// Makes every table of class `sortable` sort by the heading that is clicked; without it they are plain tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button"), isNumber = head.classList.contains("number");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const value = row => isNumber ? Number(row.cells[column].dataset.value) : row.cells[column].textContent;
      const compare = (a, b) => isNumber ? a - b : a.localeCompare(b, undefined, {numeric: true});
      body.append(...[...body.rows].sort((a, b) => order * compare(value(a), value(b))));
    });
  });
}
