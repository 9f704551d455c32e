// Pictures of the chosen runs: one at a time, drawn by Chart.js, with a table of its points beside it.
"use strict";
const COLOURS = [
  ["#0072b2", "#56b4e9"], ["#d55e00", "#ff9a56"], ["#009e73", "#3ddcac"], ["#b8569a", "#e69fce"],
  ["#8a6d00", "#e6c229"], ["#5b6470", "#aab4c0"], ["#7a4fd0", "#b79bff"], ["#a33a3a", "#ff8f8f"],
];
const SHAPES = ["circle", "rect", "triangle", "rectRot", "crossRot", "star", "rectRounded", "cross"];
const SIGNS = ["●", "■", "▲", "◆", "✕", "✶", "▢", "✚"];
const MOST_LISTED = 200, MOST_INTERVALS = 300;
const PICTURES = { "throughput-latency": "Latency", "throughput-first-token": "First token", "throughput-later-token": "Later tokens", memory: "Memory", price: "Price", "accuracy-speed": "Accuracy", "predicted-measured": "Predicted" };

page.picturesView = async (main, selected) => {
  const { el, state } = page;
  const [{ pictures, missing, stamp }, Chart] = await Promise.all([page.load("pictures"), page.library()]);
  if (stamp !== page.records.overview.stamp) throw new Error(page.NEWER);
  const names = [...new Set([...Object.keys(PICTURES), ...pictures.map(({ name }) => name), ...Object.keys(missing)])].filter((name) => missing[name] || pictures.some((one) => one.name === name));
  const name = names.includes(state.picture) ? state.picture : names[0];
  const inside = new Set(selected.rows);
  const shown = pictures.filter((one) => one.name === name).map((one) => page.filtered(one, inside)).filter(({ count }) => count);
  const picture = shown.find(({ key }) => key === state.group) || shown[0];
  const tabs = el("div", { class: "tabs", role: "group", "aria-label": "Pictures" }, names.map((one) =>
    el("button", { type: "button", "data-focus": `picture ${one}`, "aria-pressed": String(one === name), onclick: () => page.go({ picture: one, group: "" }) }, PICTURES[one] || one)));
  (page.drawn || []).forEach((chart) => chart.destroy());
  page.drawn = [];
  if (!picture) {
    const none = missing[name] || ["No run that passes the filters has a point here."];
    main.replaceChildren(el("h2", {}, "Pictures"), tabs, ...none.map((text) => el("p", { class: "empty" }, text)));
    return;
  }
  const panels = picture.panels.map((panel) => page.panel(picture, panel));
  main.replaceChildren(el("h2", {}, picture.title), tabs, shown.length > 1 ? page.pictureChoice(shown, picture) : page.facts(picture),
    ...panels.map(({ figure }) => figure), ...picture.notes.map((text) => el("p", { class: "quiet" }, text)), ...panels.flatMap(({ panel }) => [page.failures(panel), page.pointTable(picture, panel)]).filter(Boolean));
  page.drawn = panels.map(({ panel, canvas, told }) => page.draw(Chart, canvas, told, panel));
};

// A picture with the points of the chosen runs, and of what was never run.
page.filtered = (picture, inside) => {
  let count = 0, total = 0;
  const panels = picture.panels.map((panel) => ({ ...panel, series: panel.series.map((one) => {
    const points = one.points.filter(([row]) => row < 0 || inside.has(row));
    count += points.length;
    total += one.points.length;
    return { ...one, points, failures: one.failures.filter(([row]) => row < 0 || inside.has(row)) };
  }).filter(({ points, failures }) => points.length || failures.length) })).filter(({ series }) => series.some(({ points }) => points.length));
  if (count === total) return { ...picture, panels, count, notes: picture.notes.filter((text) => !text.startsWith("×")) }; // a list below names them
  // Fronts and figures in words are of all runs.
  const without = panels.map((panel) => ({ ...panel, guides: panel.guides.filter(({ label }) => !label.startsWith("front")) }));
  return { ...picture, panels: without, count, notes: [`${count} of ${total} points pass the filters; fronts and figures of all of them are left out.`] };
};

page.facts = (picture) => page.el("p", { class: "quiet" }, Object.values(picture.facts).filter(Boolean).join("; "));

page.pictureChoice = (shown, picture) => {
  const words = (one) => Object.values(one.facts).filter(Boolean).join("; ") || one.title;
  const select = page.el("select", { id: "group", "data-focus": "group" }, shown.map((one) => page.el("option", { value: one.key, selected: one.key === picture.key }, `${words(one)} (${page.count(one.count, "run")})`)));
  select.addEventListener("change", () => page.go({ group: select.value }, true));
  return page.el("p", {}, page.el("label", { for: "group" }, "Comparable runs "), select);
};

