// The smaller panels: groups waiting, syncs, drafts, mismatch, failures, and the key figures.

import { columns, sparkline } from "./charts.js";
import { byId, h, keyed, text } from "./dom.js";
import { ago, bytes, count, duration, NONE, percent, plural, tiny, whole, words } from "./format.js";

const SHOWN_GROUPS = 10;
const SHOWN_SYNCS = 6;
const SHOWN_FAILURES = 6;

const empty = (...words) => h("p", { class: "empty" }, ...words);

export function drawFigures(feed) {
  const { totals, fleet, groups } = feed;
  const waitingRequests = totals.num_queued;
  const figures = [
    ["Running", whole(totals.num_running), totals.num_under_way ? `of ${count(totals.num_under_way)} under way` : "nothing is under way"],
    ["Queued", count(waitingRequests), waitingRequests ? "for a shard" : "nobody waits for a shard"],
    ["Groups waiting", count(groups.num_waiting), groups.num_last ? `${count(groups.num_last)} for one last member` : "none for one last member"],
    ["KV in use", percent(fleet.kv_used), fleet.fullest.length ? `fullest shard ${percent(fleet.fullest[0].kv_used)}` : "no shard has said"],
    ["Shards serving", whole(fleet.num_live), serving(fleet), fleet.num_live < fleet.num_shards ? "is-bad" : ""],
    ["Weights", `v${whole(totals.live_version)}`, feed.syncs.length ? `synced ${ago(feed.now_s - feed.syncs.at(-1).at_s)}` : "not synced yet"],
    ["Finished", count(totals.num_finished), totals.num_failed ? `${count(totals.num_failed)} failed` : "none failed", totals.num_failed ? "sub-bad" : ""],
  ];
  keyed(
    byId("figures"),
    figures,
    ([name]) => name,
    ([name]) => h("div", {}, h("dt", {}, name), h("dd", { class: "value" }), h("dd", { class: "sub" })),
    (box, [, value, sub, kind = ""]) => {
      text(box.children[1], value);
      text(box.children[2], sub);
      box.className = kind;
    },
  );
}

function serving(fleet) {
  if (!fleet.num_shards) return "none has started";
  return fleet.num_live === fleet.num_shards ? "all of them" : `of ${whole(fleet.num_shards)}, the others are down`;
}

export function drawGroups(feed) {
  const { groups } = feed;
  text(byId("groups-sub"), groups.num_waiting ? `the oldest for ${duration(groups.oldest_s)}` : "");
  if (!groups.num_waiting) return byId("groups").replaceChildren(empty("No group is waiting. Every group that was asked for is finished."));
  const partly = groups.num_waiting - groups.num_whole - groups.num_last;
  const split = [["whole", groups.num_whole, "none done"], ["partly", partly, "some done"], ["last", groups.num_last, "one missing"]];
  const bar = h("div", { class: "split", role: "img", "aria-label": split.map(([, number, name]) => `${number} with ${name}`).join(", ") },
    split.map(([kind, number]) => number > 0 && h("i", { class: kind, vars: { "--n": String(number) } })));
  const keys = h("p", { class: "keys" }, split.map(([kind, number, name]) => h("span", { class: "key" }, h("i", { class: `swatch ${kind}` }), `${count(number)} ${name}`)));
  const rows = groups.shown.slice(0, SHOWN_GROUPS).map((group) =>
    h("tr", {},
      h("th", { scope: "row" }, h("span", { class: "id", title: group.group_id }, group.group_id)),
      h("td", {}, members(group)),
      h("td", { class: "number" }, `${count(group.most_tokens)} / ${count(group.max_tokens)}`),
      h("td", { class: "number" }, duration(group.waited_s)),
    ),
  );
  byId("groups").replaceChildren(bar, keys, table(["Fewest missing first", "Members", "Longest", "Waits"], rows, [2, 3]));
}

