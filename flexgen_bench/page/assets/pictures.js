// Pictures of the chosen runs: one at a time, drawn by Chart.js, with a table of its points beside it.
"use strict";
const COLOURS = [
  ["#0072b2", "#56b4e9"], ["#d55e00", "#ff9a56"], ["#009e73", "#3ddcac"], ["#b8569a", "#e69fce"],
  ["#8a6d00", "#e6c229"], ["#5b6470", "#aab4c0"], ["#7a4fd0", "#b79bff"], ["#a33a3a", "#ff8f8f"],
];
const SHAPES = ["circle", "rect", "triangle", "rectRot", "crossRot", "star", "rectRounded", "cross"];
const SIGNS = ["●", "■", "▲", "◆", "✕", "✶", "▢", "✚"];
const MOST_LISTED = 200, MOST_INTERVALS = 300;

page.picturesView = async (main, selected) => {
  const { el, state } = page;
  const [all, Chart] = await Promise.all([page.load("pictures"), page.library()]);
  const picture = all.find(({ name }) => name === state.picture) || all[0];
  const inside = new Set(selected.rows);
  const possible = picture.points.filter(([row]) => inside.has(row));
  const groups = picture.of_a_group ? page.groupsOf(possible) : [];
  const group = groups.find(({ name }) => name === state.group) || groups[0];
  const points = group ? possible.filter(([row]) => page.records.get("group", row) === group.name) : possible;
  const tabs = el("div", { class: "tabs", role: "group", "aria-label": "Pictures" }, all.map(({ name, title }) =>
    el("button", { type: "button", "data-focus": `picture ${name}`, "aria-pressed": String(name === picture.name), onclick: () => page.go({ picture: name, group: "" }) }, title)));
  const choice = groups.length > 1 ? page.groupChoice(groups, group) : group ? el("p", { class: "quiet" }, group.name) : null;
  const parts = [el("h2", {}, picture.title), tabs, el("p", {}, picture.about), choice];
  if (!points.length) {
    main.replaceChildren(...parts.filter(Boolean), el("p", { class: "empty" }, possible.length || !picture.points.length ? picture.empty : "No run that passes the filters has a point here."));
    return;
  }
  const series = page.seriesOf(points);
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": page.pictureText(picture, points, series) });
  const told = el("output", { class: "told" }, "Point at a run, or use the arrow keys; Enter opens it.");
  main.replaceChildren(...parts.filter(Boolean), page.seriesKey(series), el("figure", {}, el("div", { class: "chart" }, canvas), told), page.pointTable(picture, points));
  page.draw(Chart, canvas, told, picture, series);
};

// Groups of comparable runs, that with most points first.
page.groupsOf = (points) => {
  const counts = new Map();
  for (const [row] of points) counts.set(page.records.get("group", row), (counts.get(page.records.get("group", row)) || 0) + 1);
  return [...counts].map(([name, count]) => ({ name, count })).sort((a, b) => b.count - a.count);
};

page.groupChoice = (groups, group) => {
  const select = page.el("select", { id: "group", "data-focus": "group" }, groups.map(({ name, count }) => page.el("option", { value: name, selected: name === group.name }, `${name} (${count})`)));
  select.addEventListener("change", () => page.go({ group: select.value }, true));
  return page.el("p", {}, page.el("label", { for: "group" }, "Comparable runs "), select);
};

// Points of a system and compression together; a system keeps its colour and shape whatever is filtered.
page.seriesOf = (points) => {
  const dark = page.isDark() ? 1 : 0;
  const systems = page.records.columns.system.values;
  const found = new Map();
  for (const point of points) {
    const [row] = point;
    const [label, evidence] = [page.records.label(row), page.records.get("evidence", row)];
    const key = `${label}, ${evidence}`;
    const place = systems.indexOf(page.records.get("system", row));
    if (!found.has(key)) found.set(key, { label, evidence, place, colour: COLOURS[place % 8][dark], points: [] });
    found.get(key).points.push(point);
  }
  return [...found.values()].sort((a, b) => a.label.localeCompare(b.label));
};

