// The table of runs: a page of rows at a time, in groups that may be compared unless a column gives the order.
"use strict";
page.ROWS_A_PAGE = 50;
page.COLUMNS = [
  { name: "system", title: "System", draw: (r, row) => page.el("a", { href: page.cellLink(row), class: "run" }, r.label(row)) },
  { name: "tok", title: "Generation tok/s", figure: true, down: true, draw: (r, row) => page.speed(r, row) },
  { name: "evidence", title: "Evidence", draw: (r, row) => (r.get("status", row) === "ok" ? page.evidence(r.get("evidence", row)) : "–") },
  { name: "policy", title: "Policy", wide: true, draw: (r, row) => r.get("policy", row) || "–" },
  { name: "predicted", title: "Predicted tok/s", figure: true, down: true, draw: (r, row) => page.predicted(r.get("predicted", row)) },
  { name: "decode", title: "Decode tok/s", figure: true, down: true },
  { name: "latency", title: "Latency s", figure: true },
  { name: "batch", title: "Batch", figure: true, draw: (r, row) => page.plain(r.get("batch", row)) },
  { name: "host", title: "Host memory", figure: true, draw: (r, row) => page.memory(r, row) },
  { name: "tier", title: "Lowest tier", draw: (r, row) => r.get("tier", row) || "–" },
  { name: "tokens", title: "Same tokens", draw: (r, row) => r.get("tokens", row) },
  { name: "model", title: "Model", draw: (r, row) => r.get("model", row) },
  { name: "workload", title: "Workload", draw: (r, row) => r.get("workload", row) },
  { name: "machine", title: "Machine", draw: (r, row) => r.get("machine", row), wide: true },
  { name: "ended", title: "Ended (UTC)", down: true, draw: (r, row) => page.day(r.get("ended", row)) },
];

page.predicted = (value) => (value === null ? "–" : page.el("span", {}, page.number(value), page.el("abbr", { title: "SIMULATED" }, " S")));

page.memory = (records, row) => {
  const [peak, limit] = [records.get("host", row), records.get("host_limit", row)];
  return limit === null ? page.bytes(peak) : page.el("span", {}, page.bytes(peak), page.el("small", {}, ` of ${page.bytes(limit)}`));
};

// The figure with its interval, or how the cell ended.
page.speed = (records, row) => {
  const value = records.get("tok", row);
  if (records.get("status", row) !== "ok") {
    return page.el("span", { class: "ended" }, page.status(records.get("status", row)), page.el("small", { title: records.get("reason", row) }, records.get("reason", row)));
  }
  if (value === null) return "–";
  const n = records.get("n", row);
  const spread = n === 1 ? "n=1" : `${page.number(records.get("low", row))}–${page.number(records.get("high", row))}, n=${n}`;
  const best = records.get("best", row) === "fastest";
  return page.el("span", { class: best ? "best" : null }, page.el("b", {}, page.number(value)), best ? page.el("abbr", { title: "fastest of its group" }, " ★") : null,
    page.el("small", { title: records.get("interval", row) }, spread));
};

page.recordsView = (main, selected) => {
  const { el, records, state } = page;
  const rows = records.sort(selected.rows, state.sort, state.dir === "desc");
  const pages = Math.max(1, Math.ceil(rows.length / page.ROWS_A_PAGE));
  const at = Math.min(Math.max(1, Number(state.at) || 1), pages);
  const first = (at - 1) * page.ROWS_A_PAGE;
  const shown = rows.slice(first, first + page.ROWS_A_PAGE);
  const text = `${page.count(rows.length, "run")}${rows.length === records.size ? "" : ` of ${records.size.toLocaleString("en")}`}`;
  const range = pages > 1 ? `, ${first + 1} to ${first + shown.length} shown` : "";
  const table = el("table", { role: "table", class: "runs", "aria-rowcount": rows.length + 1 },
    el("caption", { class: "hidden" }, `${text}${range}`), el("thead", { role: "rowgroup" }, page.headRow()),
    el("tbody", { role: "rowgroup" }, page.bodyRows(shown, first)));
  const scroll = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Runs" }, table);
  scroll.addEventListener("keydown", page.moveInRows);
  main.replaceChildren(
    el("div", { class: "bar" }, el("h2", {}, text), state.sort ? el("button", { type: "button", onclick: () => page.go({ sort: "", dir: "", at: "" }) }, "Group comparable runs") : null,
      page.pager(at, pages)),
    rows.length ? scroll : el("p", { class: "empty" }, records.size ? "No run has all of these values. Clear a filter." : "There are no records yet."),
    pages > 1 ? page.pager(at, pages) : "");
  page.say(`${text}${range}`);
};

