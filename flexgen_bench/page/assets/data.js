// Data files call page.data(name, text); page.load(name) reads one when it is first asked for. Scripts, not requests:
// a page on disk may not read what lies beside it in any other way.
"use strict";
page.read = new Map(); // documents by name
page.waiting = new Map(); // promises by name

page.data = (name, text) => { page.read.set(name, JSON.parse(text)); };

page.load = (name) => {
  if (page.read.has(name)) return Promise.resolve(page.read.get(name));
  if (!page.waiting.has(name)) {
    page.waiting.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js?${page.edition || 0}`;
      script.onload = () => (page.read.has(name) ? resolve(page.read.get(name)) : reject(new Error(`data/${name}.js is damaged`)));
      script.onerror = () => reject(new Error(`data/${name}.js cannot be read. Make the page again.`));
      document.head.append(script);
    }).finally(() => page.waiting.delete(name)));
  }
  return page.waiting.get(name);
};

// Forget what was read, when a live page has newer files. Should they not be there yet, the next look asks again.
page.forget = async (edition) => {
  const before = page.edition;
  page.edition = edition;
  page.read.clear();
  try {
    return await page.load("rows");
  } catch (error) {
    page.edition = before;
    throw error;
  }
};

page.NEWER = "There are newer records than this page has read. Load it again.";

// The lanes of a cell: files are named by rows, which change as records come.
page.lanesOf = async (cell) => {
  const lanes = await page.load(cell.lanes_file.replace(/\.js$/, ""));
  if (lanes.run_id !== cell.run_id) throw new Error(page.NEWER);
  return lanes;
};

// A library that only pictures need.
page.library = () => {
  page.chart ||= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "vendor/chart.umd.min.js";
    script.onload = () => resolve(window.Chart);
    script.onerror = () => reject(new Error("vendor/chart.umd.min.js cannot be read. Make the page again."));
    document.head.append(script);
  });
  return page.chart;
};

// The document of one cell, with what its file has written once put back.
page.cell = async (row) => {
  const each = page.records.cellsAFile;
  const file = await page.load(`cells-${Math.floor(row / each)}`);
  const cell = file.cells[row % each];
  if (!cell || !page.records.get("id", row).startsWith(cell.run_id)) throw new Error(page.NEWER);
  if (cell.problem) return { ...cell, row, accuracy: [] };
  const whole = (part) => Object.fromEntries(Object.entries(part).map(([name, place]) => [name, file.values[place]]));
  return { ...cell, row, settings: whole(cell.settings), environment: whole(cell.environment) };
};
