/* What was run and what came of it. */

const HELD = "eval/success/value";

function overviewPage() {
  const { runs } = store.summary;
  return [
    h("h1", {}, store.summary.title),
    h("p", { class: "lead" }, runs.length === 1 ? headline(runs[0]) : headlines()),
    alarmBox(),
    resultChart(),
    evaluationTable(),
    attemptsTable(),
    runs.length > 1 ? familyTable() : null,
    h("section", { class: "columns" }, facts(runs[0], runs.length), timeTable(runs[0], runs.length), versions(runs)),
    absent(),
  ];
}

/** The result of one run in a sentence. */
function headline(run) {
  const c = run.curves, parts = [];
  const known = (c[HELD] || []).flatMap((value, n) => (value === null ? [] : [n]));
  if (known.length) {
    const first = known[0], end = last(known);
    const [low, high] = ["low", "high"].map((bound) => c[`eval/success/${bound}`]?.[end]);
    const [from, to] = [first, end].map((n) => pct(c[HELD][n]));
    if (from !== to) parts.push("Held-out success ", c[HELD][end] > c[HELD][first] ? "rose" : "fell", " from ", h("b", {}, from), " to ", h("b", {}, to));
    else parts.push("Held-out success ", known.length > 1 ? "stayed at " : "is ", h("b", {}, to));
    parts.push(` (95\u202f% interval ${pct(low)} to ${pct(high)}, ${plural(c["eval/success/episodes"]?.[end] ?? c["eval/episodes"]?.[end], "episode")})`);
  } else {
    const trained = (c.success || []).filter((value) => value !== null);
    if (trained.length) parts.push("Success of training episodes went from ", h("b", {}, pct(trained[0])), " to ", h("b", {}, pct(last(trained))));
  }
  const iterations = last(c.iteration || []), seconds = lastKnown(c.elapsed)?.value;
  if (parts.length) return [...parts, iterations ? ` in ${plural(iterations, "iteration")}${seconds ? ` and ${duration(seconds)}` : ""}.` : "."];
  return run.evaluation?.length ? evaluationSentence(run.evaluation) : outcomeSentence(run);
}

/** The result of an evaluation, with its interval where it is one environment. */
function evaluationSentence(results) {
  const [{ success, success_interval: kind, per_task: each }] = results;
  if (results.length > 1) return ["Mean success of ", h("b", {}, pct(mean(results.map((one) => one.success.value)))), ` over ${results.length} environments, each weighing the same.`];
  return [h("b", {}, pct(success.value)), ` of ${plural(success.episodes, "episode")} succeeded (95\u202f% interval ${pct(success.low)} to ${pct(success.high)}, ${kind === "wilson" ? "Wilson’s" : `bootstrap over tasks of ${plural(each, "episode")}`}).`];
}

/** Where there are no metrics, the trajectories speak: all that are stored, shown or not. */
function outcomeSentence(run) {
  const { scored, successes, failed } = run.episodes;
  if (!scored && !failed) return "There is nothing in this run yet: no metrics, no trajectories.";
  const rate = pct(scored ? successes / scored : null), more = failed ? `; ${count(failed)} more ended by a failure of infrastructure` : "";
  if (isCut(run)) return [h("b", {}, "Not complete"), `: ${share([run])}. ${rate} of them succeeded${more}.`];
  return [h("b", {}, rate), ` of ${plural(scored, "episode")} succeeded${more}.`];
}

/** Are episodes of an evaluation still to come? Those that are there are not like them: short ones end first. */
const isCut = ({ evaluation, episodes: { scored, failed, asked } }) => evaluation?.length === 0 && scored + failed < asked;

/** How much there is of evaluations that are not complete. */
function share(cut) {
  const [scored, asked] = ["scored", "asked"].map((name) => sum(cut.map((run) => run.episodes[name])));
  return `${count(scored)} of ${plural(asked, "episode")}${scored ? ", those that ended first" : ""}`;
}

