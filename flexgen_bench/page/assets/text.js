// Elements, and figures as text. Records hold what anybody wrote into them: text only ever becomes text nodes.
"use strict";
window.page = {};

// el("td", {class: "figure"}, "12", el("b", {}, "x")): an element; children that are null are left out.
page.el = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

page.say = (text) => { document.getElementById("said").textContent = text; };

// Three significant digits without exponent, as the project's other tables have them: 1234, 56.7, 0.0123.
page.number = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(Number(value.toPrecision(3)));
  if (size >= 100) return value.toFixed(0);
  for (const [least, decimals] of [[10, 1], [1, 2], [0.1, 3], [0.01, 4]]) if (size >= least) return value.toFixed(decimals);
  return value === 0 ? "0" : value.toPrecision(3);
};

// The same without zeros at the end, for the ticks of an axis.
page.tick = (value) => String(Number(value.toPrecision(3)));

page.bytes = (count) => {
  if (count === null || count === undefined) return "–";
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (Math.abs(count) >= unit) return `${(count / unit).toFixed(2)} ${name}`;
  }
  return `${Math.round(count)} B`;
};

page.seconds = (value) => {
  if (value === null || value === undefined) return "–";
  if (value < 1) return value === 0 ? "0 s" : `${page.number(value * 1000)} ms`;
  if (value < 120) return `${page.number(value)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 120 ? `${minutes} min ${Math.round(value - 60 * minutes)} s` : `${page.number(value / 3600)} h`;
};

page.percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

page.count = (number, one, several) => `${number.toLocaleString("en")} ${number === 1 ? one : several || `${one}s`}`;

page.day = (epoch) => new Date(1000 * epoch).toISOString().slice(0, 16).replace("T", " ");

// The word and a border of its own for every kind: no colour says anything alone.
page.evidence = (word) => page.el("span", { class: `badge evidence-${word.toLowerCase()}` }, word);

page.status = (word) => {
  const sign = { ok: "✓", unavailable: "–" }[word] || "✕";
  return page.el("span", { class: `badge status-${word}` }, `${sign} ${word}`);
};

// A plain table. columns: names, those ending in "|" are figures. rows: lists of texts, elements or null.
page.table = (caption, columns, rows, attributes) => {
  const figures = columns.map((name) => name.endsWith("|"));
  const cell = (tag, content, place) => page.el(tag,
    { class: figures[place] ? "figure" : null, scope: tag === "th" ? (place === 0 ? "row" : "col") : null },
    content === null || content === undefined ? "–" : content);
  const head = page.el("tr", {}, columns.map((name, place) =>
    page.el("th", { scope: "col", class: figures[place] ? "figure" : null }, name.replace("|", ""))));
  const body = rows.map((row) => page.el("tr", {}, row.map((content, place) => cell(place === 0 ? "th" : "td", content, place))));
  return page.el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    page.el("table", attributes || {}, page.el("caption", {}, caption), page.el("thead", {}, head), page.el("tbody", {}, body)));
};

// A nested document as [path, text] lines, for tables of settings.
page.flat = (value, path) => {
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value);
    if (Array.isArray(value) && value.every((one) => one === null || typeof one !== "object")) {
      return [[path, value.map((one) => page.plain(one)).join(", ")]];
    }
    return entries.flatMap(([name, inner]) => page.flat(inner, path ? `${path}.${name}` : name));
  }
  return [[path, page.plain(value)]];
};

page.plain = (value) => (value === null || value === undefined ? "–" : String(value));
