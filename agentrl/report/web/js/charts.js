/* Charts: uPlot draws them; the legend, which reads values at the cursor, is ours. */

const charts = [];

const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
const seriesColour = (n) => COLOURS[n % COLOURS.length];

/** Linear interpolation of known points at x; null outside. */
function at(points, x) {
  const { xs, ys } = points;
  if (!xs.length || x < xs[0] || x > last(xs)) return null;
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  if (xs[high] === xs[low]) return ys[low];
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low]);
}

/** Points of a metric of a run that are known on both axes, x ascending. */
function points(run, metric, axis) {
  const x = run.curves[axis] || [], y = run.curves[metric] || [], xs = [], ys = [];
  y.forEach((value, n) => {
    const where = axis === "elapsed" && x[n] === null && run.curves.iteration[n] === 0 ? 0 : x[n];
    if (value !== null && where !== null && where !== undefined) xs.push(where), ys.push(value);
  });
  return { xs, ys };
}

/** With more families than this in one picture their ranges would hide each other: means alone. */
const CROWD = 4;

/** Runs that differ in their seed alone, together. `line`: charts have one of them; of an evaluation they have none. */
function families() {
  const found = new Map();
  store.summary.runs.forEach((run) => {
    if (!found.has(run.family)) found.set(run.family, []);
    found.get(run.family).push(run);
  });
  let lines = 0;
  return [...found].map(([name, runs]) => {
    const line = runs.some((run) => run.curves.iteration?.length), n = line ? lines++ : 0;
    return { name, runs, line, colour: seriesColour(n), dash: n < COLOURS.length ? undefined : [7, 4] };
  });
}

/** Mean and range of several runs' points, to where the shortest ends. */
function spread(many) {
  const known = many.filter((one) => one.xs.length);
  if (!known.length) return null;
  const end = Math.min(...known.map((one) => last(one.xs))), start = Math.max(...known.map((one) => one.xs[0]));
  const xs = [...new Set(known.flatMap((one) => one.xs))].filter((x) => x >= start && x <= end).sort((a, b) => a - b);
  const columns = xs.map((x) => known.map((one) => at(one, x)));
  return {
    xs,
    ys: columns.map(mean),
    low: columns.map((c) => Math.min(...c)),
    high: columns.map((c) => Math.max(...c)),
    runs: known.length,
  };
}

/** Series of a metric over all families: mean and range over seeds, or a run's own interval where it has one. */
function metricSeries(metric, axis, options = {}) {
  const all = families();
  const known = all.map((family) => [family, spread(family.runs.map((run) => points(run, metric, axis)))]).filter(([, merged]) => merged);
  const crowded = known.length > CROWD;
  return known.map(([family, merged]) => {
    const one = { label: options.label || family.name, colour: options.colour || family.colour, dash: family.dash, ...options.style, ...merged };
    if (crowded) one.width = 1.5;
    if (crowded) one.low = one.high = null;
    else if (merged.runs > 1) one.label = `${options.label || family.name}, ${merged.runs} seeds`;
    else if (options.interval) {
      [one.low, one.high] = options.interval.map((bound) => points(family.runs[0], bound, axis).ys);
      // A damaged file may lack a bound somewhere: no band then.
      if (one.low.length !== one.ys.length || one.high.length !== one.ys.length) one.low = one.high = null;
    } else one.low = one.high = null;
    if (all.length === 1 && !options.label && merged.runs === 1) one.label = "";
    if (all.length > 1 && options.label && merged.runs === 1) one.label = `${options.label}, ${family.name}`;
    return one;
  });
}

/**
 * A figure with a chart that is drawn when it comes into view.
 * @param {{title, note, series, axis, format, height, range, bars}} spec
 */
function figure(spec) {
  const legend = h("ul", { class: "legend" });
  const plot = h("div", { class: "plot", vars: { height: `${spec.height || 190}px` } });
  const element = h("figure", { class: spec.wide ? "wide" : null }, h("figcaption", {}, h("b", {}, spec.title), spec.note ? h("span", {}, spec.note) : h("span", {})), plot, legend);
  const entry = { element, plot, legend, spec, drawn: null };
  charts.push(entry);
  watcher.observe(element);
  describe(entry, null);
  return element;
}

const watcher = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    const entry = charts.find((one) => one.element === target);
    if (isIntersecting && entry && !entry.drawn) draw(entry);
  }
}, { rootMargin: "200px" });

const format = (spec, value) => (spec.format || num)(value);

