// Sorts a table by the column whose heading is clicked; cells without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const way = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const numeric = heading.dataset.kind === "number" || heading.dataset.kind === "marks";
      const rows = [...body.rows].map((row) => {
        const key = row.cells[column].dataset.key;
        return { row, key: key === undefined ? null : numeric ? Number(key) : key };
      });
      rows.sort((one, other) => {
        if (one.key === null || other.key === null) return (one.key === null) - (other.key === null);
        const order = numeric ? one.key - other.key : one.key.localeCompare(other.key, undefined, { numeric: true });
        return way * order;
      });
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
      body.append(...rows.map((each) => each.row));
    });
  });
}
