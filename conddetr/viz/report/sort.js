// Makes every table of class "sortable" sort by the heading that is clicked.
for (const heading of document.querySelectorAll("table.sortable th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const falls = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const value = (row) => row.cells[heading.cellIndex].dataset.value;
    const order = heading.cellIndex === 0
      ? (a, b) => value(b).localeCompare(value(a))
      : (a, b) => value(b) - value(a);
    const rows = [...body.rows].sort(order);
    body.append(...(falls ? rows : rows.reverse()));
  });
}
