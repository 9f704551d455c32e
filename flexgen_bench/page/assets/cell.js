// One cell in full. Its first lines answer which system, which policy, how sure, and why.
"use strict";
page.cellView = async (main) => {
  const { el, records, state } = page;
  const row = records.rowOf.get(state.run);
  if (row === undefined) {
    main.replaceChildren(el("p", { class: "empty" }, `No record here has the run id ${state.run}.`));
    return;
  }
  const cell = await page.cell(row);
  if (cell.problem) {
    main.replaceChildren(el("h2", {}, records.label(row)), el("p", { class: "warnings" }, `${cell.file}: ${cell.problem}`));
    return;
  }
  const parts = [
    el("p", {}, el("a", { href: page.link({ view: "records", run: "" }) }, "← Records")),
    el("h2", {}, `${records.label(row)} · ${records.get("model", row)} · ${records.get("workload", row)}`),
    el("p", { class: "badges" }, page.status(cell.status), page.evidence(cell.evidence), el("span", { class: "quiet" }, records.get("group", row))),
    page.answers(cell), page.pickButtons(cell),
    cell.warnings.length ? page.section("Warnings", el("ul", { class: "warnings" }, cell.warnings.map((text) => el("li", {}, text)))) : null,
    page.section("Run it again", page.command(cell.rerun)),
    page.section("Figures", page.figures(cell)),
    page.section("Policy: asked and realised", page.policyTable(cell)),
    page.section("Memory", page.memoryTables(cell)),
    page.section("Links and lanes", page.linkTables(cell)),
    cell.accuracy.length ? page.section("Accuracy", page.accuracyOf(cell)) : null,
    cell.outputs.texts.length || cell.outputs.sha256 ? page.section("What it wrote", page.outputs(cell)) : null,
    page.section("Where and how", page.settingsOf(cell)),
  ];
  main.replaceChildren(...parts.filter(Boolean));
  const place = document.getElementById("lanes");
  if (place) page.lanesOf(cell).then((data) => place.replaceChildren(page.lanesPicture(data, ""))).catch((error) => { place.textContent = error.message; });
};

page.section = (title, ...content) => page.el("section", {}, page.el("h3", {}, title), ...content);

page.headline = (cell) => cell.metrics.find((one) => one.name === "generation_tok_per_s");

page.answers = (cell) => {
  const { el } = page;
  const figure = page.headline(cell);
  const said = figure ? [el("b", { class: "big" }, page.number(figure.value)), " tok/s generated"] : [page.status(cell.status), " no figure"];
  return el("dl", { class: "answers" },
    el("dt", {}, "Which system"), el("dd", {}, el("b", {}, cell.label), ": ", ...said),
    el("dt", {}, "Which policy"), el("dd", {}, el("b", {}, cell.policy || "it reports none"), el("small", {}, `${cell.chosen_by}${cell.batch_size ? `; batch ${cell.batch_size}` : ""}`)),
    el("dt", {}, "How sure"), el("dd", {}, page.sure(cell)),
    el("dt", {}, "Why"), el("dd", {}, el("ul", {}, cell.why.map((text) => el("li", {}, text)))));
};

page.sure = (cell) => {
  const figure = page.headline(cell);
  const lines = [];
  if (figure) {
    const width = (figure.high - figure.low) / 2 / figure.value;
    lines.push(cell.repetitions === 1 ? "One repetition: no spread is known."
      : `${page.number(figure.low)} to ${page.number(figure.high)} tok/s (${figure.interval}, ${cell.repetitions} repetitions, ±${page.percent(width)}).`);
  }
  if (cell.tokens === "= reference") lines.push("Its tokens equal the reference's.");
  else if (cell.tokens === "lossy") lines.push("Its numbers are compressed: tokens may differ from the reference's.");
  else if (cell.tokens === "reference") lines.push("Its tokens are the reference.");
  else if (cell.tokens !== "-") lines.push(`Tokens: ${cell.tokens}.`);
  if (figure && cell.prediction.tok_per_s) {
    const off = cell.prediction.tok_per_s / figure.value - 1;
    lines.push(`Predicted ${page.number(cell.prediction.tok_per_s)} tok/s (SIMULATED), ${page.percent(Math.abs(off))} ${off < 0 ? "below" : "above"} that.`);
  }
  return page.el("span", {}, page.evidence(cell.evidence), " ", lines.join(" "));
};

page.pickButtons = (cell) => {
  const picked = [page.state.a, page.state.b].includes(cell.run_id);
  return page.el("p", {}, page.el("button", { type: "button", "data-focus": "pick", "aria-pressed": String(picked), onclick: () => page.pick(page.records.get("id", cell.row), !picked) },
    picked ? "Chosen for comparison" : "Compare with another run"));
};

page.command = (text) => {
  const button = page.el("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); page.say("Copied."); button.textContent = "Copied"; } catch { page.say("Select the text and copy it."); }
  });
  return page.el("div", { class: "command" }, page.el("code", { tabindex: 0 }, text), button);
};

