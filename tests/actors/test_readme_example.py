"""The trainer example of README.md, run as it stands against a live service."""

import re
from pathlib import Path

import pytest

from rollout.client import RolloutClient

pytestmark = pytest.mark.engine

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_trainer_example_runs(client: RolloutClient, tiny_weights, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before = client.stats().live_version
    seen: list[list[int]] = []

    def my_policy_update(groups: list) -> dict:
        seen.append([len(g.trajectories) for g in groups])
        return tiny_weights

    exec(block.replace('"longroll"', '"tests"'), {"my_policy_update": my_policy_update})
    assert seen == [[8] * 4] * 2
    assert client.stats().live_version == before + 2
    assert capsys.readouterr().out.count("bytes, stalled") == 2
