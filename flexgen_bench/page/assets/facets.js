// The panel of filters: a search, and for each facet its values with how many runs they would leave.
"use strict";
page.drawFacets = (panel) => {
  const { el, records } = page;
  const search = el("input", { type: "search", id: "search", "data-focus": "search", autocomplete: "off", spellcheck: "false" });
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => page.go({ q: search.value, at: "" }, true), 60);
  });
  const worthwhile = ([name]) => records.columns[name].values.length > 1 || ["system", "evidence"].includes(name);
  const groups = page.FACETS.filter(worthwhile).map(([name, title]) => {
    const inputs = records.columns[name].values.map((value) => {
      const input = el("input", { type: "checkbox" });
      input.addEventListener("change", () => page.choose(name, value, input.checked));
      const number = el("span", { class: "quiet figure" });
      const line = el("label", { title: value }, input, el("span", { class: "value" }, value || "(none)"), number);
      return { value, input, number, line };
    });
    const mark = el("span", { class: "quiet" });
    const group = el("details", { class: "facet", open: inputs.length <= 12 },
      el("summary", {}, title, " ", mark),
      el("fieldset", {}, el("legend", { class: "hidden" }, title), inputs.map(({ line }) => line)));
    return { name, inputs, mark, group };
  });
  const clear = el("button", { type: "button", onclick: () => page.go({ chosen: {}, q: "", at: "" }) }, "Clear filters");
  const box = el("details", { class: "filters", open: window.matchMedia("(min-width: 60rem)").matches },
    el("summary", { class: "title" }, "Filters"),
    el("label", { class: "search", for: "search" }, "Search"), search, clear, groups.map(({ group }) => group));
  panel.replaceChildren(box);

  return (counts) => {
    if (document.activeElement !== search) search.value = page.state.q;
    clear.disabled = !page.state.q && !Object.keys(page.state.chosen).length;
    for (const { name, inputs, mark } of groups) {
      const chosen = page.state.chosen[name] || [];
      mark.textContent = chosen.length ? `${chosen.length} chosen` : "";
      inputs.forEach(({ value, input, number, line }, place) => {
        input.checked = chosen.includes(value);
        const count = counts[name][place];
        if (number.textContent !== String(count)) number.textContent = count;
        line.classList.toggle("empty", count === 0 && !input.checked);
      });
    }
  };
};

page.choose = (name, value, wanted) => {
  const chosen = { ...page.state.chosen };
  const others = (chosen[name] || []).filter((one) => one !== value);
  const values = wanted ? [...others, value] : others;
  if (values.length) chosen[name] = values;
  else delete chosen[name];
  page.go({ chosen, at: "" });
};
