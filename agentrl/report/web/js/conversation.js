/* One trajectory, as the conversation that it was, in the colours of credit. */

function openTrajectory(i) {
  browse.open = store.key(i);
  browse.other = null;
  route.write();
  drawRows(true);
  showDetail();
}

function closeTrajectory() {
  browse.open = browse.other = null;
  route.write();
  drawRows(true);
  showDetail();
}

/** Shows what is open: nothing, a trajectory, or two of them. */
async function showDetail() {
  const { detail, page, open, other } = browse;
  if (!detail || !store.count) return;
  const i = store.place.get(open), j = store.place.get(other);
  page.classList.toggle("opened", i !== undefined);
  forgetCharts(detail);
  if (i === undefined) {
    put(detail, h("div", { class: "hello" }, empty("Choose a trajectory", "Each line of the list is an episode; its cells are the turns, coloured by credit: ", h("i", { class: "key pos" }), " raised, ", h("i", { class: "key neg" }), " lowered. ", h("kbd", {}, "j"), " and ", h("kbd", {}, "k"), " walk through them.")));
    return;
  }
  const both = await Promise.all([store.trajectory(i), j === undefined ? null : store.trajectory(j)]);
  if (browse.open !== open || browse.other !== other) return;
  detail.setAttribute("tabindex", "-1");
  put(detail, j === undefined ? conversation(both[0]) : comparison(both[0], both[1]));
  detail.scrollTop = 0;
  if (getComputedStyle(detail).position === "static") scrollTo(0, 0);
}

function conversation(t) {
  const i = t.index, get = (name) => store.get(name, i);
  return [
    toolbar(),
    h("header", { class: "episode" },
      h("h2", {}, get("id")),
      h("p", {}, badge(i), ` outcome ${num(get("outcome"))}, ${plural(get("turns"), "turn")}, ${get("tokens") ? plural(get("tokens"), "sampled token") + ", " : ""}${stopWords(get("stop"))}`),
      h("p", { class: "soft" }, [get("env"), `iteration ${get("iteration")}`, `seed ${get("seed")}`, get("policy"), store.fileName(i).startsWith("iteration-") ? "" : store.fileName(i), get("invalid") ? plural(get("invalid"), "invalid action") : ""].filter(Boolean).join(" · ")),
      t.task ? h("details", {}, h("summary", {}, "Task"), h("pre", {}, t.task)) : null,
      t.error ? h("p", { class: "error" }, "Error: ", t.error) : null),
    creditChart(t), groupPanel(t),
    t.system ? h("details", { class: "system" }, h("summary", {}, "Instructions"), h("pre", {}, t.system)) : null,
    h("ol", { class: "turns" }, t.turns.map((turn, n) => h("li", { id: `turn-${n}` }, turnView(turn, n, i)))),
    ending(t),
  ];
}

function ending(t) {
  return h("div", { class: "ending" }, t.end ? h("div", { class: "obs" }, contentView(t.end)) : null,
    h("p", {}, badge(t.index), ` after ${plural(t.turns.length, "turn")}, ${stopWords(store.get("stop", t.index))}`));
}

/** Observation, then the action with its credit. */
function turnView(turn, n, i, seen = true) {
  return [seen ? h("div", { class: "obs" }, contentView(turn.observation)) : null, actionView(turn, n, i)];
}

function actionView(turn, n, i) {
  const value = turn[browse.mode];
  const known = value !== undefined && value !== null;
  const s = shade(value, browse.mode);
  return h("div", { class: "act" + (turn.invalid ? " invalid" : ""), vars: { "--s": colour(s), "--t": `${Math.round(Math.abs(s) * 36)}%` } },
    h("div", { class: "meta" }, h("span", {}, `turn ${n + 1}`), turn.invalid ? h("span", { class: "flag" }, "no valid action") : null,
      h("b", { title: known ? parts(turn) : null }, known ? signed(value) : "no credit")),
    browse.tokens && turn.ids.length ? tokensView(turn, i) : h("div", { class: "said" }, turn.action || "(nothing)"));
}

/** All that is known of a turn's credit, in words. */
const parts = (turn) => Object.keys(MODES).filter((mode) => turn[mode] !== undefined && turn[mode] !== null).map((mode) => `${MODES[mode].name} ${signed(turn[mode])}`).join("\n");

function tokensView(turn, i) {
  return h("div", { class: "tokens" }, turn.ids.map((id, n) => {
    const lp = turn.logprobs[n];
    return h("span", { class: "token", title: `${lp === undefined ? "no log-prob" : `${num(lp)} nats, probability ${pct(Math.exp(lp))}`}, id ${id}`, vars: { "--p": lp === undefined ? 1 : Math.exp(lp) } },
      store.token(store.get("run", i), id), h("small", {}, lp === undefined ? "" : num(lp, 2)));
  }));
}

