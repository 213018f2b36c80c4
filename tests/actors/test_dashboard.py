"""The page in a real browser: what it shows, says and does, in light, dark, on a phone and with 1,000 shards.

Pictures are written to the folder that LONGROLL_SCREENSHOTS names.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from playwright.sync_api import Browser, Page, expect, sync_playwright

from actors.dashboard import router
from launch.dashboard_demo import Demo, DemoOptions
from launch.simulate import parse
from rollout.errors import ServiceLost
from rollout.feed import MAX_LANES, Feed, FeedQuery
from tests.actors.dashboard_feeds import HOSTILE, NUM_SHARDS, busy_feed, busy_history, empty_feed

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "an operator's key"
PHONE = {"width": 375, "height": 812}
DESK = {"width": 1440, "height": 1000}
TOUCH_PX = 36  # smallest side of what a finger must hit: WCAG 2.2 asks for 24 (2.5.8), phones' makers for 44


class Service:
    """Stands where the controller stands; `scene` says how it answers. Counts what it is asked."""

    def __init__(self) -> None:
        self.scene = "busy"
        self.queries: list[FeedQuery] = []
        self.history = busy_history()
        self.demo: Demo | None = None
        self.is_locked = False

    async def feed(self, query: FeedQuery) -> Feed:
        self.queries.append(query)
        if self.scene == "gone":
            raise ServiceLost("the rollout service is gone: its actor died")
        if self.scene == "empty":
            return empty_feed(query)
        if self.scene == "large":
            assert self.demo is not None
            return await self.demo.feed(query)
        return busy_feed(query, moment=len(self.queries), history=self.history)

    async def check_key(self, authorization: str | None = Header(default=None)) -> None:
        if self.is_locked and authorization is None:
            raise HTTPException(401, "no key")
        if self.is_locked and authorization != f"Bearer {KEY}":
            raise HTTPException(403, "another role")


class Server:
    """The routes on a free port of this machine."""

    def __init__(self, service: Service) -> None:
        app = FastAPI()
        app.include_router(router(service.feed, feed_dependencies=[Depends(service.check_key)]))
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/dashboard"

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with Server(service) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser, service: Service, address: str) -> Iterator:
    """Opens the page in a context of its own; anything the browser complains about fails the test."""
    service.scene, service.is_locked, service.queries = "busy", False, []
    contexts, complaints = [], []

    def open_page(
        scene: str = "busy", colors: str = "light", viewport=DESK, is_locked: bool = False, touch=False
    ) -> Page:
        service.scene, service.is_locked = scene, is_locked
        context = browser.new_context(viewport=viewport, color_scheme=colors, has_touch=touch, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = re.compile(r"status of (401|403|503)|ERR_CONNECTION_REFUSED")  # the tests' own doing
    assert [text for text in complaints if not expected.search(text)] == []


def keep(page: Page, name: str, is_full: bool = True) -> None:
    folder = os.environ.get("LONGROLL_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=is_full)


def sticks_out(page: Page) -> list[str]:
    """What makes the page wider than its window; empty where nobody must scroll sideways."""
    found: list[str] = page.evaluate("""() => {
        const { scrollWidth, clientWidth } = document.documentElement;
        if (scrollWidth <= clientWidth) return [];
        const all = [...document.body.querySelectorAll("*")];
        const right = (one) => one.getBoundingClientRect().right;
        const wide = all.filter((one) => right(one) > clientWidth);
        return wide.map((one) => `${one.tagName}.${one.getAttribute("class")} ${right(one)}`);
    }""")
    return found


def wait_until(page: Page, condition: Callable[[], bool], timeout_s: float = 8.0) -> None:
    """The browser goes on meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        page.wait_for_timeout(50)


