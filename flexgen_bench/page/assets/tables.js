// Views that are tables: accuracy beside speed, the papers' tables, and files that are no records.
"use strict";
const BROKEN_A_PAGE = 100;

page.points = (change) => (change === null ? "–" : `${change < 0 ? "−" : "+"}${Math.abs(100 * change).toFixed(1)}`);
page.pointsRange = ({ low, high }) => (low === null ? "–" : `${page.points(low)} to ${page.points(high)}`);

page.accuracyView = async (main, selected) => {
  const { el, records } = page;
  const models = await page.load("accuracy");
  const rows = await page.lossyRuns(selected.rows);
  const beside = rows.length ? page.table("Compressed runs: speed and what it costs", ["Run", "Model", "tok/s|", "Evidence", "Mode", "Mean change, points|", "95 % interval|", "Verdict"], rows.map(([row, loss]) => [
    el("a", { href: page.cellLink(row) }, records.label(row)), records.get("model", row), page.number(records.get("tok", row)), page.evidence(records.get("evidence", row)),
    loss ? loss.mode : "not evaluated", loss ? page.points(loss.change) : null, loss ? page.pointsRange(loss) : null, loss ? loss.verdict : null]))
    : el("p", { class: "empty" }, "No compressed run is among the chosen ones.");
  const tables = models.map((model) => page.section(`${model.model}, ${model.system}, ${model.dtype}`, el("p", {}, model.advice), el("p", { class: "quiet" }, `Judged within ${model.margins}; the same items under both, 95 % intervals.`),
    page.table("Scores of each mode", ["Mode", "Task", "Items|", "Exact|", "Score|", "Change|", "95 % interval|", "Verdict", "Evidence"], model.rows.map((one) => [
      one.mode, one.task, one.n, page.score(one, one.exact), page.score(one, one.score), page.change(one, one.change), one.low === null ? null : `${page.change(one, one.low)} to ${page.change(one, one.high)}`, one.verdict, page.evidence(one.evidence)])),
    model.problems.length ? el("ul", { class: "warnings" }, model.problems.map((text) => el("li", {}, text))) : null));
  main.replaceChildren(el("h2", {}, "Accuracy beside speed"), beside, ...tables,
    ...(models.length ? [] : [el("p", { class: "empty" }, "No records of accuracy. To make some: python -m flexgen_bench accuracy")]));
};

page.lossyRuns = async (rows) => {
  const lossy = rows.filter((row) => page.records.get("compression", row) !== "exact").slice(0, 200);
  const cells = await Promise.all(lossy.map(page.cell));
  return lossy.map((row, place) => [row, cells[place].accuracy[0] || null]);
};

page.score = (one, value) => (value === null ? null : one.bounded ? (100 * value).toFixed(1) : page.number(value));
page.change = (one, value) => (one.bounded ? page.points(value) : value === null ? "–" : `${value < 0 ? "−" : "+"}${page.number(Math.abs(value))}`);

page.papersView = async (main) => {
  const { el, state } = page;
  const { tables, legend, errors } = await page.load("papers");
  if (!tables.length) {
    main.replaceChildren(el("h2", {}, "Tables of the papers"), ...errors.map((text) => el("p", { class: "empty" }, text)));
    return;
  }
  const table = tables.find(({ name }) => name === state.table) || tables[0];
  const select = el("select", { id: "paper", "data-focus": "paper" }, tables.map(({ name, title }) => el("option", { value: name, selected: name === table.name }, title)));
  select.addEventListener("change", () => page.go({ table: select.value }));
  main.replaceChildren(el("h2", {}, "Tables of the papers"), el("p", {}, el("label", { for: "paper" }, "Table "), select), el("h3", {}, table.title),
    ...table.grids.map((grid) => page.table(grid.title || table.title, [...grid.names, "", "Evidence", ...grid.columns.map((name) => `${name}|`)], grid.lines.map((line) => [
      ...line.names, line.what, page.paperEvidence(line.evidence), ...line.cells]), { class: "paper" })),
    ...(table.notes.length ? [el("ol", {}, table.notes.map((text) => el("li", {}, text)))] : []),
    ...(table.remarks.length ? [el("ul", {}, table.remarks.map((text) => el("li", {}, text)))] : []),
    ...legend.map((text) => el("p", { class: "quiet" }, text)), ...errors.map((text) => el("p", { class: "empty" }, text)));
};

page.paperEvidence = (text) => {
  const [word] = text.split(" ");
  return /^[A-Z]+$/.test(word) ? page.el("span", {}, page.evidence(word), text.slice(word.length)) : text;
};

page.brokenView = async (main) => {
  const { el, state } = page;
  const files = await page.load("broken");
  const pages = Math.max(1, Math.ceil(files.length / BROKEN_A_PAGE));
  const at = Math.min(Math.max(1, Number(state.at) || 1), pages);
  const shown = files.slice((at - 1) * BROKEN_A_PAGE, at * BROKEN_A_PAGE);
  main.replaceChildren(el("h2", {}, page.count(files.length, "file that cannot be used", "files that cannot be used")),
    el("p", {}, files.length ? "They lie where records lie. What each of them is, and what to do, is said beside it; all other records are shown." : "Every file that lies where records lie could be used."),
    ...(files.length ? [page.pager(at, pages), page.table("Unusable files", ["File", "What is wrong"], shown.map(({ file, message }) => [file, message]), { class: "broken" })] : []));
};