/** One dot for each member: ended, running, queued. */
function members(group) {
  const label = `${group.num_done} of ${group.num_members} done, ${group.num_running} running, ${group.num_queued} queued`;
  if (group.num_members > 16) return h("span", { title: label }, `${group.num_done} / ${group.num_members}`);
  const rest = group.num_members - group.num_done - group.num_running - group.num_queued;
  const dots = [["done", group.num_done], ["other", rest], ["running", group.num_running], ["queued", group.num_queued]];
  return h("span", { class: "dots", role: "img", "aria-label": label, title: label },
    dots.flatMap(([kind, number]) => Array.from({ length: number }, () => h("i", { class: kind }))));
}

export function drawSyncs(feed) {
  const syncs = feed.syncs;
  const good = syncs.filter((sync) => sync.reason === null);
  const refused = syncs.length - good.length;
  text(byId("syncs-sub"), syncs.length ? `last ${plural(syncs.length, "attempt")}${refused ? `, ${refused} refused` : ""}` : "");
  if (!syncs.length) return byId("syncs").replaceChildren(empty(`No weights were published since this controller began. Version ${feed.totals.live_version} serves.`));
  const rows = [...syncs].reverse().slice(0, SHOWN_SYNCS).map((sync) =>
    sync.reason === null
      ? h("tr", {},
          h("th", { scope: "row" }, `v${sync.version}`),
          h("td", { class: "number" }, ago(feed.now_s - sync.at_s)),
          h("td", { class: "number" }, bytes(sync.num_bytes), sync.num_bytes && sync.num_bytes_full ? h("small", {}, ` ${percent(sync.num_bytes / sync.num_bytes_full)}`) : null),
          h("td", { class: "number" }, sync.stage_s ? duration(sync.stage_s) : NONE),
          h("td", { class: "number" }, duration(sync.stall_s)),
        )
      : h("tr", { class: "is-bad" },
          h("th", { scope: "row" }, `v${sync.version}`),
          h("td", { class: "number" }, ago(feed.now_s - sync.at_s)),
          h("td", { colspan: "3", class: "reason" }, "✕ Refused: ", sync.reason),
        ),
  );
  const worst = Math.max(0, ...good.map((sync) => sync.stall_s));
  const stall = worst === 0 ? "Stall: none in any of them" : `Stall, ${duration(worst)} at most`;
  byId("syncs").replaceChildren(
    h("div", { class: "pair" },
      h("figure", {}, h("figcaption", {}, stall), columns(syncs, (sync) => sync.stall_s, 320, 64, "stall")),
      h("figure", {}, h("figcaption", {}, "Staging and flip, while shards decode"), columns(syncs, (sync) => sync.stage_s + sync.flip_s, 320, 64, "stage")),
    ),
    table(["Version", "When", "Sent", "Staged in", "Stalled"], rows, [1, 2, 3, 4]),
  );
}

export function drawDrafts(feed) {
  const drafts = feed.speculation;
  if (!drafts) {
    text(byId("drafts-sub"), "");
    return byId("drafts").replaceChildren(empty("No shard has drafted in the last minutes. Speculation is off, or nothing is decoded."));
  }
  const parts = [];
  if (drafts.tokens_per_step !== null) parts.push(`${drafts.tokens_per_step.toFixed(2)} tokens a step where drafted`);
  if (drafts.off_share !== null) parts.push(`${percent(drafts.off_share)} of steps without drafts`);
  text(byId("drafts-sub"), parts.join(" · "));
  const rows = drafts.sources.map((source) => {
    const share = source.num_drafted ? source.num_accepted / source.num_drafted : null;
    return h("div", { class: "source" },
      h("h3", {}, source.source),
      h("p", { class: "value" }, percent(share), h("span", { class: "unit" }, " of drafted tokens")),
      depths(source),
      h("p", { class: "sub" }, `offered for ${percent(source.num_asked ? source.num_offered / source.num_asked : null)} of requests`),
    );
  });
  const alarms = drafts.alarms.length ? h("p", { class: "alarm" }, `⚠ Acceptance fell at a sync: ${drafts.alarms.join(", ")}`) : null;
  byId("drafts").replaceChildren(...[alarms, h("div", { class: "sources" }, rows.length ? rows : empty("No source has drafted yet."))].filter(Boolean));
}

