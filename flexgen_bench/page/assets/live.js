// What running suites do, asked of the server that serves this page to its own machine. On disk there is none.
"use strict";
const EVERY_MS = 2000;

page.isServed = () => location.protocol.startsWith("http");

page.liveView = (main) => {
  const { el } = page;
  if (!page.isServed()) {
    main.replaceChildren(el("h2", {}, "Live"), el("p", { class: "empty" }, "This page lies on disk. To see a running suite: python -m flexgen_bench page --live"));
    return;
  }
  main.replaceChildren(el("h2", {}, "Live"), el("div", { id: "live" }, page.liveState ? page.liveBody(page.liveState) : "Asking…"));
};

// Ask once; a newer edition of the data replaces what was read.
page.follow = async () => {
  let wrong = "";
  try {
    const answer = await fetch("live.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    page.liveState = await answer.json();
    if (page.edition !== undefined && page.edition !== page.liveState.edition) {
      page.start(await page.forget(page.liveState.edition));
    }
    page.edition = page.liveState.edition;
  } catch (error) {
    wrong = `No answer: ${error.message}. The server may have been stopped.`;
  }
  const place = document.getElementById("live");
  if (place) page.keepFocus(() => place.replaceChildren(wrong ? page.el("p", { class: "warnings" }, wrong) : page.liveBody(page.liveState)));
};

// Ask again and again.
page.watch = async () => {
  await page.follow();
  setTimeout(page.watch, EVERY_MS);
};

page.liveBody = ({ suites, problem }) => {
  const { el } = page;
  const none = el("p", { class: "empty" }, "No suite is running on these results. This page will show one as soon as it begins.");
  return el("div", {}, problem ? el("p", { class: "warnings" }, problem) : null, suites.length ? suites.map(page.liveSuite) : none);
};

page.liveSuite = (suite) => {
  const { el } = page;
  const ended = suite.cells.filter(({ state }) => !["waiting", "running"].includes(state)).length;
  const failed = suite.cells.filter(({ state }) => ["failed", "timeout", "invalid"].includes(state)).length;
  const title = `${suite.suite || "cells"}: ${ended} of ${suite.cells.length} done${failed ? `, ${failed} failed` : ""}`;
  const words = { running: "running", finished: "finished", stopped: "stopped before its end" }[suite.state];
  return el("section", {}, el("h3", {}, title), el("p", {}, el("span", { class: "badge" }, words), ` began ${suite.started}`, suite.state === "running" && suite.left_s !== null ? `, about ${page.seconds(suite.left_s)} left` : ""),
    el("progress", { max: suite.cells.length, value: ended, "aria-label": title }),
    suite.state === "running" && suite.stage ? el("p", {}, el("b", {}, suite.stage), suite.meter ? `: ${suite.meter}` : "") : null,
    page.table("Cells", ["Cell", "State", "Expected|", "Took|", "Result"], suite.cells.map((cell) => [
      cell.label || "(not begun)", cell.state === "waiting" || cell.state === "running" ? el("span", { class: "badge" }, cell.state) : page.status(cell.state),
      page.seconds(cell.expected_s), page.seconds(cell.took_s), page.liveResult(cell)])));
};

page.liveResult = ({ run, reason, skipped }) => {
  const row = page.records.rowOf.get(run);
  if (row === undefined) return reason || null;
  return page.el("span", {}, page.el("a", { href: page.cellLink(row), "data-focus": `live ${run}` }, page.speed(page.records, row)), skipped ? page.el("small", {}, "measured before") : null);
};
