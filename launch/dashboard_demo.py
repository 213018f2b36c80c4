"""The dashboard of a fleet that is not there: ``python -m launch.dashboard_demo gpus=1000 prompts=512 port=8900``.

Owns the options, the server on this machine, and the pace: `speed` simulated seconds pass in a second. Takes the
scenario of `launch.simulate`; `policies` and `seeds` must name one each. The simulator computes neither the acceptance
of drafts nor mismatch; what is shown of them is drawn at random, and the page says so.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import uvicorn
from fastapi import FastAPI

from actors.dashboard import router
from launch.arguments import split_arguments
from launch.simulate import Request, parse, work
from rollout.errors import InvalidRequest
from rollout.feed import Feed, FeedQuery, MismatchPoint, SourceAcceptance, Speculation
from rollout.simulate.watched import WatchedSimulation

DRAWN = "Draft acceptance and mismatch are not simulated: what is shown of them is drawn at random."
OVER = "The simulation is over: this is its last moment."
CAUSES = {"weights": 4e-4, "kv": 1.5e-4, "routing": 8e-5, "staleness": 2e-4}  # medians of what is drawn
SOURCES = {"clover2": 0.55, "sibling": 0.4}  # chance that a layer is hit, of what is drawn
DEPTH = 4
BREATH_S = 2e-4  # between two events, so that whoever looks gets a turn where the simulation cannot keep up


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Beside those of launch.simulate.

    Attributes:
        port: On 127.0.0.1.
        speed: Simulated seconds in a second.
        skip_s: Simulated seconds that are over when the page is first served.
    """

    port: int = 8900
    speed: float = 20.0
    skip_s: float = 120.0


class Demo:
    """A simulation in a thread of its own.

    Args:
        request: What to simulate.
        options: How fast.
    """

    def __init__(self, request: Request, options: DemoOptions) -> None:
        scenario = replace(request.scenario, seed=request.options.seeds[0])
        self._options, self._rng = options, np.random.default_rng(scenario.seed)
        self._began: float | None = None
        self._num_told = 0
        self._is_stopped = threading.Event()
        self._simulation = WatchedSimulation(
            scenario,
            request.options.policies[0],
            request.costs,
            request.kv_tokens,
            work(request, scenario),
            pace=self._wait,
        )
        self._simulation.notes = (DRAWN,)
        self._is_ready = threading.Event()

    def start(self) -> None:
        """Returns when `skip_s` have been simulated."""
        threading.Thread(target=self._run, name="simulation", daemon=True).start()
        self._is_ready.wait()

    def stop(self) -> None:
        """Time stands still from now on, and the thread ends."""
        self._is_stopped.set()

    async def feed(self, query: FeedQuery) -> Feed:
        """What the page asks for."""
        self._tell_what_is_not_simulated()
        return self._simulation.feed(query, time.time())

    def _run(self) -> None:
        try:
            self._simulation.run()
            self._simulation.notes = (DRAWN, OVER)
        except InterruptedError:
            return  # nobody looks any more
        finally:
            self._is_ready.set()

    def _wait(self, now_s: float) -> None:
        if now_s < self._options.skip_s:
            return
        if self._began is None:
            self._began = time.monotonic() - now_s / self._options.speed
        self._is_ready.set()
        ahead_s = self._began + now_s / self._options.speed - time.monotonic()
        if self._is_stopped.wait(max(BREATH_S, ahead_s)):
            raise InterruptedError

    def _tell_what_is_not_simulated(self) -> None:
        history, rng = self._simulation.history, self._rng
        for sync in list(history.syncs)[self._num_told :]:
            drawn = {cause: float(median * rng.lognormal(0.0, 0.3)) for cause, median in CAUSES.items()}
            whole = sum(drawn.values()) * 1.1
            history.mismatches.append(MismatchPoint(version=sync.version, at_s=sync.at_s, all=whole, **drawn))
        self._num_told = len(history.syncs)
        self._simulation.speculation = Speculation(
            span_s=120.0,
            sources=tuple(self._source(name, chance) for name, chance in SOURCES.items()),
            tokens_per_step=float(2.4 + 0.1 * rng.standard_normal()),
            off_share=0.1,
        )

    def _source(self, name: str, chance: float) -> SourceAcceptance:
        asked = 10_000
        hits = [int(self._rng.binomial(asked, chance**depth)) for depth in range(1, DEPTH + 1)]
        before = [asked, *hits[:-1]]
        return SourceAcceptance(
            source=name,
            num_asked=asked,
            num_offered=asked,
            num_drafted=DEPTH * asked,
            num_accepted=sum(hits),
            by_depth=tuple(hit / trial if trial else None for hit, trial in zip(hits, before, strict=True)),
        )


def application(demo: Demo) -> FastAPI:
    """The routes alone, without a key: what they show is invented."""
    app = FastAPI(title="Longroll, simulated", docs_url=None, redoc_url=None)
    app.include_router(router(demo.feed))
    return app


def main(arguments: Sequence[str]) -> int:
    try:
        options, rest = split_arguments(DemoOptions, arguments)
        request = parse(["policies=divided", *rest])
        for name in ("policies", "seeds"):
            if len(getattr(request.options, name)) != 1:
                raise InvalidRequest(name, ",".join(map(str, getattr(request.options, name))), "one of them")
        if not options.speed > 0:
            raise InvalidRequest("speed", options.speed, "a number > 0")
    except InvalidRequest as error:
        print(f"launch.dashboard_demo: {error}", file=sys.stderr)
        return 2
    demo = Demo(request, options)
    demo.start()
    print(f"http://127.0.0.1:{options.port}/dashboard", flush=True)
    uvicorn.run(application(demo), host="127.0.0.1", port=options.port, log_level="warning")
    demo.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