page.seriesKey = (series) => page.el("ul", { class: "key" }, series.map(({ label, evidence, place, colour, points }) => {
  const sign = page.el("span", { "aria-hidden": "true" }, SIGNS[place % 8]);
  sign.style.color = colour;
  return page.el("li", {}, sign, ` ${label} `, page.evidence(evidence), page.el("span", { class: "quiet" }, ` ${points.length}`));
}));

// Runs that no other run beats in both axes.
page.frontier = (picture, points) => {
  const [less, more] = [picture.x.better === "less" ? 1 : -1, picture.y.better === "more" ? -1 : 1];
  let best = Infinity;
  return points.slice().sort((a, b) => less * (a[1] - b[1]) || more * (a[2] - b[2])).filter(([, , y]) => (more * y < best ? ((best = more * y), true) : false));
};

page.draw = (Chart, canvas, told, picture, series) => {
  if (page.drawn) page.drawn.destroy();
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
  const all = series.flatMap(({ points }) => points);
  const front = picture.frontier ? page.frontier(picture, all) : [];
  const axis = ({ title, log }) => ({ type: log ? "logarithmic" : "linear", title: { display: true, text: title, color: ink }, ticks: { color: ink, maxTicksLimit: 8, callback: (value) => page.number(value) }, grid: { color: line }, border: { color: ink } });
  const datasets = series.map(({ label, evidence, place, colour, points }) => ({
    label, colour, data: (picture.joined ? points.slice().sort((a, b) => a[1] - b[1]) : points).map(([row, x, y, low, high]) => ({ x, y, low, high, row })),
    pointStyle: SHAPES[place % 8], pointRadius: all.length > 2000 ? 2.5 : 5, pointHoverRadius: 8, borderColor: colour,
    backgroundColor: evidence === "MEASURED" ? colour : "transparent", pointBorderWidth: 1.5, showLine: picture.joined, borderWidth: 1, borderDash: evidence === "MEASURED" ? [] : [4, 3],
  }));
  if (picture.diagonal) {
    const ends = [Math.min(...all.map(([, x, y]) => Math.min(x, y))), Math.max(...all.map(([, x, y]) => Math.max(x, y)))];
    datasets.push({ label: "", data: ends.map((v) => ({ x: v, y: v })), showLine: true, pointRadius: 0, pointHitRadius: 0, borderColor: ink, borderDash: [4, 4], borderWidth: 1 });
  }
  page.drawn = new Chart(canvas, {
    type: "scatter", data: { datasets }, plugins: [page.marks(front, all.length, ink)],
    options: {
      animation: false, responsive: true, maintainAspectRatio: false, normalized: true, parsing: false,
      scales: { x: axis(picture.x), y: axis(picture.y) },
      interaction: { mode: "nearest", intersect: false },
      plugins: { legend: { display: false }, tooltip: { callbacks: { label: (item) => page.pointLines(picture, item.raw) }, filter: (item) => item.raw.row !== undefined } },
      onHover: (_, items) => page.tellPoint(told, picture, items),
      onClick: (_, items, chart) => { if (items.length) page.openPoint(chart, items[0]); },
    },
  });
  canvas.addEventListener("keydown", (event) => page.nextPoint(event, page.drawn, told, picture));
};