page.headRow = () => page.el("tr", { role: "row" },
  page.el("th", { role: "columnheader", scope: "col" }, page.el("span", { class: "hidden" }, "Compare")),
  page.COLUMNS.map(({ name, title, figure, down }) => {
    const sorted = page.state.sort === name;
    const descending = page.state.dir === "desc";
    const order = sorted ? (descending ? "descending" : "ascending") : "none";
    const next = sorted ? (descending ? "" : "desc") : (down ? "desc" : "");
    return page.el("th", { role: "columnheader", scope: "col", "aria-sort": order, class: figure ? "figure" : null },
      page.el("button", { type: "button", class: "sort", "data-focus": `sort ${name}`, onclick: () => page.sortBy(name, next) }, title,
        page.el("span", { "aria-hidden": "true" }, sorted ? (descending ? " ▼" : " ▲") : " ↕")));
  }));

page.sortBy = (name, dir) => page.go({ sort: name, dir, at: "" });

page.bodyRows = (shown, first) => {
  const { el, records, state } = page;
  const lines = [];
  let group = null;
  shown.forEach((row, place) => {
    if (!state.sort && records.get("group", row) !== group) {
      group = records.get("group", row);
      lines.push(el("tr", { role: "row", class: "group" }, el("th", { role: "rowheader", scope: "rowgroup", colspan: page.COLUMNS.length + 1 }, el("span", {}, group))));
    }
    lines.push(page.bodyRow(row, first + place + 2));
  });
  return lines;
};

page.bodyRow = (row, position) => {
  const { el, records, state } = page;
  const id = records.get("id", row);
  const box = el("input", { type: "checkbox", "aria-label": `Compare ${records.label(row)}, run ${id}`, "data-focus": `pick ${id}` });
  box.checked = state.a === id || state.b === id;
  box.addEventListener("change", () => page.pick(id, box.checked));
  return el("tr", { role: "row", "aria-rowindex": position, class: records.get("run", row) === "older" ? "older" : null },
    el("td", { role: "cell", class: "pick" }, box),
    page.COLUMNS.map(({ name, title, figure, wide, draw }, place) => el(place === 0 ? "th" : "td",
      { role: place === 0 ? "rowheader" : "cell", scope: place === 0 ? "row" : null, "data-title": title, class: [figure ? "figure" : "", wide ? "wide" : ""].join(" ").trim() || null },
      draw ? draw(records, row) : page.number(records.get(name, row)),
      place === 0 && records.get("run", row) === "older" ? el("small", {}, "older run") : null)));
};

// Up and down go from run to run.
page.moveInRows = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const runs = [...event.currentTarget.querySelectorAll("a.run")];
  const at = runs.indexOf(document.activeElement);
  if (!step || (at < 0 && document.activeElement !== event.currentTarget)) return;
  event.preventDefault();
  const next = runs[at < 0 ? 0 : Math.min(runs.length - 1, Math.max(0, at + step))];
  if (next) next.focus();
};

page.pager = (at, pages) => {
  if (pages < 2) return "";
  const to = (number, title, usable) => page.el("button", { type: "button", disabled: !usable, "data-focus": title, onclick: () => page.go({ at: String(number) }) }, title);
  return page.el("div", { class: "pager", role: "group", "aria-label": "Pages" },
    to(1, "First", at > 1), to(at - 1, "Previous", at > 1), page.el("span", {}, `Page ${at} of ${pages}`), to(at + 1, "Next", at < pages), to(pages, "Last", at < pages));
};

// Choose a run for the comparison: the first free place, else that of the second.
page.pick = (id, wanted) => {
  const { a, b } = page.state;
  if (!wanted) page.go({ a: a === id ? b : a, b: a === id || b === id ? "" : b }, true);
  else if (!a) page.go({ a: id }, true);
  else page.go({ b: id }, true);
};