/** Legend with the values at x, or the last ones. */
function describe(entry, x) {
  const { spec } = entry;
  const focus = (n) => entry.drawn && entry.drawn.setSeries(n === null ? null : entry.lines[n], { focus: n !== null });
  const rows = spec.series.map((one, n) => {
    const value = x === null ? last(one.ys) : at(one, x);
    const range = one.low && x !== null ? ` (${format(spec, at({ xs: one.xs, ys: one.low }, x))}–${format(spec, at({ xs: one.xs, ys: one.high }, x))})` : "";
    return h("li", { onmouseenter: () => focus(n), onmouseleave: () => focus(null) }, h("i", { class: one.dash ? "dash" : null, vars: { "--c": `var(${one.colour})` } }), h("span", {}, one.label || (x === null ? "last" : `${AXES[spec.axis]} ${num(spec.axis === "elapsed" ? x / 60 : x)}`)), h("b", {}, format(spec, value) + range));
  });
  put(entry.legend, rows);
  if (x === null) {
    const words = spec.series.map((one) => `${one.label ? one.label + ": " : ""}${format(spec, one.ys[0])} at first, ${format(spec, last(one.ys))} at last`);
    entry.plot.setAttribute("role", "img");
    entry.plot.setAttribute("aria-label", `${spec.title}. ${words.join("; ")}`);
  }
}

const AXES = { iteration: "iteration", elapsed: "wall time, min", turn: "turn" };

function draw(entry) {
  const { spec, plot } = entry;
  const tables = [], series = [{}], bands = [];
  entry.lines = [];
  for (const one of spec.series) {
    const scaled = spec.axis === "elapsed" ? one.xs.map((x) => x / 60) : one.xs;
    const line = css(one.colour);
    const columns = [scaled, one.ys];
    const start = series.length;
    entry.lines.push(start);
    series.push({
      stroke: line, width: one.width || 2, dash: one.dash, spanGaps: true,
      points: { show: one.xs.length < 30 && !one.dash && !spec.bars, size: 5, fill: line },
      ...(spec.bars ? { paths: uPlot.paths.bars({ size: [0.7, 40] }), fill: line + "aa", width: 0 } : {}),
    });
    if (one.low) {
      columns.push(one.high, one.low);
      series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } }, { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
      bands.push({ series: [start + 1, start + 2], fill: line + "2b" });
    }
    tables.push(columns);
  }
  const grid = { stroke: css("--grid"), width: 1 }, ticks = { show: false };
  const axis = { stroke: css("--muted"), font: "12px system-ui, sans-serif", grid, ticks };
  const label = spec.xlabel || AXES[spec.axis];
  entry.drawn = new uPlot({
    width: plot.clientWidth, height: plot.clientHeight,
    padding: [8, 10, 0, 0],
    legend: { show: false },
    focus: { alpha: 0.12 },
    cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false }, focus: { prox: spec.series.length > CROWD ? 16 : -1 } },
    scales: { x: { time: false }, y: { range: spec.range || ((u, low, high) => yRange(low, high)) } },
    axes: [
      { ...axis, grid: { show: false }, ...(spec.axis === "turn" || spec.axis === "iteration" ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000] } : {}), size: 24, label, labelSize: 20, labelGap: 0, labelFont: axis.font, gap: 4 },
      { ...axis, size: 50, gap: 6, values: (u, values) => values.map((value) => format(spec, value)) },
    ],
    series, bands,
    hooks: { setCursor: [(u) => {
      const { idx } = u.cursor;
      const x = idx === null || idx === undefined ? null : u.data[0][idx];
      describe(entry, x === null ? null : spec.axis === "elapsed" ? x * 60 : x);
    }] },
  }, tables.length ? uPlot.join(tables) : [[]], plot);
}

/** A little air; never a range of nothing. */
function yRange(low, high) {
  if (low === null || low === undefined) return [0, 1];
  const air = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low - air < 0 ? 0 : low - air, high + air];
}

/** Draws all charts anew: the colours, or the width, changed. */
function redraw() {
  for (const entry of charts) {
    if (!entry.drawn) continue;
    entry.drawn.destroy();
    entry.drawn = null;
    draw(entry);
  }
}

/** Forgets the charts below `element`, which goes away. */
function forgetCharts(element) {
  for (let n = charts.length - 1; n >= 0; n--) {
    if (!element.contains(charts[n].element)) continue;
    watcher.unobserve(charts[n].element);
    if (charts[n].drawn) charts[n].drawn.destroy();
    charts.splice(n, 1);
  }
}

let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => {
    for (const { drawn, plot } of charts) if (drawn && plot.clientWidth) drawn.setSize({ width: plot.clientWidth, height: plot.clientHeight });
  });
});
