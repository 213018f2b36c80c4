// Details: a tip beside the pointer, and a panel for what was chosen by click, tap or key.

import { byId, h, show, text } from "./dom.js";

export class Inspector {
  constructor() {
    this.box = byId("inspector");
    this.tip = byId("tip");
    this.render = null;
    byId("inspector-close").addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.render) this.close();
    });
    document.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") this.point(event.clientX, event.clientY);
    });
    document.addEventListener("pointerleave", () => this.hideTip());
    document.addEventListener("scroll", () => this.hideTip(), { passive: true });
    document.addEventListener("click", (event) => event.target.closest?.(".bar")?.onPick?.());
    document.addEventListener("focusin", (event) => {
      if (event.target.tipOf && event.target.matches(":focus-visible")) this.showTip(event.target.tipOf(), event.target.getBoundingClientRect());
      else this.hideTip();
    });
  }

  /** @param render called now and after every message; returns what is shown */
  open(title, render) {
    this.opener = document.activeElement;
    this.render = render;
    text(byId("inspector-title"), title);
    this.refresh();
    show(this.box, true);
    byId("inspector-close").focus({ preventScroll: true });
    this.hideTip();
  }

  close() {
    show(this.box, false);
    this.render = null;
    if (this.opener?.isConnected) this.opener.focus({ preventScroll: true });
  }

  /** After a message: what is open shows the newest figures. */
  refresh() {
    if (this.render) byId("inspector-body").replaceChildren(...this.render().filter(Boolean));
    if (this.at && !this.tip.hidden) this.point(...this.at);
  }

  point(x, y) {
    this.at = [x, y];
    let target = document.elementFromPoint(x, y);
    while (target && !target.tipOf) target = target.parentElement;
    if (target) this.showTip(target.tipOf(), { left: x, right: x, top: y, bottom: y });
    else this.hideTip();
  }

  showTip(content, box) {
    if (!content) return this.hideTip();
    this.tip.replaceChildren(h("b", {}, content.title), h("dl", { class: "rows" }, content.rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    show(this.tip, true);
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const x = Math.max(8, Math.min(box.right + 14, innerWidth - width - 8));
    const y = box.bottom + 16 + height > innerHeight ? Math.max(8, box.top - height - 12) : box.bottom + 16;
    this.tip.style.setProperty("transform", `translate(${Math.round(x)}px, ${Math.round(y)}px)`);
  }

  hideTip() {
    this.at = null;
    show(this.tip, false);
  }
}
