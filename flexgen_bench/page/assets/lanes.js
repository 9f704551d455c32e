// What every lane did: a row a lane, time to the right. Pointer and arrow keys tell of a step; a table tells all.
"use strict";
const ROW = 26, LEFT = 96, BOTTOM = 22;

page.lanesPicture = (data, name) => {
  const { el } = page;
  if (data.problem) return el("p", { class: "empty" }, data.problem);
  const key = el("ul", { class: "key" }, data.kinds.map((kind, place) =>
    el("li", {}, page.swatch(data.colours[place]), kind.replaceAll("_", " "))));
  return el("div", { class: "lanes" },
    data.waiting ? el("p", {}, `${data.waiting} (last measured repetition, ${page.seconds(data.wall_s)})`) : null,
    data.panels.map((panel) => page.lanesPanel(data, panel, name)), key,
    data.dropped ? el("p", { class: "quiet" }, `The last ${data.dropped} steps were not kept.`) : null,
    page.table("Lanes", ["Lane", "Busy|", "Busy s|", "Steps|", "Moved|", "GB/s while busy|"], data.lanes.map((one) => [
      one.lane, page.percent(one.busy_s / data.wall_s), page.number(one.busy_s), one.steps, page.bytes(one.bytes),
      one.bytes && one.busy_s ? page.number(one.bytes / one.busy_s / 1e9) : null])),
    el("details", {}, el("summary", {}, "Time by kind of step"),
      page.table("Kinds of steps", ["Lane", "Kind", "Steps|", "Seconds|", "Of the time|"], data.by_kind.map((one) => [
        one.lane, one.kind.replaceAll("_", " "), one.steps, page.number(one.seconds), page.percent(one.seconds / data.wall_s)]))));
};

page.swatch = (colour) => {
  const swatch = page.el("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = colour;
  return swatch;
};

page.lanesPanel = (data, panel, name) => {
  const { el } = page;
  const lanes = Object.keys(panel.lanes);
  const told = el("output", { class: "told" }, "Point at a step, or use the arrow keys.");
  const title = `${panel.name}, ${page.seconds(panel.span_s)}`;
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": `${name ? `${name}: ` : ""}${title}. ${page.lanesSummary(data, panel)}` });
  const view = { canvas, data, panel, lanes, told, lane: 0, step: -1 };
  canvas.addEventListener("pointermove", (event) => page.tellAt(view, event.offsetX, event.offsetY));
  canvas.addEventListener("keydown", (event) => page.tellNext(view, event));
  new ResizeObserver(() => page.drawLanes(view)).observe(canvas);
  return el("figure", {}, el("figcaption", {}, title), canvas, told);
};

// Seconds of each lane's work in a panel, in words.
page.lanesSummary = (data, panel) => Object.entries(panel.lanes).map(([lane, steps]) => {
  const width = panel.exact ? 1 / panel.span_s : 1 / 300;
  return `${lane} ${page.percent(Math.min(1, steps.reduce((sum, step) => sum + step[2] * width, 0)))} busy`;
}).join(", ");

page.drawLanes = (view) => {
  const { canvas, data, panel, lanes } = view;
  const width = canvas.clientWidth, height = ROW * lanes.length + BOTTOM;
  const sharp = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = width * sharp;
  canvas.height = height * sharp;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  pen.scale(sharp, sharp);
  pen.font = `12px ${style.fontFamily}`;
  const span = width - LEFT - 28;
  view.span = span;
  lanes.forEach((lane, place) => {
    const top = ROW * place + 3, tall = ROW - 6;
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(LEFT, top, span, tall);
    if (panel.exact) {
      for (const [kind, begin, seconds] of panel.lanes[lane]) {
        pen.fillStyle = data.colours[kind];
        pen.fillRect(LEFT + begin / panel.span_s * span, top, Math.max(0.5, seconds / panel.span_s * span - 0.4), tall);
      }
    } else page.drawShares(pen, data, panel.lanes[lane], span, top, tall);
    pen.fillStyle = style.color;
    pen.textAlign = "right";
    pen.fillText(lane, LEFT - 8, top + 14);
  });
  page.drawTicks(pen, panel.span_s, span, ROW * lanes.length + 15);
};

// In every bin a kind is as high as its share of the time.
page.drawShares = (pen, data, shares, span, top, tall) => {
  const wide = span / 300;
  let bin = -1, used = 0;
  for (const [place, kind, share] of shares) {
    if (place !== bin) { bin = place; used = 0; }
    pen.fillStyle = data.colours[kind];
    pen.fillRect(LEFT + place * wide, top + tall * (1 - used - share), wide + 0.3, tall * share);
    used += share;
  }
};

page.drawTicks = (pen, seconds, span, y) => {
  const rough = seconds / Math.max(2, span / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  pen.textAlign = "center";
  for (let time = 0; time <= seconds; time += step) pen.fillText(page.seconds(time), LEFT + time / seconds * span, y);
};

page.tellAt = (view, x, y) => {
  const time = (x - LEFT) / view.span;
  const lane = Math.min(view.lanes.length - 1, Math.max(0, Math.floor(y / ROW)));
  const steps = view.panel.lanes[view.lanes[lane]];
  const found = view.panel.exact
    ? steps.findIndex(([, begin, seconds]) => time * view.panel.span_s >= begin && time * view.panel.span_s <= begin + seconds)
    : steps.findIndex(([bin]) => bin === Math.floor(time * 300));
  Object.assign(view, { lane, step: found });
  page.tellStep(view);
};

page.tellNext = (view, event) => {
  const [along, across] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] || [0, 0];
  if (!along && !across) return;
  event.preventDefault();
  view.lane = Math.min(view.lanes.length - 1, Math.max(0, view.lane + across));
  const steps = view.panel.lanes[view.lanes[view.lane]];
  view.step = across ? 0 : Math.min(steps.length - 1, Math.max(0, view.step + along));
  page.tellStep(view);
};

page.tellStep = ({ told, panel, lanes, lane, step, data }) => {
  const found = panel.lanes[lanes[lane]][step];
  if (!found) { told.textContent = `${lanes[lane]}: idle`; return; }
  const kind = data.kinds[panel.exact ? found[0] : found[1]].replaceAll("_", " ");
  told.textContent = panel.exact
    ? `${lanes[lane]}: ${kind}, unit ${found[3]}${found[4] < 0 ? "" : `, micro-batch ${found[4]}`}, ${page.seconds(found[2])} at ${page.seconds(found[1])}`
    : `${lanes[lane]}: ${kind}, ${page.percent(found[2])} of the time around ${page.seconds(found[0] / 300 * panel.span_s)}`;
};
