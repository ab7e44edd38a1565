/* Curves, the process reward model, what was dropped, and the configuration. */

const view = { axis: "iteration", only: true, find: "" };

const CURVES = [
  ["Result", [
    { metric: HELD, title: "Held-out success", format: pct, range: () => [0, 1], interval: ["eval/success/low", "eval/success/high"], note: "with its interval, or the range over seeds" },
    { metric: "success", title: "Success in training", format: pct, range: () => [0, 1], note: "share of scorable episodes" },
    { metric: "outcome", title: "Outcome", unless: "success", note: "mean outcome reward in training" },
    { metric: "eval/outcome/value", title: "Held-out outcome", unless: HELD, note: "mean outcome reward", interval: ["eval/outcome/low", "eval/outcome/high"] },
  ]],
  ["Behaviour", [
    { metric: "turns", title: "Length", note: "turns per episode" },
    { metric: "truncated", title: "Cut off", format: pct, note: "share of episodes that a limit ended" },
    { metric: "invalid_actions", title: "Invalid actions", format: pct, note: "share of turns whose text was no action" },
    { metric: "entropy", title: "Entropy", note: "nats per token" },
    { metric: "action_tokens", title: "Sampled tokens", note: "per iteration" },
  ]],
  ["Credit and update", [
    { metric: "advantage_std", title: "Advantage", note: "standard deviation over action tokens" },
    { metric: "credit_step_share", title: "Share of the step term", format: pct, note: "of the advantage’s mean absolute size" },
    { metric: "kl_behaviour", title: "KL to the policy that played", note: "nats per token" },
    { metric: "clip_fraction", title: "Clipped", format: pct, note: "share of action tokens" },
    { metric: "policy_loss", title: "Policy loss" },
    { metric: "policy_grad_norm", title: "Gradient norm", note: "of the policy, before clipping" },
    { metric: "logprob_mismatch", title: "Sampler against trainer", note: "largest log-prob difference, nats" },
    { metric: "critic_explained", title: "Critic", note: "share of the returns’ variance explained" },
  ]],
  ["Cost", [
    { metric: "seconds/generation", title: "Playing: policy", note: "seconds per iteration" },
    { metric: "seconds/prm", title: "Judging", note: "seconds per iteration" },
    { metric: "seconds/policy", title: "Policy update", note: "seconds per iteration" },
    { metric: "tokens", title: "Tokens read", note: "per iteration" },
  ]],
];

/** Where an outcome is success itself, its curve says nothing more. */
const isSuccess = (metric, success) => store.summary.runs.every((run) => same(run.curves[metric], run.curves[success]));

function curveFigure(spec) {
  if (spec.unless && isSuccess(spec.metric, spec.unless)) return null;
  const series = metricSeries(spec.metric, view.axis, { interval: spec.interval });
  return series.length ? figure({ ...spec, axis: view.axis, series }) : null;
}

function curvesPage() {
  const any = store.summary.runs.some((run) => (run.curves.iteration || []).length);
  if (!any) return [h("h1", {}, "Learning curves"), empty("No learning curves", "There is no ", h("code", {}, "metrics.jsonl"), " with a finished iteration: this is an evaluation, a file of trajectories, or a run that has just begun.")];
  const pick = h("div", { class: "segments", role: "group", "aria-label": "Horizontal axis" }, Object.entries({ iteration: "by iteration", elapsed: "by wall time" }).map(([axis, name]) =>
    h("button", { type: "button", "aria-pressed": String(view.axis === axis), onclick: () => { view.axis = axis; showPage(); } }, name)));
  return [h("div", { class: "heading" }, h("h1", {}, "Learning curves"), pick), CURVES.map(([title, specs]) => {
    const figures = specs.map(curveFigure).filter(Boolean);
    return figures.length ? h("section", {}, h("h2", {}, title), h("div", { class: "figures" }, figures)) : null;
  })];
}

function alarmBox() {
  const ringing = store.summary.runs.filter((run) => run.alarm && run.alarm.ringing);
  const rang = store.summary.runs.filter((run) => run.alarm && !run.alarm.ringing && run.alarm.iterations.length);
  const who = (run) => (store.summary.runs.length > 1 ? `${run.label}: ` : "");
  return [
    ringing.map((run) => h("div", { class: "alarm", role: "alert" }, h("b", {}, `${who(run)}Step reward rises, success does not. `),
      `Over the last ${run.alarm.window} iterations the mean step reward went from ${num(run.alarm.reward_before)} to ${num(run.alarm.reward_after)}, success from ${pct(run.alarm.success_before)} to ${pct(run.alarm.success_after)}. The policy may be learning to please the process reward model.`)),
    rang.map((run) => h("div", { class: "alarm past" }, h("b", {}, `${who(run)}An alarm rang earlier. `),
      `Around ${run.alarm.iterations.length === 1 ? "iteration" : "iterations"} ${ranges(run.alarm.iterations)} the step reward rose while success did not; at the end it does not ring.`)),
  ];
}