page.figures = (cell) => {
  const repetitions = Array.from({ length: cell.repetitions }, (_, i) => `Run ${i + 1}|`);
  if (!cell.metrics.length) return page.el("p", { class: "empty" }, cell.reason || "Nothing was measured.");
  return [page.table("Figures and their samples", ["Figure", "Value|", "Unit", "Low|", "High|", "Interval", ...repetitions], cell.metrics.map((one) => [
    one.name.replaceAll("_", " ").replace("tok per s", "throughput"), page.el("b", {}, page.number(one.value)), one.unit, page.number(one.low), page.number(one.high), one.interval, ...one.samples.map(page.number)])),
  page.el("p", { class: "quiet" }, `${page.count(cell.warmups, "warm-up")} apart from these; weights in place after ${page.seconds(cell.load_s)}.`),
  cell.tuning.length ? page.table("Batch sizes that were tried", ["Batch|", "tok/s|", "Why not"], cell.tuning.map((one) => [one.batch_size, page.number(one.tok_per_s), one.reason])) : null,
  cell.prediction.status ? page.table("Prediction (SIMULATED)", ["What", "Says"], Object.entries(cell.prediction).map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? page.number(value) : page.plain(value)])) : null];
};

page.shares = (of) => (of && typeof of === "object" && !Array.isArray(of)
  ? Object.entries(of).filter(([, share]) => share).map(([tier, share]) => `${tier} ${page.percent(share)}`).join(", ") || "–" : page.plain(of));

page.policyTable = (cell) => {
  const first = ["weights", "experts", "kv_cache", "activations", "gpu_batch_size", "num_gpu_batches"];
  const all = [...new Set([...Object.keys(cell.requested), ...Object.keys(cell.realised)])];
  const names = [...first.filter((name) => all.includes(name)), ...all.filter((name) => !first.includes(name))];
  if (!names.length) return page.el("p", { class: "empty" }, "The system reports no policy.");
  return page.table("Policy", ["Setting", "Asked for", "Realised", "Predicted for"], names.map((name) => [
    name.replaceAll("_", " "), page.setting(cell.requested[name]), page.setting(cell.realised[name]), page.setting((cell.predicted_policy || {})[name])]));
};

page.setting = (value) => (value !== null && typeof value === "object" && Object.values(value).every((one) => typeof one === "number" && one <= 1)
  ? page.shares(value) : value === undefined ? null : page.flat(value, "").map(([path, text]) => (path ? `${path} ${text}` : text)).join("; "));

page.memoryTables = (cell) => [
  cell.memory.length ? page.table("Memory per tier", ["Tier", "Planned|", "Peak|", "Without file cache|", "Limit|", "Limit kept by the kernel"], cell.memory.map((one) => [
    one.tier, page.bytes(one.planned), page.bytes(one.peak), page.bytes(one.anonymous), page.bytes(one.limit), one.enforced === null ? null : one.enforced ? "yes" : "no"]))
    : page.el("p", { class: "empty" }, "Nobody measured its memory."),
  cell.purposes.length ? page.table("What it held", ["Tier", "Purpose", "Bytes|"], cell.purposes.map((one) => [one.tier, one.purpose, page.bytes(one.bytes)])) : null];

page.linkTables = (cell) => [
  cell.links.length ? page.table("Bytes per link, warm-up included", ["Link", "Moved|", "Busy s|", "GB/s while busy|"], cell.links.map((one) => [
    one.lane, page.bytes(one.bytes), page.number(one.seconds), one.rate ? page.number(one.rate / 1e9) : null])) : null,
  cell.lanes.length ? page.table("How busy each lane was, warm-up included", ["Lane", "Busy s|", "Of the time|", "Share"], cell.lanes.map((one) => [
    one.lane, page.number(one.seconds), page.percent(one.share), page.meter(one.share, `${one.lane} busy`)])) : null,
  cell.lanes_file ? page.el("div", { id: "lanes" }, "Reading lanes…")
    : page.el("p", { class: "empty" }, cell.links.length || cell.lanes.length ? "No trace of its steps was kept." : "The system tells nothing of links and lanes.")];

page.meter = (share, title) => (share === null ? null : page.el("meter", { min: 0, max: 1, value: Math.min(1, share), "aria-label": title }, page.percent(share)));

page.accuracyOf = (cell) => page.table("What compression costs", ["Mode", "Mean change, points|", "95 % interval|", "Tasks|", "Verdict"], cell.accuracy.map((one) => [
  one.mode, page.points(one.change), page.pointsRange(one), one.tasks, one.verdict]));

page.outputs = (cell) => [
  cell.outputs.texts.map((text, place) => page.el("blockquote", {}, page.el("span", { class: "quiet" }, cell.outputs.prompts[place] || ""), text)),
  cell.outputs.sha256 ? page.el("p", { class: "quiet long" }, `SHA-256 of all tokens: ${cell.outputs.sha256}`) : null];

page.settingsOf = (cell) => [
  page.table("Run", ["What", "Says"], [["Record", cell.file], ["Run", cell.run_id], ["Cell (hash of its spec)", cell.spec_hash], ["Began", cell.started], ["Ended", cell.ended]]),
  page.el("details", {}, page.el("summary", {}, "Settings"), page.table("Settings", ["Setting", "Value"], page.flat(cell.settings, ""))),
  page.el("details", {}, page.el("summary", {}, "Machine and software"), page.table("Environment", ["What", "Value"], page.flat(cell.environment, "")))];
