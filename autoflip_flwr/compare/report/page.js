// Draws the charts in place of their pictures, and makes the tables sortable.

async function draw(figure, spec, datasets) {
  const own = { datasets, width: "container", background: "transparent" };
  const place = figure.appendChild(document.createElement("div"));
  const options = { actions: false, renderer: "svg" };
  const { view } = await vegaEmbed(place, { ...spec, ...own }, options);
  figure.querySelector("img").hidden = true;
  return view;
}

function box(place, text, checked) {
  const label = place.appendChild(document.createElement("label"));
  const input = Object.assign(document.createElement("input"), { type: "checkbox", checked });
  label.append(input, text);
  return input;
}

for (const section of document.querySelectorAll("main > section")) {
  const { rows, specs } = JSON.parse(section.querySelector("script").textContent);
  const figures = [...section.querySelectorAll("figure")];
  const views = await Promise.all(figures.map((each) => draw(each, specs[each.dataset.chart], rows)));
  const place = section.querySelector(".boxes");
  const arms = [...new Set(rows.sent.map((row) => row.arm))];
  const shown = arms.map((arm) => box(place, arm, true));
  const smooth = box(place, "smooth", false);
  place.addEventListener("change", () => {
    const hidden = arms.filter((_, i) => !shown[i].checked);
    views.forEach((view) => view.signal("hidden", hidden).signal("smooth", smooth.checked).run());
  });
}

// "1.25 ± 0.31 MB" is 1250000. What is not known is the least.
function amount(text) {
  const [, number, prefix] = /^([\d.]+)[^kMGTP]*([kMGTP]?)/.exec(text) ?? [0, -1, ""];
  return number * 1000 ** " kMGTP".indexOf(prefix || " ");
}

for (const heading of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const sign = heading.ariaSort === "descending" ? -1 : 1;
    for (const other of heading.parentNode.cells) other.ariaSort = null;
    heading.ariaSort = sign > 0 ? "descending" : "ascending";
    const body = heading.closest("table").tBodies[0];
    const text = (row) => row.cells[heading.cellIndex].textContent;
    body.append(...[...body.rows].sort((a, b) => sign * (heading.cellIndex
      ? amount(text(b)) - amount(text(a)) : text(b).localeCompare(text(a)))));
  });
}