/** 3, 4, 5, 9 as "3–5, 9". */
function ranges(numbers) {
  const runs = [];
  for (const n of numbers) (runs.length && last(runs)[1] === n - 1 ? (last(runs)[1] = n) : runs.push([n, n]));
  return runs.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
}

function where(iterations) {
  const places = ranges(iterations);
  return places.split(",").length > 6 ? `In ${plural(iterations.length, "iteration")}, ${iterations[0]} to ${last(iterations)}.` : `${iterations.length === 1 ? "Iteration" : "Iterations"} ${places}.`;
}

function prmPage() {
  const has = (metric) => store.summary.runs.some((run) => run.curves[metric]);
  const title = h("h1", {}, "Process reward model");
  if (!["pair_accuracy", "prm_loss", "prm_label_accuracy"].some(has)) {
    const methods = [...new Set(store.summary.runs.map((run) => run.config["credit.method"]).filter(Boolean))];
    return [title, empty("No process reward model", methods.length ? `The credit method (${methods.join(", ")}) uses none, or no iteration is finished yet.` : "Nothing was learned here: these are plain trajectories.")];
  }
  const many = families().filter((family) => family.line).length > 1;
  const together = (specs) => specs.flatMap(([metric, label, colour, dash], n) => (many ? (n ? [] : metricSeries(metric, "iteration")) : metricSeries(metric, "iteration", { label, colour, style: dash ? { dash, width: 1.4 } : {} })));
  const made = (spec) => (spec.series.length ? figure({ axis: "iteration", ...spec }) : null);
  const single = (metric, heading, note, more = {}) => made({ title: heading, note, series: metricSeries(metric, "iteration"), ...more });
  return [
    title,
    h("p", { class: "lead small" }, "Does it order new episodes rightly before it has learned from them, and does what it rewards lead to success?"),
    alarmBox(),
    h("div", { class: "figures" },
      made({ title: "New pairs ordered rightly", note: "before learning from them; 50 % is chance", format: pct, range: () => [0, 1], series: together([["pair_accuracy", "sum of rewards", "--c1"], ["pair_accuracy_per_turn", "mean per turn", "--c2"], ["pair_accuracy_length", "“shorter is better” alone", "--c-grey", [5, 4]], ["pair_accuracy_after", "after learning", "--c-soft", [2, 3]]]) }),
      single("prm_label_accuracy", "New labels told rightly", "before learning from them", { format: pct, range: () => [0, 1] }),
      single("pair_margin", "Margin", "mean score gap of new pairs, reward"),
      single("prm_calibration_error", "Calibration error", "of new pairs’ probabilities, before learning", { format: pct }),
      calibrationFigure(),
      single("prm_return_correlation", "Correlation with the outcome", "of episode scores, inside groups, before learning", { range: () => [-1, 1] }),
      single("prm_drift", "Drift", "behaviour less PRM log-prob, nats per token"),
      single("credit_step_reward_mean", "Mean step reward", "watch it against success"),
      single("success", "Success in training", "share of episodes", { format: pct, range: () => [0, 1] }),
      single("credit_alpha", "Weight of the step term", "after warm-up and skill gate"),
      single("prm_loss", "PRM loss"), single("prm_grad_norm", "PRM gradient norm"), single("prm_moved", "PRM moved", "relative change of its weights per step")),
    h("p", { class: "soft" }, store.summary.runs.some((run) => run.config["prm.centred"]) ? "Drift is not measured where rewards are centred (prm.centred). " : null, alarmRule()),
  ];
}

function alarmRule() {
  const known = store.summary.runs.find((run) => run.alarm);
  if (!known) return "The alarm (step reward rises, success does not) compares two windows of iterations; there are too few yet, or no step reward.";
  return `The alarm compares the last ${known.alarm.window} iterations with the ${known.alarm.window} before: it rings where the mean step reward rose by more than three standard errors and success by less than one.`;
}

function calibrationFigure() {
  const bins = store.summary.trajectories.calibration;
  if (!bins || bins.length < 2) return null;
  const xs = bins.map((bin) => bin.confidence);
  return figure({
    title: "Calibration", axis: "confidence", xlabel: "how sure it was", format: pct,
    note: `${plural(sum(bins.map((bin) => bin.pairs)), "pair")} of the trajectories shown, by the rewards that credit used`,
    range: () => [Math.min(0.5, ...bins.map((bin) => bin.right)), 1],
    series: [{ label: "ordered rightly", colour: "--c1", xs, ys: bins.map((bin) => bin.right) }, { label: "perfectly calibrated", colour: "--c-grey", dash: [5, 4], width: 1.3, xs, ys: xs }],
  });
}