function headlines() {
  const { runs } = store.summary;
  const evaluations = runs.filter((run) => run.evaluation), cut = evaluations.filter(isCut);
  const settings = families().filter((family) => !family.runs[0].evaluation), seeds = Math.max(...settings.map((family) => family.runs.length));
  const parts = [
    settings.length && `${plural(runs.length - evaluations.length, "run")} of ${plural(settings.length, "setting")}${seeds > 1 ? `, up to ${seeds} seeds each` : ""}`,
    evaluations.length && plural(evaluations.length, "evaluation"),
    cut.length && `${cut.length === 1 ? `${cut[0].label} is` : `${count(cut.length)} are`} not complete: ${share(cut)}`,
  ];
  return `${parts.filter(Boolean).join("; ")}.`;
}

function resultChart() {
  const one = families().filter((family) => family.line).length === 1;
  const held = metricSeries(HELD, "iteration", { interval: ["eval/success/low", "eval/success/high"], label: one ? "held out" : undefined });
  const trained = one ? metricSeries("success", "iteration", { label: "training episodes", colour: "--c-soft", style: { width: 1.3 } }) : [];
  const series = [...trained, ...held];
  if (!series.length) {
    const other = metricSeries("success", "iteration");
    if (!other.length) return null;
    series.push(...other);
  }
  return figure({
    title: "Success", wide: true, height: 260, axis: "iteration", format: pct, range: () => [0, 1], series,
    note: [held.length ? "share of held-out episodes" : "share of training episodes", ...bandWords(series)].join("; "),
  });
}

/** What lines and bands of a chart are. */
function bandWords(series) {
  const seeds = series.some((one) => one.runs > 1), own = series.some((one) => one.low && one.runs === 1);
  if (series.length > CROWD) return [seeds && "means over seeds", "hover a name to find its line"].filter(Boolean);
  return [seeds && "line: mean, band: range over seeds", own && `band${seeds ? " of one run" : ""}: 95\u202f% interval`].filter(Boolean);
}

/** A mean with its interval, where the tasks differ and there is one. */
const span = ({ value, low, high }, as = pct) => (low === null ? as(value) : `${as(value)} (${as(low)} to ${as(high)})`);

/** What evaluations found, a line for each environment. */
function evaluationTable() {
  const { runs } = store.summary;
  const found = runs.flatMap((run) => (run.evaluation || []).map((one) => [run, one]));
  if (!found.length) return null;
  const several = runs.length > 1;
  const head = [several && "evaluation", "environment", "policy", "success", "95\u202f% interval", "outcome", "episodes", "failed", "turns", "tokens", "invalid", "time"].filter(Boolean);
  const words = several ? 3 : 2;
  return h("section", {}, h("div", { class: "scroll families" }, h("table", { class: "evaluation stack" },
    h("caption", {}, "Success on held-out tasks; intervals are Wilson’s, with several episodes a task a bootstrap over tasks if these differ. Failures of infrastructure are in no figure."),
    h("thead", {}, h("tr", {}, head.map((name, n) => h("th", { scope: "col", class: n >= words ? "n" : null }, name)))),
    h("tbody", {}, found.map(([run, one]) => h("tr", {},
      h("th", { scope: "row" }, several ? run.label : one.env), several ? h("td", { "data-name": "environment" }, one.env) : null, h("td", { "data-name": "policy" }, one.policy),
      [pct(one.success.value), `${pct(one.success.low)} to ${pct(one.success.high)}`, span(one.outcome, num), count(one.episodes), count(one.infrastructure_failures), num(one.turns), num(one.action_tokens), pct(one.invalid_action_rate), duration(one.seconds)]
        .map((value, n) => h("td", { class: "n", "data-name": head[words + n] }, value))))))));
}

