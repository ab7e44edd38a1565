/* Tabs, keys, the address, and news from `agentrl view`. */

const PAGES = {
  overview: ["Overview", overviewPage],
  curves: ["Curves", curvesPage],
  trajectories: ["Trajectories", trajectoriesPage, trajectoriesShown],
  prm: ["Reward model", prmPage],
  dropped: ["Dropped", droppedPage],
  config: ["Configuration", configPage],
};

const route = {
  page: "overview",

  /** `#trajectories/KEY/KEY`: a reload, or a link, comes back to the same place. */
  read() {
    const [page, open, other] = location.hash.slice(1).split("/").map(decodeURIComponent);
    this.page = PAGES[page] ? page : "overview";
    browse.open = open && store.place.has(open) ? open : null;
    browse.other = browse.open && other && store.place.has(other) ? other : null;
  },

  write() {
    const parts = [this.page, ...(this.page === "trajectories" ? [browse.open, browse.other].filter(Boolean) : [])];
    history.replaceState(null, "", "#" + parts.map(encodeURIComponent).join("/"));
  },
};

function goto(page) {
  route.page = page;
  route.write();
  showPage();
  scrollTo(0, 0);
}

function showPage() {
  const [title, build, shownThen] = PAGES[route.page];
  const main = byId("main");
  forgetCharts(main);
  main.className = route.page;
  put(main, build());
  for (const tab of byId("tabs").children) {
    const chosen = tab.dataset.page === route.page;
    tab.setAttribute("aria-selected", String(chosen));
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  if (shownThen) shownThen();
  document.title = `${title} · ${store.summary.title} · agentrl`;
}

const KEYS = [
  ["1 – 6", "the parts of the report", (key) => /^[1-6]$/.test(key) && goto(Object.keys(PAGES)[Number(key) - 1])],
  ["j   k", "next, previous trajectory", (key) => (key === "j" || key === "k") && inList(() => step(key === "j" ? 1 : -1))],
  ["/", "search the texts", (key) => key === "/" && inList(() => byId("search") && byId("search").focus())],
  ["c", "colour by the next kind of credit", (key) => key === "c" && inList(nextMode)],
  ["t", "tokens and their log-probs, or text", (key) => key === "t" && inList(() => browse.open && toggleTokens())],
  ["m", "compare with the group’s next other ending; back to one", (key) => key === "m" && inList(toggleCompare)],
  ["Esc", "close: the comparison, then the trajectory", (key) => key === "Escape" && inList(() => (browse.other ? compareWith(null) : browse.open && closeTrajectory()))],
  ["d", "light or dark", (key) => key === "d" && (theme.toggle(), true)],
  ["?", "this list", (key) => key === "?" && (showKeys(), true)],
];

function inList(act) {
  if (route.page !== "trajectories") goto("trajectories");
  act();
  return true;
}

function nextMode() {
  const known = Object.keys(MODES).filter(modeKnown);
  if (known.length) setMode(known[(known.indexOf(browse.mode) + 1) % known.length]);
  const choice = byId("mode");
  if (choice) choice.value = browse.mode;
}

function toggleCompare() {
  const i = store.place.get(browse.open);
  if (i === undefined) return;
  compareWith(browse.other ? null : nearestPartner(i));
}

function showKeys() {
  const help = byId("help");
  if (help.open) return help.close();
  put(help, h("h2", {}, "Keyboard"), h("dl", { class: "keys" }, KEYS.map(([keys, about]) => [h("dt", {}, h("kbd", {}, keys)), h("dd", {}, about)])),
    h("p", { class: "soft" }, "Arrows move through the list when it has the focus; Enter goes on to the trajectory."), h("button", { type: "button", class: "quiet", onclick: () => help.close() }, "Close"));
  help.showModal();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (byId("help").open && event.key !== "?") return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (KEYS.some(([, , act]) => act(event.key))) event.preventDefault();
});

/** `agentrl view`: asks for news, takes it, and leaves the reader where he is. */
async function follow() {
  let stamp = null;
  const wait = (ms) => new Promise((go) => setTimeout(go, ms));
  byId("live").hidden = false;
  for (;;) {
    try {
      const now = (await (await fetch("stamp")).json()).stamp;
      if (stamp === null) stamp = document.body.dataset.stamp || now;
      if (now !== stamp) {
        const news = await (await fetch("data")).json();
        stamp = news.stamp;
        update(news.parts);
      }
      liveState(true);
    } catch {
      liveState(false);
    }
    await wait(2000);
  }
}

function liveState(on) {
  byId("live").className = on ? "on" : "off";
  put(byId("live-text"), on ? "live" : "server gone");
}

function update(parts) {
  const top = browse.box && browse.box.isConnected ? browse.rows[Math.floor(browse.box.scrollTop / ROW)] : undefined;
  const anchor = top === undefined ? null : store.key(top), offset = browse.box ? browse.box.scrollTop % ROW : 0;
  const before = store.count;
  store.load(parts);
  if (route.page !== "trajectories" || !before || !store.count) {
    const y = scrollY;
    showPage();
    return scrollTo(0, y);
  }
  if (document.activeElement && !document.activeElement.closest(".filters")) document.querySelector(".filters").replaceWith(filterForm());
  if (browse.filters.text) searchFor(browse.filters.text);
  refilter();
  const now = anchor === null ? -1 : browse.rows.indexOf(store.place.get(anchor));
  if (now >= 0 && browse.box.scrollTop > 0) browse.box.scrollTop = now * ROW + offset;
  drawRows(true);
}

function start() {
  store.load(null);
  put(byId("brand"), "agentrl");
  add(byId("tabs"), [Object.entries(PAGES).map(([page, [title]]) => h("button", { type: "button", role: "tab", "data-page": page, onclick: () => goto(page) }, title))]);
  byId("theme").addEventListener("click", () => theme.toggle());
  byId("keys").addEventListener("click", showKeys);
  theme.changed = redraw;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("hashchange", () => (route.read(), showPage()));
  route.read();
  showPage();
  document.body.dataset.ready = "true";
  if (document.body.dataset.live === "true") follow();
}

start();
