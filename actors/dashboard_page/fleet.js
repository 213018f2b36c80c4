// The shards: a tile each where they are few, a heat map of cells where they are many.

import { histogram } from "./charts.js";
import { byId, h, keyed, roving, show, text } from "./dom.js";
import { count, duration, NONE, percent, plural, whole } from "./format.js";

const METRICS = {
  kv: { label: "KV in use", of: (cell) => cell.kv_used, format: percent, top: () => 1 },
  rate: { label: "Tokens/s", of: (cell) => cell.tokens_per_s, format: count, top: (cells) => most(cells, "tokens_per_s") },
  running: { label: "Running", of: (cell) => cell.num_running, format: whole, top: (cells) => most(cells, "num_running") },
};
const FEW = 16; // shards that are seen at a glance, without histograms
const most = (cells, name) => Math.max(1, ...cells.map((cell) => cell[name] ?? 0));

export class FleetView {
  /** @param onPick told the place of a cell that was chosen, or null. @param inspect see Inspector */
  constructor(onPick, inspect) {
    this.metric = "kv";
    this.picked = null;
    this.onPick = onPick;
    this.cells = byId("cells");
    this.settle = roving(this.cells, ".cell", () => getComputedStyle(this.cells).gridTemplateColumns.split(" ").length);
    for (const [name, metric] of Object.entries(METRICS)) {
      const input = h("input", { type: "radio", name: "metric", value: name, checked: name === this.metric });
      input.addEventListener("change", () => {
        this.metric = name;
        this.draw(this.feed);
      });
      byId("metric").append(h("label", {}, input, h("span", {}, metric.label)));
    }
    this.inspect = inspect;
  }

  pick(place) {
    this.picked = this.picked === place ? null : place;
    this.onPick(this.picked);
    this.draw(this.feed);
  }

  draw(feed) {
    this.feed = feed;
    if (!feed) return;
    const { fleet } = feed;
    text(byId("fleet-sub"), summary(fleet));
    show(byId("fleet-empty"), fleet.num_shards === 0);
    const metric = METRICS[this.metric];
    const top = metric.top(fleet.cells);
    this.cells.classList.toggle("tiles", !fleet.is_aggregated);
    this.cells.classList.toggle("few", fleet.cells.length <= FEW);
    keyed(
      this.cells,
      fleet.cells,
      (cell, place) => place,
      (cell, place) => this.makeCell(place),
      (button, cell, place) => this.updateCell(button, cell, place, feed, metric, top),
    );
    this.settle();
    show(byId("ramp"), fleet.cells.length > 0);
    byId("ramp").replaceChildren(
      h("span", {}, metric.format(0)),
      h("span", { class: "ramp-bar" }),
      h("span", {}, this.metric === "rate" ? `${metric.format(top)} tokens/s` : metric.format(top)),
      ...[["down", "Down"], ["draining", "Draining"], ["behind", "Older weights"]].map(([kind, label]) =>
        h("span", { class: "key" }, h("i", { class: `cell swatch is-${kind}` }), label),
      ),
    );
    this.drawSide(fleet);
    this.drawFocus(feed);
  }

  makeCell(place) {
    const button = h("button", { type: "button", class: "cell", tabindex: "-1" }, h("b"), h("span"), h("em"));
    button.addEventListener("click", () => this.pick(place));
    button.tipOf = () => tipOf(this.feed.fleet.cells[place], this.feed);
    return button;
  }

  updateCell(button, cell, place, feed, metric, top) {
    const { fleet } = feed;
    const value = metric.of(cell);
    const share = value === null ? 0 : Math.min(1, value / top);
    button.style.setProperty("--x", `${(share * 100).toFixed(0)}%`);
    button.classList.toggle("is-middle", share > 0.45 && share <= 0.6);
    button.classList.toggle("is-strong", share > 0.6);
    button.classList.toggle("is-unknown", value === null);
    button.classList.toggle("is-down", cell.num_live === 0);
    button.classList.toggle("is-partly", cell.num_live > 0 && cell.num_live < cell.num_shards);
    button.classList.toggle("is-draining", cell.num_draining > 0);
    button.classList.toggle("is-behind", cell.version_min !== null && cell.version_min < feed.totals.live_version);
    button.setAttribute("aria-pressed", String(this.picked === place));
    button.setAttribute("aria-label", told(cell, feed));
    const [name, main, sub] = button.children;
    if (fleet.is_aggregated) {
      text(name, "");
      text(main, "");
      text(sub, "");
      return;
    }
    text(name, String(cell.first_rank));
    text(main, cell.num_live ? metric.format(value) : "down");
    const others = { kv: `${count(cell.tokens_per_s)} tokens/s`, rate: `KV ${percent(cell.kv_used)}`, running: `KV ${percent(cell.kv_used)}` };
    text(sub, cell.num_live ? (cell.num_draining ? "draining" : others[this.metric]) : "");
  }