/** Share of trials that hit, layer by layer. */
function depths(source) {
  const known = source.by_depth.flatMap((share, i) => (share === null ? [] : [[i + 1, share]]));
  const label = known.map(([depth, share]) => `layer ${depth}: ${percent(share)}`).join(", ");
  return h("div", { class: "depths", role: "img", "aria-label": label || "no layer was tried" },
    known.map(([depth, share]) => h("span", { title: `Layer ${depth}: ${percent(share)}` }, h("i", { vars: { "--x": `${(share * 100).toFixed(0)}%` } }), h("small", {}, String(depth)))));
}

const CAUSES = [
  ["all", "All causes", "engine against training forward"],
  ["weights", "Weights", "rounding of the served weights"],
  ["kv", "KV cache", "rounding of keys and values"],
  ["routing", "Routing", "other experts than in training"],
  ["staleness", "Staleness", "tokens of older versions"],
];

export function drawMismatch(feed) {
  const points = feed.mismatches;
  const last = points.at(-1);
  text(byId("mismatch-sub"), last ? `nats a token, step to version ${last.version}` : "");
  if (!last) return byId("mismatch").replaceChildren(empty("No training step has reported yet. A trainer measures it and tells it after each step."));
  const rows = CAUSES.map(([name, label, meaning]) => {
    const known = points.findLast((point) => point[name] !== null);
    const age = known && known !== last ? `, of version ${known.version}` : "";
    return h("tr", {},
      h("th", { scope: "row" }, label, h("small", {}, meaning + age)),
      h("td", { class: "trend" }, sparkline(points.map((point) => point[name]), 180, 30, true)),
      h("td", { class: "number" }, tiny(known ? known[name] : null)),
    );
  });
  byId("mismatch").replaceChildren(table(["Cause", "Trend (log)", "Now"], rows, [2], "causes"));
}

const MEANINGS = {
  engine_dead: "their engine died, again and again", engine_error: "their engine raised", reward_raised: "the reward function raised",
  reward_timeout: "the reward function took too long", stale: "too many weight versions apart", internal: "a fault of the service",
  died: "a process was gone", hung: "busy, and no step for too long", sync: "unknown which weights they served", behind: "behind the fleet's version",
};

export function drawFailures(feed) {
  const { failures, now_s } = feed;
  const sums = [];
  if (failures.num_retries) sums.push(`${plural(failures.num_retries, "chunk")} tried again`);
  if (failures.num_restarts) sums.push(`${plural(failures.num_restarts, "group")} of shards started again`);
  if (failures.num_internal_errors) sums.push(plural(failures.num_internal_errors, "internal error"));
  text(byId("failures-sub"), sums.join(" · "));
  const kinds = [
    ...failures.trajectories.map((one) => ({ ...one, what: "trajectory", many: "trajectories" })),
    ...failures.groups.map((one) => ({ ...one, what: "group of shards", many: "groups of shards" })),
  ];
  if (!kinds.length) return byId("failures").replaceChildren(empty("Nothing has failed since this controller began."));
  const most = Math.max(...kinds.map((kind) => kind.count));
  const list = h("ul", { class: "kinds" }, kinds.map((kind) =>
    h("li", {},
      h("b", {}, words(kind.kind)),
      h("span", { class: "meter" }, h("i", { vars: { "--x": `${Math.max(1, (kind.count / most) * 100).toFixed(0)}%` } })),
      h("span", { class: "number" }, plural(kind.count, kind.what, kind.many)),
      h("small", {}, MEANINGS[kind.kind] ?? ""),
    )));
  const newest = [...failures.newest].reverse().slice(0, SHOWN_FAILURES).map((failure) =>
    h("li", {}, h("p", {}, h("b", { class: "id" }, failure.trajectory_id), h("span", { class: "sub" }, ` ${words(failure.kind)}, ${ago(now_s - failure.at_s)}`)), h("p", { class: "reason" }, failure.reason)));
  byId("failures").replaceChildren(...[list, newest.length ? h("ol", { class: "newest" }, newest) : null].filter(Boolean));
}

function table(heads, rows, numeric, kind = "") {
  return h("table", { class: kind },
    h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: numeric.includes(i) ? "number" : null }, head)))),
    h("tbody", {}, rows));
}
