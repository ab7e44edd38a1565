/* The trajectories: filters, and a list that draws only the rows in view. */

const ROW = 58;

const OUTCOMES = { "": "any outcome", success: "success", failure: "failure", unscored: "not scored" };
const SORTS = { iteration: "iteration", outcome: "outcome", turns: "turns", tokens: "tokens", reward: "total reward", invalid: "invalid actions" };

const browse = {
  filters: { outcome: "", stop: "", run: "", env: "", group: "", text: "", iteration: ["", ""], turns: ["", ""] },
  sort: "iteration", down: true,
  mode: "total",
  rows: [], hits: null,
  open: null, // key of the open trajectory
  other: null, // key of the one beside it
  tokens: false,
};

const fate = (i) => (!store.get("scorable", i) ? "unscored" : store.get("success", i) ? "success" : "failure");
/** Stop reasons as people say them. */
const STOPS = { terminated: "ended by the environment", turn_limit: "cut off by the turn limit", token_limit: "cut off by the token limit" };
const words = (text) => text.replaceAll("_", " ");
const stopWords = (stop) => STOPS[stop] || words(stop);

const FATES = { success: ["●", "success"], failure: ["○", "failure"], unscored: ["△", "not scored"] };

const badge = (i) => h("span", { class: `fate ${fate(i)}` }, h("span", { "aria-hidden": "true" }, FATES[fate(i)][0], " "), FATES[fate(i)][1]);

/** Positions that pass the filters, sorted. */
function filtered() {
  const f = browse.filters, get = store.get, found = [];
  const bounds = (name) => f[name].map((text, n) => (text === "" ? (n ? Infinity : -Infinity) : Number(text)));
  const [iterations, turns] = [bounds("iteration"), bounds("turns")];
  const inside = (value, [low, high]) => value >= low && value <= high;
  for (let i = 0; i < store.count; i++) {
    if (f.outcome && fate(i) !== f.outcome) continue;
    if (f.stop && get("stop", i) !== f.stop) continue;
    if (f.run !== "" && get("run", i) !== Number(f.run)) continue;
    if (f.env && get("env", i) !== f.env) continue;
    if (f.group && !get("group", i).toLowerCase().includes(f.group.toLowerCase())) continue;
    if (!inside(get("iteration", i), iterations) || !inside(get("turns", i), turns)) continue;
    if (browse.hits && !browse.hits.has(i)) continue;
    found.push(i);
  }
  const column = store.columns[browse.sort] || [], sign = browse.down ? -1 : 1;
  return found.sort((a, b) => sign * ((column[a] ?? -Infinity) - (column[b] ?? -Infinity)) || a - b);
}

function trajectoriesPage() {
  if (!store.count) {
    return [h("h1", {}, "Trajectories"), empty("No trajectories", "No trajectory could be read from ", h("code", {}, store.summary.runs.map((r) => r.path).join(", ")), ". A run keeps them with ", h("code", {}, "buffer.write_trajectories: true"), "; “Left out and absent” on the first page says what went wrong with files that are there.")];
  }
  if (!modeKnown(browse.mode)) browse.mode = modeKnown("total") ? "total" : "environment";
  browse.box = h("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": "Trajectories", onscroll: drawRows, onkeydown: listKeys });
  browse.tally = h("p", { class: "tally", role: "status" });
  browse.detail = h("section", { class: "detail", "aria-label": "Trajectory" });
  const page = h("div", { class: "browse" + (browse.open ? " opened" : "") },
    h("section", { class: "side", "aria-label": "List of trajectories" }, h("h1", { class: "unseen" }, "Trajectories"), filterForm(), browse.tally, browse.box), browse.detail);
  browse.page = page;
  return [page];
}

/** What the page needs once it stands in the document. */
function trajectoriesShown() {
  if (!store.count) return;
  new ResizeObserver(drawRows).observe(browse.box);
  refilter();
  const place = browse.rows.indexOf(store.place.get(browse.open));
  if (place >= 0) reveal(place);
  showDetail();
}