  drawSide(fleet) {
    const side = byId("fleet-side");
    const parts = [];
    if (fleet.kv_histogram && fleet.num_shards > FEW) {
      parts.push(h("div", {}, h("h3", {}, "Shards by KV in use"), histogram(fleet.kv_histogram, "KV in use", percent, 300, 84)));
    }
    if (fleet.rate_histogram && fleet.num_shards > FEW) {
      const format = (value) => (value ? `${count(value)} tokens/s` : "0");
      parts.push(h("div", {}, h("h3", {}, "Shards by throughput"), histogram(fleet.rate_histogram, "tokens per second", format, 300, 84)));
    }
    if (fleet.is_aggregated) {
      parts.push(outliers("Fullest", fleet.fullest, (tile) => `${percent(tile.kv_used)} KV`));
      parts.push(outliers("Slowest that run something", fleet.slowest, (tile) => `${count(tile.tokens_per_s)} tokens/s, ${tile.num_running} running`));
    }
    side.replaceChildren(...parts.filter(Boolean));
    show(side, parts.length > 0);
  }

  drawFocus(feed) {
    const { fleet } = feed;
    const box = byId("focus");
    const cell = this.picked === null ? null : fleet.cells[this.picked];
    show(box, Boolean(cell));
    if (!cell) return;
    const tiles = fleet.focus;
    const isHere = tiles.length > 0 && tiles[0].rank === cell.first_rank;
    const heads = ["Shard", "State", "Running", "Waiting", "KV in use", "KV reserved", "Tokens/s", "Version", "Preempted"];
    const rows = (isHere ? tiles : []).map((tile) =>
      h("tr", {},
        h("th", { scope: "row" }, String(tile.rank)),
        ...[
          state(tile), whole(tile.num_running), whole(tile.num_waiting), percent(tile.kv_used), percent(tile.kv_reserved),
          count(tile.tokens_per_s), whole(tile.version), whole(tile.num_preemptions),
        ].map((value, i) => h("td", { "data-label": heads[i + 1] }, value)),
      ),
    );
    const close = h("button", { type: "button", class: "tool", onclick: () => this.pick(this.picked) }, "Close");
    box.replaceChildren(
      h("div", { class: "head" }, h("h3", {}, title(cell)), h("p", { class: "sub" }, isHere ? "" : "Asking for its shards …"), close),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title(cell) },
        h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, rows))),
    );
  }
}

function summary(fleet) {
  if (!fleet.num_shards) return "";
  const parts = [`${whole(fleet.num_live)} of ${whole(fleet.num_shards)} serve`];
  if (fleet.num_draining) parts.push(`${whole(fleet.num_draining)} draining`);
  parts.push(`in ${plural(fleet.num_groups, "expert-parallel group")}`);
  if (fleet.num_groups_wanted !== null && fleet.num_groups_wanted !== fleet.num_groups) parts.push(`${whole(fleet.num_groups_wanted)} wanted`);
  if (fleet.is_aggregated) parts.push(`a cell is ${plural(fleet.cells[0].num_shards, "shard")}`);
  if (fleet.age_s === null) parts.push("their engines have not answered yet");
  else if (fleet.age_s > 5) parts.push(`figures are ${duration(fleet.age_s)} old: engines are slow to answer`);
  return parts.join(" · ");
}

function title(cell) {
  if (cell.num_shards === 1) return `Shard ${cell.first_rank}`;
  const groups = cell.first_group === cell.last_group ? `Group ${cell.first_group}` : `Groups ${cell.first_group}–${cell.last_group}`;
  return `${groups}, shards ${cell.first_rank}–${cell.last_rank}`;
}

function state(tile) {
  return tile.is_live ? (tile.is_draining ? "draining" : "serves") : "down";
}

function rows(cell, feed) {
  const versions = cell.version_min === cell.version_max ? whole(cell.version_max) : `${cell.version_min}–${cell.version_max}`;
  const found = [
    ["Serve", cell.num_shards === 1 ? (cell.num_live ? "yes" : "no, down") : `${cell.num_live} of ${cell.num_shards}`],
    ["KV in use", cell.num_shards > 1 && cell.kv_used !== null ? `${percent(cell.kv_used)}, fullest ${percent(cell.kv_used_max)}` : percent(cell.kv_used)],
    ["KV reserved", percent(cell.kv_reserved)],
    ["Throughput", cell.tokens_per_s === null ? NONE : `${count(cell.tokens_per_s)} tokens/s`],
    ["Running", cell.num_waiting ? `${whole(cell.num_running)}, of them ${cell.num_waiting} wait in the engine` : whole(cell.num_running)],
    ["Weights", cell.version_max === null ? NONE : `version ${versions}${cell.version_min < feed.totals.live_version ? `, live is ${feed.totals.live_version}` : ""}`],
  ];
  if (cell.num_draining) found.splice(1, 0, ["Draining", String(cell.num_draining)]);
  return found;
}

const tipOf = (cell, feed) => cell && { title: title(cell), rows: rows(cell, feed) };
const told = (cell, feed) => `${title(cell)}. ${rows(cell, feed).map(([name, value]) => `${name}: ${value}`).join(". ")}`;

function outliers(name, tiles, tell) {
  if (!tiles.length) return null;
  return h("div", { class: "outliers" }, h("h3", {}, name), h("ol", {}, tiles.map((tile) => h("li", {}, h("b", {}, `Shard ${tile.rank}`), ` ${tell(tile)}`))));
}
