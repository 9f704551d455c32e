// What is looked at, kept in the address, so that a view can be linked and the browser's buttons work.
"use strict";
page.VIEWS = [
  ["records", "Records"], ["pictures", "Pictures"], ["compare", "Compare"], ["accuracy", "Accuracy"],
  ["papers", "Paper tables"], ["broken", "Unusable files"], ["live", "Live"],
];
const SINGLE = ["q", "sort", "dir", "at", "run", "a", "b", "picture", "group", "table", "differences"];

page.stateOf = (hash) => {
  const [view, query] = hash.replace(/^#/, "").split("?");
  const given = new URLSearchParams(query || "");
  const state = { view: view || "records", chosen: {} };
  for (const name of SINGLE) state[name] = given.get(name) || "";
  for (const [name] of page.FACETS) {
    const values = given.getAll(`f.${name}`);
    if (values.length) state.chosen[name] = values;
  }
  return state;
};

page.hashOf = (state) => {
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries(state.chosen)) for (const value of values) query.append(`f.${name}`, value);
  for (const name of SINGLE) if (state[name]) query.set(name, state[name]);
  const text = query.toString();
  return `#${state.view}${text ? `?${text}` : ""}`;
};

// Go to the present state with some changes. kept: no step of its own for the browser's back button.
page.go = (changes, kept) => {
  const hash = page.hashOf({ ...page.state, ...changes });
  history[kept ? "replaceState" : "pushState"](null, "", hash);
  page.show();
};

// The address of a state, for links.
page.link = (changes) => page.hashOf({ ...page.state, ...changes });
page.cellLink = (row) => page.link({ view: "cell", run: page.records.get("id", row) });