// Intervals as lines through the points, and rings around the frontier's.
page.marks = (front, count, ink) => {
  const rings = new Set(front.map(([row]) => row));
  return {
    id: "marks",
    beforeDatasetsDraw: (chart) => {
      const { ctx: pen, scales } = chart;
      chart.data.datasets.forEach((dataset, place) => {
        if (count > MOST_INTERVALS) return;
        chart.getDatasetMeta(place).data.forEach((point, at) => {
          const { low, high } = dataset.data[at];
          if (low === undefined || !(high > low)) return;
          pen.strokeStyle = dataset.colour;
          pen.lineWidth = 1;
          pen.beginPath();
          pen.moveTo(point.x, scales.y.getPixelForValue(low));
          pen.lineTo(point.x, scales.y.getPixelForValue(high));
          pen.stroke();
        });
      });
    },
    afterDatasetsDraw: (chart) => {
      const pen = chart.ctx;
      pen.strokeStyle = ink;
      pen.lineWidth = 1.5;
      chart.data.datasets.forEach((dataset, place) => chart.getDatasetMeta(place).data.forEach((point, at) => {
        if (!rings.has(dataset.data[at].row)) return;
        pen.beginPath();
        pen.arc(point.x, point.y, 9, 0, 2 * Math.PI);
        pen.stroke();
      }));
    },
  };
};

page.pointLines = (picture, { row, x, y }) => [`${page.records.label(row)} (${page.records.get("evidence", row)})`,
  `${picture.y.title}: ${page.number(y)}`, `${picture.x.title}: ${page.number(x)}`, page.records.get("policy", row).slice(0, 80)];

page.tellPoint = (told, picture, items) => {
  const raw = items.length && items[0].element.$context ? items[0].element.$context.raw : null;
  if (raw && raw.row !== undefined) told.textContent = page.pointLines(picture, raw).filter(Boolean).join("; ");
};

page.openPoint = (chart, { datasetIndex, index }) => {
  const { row } = chart.data.datasets[datasetIndex].data[index];
  if (row !== undefined) page.go({ view: "cell", run: page.records.get("id", row) });
};

// Arrow keys go from point to point, from left to right.
page.nextPoint = (event, chart, told, picture) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Enter" && chart.told) page.openPoint(chart, chart.told);
  if (!step) return;
  event.preventDefault();
  chart.order ||= chart.data.datasets.flatMap((dataset, datasetIndex) => dataset.data.map((point, index) => ({ datasetIndex, index, point })))
    .filter(({ point }) => point.row !== undefined).sort((a, b) => a.point.x - b.point.x);
  chart.place = Math.min(chart.order.length - 1, Math.max(0, (chart.place ?? -1) + step));
  chart.told = chart.order[chart.place];
  chart.setActiveElements([chart.told]);
  chart.tooltip.setActiveElements([chart.told], { x: 0, y: 0 });
  chart.update("none");
  told.textContent = page.pointLines(picture, chart.told.point).filter(Boolean).join("; ");
};

page.pictureText = (picture, points, series) => {
  const top = points.reduce((best, point) => (point[2] > best[2] ? point : best));
  return `${picture.title}: ${page.count(points.length, "run")} of ${series.map(({ label }) => label).filter((v, i, a) => a.indexOf(v) === i).join(", ")}. Highest: ${page.records.label(top[0])} with ${page.number(top[2])} (${picture.y.title}) at ${page.number(top[1])} (${picture.x.title}). All points are in the table below.`;
};

page.pointTable = (picture, points) => {
  const listed = points.slice().sort((a, b) => b[2] - a[2]).slice(0, MOST_LISTED);
  const front = new Set((picture.frontier ? page.frontier(picture, points) : []).map(([row]) => row));
  return page.el("details", {}, page.el("summary", {}, `Table of points${points.length > MOST_LISTED ? ` (the highest ${MOST_LISTED} of ${points.length})` : ""}`),
    page.table(picture.title, ["Run", `${picture.y.title}|`, "Low|", "High|", `${picture.x.title}|`, "Evidence", picture.frontier ? "Unbeaten" : "Ended"], listed.map(([row, x, y, low, high]) => [
      page.el("a", { href: page.cellLink(row) }, page.records.label(row)), page.number(y), page.number(low), page.number(high), page.number(x),
      page.evidence(page.records.get("evidence", row)), picture.frontier ? (front.has(row) ? "yes" : "") : page.day(page.records.get("ended", row))])));
};
