// Small charts as SVG, drawn anew with every message. Pure: data in, an element out.

import { s } from "./dom.js";
import { count, duration } from "./format.js";

/** A round number at or above `value`, so that an axis ends on something one can read. */
export function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 7.5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/**
 * Throughput over time, with a tick at every weight sync.
 * @param points [{at_s, tokens_per_s}], ascending. @param marks [{at_s, is_refused}]
 */
export function timeline(points, marks, now_s, span_s, width, height) {
  const top = niceTop(Math.max(1, ...points.map((point) => point.tokens_per_s)));
  const left = 44;
  const base = height - 18;
  const x = (at) => left + ((at - now_s) / span_s + 1) * (width - left);
  const y = (rate) => 6 + (base - 6) * (1 - rate / top);
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "timeline" });
  chart.setAttribute("aria-label", `Tokens per second over the last ${duration(span_s)}, up to ${count(top)}`);
  for (const part of [0, 0.5, 1]) {
    chart.append(s("line", { class: "grid", x1: left, x2: width, y1: y(top * part), y2: y(top * part) }));
    chart.append(s("text", { class: "tick", x: left - 8, y: y(top * part) + 4, "text-anchor": "end" }, count(top * part)));
  }
  for (const [part, anchor] of [[1, "start"], [0.5, "middle"]]) {
    const label = `${duration(span_s * part)} ago`;
    chart.append(s("text", { class: "tick", x: x(now_s - span_s * part), y: height - 3, "text-anchor": anchor }, label));
  }
  chart.append(s("text", { class: "tick", x: width, y: height - 3, "text-anchor": "end" }, "now"));
  const shown = points.filter((point) => point.at_s >= now_s - span_s);
  if (shown.length > 1) {
    const line = shown.map((point, i) => `${i ? "L" : "M"}${x(point.at_s).toFixed(1)} ${y(point.tokens_per_s).toFixed(1)}`).join("");
    const ends = `L${x(shown.at(-1).at_s).toFixed(1)} ${base}L${x(shown[0].at_s).toFixed(1)} ${base}Z`;
    chart.append(s("path", { class: "area", d: line + ends }), s("path", { class: "line", d: line }));
  }
  for (const mark of marks) {
    if (mark.at_s < now_s - span_s) continue;
    const at = x(mark.at_s);
    const kind = mark.reason === null ? "mark" : "mark refused";
    chart.append(s("line", { class: kind, x1: at, x2: at, y1: 6, y2: base }), s("text", { class: kind, x: at, y: 6, "text-anchor": "middle", dy: "0.1em" }, mark.reason === null ? "▾" : "✕"));
  }
  return chart;
}

/** A line without axes; null breaks it. With `isLog` equal ratios are equal heights. */
export function sparkline(values, width, height, isLog = false) {
  const known = values.filter((value) => value !== null && (!isLog || value > 0));
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", "aria-hidden": "true" });
  if (!known.length) return chart;
  const of = isLog ? Math.log10 : (value) => value;
  const low = isLog ? of(Math.min(...known)) : 0;
  const high = of(Math.max(...known));
  const range = high - low || 1;
  const x = (i) => 3 + (values.length > 1 ? (i / (values.length - 1)) * (width - 6) : (width - 6) / 2);
  const y = (value) => (high === low ? height / 2 : height - 3 - ((of(value) - low) / range) * (height - 6));
  let path = "";
  let isOpen = false;
  values.forEach((value, i) => {
    const isKnown = value !== null && (!isLog || value > 0);
    if (isKnown) path += `${isOpen ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    isOpen = isKnown;
  });
  chart.append(s("path", { class: "line", d: path }));
  const last = values.findLastIndex((value) => value !== null && (!isLog || value > 0));
  chart.append(s("circle", { class: "end", cx: x(last), cy: y(values[last]), r: 2.5 }));
  return chart;
}

/** Numbers of shards in equal bins, with the ends of the axis named. */
export function histogram(data, name, format, width, height) {
  const most = Math.max(1, ...data.counts);
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", class: "histogram" });
  const step = width / data.counts.length;
  const base = height - 16;
  data.counts.forEach((number, i) => {
    const size = number ? Math.max(2, (number / most) * (base - 14)) : 0;
    chart.append(s("rect", { class: "bin", x: i * step + 1, y: base - size, width: step - 2, height: size, rx: 1.5 }));
    if (number) chart.append(s("text", { class: "tick", x: i * step + step / 2, y: base - size - 3, "text-anchor": "middle" }, count(number)));
  });
  chart.append(s("line", { class: "grid", x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5 }));
  chart.append(s("text", { class: "tick", x: 0, y: height - 3 }, format(data.low)));
  chart.append(s("text", { class: "tick", x: width, y: height - 3, "text-anchor": "end" }, format(data.high)));
  const told = data.counts.map((number, i) => `${number} up to ${format(data.low + ((data.high - data.low) * (i + 1)) / data.counts.length)}`);
  chart.setAttribute("aria-label", `Shards by ${name}: ${told.join(", ")}`);
  return chart;
}

/** One column for each sync, the newest on the right, on a scale from 0. */
export function columns(points, valueOf, width, height, kind) {
  const top = niceTop(Math.max(1e-3, ...points.map((point) => valueOf(point))));
  const slots = Math.max(16, points.length);
  const step = width / slots;
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", class: `columns-chart ${kind}`, "aria-hidden": "true" });
  chart.append(s("line", { class: "grid", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 }));
  chart.append(s("line", { class: "grid dashed", x1: 0, x2: width, y1: 12.5, y2: 12.5 }));
  chart.append(s("text", { class: "tick", x: 0, y: 9 }, duration(top)));
  points.forEach((point, i) => {
    const x = width - (points.length - i) * step;
    if (point.reason !== null) {
      chart.append(s("text", { class: "refused", x: x + step / 2, y: height - 3, "text-anchor": "middle" }, "✕"));
      return;
    }
    const size = Math.max(1, (valueOf(point) / top) * (height - 13));
    chart.append(s("rect", { class: "column", x: x + 1, y: height - size, width: step - 2, height: size, rx: 1.5 }));
  });
  return chart;
}