page.axisText = ({ title, unit }) => (unit ? `${title}, ${unit}` : title);

page.panel = (picture, panel) => {
  const { el } = page;
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": page.panelText(picture, panel) });
  const told = el("output", { class: "told" }, "Point at a run, or use the arrow keys; Enter opens it.");
  const figure = el("figure", {}, panel.title ? el("figcaption", {}, panel.title) : null, page.seriesKey(panel), el("div", { class: "chart" }, canvas), told);
  return { panel, canvas, told, figure };
};

// A system keeps its colour and shape whatever is filtered.
page.styleOf = (system) => {
  const place = page.records.columns.system.values.indexOf(system);
  const at = place < 0 ? 5 : place;
  return { colour: COLOURS[at % 8][page.isDark() ? 1 : 0], shape: SHAPES[at % 8], sign: SIGNS[at % 8] };
};

page.seriesKey = ({ series, guides }) => page.el("ul", { class: "key" }, series.map(({ label, system, evidence, points }) => {
  const { colour, sign } = page.styleOf(system);
  const mark = page.el("span", { "aria-hidden": "true" }, sign);
  mark.style.color = colour;
  return page.el("li", {}, mark, ` ${label} `, page.evidence(evidence), page.el("span", { class: "quiet" }, ` ${points.length}`));
}), guides.map(({ label }) => page.el("li", { class: "quiet" }, `${label.startsWith("front") ? "◌" : "┄"} ${label}`)));

page.draw = (Chart, canvas, told, panel) => {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
  const count = panel.series.reduce((sum, { points }) => sum + points.length, 0);
  const axis = (of, ends) => ({ ...page.room(of, ends), type: of.log ? "logarithmic" : "linear", title: { display: true, text: page.axisText(of), color: ink }, ticks: { color: ink, maxTicksLimit: 8, callback: page.tick }, grid: { color: line }, border: { color: ink } });
  const datasets = panel.series.map(({ system, evidence, joined, points }) => {
    const { colour, shape } = page.styleOf(system);
    return { colour, data: (joined ? points.slice().sort((a, b) => a[1] - b[1]) : points).map(([row, x, y, left, right, low, high, label]) => ({ x, y, left, right, low, high, row, label, system, evidence })),
      pointStyle: shape, pointRadius: count > 2000 ? 2.5 : 5, pointHoverRadius: 8, borderColor: colour, backgroundColor: evidence === "MEASURED" ? colour : "transparent",
      pointBorderWidth: 1.5, showLine: joined, borderWidth: 1, borderDash: evidence === "MEASURED" ? [] : [4, 3] };
  });
  const guides = panel.guides.map(({ label, points, stepped }) => ({ stepped: stepped ? "before" : false, data: points.map(([x, y]) => ({ x, y })), showLine: true, pointHitRadius: 0,
    pointStyle: "circle", pointRadius: label.startsWith("front") ? 10 : points.length === 1 ? 6 : 0, backgroundColor: "transparent", borderColor: ink, borderDash: [4, 4], borderWidth: 1 }));
  const chart = new Chart(canvas, {
    type: "scatter", data: { datasets: [...datasets, ...guides] }, plugins: count > MOST_INTERVALS ? [] : [page.intervals],
    options: {
      animation: false, responsive: true, maintainAspectRatio: false, normalized: true, parsing: false,
      scales: { x: axis(panel.x, page.extent(panel, [1, 3, 4])), y: axis(panel.y, page.extent(panel, [2, 5, 6])) }, interaction: { mode: "nearest", intersect: false },
      plugins: { legend: { display: false }, tooltip: { callbacks: { label: (item) => page.pointLines(panel, item.raw) }, filter: (item) => item.raw.row !== undefined } },
      onHover: (_, items) => items.length && items[0].element.$context && page.tellPoint(told, panel, items[0].element.$context.raw),
      onClick: (_, items, drawn) => items.length && page.openPoint(drawn, items[0]),
    },
  });
  canvas.addEventListener("keydown", (event) => page.nextPoint(event, chart, told, panel));
  return chart;
};

// The least and the largest of an axis, with some room; places: where a point holds what lies along it.
page.extent = (panel, places) => [...panel.series.flatMap(({ points }) => points), ...panel.guides.flatMap(({ points }) => points.map(([x, y]) => [null, x, y]))].reduce(([least, most], point) => {
  const values = places.map((place) => point[place]).filter((value) => typeof value === "number");
  return [Math.min(least, ...values), Math.max(most, ...values)];
}, [Infinity, -Infinity]);

page.room = ({ log }, [least, most]) => {
  if (log) return { min: least / 1.15, max: most * 1.15 };
  const margin = 0.08 * (most - least) || Math.abs(most) || 1;
  return { min: least - margin, max: most + margin };
};

