// Draws the charts of a page, and adds the points that come while it is open.
const COLORS = 10;
const STEPS = [1, 2, 5].flatMap((one) => [0, 1, 2, 3, 4, 5].map((power) => one * 10 ** power)).sort((a, b) => a - b); // between ticks
const page = document.querySelector("[data-charts]");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What a page shows: for each chart its metrics, for each metric and run the points.
const runs = page ? JSON.parse(page.dataset.runs) : [];
const figures = page ? [...page.querySelectorAll("[data-metrics]")] : [];
const points = new Map(); // "run metric" → Map of step → value
const cursors = Object.fromEntries(runs.map((run) => [run, 0]));
const plots = new Map(); // figure → uPlot
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]]; // with several runs, of a chart's metrics
const smoothing = document.getElementById("smooth");
if (smoothing) smoothing.checked = localStorage.getItem("smooth") !== "no";

const metricsOf = (figure) => JSON.parse(figure.dataset.metrics);
const key = (run, metric) => `${run} ${metric}`;

function address(path, after) {
  const query = new URLSearchParams();
  for (const run of runs) { query.append("run", run); if (after) query.append("after", cursors[run]); }
  for (const metric of new Set(figures.flatMap(metricsOf))) query.append("metric", metric);
  return `${path}?${query}`;
}

function take(found) {
  const changed = new Set();
  for (const [run, one] of Object.entries(found)) {
    cursors[run] = one.after;
    for (const [metric, [steps, values]] of Object.entries(one.metrics)) {
      const known = points.get(key(run, metric)) ?? new Map();
      steps.forEach((step, place) => known.set(step, values[place]));
      points.set(key(run, metric), known);
      changed.add(metric);
    }
  }
  for (const figure of figures) if (metricsOf(figure).some((metric) => changed.has(metric))) draw(figure);
}

// Series of a chart: with one run the metrics have the colours, with several the runs have.
function seriesOf(figure) {
  return runs.flatMap((run, r) => metricsOf(figure).map((metric, m) => ({ run, metric, color: (runs.length > 1 ? r : m) % COLORS, dash: runs.length > 1 ? DASHES[m % DASHES.length] : [] })));
}

const isEvaluation = (metric) => metric.includes("evaluation/");

// Series with a value at most steps are smoothed; of the others each point is shown.
const isSmoothed = (metric, values) => Boolean(smoothing?.checked) && !isEvaluation(metric) && values.filter((value) => value != null).length > values.length / 2;

// The mean of the points until each, of which later ones count more: half as much every fiftieth of the series.
function smooth(values) {
  const kept = 0.5 ** (50 / Math.max(values.length, 1));
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value == null) return null;
    sum = kept * sum + value; weight = kept * weight + 1;
    return sum / weight;
  });
}

function dataOf(shown) {
  const steps = [...new Set(shown.flatMap(({ run, metric }) => [...(points.get(key(run, metric))?.keys() ?? [])]))].sort((a, b) => a - b);
  const raw = shown.map(({ run, metric }) => { const known = points.get(key(run, metric)); return steps.map((step) => known?.get(step) ?? null); });
  return [steps, ...raw, ...shown.flatMap((one, place) => (one.smoothed ? [smooth(raw[place])] : []))];
}

const small = (tick) => tick !== 0 && Math.abs(tick) < 1e-3;

// From where to where the y axis goes.
function heights(low, high, top) {
  if (top) return [Math.min(0, low ?? 0), Math.max(Number(top), high ?? 1)];
  if (low == null || low === high) return [Math.min(0, low ?? 0), (high ?? 0) || 1];
  return uPlot.rangeNum(low, high, 0.1, true);
}

function draw(figure) {
  const shown = figure.shown ?? seriesOf(figure);
  const known = plots.get(figure);
  if (known) { known.setData(dataOf(shown)); return; }
  dataOf(shown).slice(1).forEach((values, place) => { shown[place].smoothed = isSmoothed(shown[place].metric, values); });
  figure.shown = shown;
  const place = figure.querySelector(".plot");
  const axis = { stroke: style("--faint"), grid: { stroke: style("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const top = figure.dataset.top;
  const plot = new uPlot({
    width: place.clientWidth, height: 190, legend: { show: false }, padding: [8, 16, 0, 0],
    scales: { x: { time: false }, y: { range: (_, low, high) => heights(low, high, top) } },
    axes: [{ ...axis, size: 26, incrs: STEPS }, { ...axis, size: 54, values: (_, ticks) => ticks.map((tick) => Number(tick.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3, notation: small(tick) ? "scientific" : "standard" })) }],
    cursor: { points: { size: (_, number) => (number > shown.length ? 0 : 6) }, drag: { x: true, y: false } },
    series: [
      {},
      ...shown.map(({ metric, color, dash, smoothed }) => ({ label: metric, stroke: style(`--s${color}`) + (smoothed ? "38" : ""), width: smoothed ? 1 : 1.8, dash: smoothed ? [] : dash, spanGaps: isEvaluation(metric), points: isEvaluation(metric) ? { show: true, size: 5 } : { size: 4 } })),
      ...shown.filter((one) => one.smoothed).map(({ metric, color, dash }) => ({ label: metric, stroke: style(`--s${color}`), width: 1.8, dash, spanGaps: true, points: { show: false } })),
    ],
    hooks: { setCursor: [(one) => read(figure, one.cursor.idx)] },
  }, dataOf(shown), place);
  plots.set(figure, plot);
  plot.over.addEventListener("click", () => open(figure));
  new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: 190 })).observe(place);
  read(figure, null);
}

