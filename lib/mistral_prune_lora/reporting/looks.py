"""How pages look and what their scripts do, as text: a digest of the code then covers them."""

STYLE = """
.pages { font: 15px/1.5 system-ui, sans-serif; color: #1d2730; max-width: 1160px; margin: 0 auto; padding: 12px 16px; }
.pages h1 { font-size: 24px; font-weight: 650; margin: 8px 0 4px; }
.pages h2 { font-size: 19px; font-weight: 650; margin: 26px 0 6px; padding-top: 10px; border-top: 1px solid #dde3e6; }
.pages h3 { font-size: 15px; font-weight: 650; margin: 10px 0 2px; }
.pages p { margin: 4px 0 8px; max-width: 76ch; }
.pages figure { margin: 0; min-width: 0; }
.pages figcaption p { font-size: 13px; color: #51606a; }
.pages .figures { display: grid; gap: 14px 28px; }
.pages .figures { grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.pages .chart { width: 100%; min-height: 80px; }
.pages .chart.vega-embed { padding: 24px 0 0; display: block; }
.pages .chart.vega-embed summary { padding: 2px; top: -4px; }
.pages .wide { overflow-x: auto; max-height: 80vh; border: 1px solid #dde3e6; border-radius: 4px; margin: 6px 0 14px; }
.pages table { border-collapse: collapse; font-size: 13px; width: 100%; margin: 0; }
.pages th, .pages td { padding: 4px 9px; text-align: left; white-space: nowrap; border-bottom: 1px solid #edf1f3; }
.pages td.number, .pages th.number { text-align: right; font-variant-numeric: tabular-nums; }
.pages td.text { white-space: normal; min-width: 16em; }
.pages td small { display: block; color: #51606a; font-size: 11px; }
.pages thead th { position: sticky; top: 0; background: #f3f6f7; font-weight: 600; }
.pages th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
.pages th[aria-sort=ascending] button::after { content: " \\25B2"; }
.pages th[aria-sort=descending] button::after { content: " \\25BC"; }
.pages input[type=search] { font: inherit; padding: 3px 8px; width: 18em; max-width: 100%; }
.pages input[type=search] { border: 1px solid #b9c6cc; border-radius: 4px; }
.pages .doubts { background: #fdf5e6; border-left: 4px solid #c08a00; padding: 6px 14px; border-radius: 3px; }
.pages .doubts ul, .pages ul { margin: 4px 0; padding-left: 20px; list-style: disc; }
.pages details { margin: 6px 0; }
.pages summary { cursor: pointer; font-weight: 600; }
.pages pre { font: 12px/1.45 ui-monospace, monospace; background: #f6f8f9; color: inherit; }
.pages pre { padding: 10px; overflow: auto; max-height: 70vh; }
.pages code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; white-space: normal; }
.pages .plain { color: #51606a; font-size: 13px; }
"""

# Tables sort by a click on a heading, numbers as numbers with empty cells last, and show the rows that hold every word
# of the search. Figures are drawn one after the other, each as wide as its place.
SCRIPT = """
function value(row, place) {
  const cell = row.cells[place];
  const number = cell.dataset.value;
  return number === undefined ? cell.textContent : number === "" ? NaN : Number(number);
}
function compared(a, b) {
  if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), "en", {numeric: true});
  return isNaN(a) || isNaN(b) ? NaN : a - b;
}
function sortBy(heading) {
  const table = heading.closest("table"), place = heading.cellIndex, body = table.tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(body.rows).map(row => [value(row, place), row]);
  rows.sort(([a], [b]) => {
    const order = compared(a, b);
    return isNaN(order) ? Number(isNaN(a)) - Number(isNaN(b)) : down ? -order : order;
  });
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
for (const search of document.querySelectorAll("input[type=search]")) {
  const table = document.getElementById(search.dataset.table);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
}
async function drawFigures(charts, options) {
  for (const place of document.querySelectorAll(".chart")) {
    await vegaEmbed(place, charts[Number(place.dataset.chart)], options);
    place.dataset.drawn = "yes";
  }
}
"""