// Intervals as lines through the points.
page.intervals = {
  id: "intervals",
  beforeDatasetsDraw: ({ ctx: pen, scales: { x, y }, data }) => {
    data.datasets.forEach(({ data: points, colour }) => points.forEach((point) => {
      const ends = [[point.x, point.low, point.x, point.high], [point.left, point.y, point.right, point.y]];
      for (const [left, low, right, high] of ends) {
        if ([left, low, right, high].some((end) => end === null || end === undefined)) continue;
        pen.strokeStyle = colour;
        pen.lineWidth = 1;
        pen.beginPath();
        pen.moveTo(x.getPixelForValue(left), y.getPixelForValue(low));
        pen.lineTo(x.getPixelForValue(right), y.getPixelForValue(high));
        pen.stroke();
      }
    }));
  },
};

page.pointName = ({ row, label, system }) => (row >= 0 ? page.records.label(row) : [system, label].filter(Boolean).join(", "));

page.pointLines = (panel, point) => [`${page.pointName(point)} (${point.evidence})`, point.row >= 0 ? point.label : "",
  `${page.axisText(panel.y)}: ${page.number(point.y)}`, `${page.axisText(panel.x)}: ${page.number(point.x)}`, point.row >= 0 ? page.records.get("policy", point.row).slice(0, 80) : ""].filter(Boolean);

page.tellPoint = (told, panel, point) => { if (point.row !== undefined) told.textContent = page.pointLines(panel, point).join("; "); };

page.openPoint = (chart, { datasetIndex, index }) => {
  const { row } = chart.data.datasets[datasetIndex].data[index];
  if (row >= 0) page.go({ view: "cell", run: page.records.get("id", row) });
};

// Arrow keys go from point to point, from left to right.
page.nextPoint = (event, chart, told, panel) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Enter" && chart.told) page.openPoint(chart, chart.told);
  if (!step) return;
  event.preventDefault();
  chart.inOrder ||= chart.data.datasets.flatMap((dataset, datasetIndex) => dataset.data.map((point, index) => ({ datasetIndex, index, point })))
    .filter(({ point }) => point.row !== undefined).sort((a, b) => a.point.x - b.point.x);
  chart.place = Math.min(chart.inOrder.length - 1, Math.max(0, (chart.place ?? -1) + step));
  chart.told = chart.inOrder[chart.place];
  chart.setActiveElements([chart.told]);
  chart.tooltip.setActiveElements([chart.told], { x: 0, y: 0 });
  chart.update("none");
  page.tellPoint(told, panel, chart.told.point);
};

// Runs that gave no number where others did.
page.failures = (panel) => {
  const lines = panel.series.flatMap(({ label, failures }) => failures.map(([row, x, status, reason]) => page.el("li", {},
    row >= 0 ? page.el("a", { href: page.cellLink(row) }, label) : label, ` at ${page.number(x)} ${panel.x.unit}: `, page.status(status), ` ${reason}`)));
  return lines.length ? page.el("ul", {}, lines) : null;
};

page.allPoints = (panel) => panel.series.flatMap(({ system, evidence, points }) => points.map(([row, x, y, , , low, high, label]) => ({ row, x, y, low, high, label, system, evidence })));

page.panelText = (picture, panel) => {
  const points = page.allPoints(panel);
  const top = points.reduce((best, point) => (point.y > best.y ? point : best));
  return `${picture.title}: ${page.count(points.length, "point")} of ${[...new Set(panel.series.map(({ label }) => label))].join(", ")}. Highest: ${page.pointName(top)}, ${page.number(top.y)} (${page.axisText(panel.y)}) at ${page.number(top.x)} (${page.axisText(panel.x)}). All points are in the table below.`;
};

page.pointTable = (picture, panel) => {
  const points = page.allPoints(panel);
  const listed = points.sort((a, b) => b.y - a.y).slice(0, MOST_LISTED);
  const front = new Set(panel.guides.filter(({ label }) => label.startsWith("front")).flatMap(({ points: ends }) => ends.map(String)));
  return page.el("details", {}, page.el("summary", {}, `Table of points${points.length > MOST_LISTED ? ` (the highest ${MOST_LISTED} of ${points.length})` : ""}`),
    page.table(picture.title, ["Run", `${page.axisText(panel.y)}|`, "Low|", "High|", `${page.axisText(panel.x)}|`, "Evidence", "On the front"], listed.map((point) => [
      point.row >= 0 ? page.el("a", { href: page.cellLink(point.row) }, page.pointName(point)) : page.pointName(point), page.number(point.y), page.number(point.low), page.number(point.high), page.number(point.x),
      page.evidence(point.evidence), front.has(String([point.x, point.y])) ? "yes" : ""])));
};
