// The rows: what a column holds, which rows a choice of values leaves, and their order.
"use strict";
page.FACETS = [
  ["system", "System"], ["model", "Model"], ["workload", "Workload"], ["compression", "Compression"],
  ["machine", "Machine"], ["hardware", "Hardware"], ["evidence", "Evidence"], ["status", "Ended"],
  ["suite", "Suite"], ["run", "Run"], ["folder", "Folder"],
];
const SEARCHED = ["system", "compression", "model", "dtype", "workload", "hardware", "machine", "policy", "suite", "reason", "id"];

page.Records = class {
  constructor(overview) {
    this.overview = overview;
    this.columns = overview.columns;
    this.cellsAFile = overview.cells_a_file;
    this.size = this.columns.id.at.length;
    this.rowOf = new Map(Array.from({ length: this.size }, (_, row) => [this.get("id", row), row]));
  }

  // A row's value: text, a number, or null.
  get(name, row) {
    const column = this.columns[name];
    return column.numbers ? column.numbers[row] : column.values[column.at[row]];
  }

  label(row) {
    const compression = this.get("compression", row);
    return compression === "exact" ? this.get("system", row) : `${this.get("system", row)} (${compression})`;
  }

  // {rows, counts}: rows that have one of the chosen values of every facet and all words; and for every facet how many
  // rows each of its values would have beside what is chosen in the others.
  select(chosen, words) {
    const facets = page.FACETS.map(([name]) => {
      const column = this.columns[name];
      const wanted = chosen[name] && chosen[name].length ? chosen[name] : null;
      const allowed = wanted && column.values.map((value) => wanted.includes(value));
      return { name, at: column.at, allowed, counts: new Uint32Array(column.values.length) };
    });
    const found = this.search(words);
    const rows = [];
    for (let row = 0; row < this.size; row += 1) {
      if (found && !found[row]) continue;
      let missed = 0;
      let last = null;
      for (const facet of facets) {
        if (facet.allowed && !facet.allowed[facet.at[row]]) { missed += 1; last = facet; if (missed > 1) break; }
      }
      if (missed === 0) {
        rows.push(row);
        for (const facet of facets) facet.counts[facet.at[row]] += 1;
      } else if (missed === 1) last.counts[last.at[row]] += 1;
    }
    return { rows, counts: Object.fromEntries(facets.map((facet) => [facet.name, facet.counts])) };
  }

  // Which rows hold every word somewhere; null where no word is asked for. Columns have few different values, so those
  // are searched and not the rows.
  search(words) {
    const asked = words.toLowerCase().split(/\s+/).filter(Boolean);
    if (!asked.length) return null;
    const found = new Uint8Array(this.size).fill(1);
    for (const word of asked) {
      const hits = SEARCHED.map((name) => ({ at: this.columns[name].at, has: this.columns[name].values.map((v) => v.toLowerCase().includes(word)) }));
      for (let row = 0; row < this.size; row += 1) if (found[row] && !hits.some(({ at, has }) => has[at[row]])) found[row] = 0;
    }
    return found;
  }

  // In the order of a column; what is not known comes last either way. Without a column: comparable runs together.
  sort(rows, name, descending) {
    const column = name && this.columns[name];
    if (!column) return rows;
    const values = column.numbers || column.at; // texts lie in order
    const sign = descending ? -1 : 1;
    return rows.slice().sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return sign * (x - y) || a - b;
    });
  }
};