/** pass@k and pass^k of evaluations with several episodes of each task. */
function attemptsTable() {
  const { runs } = store.summary;
  const found = runs.flatMap((run) => (run.evaluation || []).filter((one) => Object.keys(one.pass_at_k).length).map((one) => [run, one]));
  if (!found.length) return null;
  const head = ["evaluation", "k", "pass@k", "pass^k"];
  const name = (run, one) => [runs.length > 1 ? run.label : "", runs.length > 1 && run.evaluation.length === 1 ? "" : one.env].filter(Boolean).join(", ");
  return h("section", {}, h("div", { class: "scroll families" }, h("table", { class: "attempts stack" },
    h("caption", {}, "Several episodes of each task: pass@k is the chance that one of k succeeds, pass^k that all do, with 95\u202f% bootstrap intervals over tasks"),
    h("thead", {}, h("tr", {}, head.map((title, n) => h("th", { scope: "col", class: n ? "n" : null }, title)))),
    h("tbody", {}, found.map(([run, one]) => Object.entries(one.pass_at_k).map(([k, at], n) => h("tr", {},
      h("th", { scope: "row" }, n ? "" : name(run, one)), [k, span(at), one.pass_hat_k[k] ? span(one.pass_hat_k[k]) : "–"].map((value, m) => h("td", { class: "n", "data-name": head[m + 1] }, value)))))))));
}

/** Final success of a run: held out, else in training, else of its evaluation or its episodes. */
function finalSuccess(run) {
  const trained = lastKnown(run.curves[HELD])?.value ?? lastKnown(run.curves.success)?.value;
  if (trained !== undefined) return trained;
  if (run.evaluation?.length) return mean(run.evaluation.map((one) => one.success.value));
  return run.episodes.scored ? run.episodes.successes / run.episodes.scored : undefined;
}

function familyTable() {
  const head = ["setting", "credit", "runs", "success", "range", "iterations", "wall time"];
  // Complete evaluations have a table of their own.
  const rows = families().filter((family) => family.runs.some((run) => !run.evaluation?.length)).map((family) => {
    const finals = family.runs.map(finalSuccess).filter((v) => v !== undefined);
    const range = finals.length > 1 ? `${pct(Math.min(...finals))} to ${pct(Math.max(...finals))}` : "–";
    const time = mean(family.runs.map((run) => lastKnown(run.curves.elapsed)?.value ?? 0));
    return h("tr", {},
      h("th", { scope: "row" }, family.line ? h("i", { class: "dot", vars: { "--c": `var(${family.colour})` } }) : null, family.name,
        family.runs.filter(isCut).map((run) => h("span", { class: "soft" }, ` not complete: ${share([run])}`))),
      [family.runs[0].config["credit.method"] ?? "–", family.runs.length, finals.length ? pct(mean(finals)) : "–", range, last(family.runs[0].curves.iteration || []) ?? "–", time ? duration(time) : "–"]
        .map((value, n) => h("td", { class: n ? "n" : null, "data-name": head[n + 1] }, value)));
  });
  if (!rows.length) return null;
  return h("div", { class: "scroll families" }, h("table", { class: "stack" },
    h("caption", {}, "Final success (held out where it was evaluated, of all stored episodes where nothing was trained)", families().some((family) => family.runs.length > 1) ? ", mean over seeds" : null),
    h("thead", {}, h("tr", {}, head.map((t, n) => h("th", { scope: "col", class: n > 1 ? "n" : null }, t)))),
    h("tbody", {}, rows)));
}

/** A template that is nothing where one of its values is not known. */
const whole = (words, ...values) => (values.some((value) => value === undefined || value === null) ? undefined : String.raw({ raw: words }, ...values));

