// Numbers as people read them, with their units. Pure.

const NARROW = "\u202f"; // no-break, narrow
const STEPS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const DIGITS = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const NONE = "–";

function scaled(value, suffix) {
  const size = Math.abs(value);
  const text = size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text) + suffix;
}

/** 12345 → "12.3k"; below 10,000 every digit is shown. */
export function count(value) {
  if (value === null || value === undefined) return NONE;
  if (Math.abs(value) < 1e4) return DIGITS.format(Math.round(value));
  for (const [step, suffix] of STEPS) if (Math.abs(value) >= step * 0.9995) return scaled(value / step, suffix);
  return DIGITS.format(value);
}

/** Every digit, with separators. */
export const whole = (value) => (value === null || value === undefined ? NONE : DIGITS.format(value));

export const percent = (share) =>
  share === null || share === undefined
    ? NONE
    : `${share > 0 && share < 0.0995 ? (share * 100).toFixed(1) : (share * 100).toFixed(0)}${NARROW}%`;

export function bytes(value) {
  if (!value) return NONE;
  for (const [step, suffix] of STEPS) if (value >= step * 0.9995) return `${scaled(value / step, "")}${NARROW}${suffix}B`;
  return `${value}${NARROW}B`;
}

/** Seconds → "340 ms", "12.4 s", "4 min 10 s", "3 h 20 min". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds === 0) return `0${NARROW}s`;
  if (seconds < 0.0005) return `<${NARROW}1${NARROW}ms`;
  if (seconds < 0.9995) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 1 : 0)}${NARROW}ms`;
  if (seconds < 59.5) return `${seconds < 9.95 ? seconds.toFixed(1) : seconds.toFixed(0)}${NARROW}s`;
  const whole = Math.round(seconds);
  if (whole < 3600) {
    const rest = whole % 60;
    return `${Math.floor(whole / 60)}${NARROW}min${rest && whole < 600 ? ` ${rest}${NARROW}s` : ""}`;
  }
  const minutes = Math.round(whole / 60);
  const rest = minutes % 60;
  return `${Math.floor(minutes / 60)}${NARROW}h${rest ? ` ${rest}${NARROW}min` : ""}`;
}

export const ago = (seconds) => (seconds < 1.5 ? "now" : `${duration(seconds)} ago`);

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** 0.00021 → "2.1 × 10⁻⁴". */
export function tiny(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  if (Math.abs(value) >= 0.01) return value.toFixed(3);
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa}${NARROW}×${NARROW}10${[...String(Number(exponent))].map((c) => RAISED[c]).join("")}`;
}

export const clock = (wall_s) => new Date(wall_s * 1e3).toLocaleTimeString("en-GB");

export const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;

/** "engine_dead" → "engine dead". */
export const words = (name) => name.replaceAll("_", " ");
