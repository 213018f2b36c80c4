// Trajectories over time: their chunks, where they ran, under which weights, and when they moved.

import { byId, h, keyed, roving, s, show, text } from "./dom.js";
import { ago, count, duration, plural, whole, words } from "./format.js";

const BAR = 16;
const HEIGHT = 22;
const AGES = 4; // shades: live, and so many versions behind
const STATES = {
  queued: "○", running: "▶", landing: "◌", scoring: "◇", completed: "●", truncated: "◐", aborted: "■", failed: "✕",
};

export class LanesView {
  /** @param onAsk told {order, find} when the viewer wants others. @param inspector shows details */
  constructor(onAsk, inspector) {
    this.inspector = inspector;
    this.list = byId("lanes");
    this.settle = roving(this.list, ".lane-name");
    const ask = () => onAsk({ order: byId("order").value, find: byId("find").value.trim() });
    byId("order").addEventListener("change", ask);
    byId("span").addEventListener("change", () => this.draw(this.feed));
    let typing;
    byId("find").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(ask, 300);
    });
    new ResizeObserver(() => this.chartWidth() !== this.width && this.draw(this.feed)).observe(this.list);
    this.drawLegend();
  }

  drawLegend() {
    const shade = (age) => h("i", { class: `swatch age-${age}` });
    byId("lanes-legend").replaceChildren(
      h("span", { class: "key" }, shade(0), "Live weights"),
      h("span", { class: "key" }, shade(1), shade(2), shade(3), "1, 2, 3 versions behind"),
      h("span", { class: "key" }, h("i", { class: "swatch running" }), "Running"),
      h("span", { class: "key" }, h("i", { class: "moved" }, "◆"), "Moved to another shard"),
      h("span", { class: "key" }, h("i", { class: "swatch lost" }), "Lost with its engine"),
    );
  }

  draw(feed) {
    this.feed = feed;
    if (!feed) return;
    const { lanes } = feed;
    text(byId("lanes-sub"), summary(lanes, feed.totals.num_under_way));
    const isEmpty = lanes.shown.length === 0;
    show(byId("lanes-empty"), isEmpty);
    show(byId("lanes-legend"), !isEmpty);
    if (isEmpty) text(byId("lanes-empty"), emptyText(lanes));
    this.width = this.chartWidth();
    const wanted = Number(byId("span").value);
    const oldest = Math.min(feed.now_s - 10, ...lanes.shown.map((lane) => lane.bars[0]?.started_s ?? lane.started_s));
    this.span = wanted || Math.max(10, (feed.now_s - oldest) * 1.02);
    this.drawAxis(isEmpty);
    keyed(
      this.list,
      lanes.shown,
      (lane) => `${lane.trajectory_id} ${lane.started_s}`,
      () => this.makeLane(),
      (item, lane) => this.updateLane(item, lane, feed),
    );
    this.settle();
    if (!isEmpty && this.chartWidth() !== this.width) this.draw(feed); // the first lanes tell how wide a lane is
  }

  chartWidth() {
    const chart = this.list.querySelector(".lane-chart");
    return chart ? Math.max(60, chart.clientWidth) : 600;
  }

  drawAxis(isEmpty) {
    const axis = byId("lanes-axis");
    show(axis, !isEmpty);
    if (isEmpty) return;
    const parts = this.width < 420 ? [1, 0.5, 0] : [1, 0.75, 0.5, 0.25, 0];
    axis.replaceChildren(h("span"), h("div", {}, parts.map((part) => h("span", {}, part ? ago(this.span * part) : "now"))), h("span"));
  }

  makeLane() {
    const name = h("button", { type: "button", class: "lane-name", tabindex: "-1" }, h("i", { "aria-hidden": "true" }), h("span"));
    const item = h("li", { class: "lane" }, name, h("div", { class: "lane-chart" }), h("span", { class: "lane-tokens" }));
    name.addEventListener("click", () => this.inspect(item.lane));
    return item;
  }

  updateLane(item, lane, feed) {
    item.lane = lane;
    const [name, chart, tokens] = item.children;
    item.dataset.state = lane.state;
    text(name.children[0], STATES[lane.state] ?? "○");
    text(name.children[1], lane.trajectory_id);
    name.setAttribute("aria-label", told(lane));
    text(tokens, `${count(lane.num_tokens)} / ${count(lane.max_tokens)}`);
    chart.replaceChildren(this.bars(lane, feed));
  }

  bars(lane, feed) {
    const { width, span } = this;
    const chart = s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, "aria-hidden": "true" });
    const x = (at) => Math.max(0, Math.min(width, ((at - feed.now_s) / span + 1) * width));
    const middle = HEIGHT / 2;
    const first = lane.bars[0]?.started_s ?? lane.started_s;
    chart.append(s("line", { class: "thread", x1: x(first), x2: x(lane.ended_s ?? feed.now_s), y1: middle, y2: middle }));
    for (const bar of lane.bars) {
      const end = bar.ended_s ?? feed.now_s;
      if (end < feed.now_s - span) continue;
      const from = x(bar.started_s);
      const size = Math.max(2, x(end) - from - 1);
      const group = s("g", { class: "bar" });
      group.tipOf = () => barTip(bar, lane, feed);
      group.onPick = () => this.inspect(lane);
      group.append(...pieces(bar, from, size, feed.totals.live_version));
      const label = `s${bar.shard}`;
      if (size > 12 + label.length * 6.5) {
        group.append(s("text", { class: `on ${textClass(bar, feed.totals.live_version)}`, x: from + (bar.is_moved ? 11 : 5), y: middle + 3.5 }, label));
      }
      if (bar.is_moved && bar.started_s >= feed.now_s - span) {
        group.append(s("path", { class: "moved", d: `M${from} ${middle - 6}l5 6l-5 6l-5 -6z` }));
      }
      chart.append(group);
    }
    if (lane.ended_s !== null && lane.ended_s >= feed.now_s - span) {
      chart.append(s("text", { class: `ending ${lane.state}`, x: Math.min(width - 8, x(lane.ended_s) + 3), y: middle + 4 }, STATES[lane.state] ?? ""));
    }
    return chart;
  }

  inspect(lane) {
    const key = `${lane.trajectory_id} ${lane.started_s}`;
    this.inspector.open(lane.trajectory_id, () => {
      const found = this.feed.lanes.shown.find((one) => `${one.trajectory_id} ${one.started_s}` === key);
      return details(found ?? lane, this.feed, Boolean(found));
    });
  }
}