function filterForm() {
  const f = browse.filters;
  const select = (name, label, options, current, change) => h("label", {}, h("span", {}, label),
    h("select", { name, onchange: (e) => change(e.target.value) }, options.map(([value, text]) => h("option", { value, selected: String(value) === String(current) }, text))));
  const simple = (name, label, options) => select(name, label, options, f[name], (value) => { f[name] = value; refilter(); });
  const distinct = (name) => [...new Set(store.columns[name])].sort();
  const range = (name, label) => h("fieldset", {}, h("legend", {}, label), [0, 1].map((n) => h("input", {
    type: "number", min: 0, inputmode: "numeric", value: f[name][n], placeholder: n ? "to" : "from", "aria-label": `${label} ${n ? "to" : "from"}`, name: `${name}${n}`,
    oninput: (e) => { f[name][n] = e.target.value; refilter(); } })));
  const stops = distinct("stop"), envs = distinct("env"), runs = store.summary.runs;
  const more = h("details", { class: "more", open: innerWidth > 860 },
    h("summary", {}, "Filter and sort"),
    h("div", { class: "grid" },
      simple("outcome", "Outcome", Object.entries(OUTCOMES)),
      simple("stop", "Stop reason", [["", "any"], ...stops.map((s) => [s, words(s)])]),
      runs.length > 1 ? simple("run", "Run", [["", "all"], ...runs.map((r, n) => [n, r.label])]) : null,
      envs.length > 1 ? simple("env", "Environment", [["", "all"], ...envs.map((e) => [e, e])]) : null,
      range("iteration", "Iteration"), range("turns", "Turns"),
      h("label", {}, h("span", {}, "Group"), h("input", { type: "text", name: "group", value: f.group, placeholder: "any", oninput: (e) => { f.group = e.target.value; refilter(); } })),
      h("div", { class: "sort" },
        select("sort", "Sort by", Object.entries(SORTS), browse.sort, (value) => { browse.sort = value; refilter(); }),
        h("button", { type: "button", class: "quiet", title: "Direction", "aria-label": "Sort direction", onclick: (e) => { browse.down = !browse.down; put(e.currentTarget, browse.down ? "↓" : "↑"); refilter(); } }, browse.down ? "↓" : "↑"))),
    h("button", { type: "button", class: "link", onclick: clearFilters }, "Clear filters"));
  return h("form", { class: "filters", onsubmit: (e) => e.preventDefault() },
    h("input", { type: "search", id: "search", placeholder: "Search what was seen and said ( / )", "aria-label": "Search texts", value: f.text, oninput: (e) => searchFor(e.target.value) }), more);
}

function clearFilters() {
  Object.assign(browse.filters, { outcome: "", stop: "", run: "", env: "", group: "", text: "", iteration: ["", ""], turns: ["", ""] });
  browse.hits = null;
  document.querySelector(".filters").replaceWith(filterForm());
  refilter();
}

let searches = 0;

async function searchFor(text) {
  const mine = ++searches;
  browse.filters.text = text;
  if (!text.trim()) {
    browse.hits = null;
    return refilter();
  }
  await new Promise((go) => setTimeout(go, 150)); // until the typing stops
  if (mine !== searches) return;
  await store.search(text.trim(), (hits) => { browse.hits = hits; refilter(); }, () => mine === searches);
}

function refilter() {
  browse.rows = filtered();
  const hidden = store.count - browse.rows.length;
  put(browse.tally, h("b", {}, plural(browse.rows.length, "trajectory", "trajectories")), hidden ? ` of ${count(store.count)}` : null);
  drawRows(true);
}

/** Draws the rows in view. */
function drawRows(anew) {
  const { box, rows } = browse;
  if (!box || !box.isConnected) return;
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const end = Math.min(rows.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 4);
  if (anew !== true && box.dataset.span === `${first}-${end}`) return;
  box.dataset.span = `${first}-${end}`;
  if (!rows.length) return void put(box, empty("Nothing matches", "No trajectory passes these filters. ", h("button", { class: "link", onclick: clearFilters }, "Clear them"), "."));
  const drawn = rows.slice(first, end).map((i, n) => listRow(i, first + n));
  put(box, h("div", { class: "all", vars: { height: `${rows.length * ROW}px` } }, drawn));
  const chosen = rows.indexOf(store.place.get(browse.open));
  box.setAttribute("aria-activedescendant", chosen >= 0 ? `row-${rows[chosen]}` : "");
}

function listRow(i, n) {
  const get = (name) => store.get(name, i);
  const chosen = store.key(i) === browse.open;
  const runs = store.summary.runs.length > 1;
  return h("div", { class: "row" + (chosen ? " chosen" : ""), id: `row-${i}`, role: "option", "aria-selected": String(chosen), "aria-setsize": browse.rows.length, "aria-posinset": n + 1, vars: { top: `${n * ROW}px` }, onclick: () => openTrajectory(i) },
    h("span", { class: "a" }, badge(i), h("span", { class: "id" }, runs ? `${store.summary.runs[get("run")].label} · ` : "", store.name(i))),
    h("span", { class: "b" }, strip(i, browse.mode), h("span", {}, plural(get("turns"), "turn"), get("stop") === "terminated" ? null : ` · ${words(get("stop"))}`)));
}

function listKeys(event) {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    step(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Enter" && browse.open) byId("main").querySelector(".detail").focus();
}

/** Opens the next or the previous trajectory of the list. */
function step(by) {
  const now = browse.rows.indexOf(store.place.get(browse.open));
  const next = now < 0 ? 0 : now + by;
  if (next < 0 || next >= browse.rows.length) return;
  openTrajectory(browse.rows[next]);
  reveal(next);
}

function reveal(n) {
  const { box } = browse;
  if (n * ROW < box.scrollTop) box.scrollTop = n * ROW;
  else if ((n + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (n + 1) * ROW - box.clientHeight;
  drawRows(true);
}
