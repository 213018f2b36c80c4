// Elements without markup: what others wrote (ids, reasons) only ever becomes text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "vars") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

/** An HTML element; strings among its children become text nodes. `vars` sets custom properties. */
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

export function show(element, isShown) {
  element.hidden = !isShown;
}

/** Keeps one child of `parent` for every item, by key and in order; what has the focus keeps it. */
export function keyed(parent, items, keyOf, make, update) {
  const old = (parent.keyedChildren ??= new Map());
  const next = new Map();
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  let place = parent.firstChild;
  items.forEach((item, index) => {
    const key = keyOf(item, index);
    const child = old.get(key) ?? make(item, index);
    next.set(key, child);
    update(child, item, index);
    if (child === place) place = place.nextSibling;
    else parent.insertBefore(child, place);
  });
  for (const [key, child] of old) if (!next.has(key)) child.remove();
  parent.keyedChildren = next;
  if (focused && focused.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
}

/** Arrow keys move the focus among the children that `selector` finds; one of them is a tab stop. */
export function roving(container, selector, columns = () => 1) {
  const stops = () => [...container.querySelectorAll(selector)];
  container.addEventListener("focusin", (event) => {
    const here = event.target.closest(selector);
    if (here) for (const stop of stops()) stop.tabIndex = stop === here ? 0 : -1;
  });
  container.addEventListener("keydown", (event) => {
    const all = stops();
    const at = all.indexOf(document.activeElement);
    if (at < 0) return;
    const wide = columns();
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide, Home: -at, End: all.length - 1 - at };
    if (!(event.key in moves)) return;
    event.preventDefault();
    all[Math.max(0, Math.min(all.length - 1, at + moves[event.key]))].focus();
  });
  return () => {
    const all = stops();
    if (all.length && !all.some((stop) => stop.tabIndex === 0)) all[0].tabIndex = 0;
  };
}
