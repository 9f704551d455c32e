// Put the view that the address asks for on the page.
"use strict";
const FILTERED = ["records", "pictures", "accuracy"];

page.start = (overview) => {
  page.records = new page.Records(overview);
  const { el } = page;
  const folders = overview.folders.join(", ");
  document.getElementById("origin").textContent = `${page.count(page.records.size, "record")} of ${folders}${overview.last_ended ? `, the last of ${overview.last_ended.slice(0, 16).replace("T", " ")} UTC` : ""}; flexgen-bench ${overview.version}`;
  const views = page.VIEWS.filter(([name]) => name !== "live" || page.isServed());
  document.getElementById("views").replaceChildren(...views.map(([name, title]) => {
    const count = name === "broken" && overview.broken ? el("span", { class: "count" }, ` ${overview.broken}`) : null;
    return el("li", {}, el("a", { "data-view": name, "data-focus": `view ${name}` }, title, count));
  }));
  page.keepFocus(() => {
    page.showCounts = page.drawFacets(document.getElementById("filters"));
    page.show();
  });
};

// Draw something anew; what had the focus, by its data-focus, gets it again.
page.keepFocus = (draw) => {
  const key = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.focus : "";
  draw();
  page.giveFocus(key);
};

page.giveFocus = (key) => {
  const found = key && document.querySelector(`[data-focus="${CSS.escape(key)}"]:not(:disabled)`);
  if (found && found !== document.activeElement) found.focus({ preventScroll: true });
  return Boolean(found);
};

page.show = () => {
  const before = page.state;
  const focus = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.focus : "";
  page.state = page.stateOf(location.hash);
  const { state, records } = page;
  const main = document.getElementById("main");
  const selected = records.select(state.chosen, state.q);
  const filtered = FILTERED.includes(state.view);
  document.getElementById("filters").hidden = !filtered;
  document.getElementById("frame").classList.toggle("filtered", filtered);
  if (filtered) page.showCounts(selected.counts);
  for (const link of document.querySelectorAll("#views a")) {
    const name = link.dataset.view;
    link.href = page.link({ view: name, run: "", at: "" });
    const current = name === state.view || (name === "records" && state.view === "cell");
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  page.showBasket();
  const draw = page.views[state.view] || page.recordsView;
  const moved = before && (before.view !== state.view || before.run !== state.run);
  const done = () => {
    requestAnimationFrame(() => setTimeout(() => { page.painted = performance.now(); })); // benchmarks/page_speed.py reads it
    document.body.dataset.shown = state.view;
    const again = page.giveFocus(focus);
    if (moved) window.scrollTo(0, 0);
    if (moved && !again) main.focus({ preventScroll: true });
    const heading = main.querySelector("h2");
    document.title = `${heading ? heading.textContent : "Records"} – flexgen-bench`;
  };
  page.turn = (page.turn || 0) + 1;
  const turn = page.turn;
  const drawn = draw(main, selected);
  if (!(drawn instanceof Promise)) return done();
  delete document.body.dataset.shown;
  return drawn.then(() => turn === page.turn && done(), (error) => {
    main.replaceChildren(page.el("p", { class: "warnings", role: "alert" }, error.message));
    done();
  });
};

page.views = {
  records: page.recordsView, cell: page.cellView, compare: page.compareView, pictures: page.picturesView,
  accuracy: page.accuracyView, papers: page.papersView, broken: page.brokenView, live: page.liveView,
};

// The runs that are chosen for a comparison, at the foot of the page.
page.showBasket = () => {
  const { el, records, state } = page;
  const basket = document.getElementById("basket");
  const chosen = [["A", state.a], ["B", state.b]].filter(([, id]) => records.rowOf.has(id));
  basket.hidden = !chosen.length || state.view === "compare";
  basket.replaceChildren(...chosen.map(([letter, id]) => el("span", {}, `${letter}: ${records.label(records.rowOf.get(id))} `,
    el("button", { type: "button", "aria-label": `Leave out ${letter}`, onclick: () => page.pick(id, false) }, "✕"))),
  el("a", { class: "button", href: page.link({ view: "compare" }) }, chosen.length === 2 ? "Compare" : "Choose one more"));
};

// Light, dark, or as the system has it; kept where the browser lets a page on disk keep anything.
page.THEMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
page.isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme === "dark" || (theme !== "light" && window.matchMedia("(prefers-color-scheme: dark)").matches);
};
page.setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = page.THEMES[theme];
  try { localStorage.setItem("theme", theme); } catch { /* nothing is kept then */ }
};

(() => {
  let theme = "auto";
  try { theme = localStorage.getItem("theme") || "auto"; } catch { /* nothing was kept */ }
  page.setTheme(theme in page.THEMES ? theme : "auto");
  const themes = Object.keys(page.THEMES);
  document.getElementById("theme").addEventListener("click", () => {
    page.setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
    page.show();
  });
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  window.addEventListener("popstate", page.show);
  if (!page.read.has("rows")) {
    document.getElementById("main").replaceChildren(page.el("p", { class: "warnings", role: "alert" }, "data/rows.js cannot be read. Make the page again: python -m flexgen_bench page"));
    return;
  }
  page.start(page.read.get("rows"));
  if (page.isServed()) page.watch();
})();
