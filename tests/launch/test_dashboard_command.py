"""The commands around the dashboard: keys, errors, and the simulated fleet."""

from __future__ import annotations

import asyncio

import pytest
from fastapi.testclient import TestClient

from launch.dashboard import application, main
from launch.dashboard_demo import DRAWN, OVER, Demo, DemoOptions
from launch.dashboard_demo import main as demo_main
from launch.simulate import parse
from rollout.errors import ServiceLost
from rollout.feed import Feed, FeedQuery, LaneOrder
from tests.actors.dashboard_feeds import busy_feed

SMALL = ["policies=divided", "gpus=16", "prompts=8", "n_samples_per_prompt=4", "output_tokens=8192", "rl_steps=2"]


def client_of(find_feed) -> TestClient:
    return TestClient(application(find_feed, "secret"))


async def answers(query: FeedQuery) -> Feed:
    return busy_feed(query)


def test_the_page_is_for_anybody_and_the_feed_for_holders_of_the_key() -> None:
    client = client_of(answers)
    page = client.get("/dashboard")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for name in ("app.js", "style.css", "theme.js"):
        asset = client.get(f"/dashboard/assets/{name}")
        assert asset.status_code == 200 and asset.headers["x-content-type-options"] == "nosniff"
        assert (
            client.get(f"/dashboard/assets/{name}", headers={"If-None-Match": asset.headers["etag"]}).status_code == 304
        )
    for headers in (
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": "Basic secret"},
        {"Authorization": "secret"},
    ):
        assert client.get("/dashboard/feed", headers=headers).status_code == 401
    feed = client.get("/dashboard/feed", headers={"Authorization": "Bearer secret"})
    assert feed.status_code == 200 and feed.json()["totals"]["live_version"] == 7
    assert feed.headers["cache-control"] == "no-store" and feed.headers["content-encoding"] == "gzip"
    plain = client.get("/dashboard/feed", headers={"Authorization": "Bearer secret", "Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.json() == feed.json()


@pytest.mark.parametrize("name", ["..%2fdashboard.py", "%2e%2e/dashboard.py", "nothing.js", "index.html%00"])
def test_only_the_page_s_own_files_are_served(name: str) -> None:
    assert client_of(answers).get(f"/dashboard/assets/{name}").status_code == 404


@pytest.mark.parametrize("query", ["order=random", "cell=-1", "cell=x", "find=" + "x" * 97])
def test_a_query_that_makes_no_sense_is_refused(query: str) -> None:
    answer = client_of(answers).get(f"/dashboard/feed?{query}", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 422


def test_a_lost_service_is_said() -> None:
    async def fails(query: FeedQuery) -> Feed:
        raise ServiceLost("no service runs in namespace 'x'")

    answer = client_of(fails).get("/dashboard/feed", headers={"Authorization": "Bearer secret"})
    assert (answer.status_code, answer.json()["detail"]) == (503, "no service runs in namespace 'x'")
    assert answer.headers["retry-after"] == "5"


def test_the_demo_runs_to_its_end_as_the_simulator_does() -> None:
    # Nothing is waited for: the whole run is skipped.
    demo = Demo(parse([*SMALL, "over_sampling=1.5", "max_staleness=1"]), DemoOptions(skip_s=1e9))
    demo.start()
    feed = asyncio.run(demo.feed(FeedQuery(order=LaneOrder.NEWEST, cell=0)))
    demo.stop()
    assert feed.is_simulated and feed.notes == (DRAWN, OVER)
    assert feed.totals.num_finished >= 2 * 8 * 4, "two steps of eight groups of four"
    assert (feed.fleet.num_shards, len(feed.fleet.cells), len(feed.fleet.focus)) == (16, 16, 1)
    assert [sync.version for sync in feed.syncs] == [1, 2]
    assert len(feed.mismatches) == 2
    assert any(lane.state == "completed" for lane in feed.lanes.shown)
    versions = {span.version for lane in feed.lanes.shown for bar in lane.bars for span in bar.spans}
    assert versions == {0, 1}
    tokens = sum(bar.num_tokens for lane in feed.lanes.shown for bar in lane.bars)
    assert tokens > 0 and feed.totals.num_tokens >= tokens


@pytest.mark.parametrize(
    ("command", "argument", "expected"),
    [
        (main, "nmespace=x", "namespace"),
        (main, "port=http", "type int"),
        (demo_main, "policies=static,divided", "policies"),
        (demo_main, "speed=0", "speed"),
        (demo_main, "seeds=1,2", "seeds"),
    ],
)
def test_wrong_options_are_named(command, argument: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([argument]) == 2
    assert expected in capsys.readouterr().err