function contentView(parts) {
  if (!parts) return h("span", { class: "soft" }, "(nothing)");
  return parts.map((part) => {
    if (part.image === undefined) return h("pre", {}, part.text);
    const source = store.picture(part.image);
    if (source) return h("img", { src: source, alt: part.alt || "picture without words" });
    return h("p", { class: "soft" }, part.image === -2 ? "picture: its file cannot be read" : "picture left out of this file (--image-mb)", part.alt ? `: ${part.alt}` : "");
  });
}

/** Which colour, tokens or texts, and the way back. */
function toolbar() {
  const modes = Object.keys(MODES).filter(modeKnown);
  const known = modes.includes(browse.mode);
  return h("div", { class: "toolbar" },
    h("button", { type: "button", class: "quiet back", onclick: () => (browse.other ? compareWith(null) : closeTrajectory()) }, browse.other ? "← one" : "← list"),
    h("label", {}, h("span", { class: "unseen" }, "Colour by"), h("select", { id: "mode", title: "Colour by (c)", onchange: (e) => setMode(e.target.value) },
      Object.entries(MODES).map(([mode, { name }]) => h("option", { value: mode, selected: mode === browse.mode, disabled: !modes.includes(mode) }, modes.includes(mode) ? name : `${name} (not stored)`)))),
    known ? h("span", { class: "scale", title: MODES[browse.mode].about }, h("b", {}, signed(-store.summary.trajectories.scales[browse.mode])), h("i", {}), h("b", {}, signed(store.summary.trajectories.scales[browse.mode]))) : null,
    h("button", { type: "button", class: "quiet", id: "tokens", title: "Token log-probs (t)", "aria-pressed": String(browse.tokens), onclick: toggleTokens }, "Tokens"));
}

function setMode(mode) {
  browse.mode = mode;
  drawRows(true);
  keepPlace(showDetail);
  say(`Coloured by ${MODES[mode].name}`);
}

function toggleTokens() {
  browse.tokens = !browse.tokens;
  keepPlace(showDetail);
}

/** Draws anew without moving what the reader looks at. */
async function keepPlace(change) {
  const { detail } = browse;
  const [inner, outer] = [detail.scrollTop, scrollY];
  await change();
  detail.scrollTop = inner;
  scrollTo(0, outer);
}

function creditChart(t) {
  const xs = t.turns.map((_, n) => n + 1);
  const line = (mode, colour, more) => ({ label: MODES[mode].name, colour, xs, ys: t.turns.map((turn) => turn[mode] ?? 0), ...more });
  if (t.turns.length < 2) return null;
  if (t.turns[0].episode === undefined) {
    return h("p", { class: "note" }, "No credit is stored for this episode; the environment’s reward is all there is. A training run stores it for the episodes that it learned from, once it has; collections, evaluations and failed episodes have none.");
  }
  const series = [line("step", "--c1", { width: 1.6 }), line("episode", "--c2", { width: 1.6, dash: [5, 4] })];
  if (browse.mode === "reward" && t.turns[0].reward !== undefined) series.splice(0, 2, line("reward", "--c3", { width: 1.6 }));
  if (browse.mode === "environment") series.splice(0, 2, line("environment", "--c4", { width: 1.6 }));
  return figure({ title: "Credit by turn", note: series.length > 1 ? "the advantage is the sum of both terms" : MODES[browse.mode].about, xlabel: "turn", axis: "turn", height: 130, series });
}

/** The other episodes of the same task. */
function groupPanel(t) {
  const members = store.members(t.index);
  if (members.length < 2) return null;
  return h("details", { class: "group", open: innerWidth > 860 }, h("summary", {}, `Group of ${members.length}: same task, ${members.filter((i) => fate(i) === "success").length} succeeded`),
    h("ul", {}, members.map((i) => h("li", { class: i === t.index ? "self" : null },
      badge(i), strip(i, browse.mode), h("span", { class: "soft" }, plural(store.get("turns", i), "turn")),
      i === t.index ? h("span", { class: "soft" }, "this one") : h("span", { class: "acts" },
        h("button", { type: "button", class: "link", onclick: () => openTrajectory(i), "aria-label": `Open ${store.get("id", i)}` }, "open"),
        h("button", { type: "button", class: "link compare", onclick: () => compareWith(i), "aria-label": `Compare with ${store.get("id", i)}` }, "compare"))))));
}