/** A list of names and values, those that are known. */
function facts(run, runs) {
  const g = (key) => run.config[key];
  const method = g("credit.method");
  const distinct = (name) => [...new Set((store.columns[name] || []).filter((_, i) => store.summary.runs[store.get("run", i)] === run))].filter(Boolean).join(", ");
  const env = g("env.id") ?? distinct("env"), policies = g("policy.name") ?? distinct("policy");
  const rows = [
    ["environment", env],
    ["credit method", method],
    ["rollout", whole`${g("rollout.groups")} groups of ${g("rollout.group_size")} episodes, history ${g("rollout.history")}`],
    ["model", g("model.path") && (whole`${g("model.path")} (${g("model.dtype")}, ${g("model.device")})` ?? g("model.path"))],
    ["policy", policies],
    ["episodes asked for", run.evaluation && g("episodes") && `${count(g("episodes"))} in each environment, ${g("per_task")} of each task`],
    ["sampling", run.evaluation && g("sampling.max_new_tokens") && `temperature ${g("sampling.temperature")}, top-p ${g("sampling.top_p")}, top-k ${g("sampling.top_k")}, at most ${plural(g("sampling.max_new_tokens"), "token")} a turn`],
    ["history", run.evaluation && g("rollout.history")],
    ["outcome", run.evaluation && g("outcome.rule") && `${g("outcome.rule")}${g("outcome.success_above") === null ? "" : ` above ${g("outcome.success_above")}`}; episodes cut off: ${g("outcome.truncated")}`],
    ["iterations", run.curves.iteration && (whole`${last(run.curves.iteration)} of ${g("iterations")}` ?? last(run.curves.iteration))],
    ["training episodes", run.curves.episodes && count(sum(run.curves.episodes))],
    ["tokens sampled", run.curves.action_tokens && count(sum(run.curves.action_tokens))],
    ["seed", runs > 1 ? [...new Set(store.summary.runs.map((r) => r.seed))].filter((s) => s !== null).join(", ") : run.seed],
    ["trajectories", `${count(store.count)} shown of ${count(store.summary.trajectories.found)} stored`],
    ["folder", runs > 1 ? null : run.path],
  ];
  return h("div", {}, h("h2", {}, "What was run"), runs > 1 ? h("p", { class: "soft" }, `of ${run.label}`) : null, pairs(rows));
}

const pairs = (rows) => h("dl", {}, rows.filter(([, value]) => value !== undefined && value !== null && value !== "" && value !== false)
  .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

const PARTS = { generation: "policy plays", environment: "environment", prm: "reward model", policy: "policy update", other: "all else" };

function timeTable(run, runs) {
  const spent = Object.keys(PARTS).map((part) => [part, sum(run.curves[`seconds/${part}`])]);
  const total = sum(spent.map(([, value]) => value));
  if (!total) return null;
  const bars = spent.map(([part, value]) => h("div", { class: "bar" },
    h("span", {}, PARTS[part]), h("i", { vars: { "--w": value / total } }), h("b", {}, duration(value)), h("span", { class: "n" }, pct(Math.round((1000 * value) / total) / 1000))));
  return h("div", {}, h("h2", {}, "Where the time went"), runs > 1 ? h("p", { class: "soft" }, `of ${run.label}`) : null, bars,
    h("p", { class: "soft" }, `${duration(total)} in iterations, ${duration(lastKnown(run.curves.elapsed)?.value)} in all with evaluation and checkpoints.`));
}

function versions(runs) {
  const known = Object.entries(runs[0].versions);
  return h("div", {}, h("h2", {}, "Made with"),
    known.length ? pairs(known) : h("p", { class: "soft" }, "Versions were not recorded with this run."),
    h("p", { class: "soft" }, `Report by agentrl ${store.summary.version}, ${new Date(1000 * store.summary.made).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })}.`));
}

/** Everything that could not be read or is left out, so that nothing is absent in silence. */
function absent() {
  const { runs, trajectories: list } = store.summary;
  const notes = [...list.notes.map((note) => [null, note]), ...runs.flatMap((run) => run.notes.map((note) => [runs.length > 1 ? run.label : null, note]))];
  if (list.found > list.count) notes.unshift([null, `${count(list.count)} of ${count(list.found)} trajectories are in this file: whole groups, the first ones of every iteration (--trajectories N takes more).`]);
  if (list.images_left_out) notes.push([null, `${plural(list.images_left_out, "picture")} left out (--image-mb sets the bound).`]);
  if (new Set(store.columns.env || []).size > 1) notes.push([null, `The trajectories come from several environments (${[...new Set(store.columns.env)].join(", ")}); rewards and lengths of one say little about another.`]);
  if (!notes.length) return null;
  return h("section", { class: "absent" }, h("h2", {}, "Left out and absent"), h("ul", {}, notes.map(([who, note]) => h("li", {}, who ? h("b", {}, who, ": ") : null, note))));
}
