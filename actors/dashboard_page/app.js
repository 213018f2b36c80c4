// Asks for the feed every second, says how that goes, and hands it to the views.

import { timeline } from "./charts.js";
import { byId, h, show, text } from "./dom.js";
import { FleetView } from "./fleet.js";
import { clock, count, duration, whole } from "./format.js";
import { Inspector } from "./inspector.js";
import { LanesView } from "./lanes.js";
import { drawDrafts, drawFailures, drawFigures, drawGroups, drawMismatch, drawSyncs } from "./panels.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 30_000;
const PATIENCE_MS = 10_000;
const RATE_SPAN_S = 600;
const KEY = "longroll-key";

const query = { order: "longest", find: "", cell: null };
let feed = null;
let failures = 0;
let timer = null;
let asking = null;
let nextAt = 0;
let lostAt = null;

const inspector = new Inspector();
const fleet = new FleetView((cell) => ask({ cell }), inspector);
const lanes = new LanesView(ask, inspector);

function storage(action) {
  try {
    return action();
  } catch {
    return null; // refused: the key is asked for again with every visit
  }
}

let key = storage(() => sessionStorage.getItem(KEY));

function ask(changed) {
  Object.assign(query, changed);
  poll();
}

async function poll() {
  clearTimeout(timer);
  asking?.abort();
  asking = null;
  if (document.hidden) return say("paused", "Paused while hidden");
  const mine = (asking = new AbortController());
  const patience = setTimeout(() => mine.abort("slow"), PATIENCE_MS);
  try {
    const parameters = new URLSearchParams({ order: query.order, find: query.find });
    if (query.cell !== null) parameters.set("cell", query.cell);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(`dashboard/feed?${parameters}`, { headers, cache: "no-store", credentials: "omit", signal: mine.signal });
    if (response.status === 401 || response.status === 403) return refuse(response.status);
    if (!response.ok) throw new Error(await reason(response));
    const message = await response.json();
    if (asking !== mine) return;
    arrived(message);
  } catch (error) {
    if (asking !== mine) return; // a newer question is under way
    lose(mine.signal.reason === "slow" ? `no answer within ${duration(PATIENCE_MS / 1e3)}` : error instanceof TypeError ? "it cannot be reached" : error.message);
  } finally {
    clearTimeout(patience);
  }
}

async function reason(response) {
  const told = await response.json().then((body) => body.detail ?? body.error?.message, () => null);
  return typeof told === "string" ? `it answers ${response.status}: ${told}` : `it answers ${response.status}`;
}

function arrived(message) {
  feed = message;
  const wasLost = failures > 0;
  failures = 0;
  lostAt = null;
  if (wasLost) announce("The connection is back.");
  show(byId("banner"), false);
  show(byId("gate"), false);
  show(byId("content"), true);
  show(byId("forget"), Boolean(key));
  say("live", `Live, ${clock(feed.wall_s)}`);
  draw();
  later(EVERY_MS);
}

function lose(why) {
  failures += 1;
  lostAt ??= Date.now();
  const wait = Math.min(SLOWEST_MS, EVERY_MS * 2 ** failures) * (0.8 + 0.4 * Math.random());
  nextAt = Date.now() + wait;
  show(byId("banner"), true);
  const seen = feed ? `What you see is from ${clock(feed.wall_s)}.` : "Nothing has been seen of it yet.";
  byId("banner-text").replaceChildren(h("b", {}, "The connection to the service is lost"), ` since ${clock(lostAt / 1e3)}: ${why}. ${seen}`);
  say("lost", "Lost");
  if (failures === 1) announce(`The connection to the service is lost: ${why}.`);
  later(wait);
}

function refuse(status) {
  const had = key;
  key = null;
  storage(() => sessionStorage.removeItem(KEY));
  say("gate", "A key is needed");
  show(byId("banner"), false);
  show(byId("content"), false);
  show(byId("forget"), false);
  show(byId("gate"), true);
  text(byId("gate-title"), !had ? "A key is needed" : status === 403 ? "This key may not look" : "This key was refused");
  if (had && status === 403) text(byId("gate-text"), "The feed is shown to holders of a key with the role operator, and this one has another role.");
  announce(byId("gate-title").textContent);
  byId("key").focus();
}

function later(wait) {
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

function say(state, words) {
  document.body.dataset.state = state;
  text(byId("link-text"), words);
}

const announce = (words) => text(byId("announce"), words);

function draw() {
  document.title = `${count(rateNow())} tokens/s · Longroll`;
  show(byId("simulated"), feed.is_simulated);
  show(byId("notes"), feed.notes.length > 0);
  byId("notes").replaceChildren(...feed.notes.map((note) => h("li", {}, note)));
  drawRate();
  drawFigures(feed);
  fleet.draw(feed);
  lanes.draw(feed);
  for (const panel of [drawGroups, drawSyncs, drawDrafts, drawMismatch, drawFailures]) panel(feed);
  inspector.refresh();
}

const rateNow = () => feed.rates.at(-1)?.tokens_per_s ?? 0;

function drawRate() {
  const { totals, fleet: shards } = feed;
  text(byId("rate"), count(rateNow()));
  const each = shards.num_live ? `${count(rateNow() / shards.num_live)} a shard · ` : "";
  text(byId("rate-sub"), `${each}${count(totals.num_tokens)} tokens in all`);
  const box = byId("rate-chart");
  if (feed.rates.length < 2) return box.replaceChildren(h("p", { class: "empty" }, "Nothing has been generated yet."));
  const oldest = feed.rates[0]?.at_s ?? feed.now_s;
  const span = Math.max(60, Math.min(feed.is_simulated ? 6 * RATE_SPAN_S : RATE_SPAN_S, feed.now_s - oldest));
  box.replaceChildren(timeline(feed.rates, feed.syncs, feed.now_s, span, Math.max(240, box.clientWidth), 132));
  text(byId("rate-caption"), feed.syncs.length ? "▾ new weights" : "");
}

function countdown() {
  if (document.body.dataset.state !== "lost") return;
  const wait = Math.max(0, Math.ceil((nextAt - Date.now()) / 1e3));
  text(byId("link-text"), wait ? `Lost, again in ${whole(wait)}\u202fs` : "Lost, trying");
}

const THEMES = { auto: ["Auto", "as the system has them"], light: ["Light", "light"], dark: ["Dark", "dark"] };

function setTheme(name) {
  const root = document.documentElement;
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
  storage(() => (name === "auto" ? localStorage.removeItem("longroll-theme") : localStorage.setItem("longroll-theme", name)));
  const [label, meaning] = THEMES[name];
  text(byId("theme"), label);
  byId("theme").setAttribute("aria-label", `Colours: ${meaning}`);
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(names[(names.indexOf(now) + 1) % names.length]);
});
byId("forget").addEventListener("click", () => {
  key = null;
  storage(() => sessionStorage.removeItem(KEY));
  poll();
});
byId("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key").value.trim();
  if (!/^[\x20-\x7e]+$/.test(given)) return text(byId("gate-text"), "A key has letters, digits and signs of ASCII only.");
  key = given;
  byId("key").value = "";
  storage(() => sessionStorage.setItem(KEY, key));
  say("starting", "Connecting");
  poll();
});
byId("retry").addEventListener("click", poll);
document.addEventListener("visibilitychange", poll);
addEventListener("online", poll);
addEventListener("resize", () => feed && drawRate());
setInterval(countdown, 500);
setTheme(document.documentElement.dataset.theme ?? "auto");
poll();