/** Which episodes the counts are of. */
function counted(run) {
  if (run.evaluation?.length) return "All episodes";
  return run.curves.iteration ? "All training episodes" : "All stored episodes";
}

function droppedPage() {
  const { runs, trajectories: list } = store.summary;
  const head = (names) => h("thead", {}, h("tr", {}, names.map((name, n) => h("th", { scope: "col", class: n && n < 3 ? "n" : null }, name))));
  const tables = runs.filter((run) => run.dropped.length).map((run) => h("section", {}, runs.length > 1 ? h("h2", {}, run.label) : null,
    h("div", { class: "scroll" }, h("table", { class: "dropped stack" }, head(["what", "count", "share", "why"]),
      h("tbody", {}, run.dropped.map((row) => h("tr", { class: row.count ? null : "none" },
        h("th", { scope: "row" }, row.what), h("td", { class: "n", "data-name": "count" }, count(row.count)), h("td", { class: "n", "data-name": "share" }, row.of && row.count ? pct(row.count / row.of) : "–"),
        h("td", {}, row.why, row.count && row.iterations.length ? h("span", { class: "soft" }, ` ${where(row.iterations)}`) : null)))))),
    Object.keys(run.stops).length ? h("p", {}, counted(run), " by how they ended: ", Object.entries(run.stops).map(([name, n]) => `${count(n)} ${words(name)}`).join(", "), ".") : null));
  const errors = Object.entries(list.errors);
  return [
    h("h1", {}, "Dropped, and why"),
    h("p", { class: "lead small" }, "A failure of infrastructure is never a reward of zero: it is counted here and left out of every mean, baseline and pair."),
    tables.length ? tables : empty("No counts", "There is no ", h("code", {}, "metrics.jsonl"), " with a finished iteration, no ", h("code", {}, "result.json"), " of an evaluation, and no trajectory to count."),
    errors.length ? h("section", {}, h("h2", {}, "Errors of failed episodes"), h("div", { class: "scroll" }, h("table", {}, head(["message", "times"]), h("tbody", {}, errors.map(([message, n]) => h("tr", {}, h("td", { class: "mono" }, message), h("td", { class: "n" }, count(n)))))))) : null,
    absent(),
  ];
}

const shown = (value) => (value === null || value === undefined ? "–" : typeof value === "string" ? value || "“”" : typeof value === "object" ? JSON.stringify(value) : String(value));

function configPage() {
  const { runs, defaults } = store.summary;
  const known = runs.filter((run) => Object.keys(run.config).length);
  const title = h("h1", {}, "Configuration");
  if (!known.length) return [title, empty("No configuration", "A run leaves its settings in ", h("code", {}, "config.yaml"), ", an evaluation in ", h("code", {}, "settings.json"), "; there is none here.")];
  const body = h("tbody", {});
  const columns = known.length <= 6 ? known : known.slice(0, 6);
  const fill = () => {
    const keys = [...new Set(columns.flatMap((run) => Object.keys(run.config)))];
    const rows = keys.filter((key) => {
      const values = columns.map((run) => shown(run.config[key]));
      const plain = key in defaults && values.every((value) => value === shown(defaults[key]));
      return (!view.only || !plain) && (!view.find || `${key} ${values.join(" ")}`.toLowerCase().includes(view.find.toLowerCase()));
    });
    put(body, rows.map((key) => {
      const values = columns.map((run) => shown(run.config[key]));
      return h("tr", { class: new Set(values).size > 1 ? "differ" : null }, h("th", { scope: "row" }, key), values.map((value) => h("td", { class: "mono" }, value)), h("td", { class: "mono soft" }, key in defaults ? shown(defaults[key]) : "–"));
    }));
    if (!rows.length) put(body, h("tr", {}, h("td", { colspan: columns.length + 2 }, "No setting matches.")));
  };
  fill();
  return [
    title,
    h("form", { class: "inline", onsubmit: (e) => e.preventDefault() },
      h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting", value: view.find, oninput: (e) => { view.find = e.target.value; fill(); } }),
      h("label", { class: "check" }, h("input", { type: "checkbox", checked: view.only, onchange: (e) => { view.only = e.target.checked; fill(); } }), "only what differs from the default")),
    h("div", { class: "scroll" }, h("table", { class: "config" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"), columns.map((run) => h("th", { scope: "col" }, known.length > 1 ? run.label : "this run")), h("th", { scope: "col" }, "default"))), body)),
    known.length > columns.length ? h("p", { class: "soft" }, `The first ${columns.length} of ${known.length} runs.`) : null,
    known.filter((run) => run.plan).slice(0, 1).map((run) => h("section", {}, h("h2", {}, "Derived plan"), known.length > 1 ? h("p", { class: "soft" }, `of ${run.label}`) : null, h("pre", { class: "plan" }, run.plan))),
  ];
}
