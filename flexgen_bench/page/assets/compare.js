// Two runs side by side, down to lanes and settings. A line that differs says so with a sign.
"use strict";
const WORDED = ["Policy", "Settings", "Machine and software"]; // what stands there is seldom a figure
page.compareView = async (main) => {
  const { el, records, state } = page;
  const rows = [state.a, state.b].map((id) => records.rowOf.get(id));
  if (rows.includes(undefined)) {
    main.replaceChildren(...page.chooseRuns(rows));
    return;
  }
  const cells = await Promise.all(rows.map(page.cell));
  const odd = cells.find(({ problem }) => problem);
  if (odd) throw new Error(`${odd.file}: ${odd.problem}`);
  const only = state.differences !== "all";
  const box = el("input", { type: "checkbox", "data-focus": "only" });
  box.checked = only;
  box.addEventListener("change", () => page.go({ differences: box.checked ? "" : "all" }, true));
  const places = rows.map((_, i) => el("div", {}, el("h4", {}, "AB"[i], ": ", cells[i].label), el("div", {}, cells[i].lanes_file ? "Reading lanes…" : "No trace of its steps was kept.")));
  const sections = page.compared(cells).map(([title, lines]) => page.compareTable(title, lines, only)).filter(Boolean);
  main.replaceChildren(el("h2", {}, "Two runs side by side"),
    el("div", { class: "pair" }, cells.map((cell, i) => page.compareCard(cell, "AB"[i]))), page.verdict(cells),
    el("p", {}, el("button", { type: "button", "data-focus": "swap", onclick: () => page.go({ a: state.b, b: state.a }, true) }, "Swap"), " ",
      el("button", { type: "button", onclick: () => page.go({ a: "", b: "" }) }, "Choose others"), " ", el("label", {}, box, " only what differs")),
    ...sections, page.section("Lanes", el("div", { class: "pair" }, places)));
  cells.forEach((cell, i) => {
    if (cell.lanes_file) page.lanesOf(cell).then((data) => places[i].lastChild.replaceChildren(page.lanesPicture(data, cell.label))).catch((error) => { places[i].lastChild.textContent = error.message; });
  });
};

// One or both runs are still to be chosen: those that may be compared with the first come first.
page.chooseRuns = (rows) => {
  const { el, records } = page;
  const first = rows.find((row) => row !== undefined);
  if (first === undefined) {
    return [el("h2", {}, "Two runs side by side"), el("p", {}, "Choose two runs in ", el("a", { href: page.link({ view: "records" }) }, "Records"), " with the boxes in front of them.")];
  }
  const group = records.columns.group.at[first];
  const beside = records.columns.group.at.map((_, row) => row).filter((row) => row !== first && records.columns.group.at[row] === group).slice(0, 50);
  return [el("h2", {}, "Two runs side by side"), el("p", {}, "Chosen: ", el("b", {}, records.label(first)), `, run ${records.get("id", first)}.`),
    beside.length ? el("p", {}, "Runs of the same work on the same kind of machine:") : el("p", {}, "No other run does the same work; any in ", el("a", { href: page.link({ view: "records" }) }, "Records"), " can be chosen."),
    el("ul", {}, beside.map((row) => el("li", {}, el("button", { type: "button", onclick: () => page.pick(records.get("id", row), true) }, `${records.label(row)}, ${page.number(records.get("tok", row))} tok/s, ${page.day(records.get("ended", row))}`))))];
};

page.compareCard = (cell, letter) => page.el("article", {}, page.el("h3", {}, `${letter}: `, page.el("a", { href: page.cellLink(cell.row) }, cell.label)),
  page.el("p", { class: "badges" }, page.status(cell.status), page.evidence(cell.evidence)), page.answers(cell), page.command(cell.rerun));

// Which is faster and whether their intervals part; nothing where they did different work.
page.verdict = ([a, b]) => {
  const { records } = page;
  const [x, y] = [a, b].map(page.headline);
  if (!x || !y) return page.el("p", { class: "verdict" }, "One of them has no figure.");
  const ratio = y.value / x.value;
  const apart = x.high < y.low || y.high < x.low;
  const spread = a.repetitions < 2 || b.repetitions < 2 ? "one was run once, so no spread is known" : apart ? "their intervals do not meet" : "their intervals meet: undecided";
  const same = records.get("group", a.row) === records.get("group", b.row) ? "" : " They did different work: this is no comparison of systems.";
  return page.el("p", { class: "verdict" }, `B generates ${ratio.toFixed(2)} times as fast as A; ${spread}.${same}`);
};

// [title, lines of [name, A, B]] of everything that two cells can be compared by.
page.compared = (cells) => {
  const both = (lists) => {
    const maps = lists.map((list) => new Map(list));
    return [...new Set(lists.flatMap((list) => list.map(([name]) => name)))].map((name) => [name, ...maps.map((map) => (map.has(name) ? map.get(name) : "–"))]);
  };
  const of = (build) => both(cells.map(build));
  return [
    ["Figures", of((c) => c.metrics.map((one) => [one.name.replaceAll("_", " "), page.number(one.value)]))],
    ["Policy", of((c) => [...Object.entries(c.requested).map(([name, value]) => [name.replaceAll("_", " "), page.plain(page.setting(value))]), ...Object.entries(c.realised).map(([name, value]) => [`realised ${name.replaceAll("_", " ")}`, page.plain(page.setting(value))])])],
    ["Memory", of((c) => [...c.memory.flatMap((one) => [[`${one.tier} planned`, page.bytes(one.planned)], [`${one.tier} peak`, page.bytes(one.peak)], [`${one.tier} limit`, page.bytes(one.limit)]]), ...c.purposes.map((one) => [`${one.tier}: ${one.purpose}`, page.bytes(one.bytes)])])],
    ["Links", of((c) => c.links.flatMap((one) => [[`${one.lane} moved`, page.bytes(one.bytes)], [`${one.lane} GB/s while busy`, page.number(one.rate && one.rate / 1e9)]]))],
    ["Busy share of lanes", of((c) => c.lanes.map((one) => [one.lane, one.share === null ? page.seconds(one.seconds) : page.percent(one.share)]))],
    ["Settings", of((c) => page.flat(c.settings, ""))],
    ["Machine and software", of((c) => page.flat(c.environment, ""))],
  ];
};

page.compareTable = (title, lines, only) => {
  const { el } = page;
  const shown = only ? lines.filter(([, a, b]) => a !== b) : lines;
  if (!lines.length) return null;
  if (!shown.length) return page.section(title, el("p", { class: "quiet" }, "The same in both."));
  return page.section(title, page.table(title, WORDED.includes(title) ? ["What", "A", "B", "B/A|", "Differs"] : ["What", "A|", "B|", "B/A|", "Differs"], shown.map(([name, a, b]) => [
    name, a, b, page.ratio(a, b), a === b ? "" : el("span", { class: "differs" }, "≠", el("span", { class: "hidden" }, " differs"))]), { class: "compared" }));
};

page.ratio = (a, b) => {
  const [x, y] = [a, b].map((text) => (/^[\d.]+$/.test(text) ? Number(text) : NaN));
  return x > 0 && y > 0 && x !== y ? `${(y / x).toFixed(2)}×` : "";
};
