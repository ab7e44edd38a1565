/* Two trajectories of one group: what they share once, then side by side from where they part. */

function compareWith(i) {
  browse.other = i === null ? null : store.key(i);
  route.write();
  showDetail();
}

/** The best partner: a member of the group that ended otherwise, else the next one. */
function nearestPartner(i) {
  const others = store.members(i).filter((j) => j !== i);
  return others.find((j) => fate(j) !== fate(i)) ?? others[0] ?? null;
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** First turn in which two episodes differ, and in what: `{turn, what}`; null where they do not. */
function parting(a, b) {
  const most = Math.max(a.turns.length, b.turns.length);
  for (let turn = 0; turn < most; turn++) {
    const [x, y] = [a.turns[turn], b.turns[turn]];
    if (!x || !y) return { turn, what: `${store.get("id", (x ? b : a).index)} has ended here` };
    if (!same(x.observation, y.observation)) return { turn, what: turn ? "the same action led to another observation" : "they began differently" };
    if (x.action !== y.action) return { turn, what: "the same observation, another action" };
  }
  return same(a.end, b.end) ? null : { turn: most, what: "the last observation" };
}

function comparison(a, b) {
  const part = parting(a, b);
  const shared = part ? part.turn : a.turns.length;
  const most = Math.max(a.turns.length, b.turns.length);
  const split = [];
  for (let n = shared; n < most; n++) {
    split.push(h("div", { class: "pair" }, [a, b].map((t, side) => h("div", { class: side ? "right" : "left" },
      t.turns[n] ? turnView(t.turns[n], n, t.index, n > shared || !sameSight(a, b, n)) : h("p", { class: "over" }, n === t.turns.length ? stopWords(store.get("stop", t.index)) : "")))));
  }
  return [
    toolbar(),
    h("div", { class: "pair heads" }, [a, b].map((t, side) => h("header", { class: side ? "right" : "left" }, h("h2", {}, store.get("id", t.index)),
      h("p", {}, badge(t.index), ` ${plural(t.turns.length, "turn")}, outcome ${num(store.get("outcome", t.index))}`), strip(t.index, browse.mode)))),
    shared ? h("details", { class: "shared", open: shared < 6 }, h("summary", {}, `${plural(shared, "equal turn")}`),
      h("ol", { class: "turns" }, a.turns.slice(0, shared).map((turn, n) => h("li", {}, h("div", { class: "obs" }, contentView(turn.observation)),
        h("div", { class: "pair" }, actionView(turn, n, a.index), actionView(b.turns[n], n, b.index)))))) : null,
    part ? h("div", { class: "parting", id: "parting" }, h("b", {}, `They part at turn ${part.turn + 1}`), h("span", {}, part.what)) : h("div", { class: "parting", id: "parting" }, h("b", {}, "They never part"), h("span", {}, "the same observations and actions throughout")),
    part && sameSight(a, b, shared) ? h("div", { class: "obs" }, contentView(a.turns[shared].observation)) : null,
    split,
    h("div", { class: "pair" }, ending(a), ending(b)),
  ];
}

const sameSight = (a, b, n) => a.turns[n] && b.turns[n] && same(a.turns[n].observation, b.turns[n].observation);