def hide(page: Page, is_hidden: bool) -> None:
    """As if another tab were in front: headless tabs never are hidden."""
    how = "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
    page.evaluate(how if is_hidden else "delete document.hidden")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_shows_everything_that_the_feed_has(visit, service) -> None:
    page = visit()
    expect(page.locator("#rate")).to_have_text(re.compile(r"^\d[\d,.]*k?$"))
    expect(page.locator(".cells .cell")).to_have_count(NUM_SHARDS)
    expect(page.locator("#fleet-sub")).to_contain_text("5 of 6 serve")
    down, draining, behind = (page.locator(f".cells .cell.is-{kind}") for kind in ("down", "draining", "behind"))
    expect(down).to_have_attribute("aria-label", re.compile("no, down"))
    expect(draining).to_have_count(1)
    expect(behind).to_have_attribute("aria-label", re.compile("version 6, live is 7"))
    expect(page.locator("#lanes .lane")).to_have_count(19)
    assert page.locator("#lanes path.moved").count() > 0 and page.locator("#lanes rect.lost").count() == 1
    assert page.locator("#lanes rect.age-0").count() > 0 and page.locator("#lanes rect.age-1").count() > 0
    expect(page.locator("#groups tbody tr")).to_have_count(10)
    expect(page.locator("#drafts")).to_contain_text("Acceptance fell at a sync: sibling")
    expect(page.locator("#mismatch tbody tr")).to_have_count(5)
    expect(page.locator("#mismatch")).to_contain_text("× 10⁻⁴".replace(" ", "\u202f"))
    expect(page.locator("#syncs")).to_contain_text("another digest than its sender")
    expect(page.locator("#failures")).to_contain_text("22 trajectories")
    keep(page, "desk-light")
    before = len(service.queries)
    wait_until(page, lambda: len(service.queries) >= before + 2)


def test_what_others_wrote_is_text_only(visit) -> None:
    page = visit()
    expect(page.locator("#lanes")).to_contain_text(HOSTILE[:40])
    expect(page.locator("#failures")).to_contain_text("<script>window.hacked=1</script>")
    expect(page.locator("#groups")).to_contain_text("<script>")
    page.locator(".lane-name", has_text="<img").first.click()
    expect(page.locator("#inspector-title")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#content img, #content script, .inspector img").count() == 0


def test_dark_light_and_what_the_system_has(visit) -> None:
    page = visit(colors="dark")
    expect(page.locator(".cells .cell")).to_have_count(NUM_SHARDS)
    dark = background(page)
    keep(page, "desk-dark")
    toggle = page.locator("#theme")
    toggle.click()
    light = background(page)
    assert dark != light and toggle.get_attribute("aria-label") == "Colours: light"
    page.reload()
    assert background(page) == light, "what was chosen is kept"
    toggle.click()
    assert background(page) == dark
    toggle.click()
    assert toggle.inner_text() == "Auto" and background(page) == dark
    page.emulate_media(color_scheme="light")
    assert background(page) == light


def test_details_by_pointer_and_by_key(visit, service) -> None:
    page = visit()
    bar = page.locator("#lanes .bar").nth(3)
    bar.scroll_into_view_if_needed()
    bar.hover()
    expect(page.locator("#tip")).to_contain_text("Weights")
    keep(page, "tip", is_full=False)
    page.locator(".lane-name").first.focus()
    page.keyboard.press("ArrowDown")
    second = page.evaluate("document.activeElement.innerText")
    assert second == page.locator(".lane-name").nth(1).inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("#inspector")).to_be_visible()
    expect(page.locator("#inspector tbody tr").first).to_contain_text("runs")
    keep(page, "inspector", is_full=False)
    page.keyboard.press("Escape")
    expect(page.locator("#inspector")).to_be_hidden()
    assert page.evaluate("document.activeElement.innerText") == second, "the focus goes back"
    page.locator(".cells .cell").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#focus")).to_contain_text("Shard 1")
    asked = len(service.queries)
    wait_until(page, lambda: len(service.queries) > asked + 1)
    assert page.evaluate("document.activeElement.classList.contains('cell')"), "messages do not take the focus away"


def test_asks_for_other_trajectories(visit, service) -> None:
    page = visit()
    page.select_option("#order", "failed")
    expect(page.locator("#lanes .lane")).to_have_count(1)
    expect(page.locator("#lanes .lane")).to_have_attribute("data-state", "failed")
    page.select_option("#order", "newest")
    page.fill("#find", "math/2/")
    expect(page.locator("#lanes .lane")).to_have_count(4)
    page.fill("#find", "nobody")
    expect(page.locator("#lanes-empty")).to_contain_text("has “nobody” in its id")
    assert service.queries[-1].find == "nobody"


def test_a_phone(visit) -> None:
    page = visit(viewport=PHONE, touch=True)
    expect(page.locator("#lanes .lane")).to_have_count(19)
    keep(page, "phone-light")
    assert sticks_out(page) == []
    for selector in ("button:visible", "select:visible", "input[type=search]", ".segments label", ".lane-name"):
        for box in [one.bounding_box() for one in page.locator(selector).all()[:40]]:
            assert box is not None and min(box["width"], box["height"]) >= TOUCH_PX, (selector, box)
    page.locator(".lane-name").first.tap()
    expect(page.locator("#inspector")).to_be_visible()
    box = page.locator("#inspector").bounding_box()
    assert box is not None and box["x"] == 0 and box["width"] == PHONE["width"]
    keep(page, "phone-inspector", is_full=False)
    assert sticks_out(page) == []