/** A chunk's rectangles: one for each weight version in it. */
function pieces(bar, from, size, live) {
  const y = (HEIGHT - BAR) / 2;
  const rect = (kind, x, width) => s("rect", { class: kind, x, y, width: Math.max(1, width), height: BAR, rx: Math.min(3, width / 2) });
  if (bar.end === null) return [rect("running", from, size)];
  if (bar.end === "lost" || bar.end === "failed") return [rect("lost", from, size)];
  if (!bar.spans.length) return [rect("nothing", from, size)];
  const total = bar.spans.reduce((sum, span) => sum + span.num_tokens, 0);
  let at = from;
  return bar.spans.map((span) => {
    const width = (span.num_tokens / total) * size;
    const piece = rect(`age-${age(span.version, live)}`, at, width);
    at += width;
    return piece;
  });
}

const age = (version, live) => Math.max(0, Math.min(AGES - 1, live - version));
const textClass = (bar, live) => (bar.end === null || bar.end === "lost" || !bar.spans.length ? "plain" : `on-${age(bar.spans[0].version, live)}`);

const ENDS = {
  length: "budget used", stop: "ended", abort: "cut", error: "engine error", lost: "lost with its engine", failed: "failed",
};

function versions(bar) {
  if (!bar.spans.length) return "–";
  return bar.spans.map((span) => (bar.spans.length > 1 ? `v${span.version} (${count(span.num_tokens)})` : `v${span.version}`)).join(" → ");
}