// Says in words what is under the cursor, or the last values.
function read(figure, place) {
  const plot = plots.get(figure);
  if (!plot) return;
  const steps = plot.data[0];
  const at = place ?? steps.length - 1;
  figure.dataset.place = place ?? "";
  const text = figure.querySelector(".reading");
  const begin = document.createElement("span");
  begin.textContent = steps.length ? `step ${steps[at]}` : "";
  text.replaceChildren(begin);
  const names = metricsOf(figure).map((metric) => metric.split("/").at(-1));
  const shown = seriesOf(figure);
  shown.forEach(({ run, metric, color }, number) => {
    const column = plot.data[number + 1];
    let from = at;
    while (from >= 0 && column[from] == null) from -= 1;
    if (from < 0 || (column[from] === 0 && shown.length > 6)) return;
    const pair = document.createElement("span");
    const name = document.createElement("span");
    name.className = `name series-${color}`;
    const last = metric.split("/").at(-1);
    const full = names.filter((one) => one === last).length > 1 ? metric : last;
    name.textContent = runs.length === 1 ? full : names.length === 1 ? run : `${run} ${full}`;
    pair.append(name, ` ${Number(column[from].toPrecision(3))}`);
    text.append(pair);
  });
}

function move(figure, by) {
  const plot = plots.get(figure);
  if (!plot || !plot.data[0].length) return;
  const last = plot.data[0].length - 1;
  const place = Math.max(0, Math.min(last, (figure.dataset.place === "" ? last + (by < 0 ? 1 : 0) : Number(figure.dataset.place)) + by));
  plot.setCursor({ left: plot.valToPos(plot.data[0][place], "x"), top: 20 });
  read(figure, place);
}

// The experiences behind the point: those of its step.
function open(figure) {
  const plot = plots.get(figure);
  if (!plot || !plot.data[0].length) return;
  const place = figure.dataset.place === "" ? plot.data[0].length - 1 : Number(figure.dataset.place);
  const step = plot.data[0][place];
  if (recorded) { toStep(step); return; }
  const evaluation = metricsOf(figure).every((metric) => metric.includes("evaluation/"));
  location.assign(`/runs/${encodeURIComponent(runs[0])}/experiences?step=${evaluation ? Math.max(0, step - 1) : step}`);
}

// In a report: to the first experience of the step, or of the next one that the report has.
function toStep(step) {
  const rows = [...document.querySelectorAll("[data-step]")];
  const row = rows.find((one) => Number(one.dataset.step) >= step) ?? rows.at(-1);
  if (row) location.hash = row.dataset.href;
}

figures.forEach((figure) => figure.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") { move(figure, event.key === "ArrowLeft" ? -1 : 1); event.preventDefault(); }
  if (event.key === "Enter") { open(figure); event.preventDefault(); }
}));

function redraw() { for (const plot of plots.values()) plot.destroy(); plots.clear(); figures.forEach((figure) => { figure.shown = undefined; draw(figure); }); }
addEventListener("theme", redraw);
smoothing?.addEventListener("change", () => { localStorage.setItem("smooth", smoothing.checked ? "yes" : "no"); redraw(); });

// A report has its points within; a page of the console asks for them, and for those that come.
const recorded = document.getElementById("series");
if (recorded) {
  take(JSON.parse(recorded.textContent));
} else if (figures.length && runs.length) {
  const answer = await fetch(address("/series", false));
  take(await answer.json());
  const live = new EventSource(address("/live", true));
  live.onmessage = (event) => take(JSON.parse(event.data));
  addEventListener("pagehide", () => live.close());
}

// Lengths and shares that the pages give as data: the page's policy allows no inline styles.
function dress(root) {
  for (const one of root.querySelectorAll("[data-height]")) one.querySelector(".bar").style.height = `${one.dataset.height * 0.62}px`;
  for (const one of root.querySelectorAll("[data-probability]")) one.style.setProperty("--p", one.dataset.probability);
}
dress(document);
document.addEventListener("htmx:afterSwap", () => dress(document));