def test_a_thousand_shards(visit, service) -> None:
    request = parse(["policies=divided", "gpus=1000", "prompts=800", "n_samples_per_prompt=8", "kv_tokens=40000"])
    demo = service.demo = Demo(request, DemoOptions(speed=10.0, skip_s=40.0))
    demo.start()
    try:
        page = visit("large")
        expect(page.locator(".cells .cell")).to_have_count(125)
        expect(page.locator("#fleet-sub")).to_contain_text("1,000 of 1,000 serve")
        expect(page.locator("#simulated")).to_be_visible()
        expect(page.locator("#lanes .lane")).to_have_count(MAX_LANES)
        expect(page.locator("#fleet-side")).to_contain_text("Fullest")
        page.locator(".cells .cell").nth(17).click()
        expect(page.locator("#focus tbody tr")).to_have_count(8)
        expect(page.locator("#focus")).to_contain_text("Group 17, shards 136–143")
        keep(page, "thousand-light")
        page.emulate_media(color_scheme="dark")
        keep(page, "thousand-dark")
        page.set_viewport_size(PHONE)
        keep(page, "thousand-phone")
        assert sticks_out(page) == []
        with ThreadPoolExecutor(1) as apart:  # in this thread the browser's own loop runs
            feed = apart.submit(asyncio.run, demo.feed(FeedQuery(cell=3))).result()
        assert len(feed.to_json()) < 256 * 1024
    finally:
        demo.stop()


def test_nothing_has_happened_yet(visit) -> None:
    page = visit("empty")
    expect(page.locator("#fleet-empty")).to_contain_text("No shard has started yet")
    for place, words in (
        ("#lanes-empty", "No trajectory has run yet"),
        ("#groups", "No group is waiting"),
        ("#syncs", "No weights were published"),
        ("#drafts", "No shard has drafted"),
        ("#mismatch", "No training step has reported"),
        ("#failures", "Nothing has failed"),
    ):
        expect(page.locator(place)).to_contain_text(words)
    keep(page, "empty-light")
    page.set_viewport_size(PHONE)
    keep(page, "empty-phone")
    assert sticks_out(page) == []


def test_a_lost_connection_is_said_and_mended(visit, service) -> None:
    page = visit()
    expect(page.locator("#link-text")).to_contain_text("Live")
    service.scene = "gone"
    expect(page.locator("#banner-text")).to_contain_text("The connection to the service is lost")
    expect(page.locator("#banner-text")).to_contain_text("503: the rollout service is gone")
    expect(page.locator("#link-text")).to_contain_text("Lost")
    expect(page.locator("#announce")).to_contain_text("lost")
    expect(page.locator(".cells .cell")).to_have_count(NUM_SHARDS)
    keep(page, "lost-light", is_full=False)
    asked = len(service.queries)
    page.wait_for_timeout(3000)
    assert len(service.queries) - asked <= 2, "it asks less and less often"
    service.scene = "busy"
    page.click("#retry")
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#announce")).to_have_text("The connection is back.")


def test_asks_for_a_key_once(visit, service) -> None:
    page = visit(is_locked=True)
    expect(page.locator("#gate")).to_be_visible()
    expect(page.locator("#content")).to_be_hidden()
    keep(page, "gate-light", is_full=False)
    page.fill("#key", "a client's key")
    page.click("#gate button")
    expect(page.locator("#gate-title")).to_have_text("This key may not look")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_visible()
    page.reload()
    expect(page.locator("#content")).to_be_visible()
    assert KEY not in page.url and page.evaluate("localStorage.length") == 0, "the key stays in this tab"
    page.click("#forget")
    expect(page.locator("#gate")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_rests_while_it_is_hidden(visit, service) -> None:
    page = visit()
    expect(page.locator("#link-text")).to_contain_text("Live")
    hide(page, True)
    expect(page.locator("#link-text")).to_have_text("Paused while hidden")
    asked = len(service.queries)
    page.wait_for_timeout(2200)  # two polls
    assert len(service.queries) <= asked + 1, "only what was on its way"
    hide(page, False)
    expect(page.locator("#link-text")).to_contain_text("Live")
    assert len(service.queries) > asked