function barTip(bar, lane, feed) {
  const end = bar.ended_s ?? feed.now_s;
  const seconds = end - bar.started_s;
  const rows = [
    ["Shard", bar.is_moved ? `${bar.shard}, moved here` : String(bar.shard)],
    ["Began", ago(feed.now_s - bar.started_s)],
    ["Took", bar.end === null ? `${duration(seconds)} so far` : duration(seconds)],
  ];
  if (bar.end !== null) {
    rows.push(["Tokens", bar.num_tokens ? `${whole(bar.num_tokens)}${seconds > 0 ? `, ${(bar.num_tokens / seconds).toFixed(1)} a second` : ""}` : "none"]);
    if (bar.spans.length) rows.push(["Weights", versions(bar)]);
    if (bar.num_cached_tokens) rows.push(["Prefix cached", `${whole(bar.num_cached_tokens)} tokens`]);
    rows.push(["End", ENDS[bar.end] ?? bar.end]);
  }
  return { title: lane.trajectory_id, rows };
}

function details(lane, feed, isCurrent) {
  const rows = [
    ["State", words(lane.state)],
    ["Tokens", `${whole(lane.num_tokens)} of at most ${whole(lane.max_tokens)}, after a prompt of ${whole(lane.num_prompt_tokens)}`],
    ["Chunks", `${whole(lane.num_chunks)}, moved ${plural(lane.num_moves, "time")}, lost ${plural(lane.num_lost, "time")}`],
    ["Began", ago(feed.now_s - lane.started_s)],
  ];
  if (lane.ended_s !== null) rows.push(["Ended", `${ago(feed.now_s - lane.ended_s)}, after ${duration(lane.ended_s - lane.started_s)}`]);
  if (lane.error) rows.push(["Reason", lane.error]);
  const heads = ["Shard", "Took", "Tokens", "Weights", "End"];
  const chunks = [...lane.bars].reverse().map((bar) =>
    h("tr", {},
      h("th", { scope: "row" }, bar.is_moved ? `◆ ${bar.shard}` : String(bar.shard)),
      h("td", {}, duration((bar.ended_s ?? feed.now_s) - bar.started_s)),
      h("td", {}, bar.end === null ? "…" : whole(bar.num_tokens)),
      h("td", {}, versions(bar)),
      h("td", {}, bar.end === null ? "runs" : (ENDS[bar.end] ?? bar.end)),
    ),
  );
  return [
    isCurrent ? null : h("p", { class: "sub" }, "No longer in the list; as it was last told."),
    h("dl", { class: "rows" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    lane.num_chunks > lane.bars.length ? h("p", { class: "sub" }, `The newest ${lane.bars.length} of ${whole(lane.num_chunks)} chunks, the last one first`) : h("p", { class: "sub" }, "Chunks, the last one first"),
    h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, chunks)),
  ];
}

function told(lane) {
  const moved = lane.num_moves ? `, moved ${plural(lane.num_moves, "time")}` : "";
  return `${lane.trajectory_id}: ${words(lane.state)}, ${whole(lane.num_tokens)} of ${whole(lane.max_tokens)} tokens in ${plural(lane.num_chunks, "chunk")}${moved}`;
}

function summary(lanes, num_under_way) {
  const parts = [`${plural(num_under_way, "trajectory", "trajectories")} under way`];
  if (lanes.num_matching > lanes.shown.length) parts.push(`${whole(lanes.shown.length)} shown of ${whole(lanes.num_matching)}`);
  if (lanes.num_followed) parts.push(`chunks of ${whole(lanes.num_followed)} are kept`);
  return parts.join(" · ");
}

function emptyText(lanes) {
  const find = byId("find").value.trim();
  if (find) return `No trajectory that is followed has “${find}” in its id.`;
  if (byId("order").value === "moved") return "No trajectory has moved to another shard.";
  if (byId("order").value === "failed") return "No trajectory has failed or was aborted.";
  return lanes.num_followed
    ? "Nothing is under way. Choose “newest events” to see what has ended."
    : "No trajectory has run yet. Submit prompts, and their chunks appear here as they start.";
}
