/* The data of the report: a summary at once, texts of trajectories in chunks, decoded when they are wanted. */

const CHUNK = 100;

const store = {
  parts: null,
  summary: null,
  decoded: new Map(),

  /** Takes new data (`agentrl view`), or what stands in this file. */
  load(parts) {
    this.parts = parts;
    this.decoded.clear();
    this.summary = JSON.parse(this.body("summary"));
    const list = this.summary.trajectories;
    this.columns = list.columns;
    this.count = list.count;
    this.place = new Map();
    this.keys = [];
    this.names = new Map();
    for (let i = 0; i < this.count; i++) {
      const { label, files } = this.summary.runs[this.get("run", i)];
      const base = [label, files[this.get("file", i)], this.get("iteration", i), this.get("id", i)].join("|");
      let key = base;
      for (let n = 2; this.place.has(key); n++) key = `${base}|${n}`; // a file may hold an id twice
      this.keys.push(key);
      this.place.set(key, i);
      const name = this.get("run", i) + "|" + this.get("id", i);
      this.names.set(name, (this.names.get(name) || new Set()).add(this.get("file", i)));
    }
    this.groups = new Map();
    for (let i = 0; i < this.count; i++) {
      const group = this.groupKey(i);
      if (!this.groups.has(group)) this.groups.set(group, []);
      this.groups.get(group).push(i);
    }
  },

  body(name) {
    return this.parts ? this.parts[name].body : byId(name).textContent;
  },

  encoding(name) {
    return this.parts ? this.parts[name].encoding : byId(name).dataset.encoding;
  },

  get: (name, i) => (store.columns[name] ? store.columns[name][i] : undefined),
  key: (i) => store.keys[i],
  groupKey: (i) => ["run", "file", "iteration", "group"].map((name) => store.get(name, i)).join("|"),
  fileName: (i) => store.summary.runs[store.get("run", i)].files[store.get("file", i)],

  /** The id, with its file where another file of the run has the same one. */
  name(i) {
    const id = store.get("id", i);
    return store.names.get(store.get("run", i) + "|" + id).size > 1 ? `${id} · ${store.fileName(i)}` : id;
  },

  members: (i) => store.groups.get(store.groupKey(i)) || [i],

  /** Returns a promise of chunk `n`: `{strings, rows}`. */
  chunk(n) {
    if (!this.decoded.has(n)) this.decoded.set(n, this.decode(`chunk-${n}`));
    return this.decoded.get(n);
  },

  async decode(name) {
    const body = JSON.parse(this.body(name));
    if (this.encoding(name) !== "gzip") return body;
    const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  },

  /** Returns a promise of trajectory `i` with its texts in place. */
  async trajectory(i) {
    const { strings, rows } = await this.chunk(Math.floor(i / CHUNK));
    const row = rows[i % CHUNK];
    const content = (value) => {
      if (value === null) return null;
      if (!Array.isArray(value)) return [{ text: strings[value] }];
      return value.map((part) => (Array.isArray(part) ? { image: part[0], alt: strings[part[1]] } : { text: strings[part] }));
    };
    const word = (value) => (value === undefined ? null : strings[value]);
    const turns = row.act.map((action, t) => {
      const turn = { action: strings[action], observation: content(row.obs[t]), environment: row.env[t] };
      for (const name of ["episode", "step", "reward"]) if (row[name]) turn[name] = row[name][t];
      if (row.episode) turn.total = turn.episode + turn.step;
      return { ...turn, invalid: row.bad.includes(t), ids: row.ids[t], logprobs: row.lp[t], seconds: row.sec[t] };
    });
    return { index: i, turns, end: content(row.end), system: word(row.sys), error: word(row.error), task: word(row.task) };
  },

  /** Calls `found(set of positions, done)` as chunks are searched for a text; stops where `going()` is false. */
  async search(query, found, going) {
    const wanted = query.toLowerCase();
    const hits = new Set();
    for (let n = 0; n * CHUNK < this.count && going(); n++) {
      const { strings, rows } = await this.chunk(n);
      const good = new Set();
      strings.forEach((text, s) => text.toLowerCase().includes(wanted) && good.add(s));
      const has = (value) => (Array.isArray(value) ? value.some((part) => good.has(Array.isArray(part) ? part[1] : part)) : good.has(value));
      rows.forEach((row, r) => {
        if ([row.end, row.error, row.sys].some(has) || row.act.some(has) || row.obs.some(has)) hits.add(n * CHUNK + r);
      });
      if (going()) found(hits, (n + 1) * CHUNK >= this.count);
    }
  },

  picture: (n) => (n < 0 ? null : "data:image/png;base64," + JSON.parse(store.body(`image-${n}`))),

  token(run, id) {
    const text = (this.summary.trajectories.vocabulary[run] || {})[id];
    return text === undefined ? `#${id}` : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
  },
};

const MODES = {
  total: { name: "Advantage", about: "what the policy was trained on: episode term plus step term", unit: "" },
  episode: { name: "Episode term", about: "the part that all turns of an episode share: how it ended beside its group", unit: "" },
  step: { name: "Step term", about: "the turn's own part, from its step reward", unit: "" },
  reward: { name: "Step reward", about: "what the process reward model gave this turn", unit: "reward" },
  environment: { name: "Environment reward", about: "what the environment paid for this turn", unit: "reward" },
};

/** Is there anything of a mode in the trajectories shown? */
const modeKnown = (mode) => (store.columns[`strip_${mode}`] || []).some((strip) => /[a-i]/.test(strip));

const SHADES = "abcdefghi";

/** From -1 to 1: how full the colour of a value is in a mode. */
function shade(value, mode) {
  const full = store.summary.trajectories.scales[mode];
  return value === null || value === undefined || !full ? 0 : Math.max(-1, Math.min(1, value / full));
}

/** Colour of a shade: blue above nothing, orange below; told apart by people of every colour vision. */
function colour(s) {
  const hue = s < 0 ? "var(--neg)" : "var(--pos)";
  return `color-mix(in oklab, ${hue} ${Math.round(100 * Math.abs(s))}%, var(--none))`;
}

/** A row of cells, one per turn. */
function strip(i, mode) {
  const letters = store.get(`strip_${mode}`, i) || "";
  const cells = [...letters].map((c) => {
    const known = SHADES.indexOf(c);
    return h("i", { vars: { background: known < 0 ? "var(--line)" : colour((known - 4) / 4) } });
  });
  return h("span", { class: "strip", "aria-hidden": "true" }, cells.slice(0, 60), letters.length > 60 ? "…" : null);
}
