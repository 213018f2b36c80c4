"""Bad input to a live service: a clear error (what, got, expected), and nobody else notices."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from actors.service import Service, start_service
from rollout.client import RolloutClient
from rollout.config import ClusterConfig, EngineConfig, ModelConfig, SchedulerConfig, SyncConfig
from rollout.errors import InvalidRequest, LongrollError, UnknownHandle
from rollout.handles import RolloutHandle
from rollout.types import Prompt, SamplingParams, Status

pytestmark = pytest.mark.engine

GOOD = (10, 11, 12)
SHORT = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), SHORT, "no tokens, expected at least one"),
        (tuple([5] * 2045), SHORT, "at most max_model_len = 2048"),
        ((3, 512), SHORT, r"got 512, expected an id in \[0, 512\)"),
        ((-1,), SHORT, r"got -1, expected an id in \[0, 512\)"),
    ],
    ids=["empty", "over-long", "beyond-vocabulary", "negative"],
)
def test_a_bad_prompt_is_refused_and_its_neighbours_are_not_queued(
    client: RolloutClient, prompt: tuple[int, ...], sampling: SamplingParams, message: str
) -> None:
    before = client.stats().num_finished
    with pytest.raises(InvalidRequest, match=message):
        client.submit([GOOD, prompt], 2, sampling, run_seed=0)
    assert client.stats().num_finished == before and client.stats().num_queued == 0
    groups = list(client.groups(client.submit([GOOD], 2, SHORT, run_seed=0)))
    assert [len(t.token_ids) for t in groups[0].trajectories] == [8, 8]


def test_bad_numbers_and_names_are_refused(client: RolloutClient) -> None:
    with pytest.raises(InvalidRequest, match="n_samples_per_prompt: got 0"):
        client.submit([GOOD], 0, SHORT, run_seed=0)
    with pytest.raises(InvalidRequest, match="temperature: got nan"):
        SamplingParams(temperature=float("nan"))
    with pytest.raises(InvalidRequest, match="prompts: got an empty sequence"):
        client.submit([], 1, SHORT, run_seed=0)
    with pytest.raises(InvalidRequest, match="reward"):
        client.submit([GOOD], 1, SHORT, run_seed=0, reward="no_such_reward")
    with pytest.raises(UnknownHandle):
        list(client.groups(RolloutHandle(handle_id="none", group_ids=("a",), n_samples_per_prompt=1)))


def test_a_reward_that_raises_or_hangs_fails_its_trajectory_with_the_reason(client: RolloutClient) -> None:
    prompt = Prompt(token_ids=GOOD, prompt_id="x", metadata={"task": "no such task", "index": 0})
    group = next(iter(client.groups(client.submit([prompt], 3, SHORT, run_seed=0, reward="reasoning_gym"))))
    assert {t.status for t in group.trajectories} == {Status.FAILED}
    assert all(t.reward is None and t.error for t in group.trajectories), "a failure became a reward"


def test_a_client_that_disconnects_disturbs_nobody(client: RolloutClient, service: Service) -> None:
    """A second process submits long work and is killed; ours goes on and the service stays whole."""
    address = ray.get_runtime_context().gcs_address
    failed_before = client.stats().num_failed
    script = textwrap.dedent(
        f"""
        import os, ray
        ray.init(address={address!r}, namespace="tests", log_to_driver=False)
        from actors.service import connect
        from rollout.types import SamplingParams
        client = connect("tests")
        client.submit([(20, 21, 22)] * 4, 4, SamplingParams(max_tokens=600, ignore_eos=True), run_seed=1)
        print("submitted", flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    stranger = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert "submitted" in stranger.stdout, stranger.stderr[-2000:]
    groups = list(client.groups(client.submit([GOOD] * 3, 2, SHORT, run_seed=0)))
    assert len(groups) == 3 and all(t.status is Status.TRUNCATED for g in groups for t in g.trajectories)
    deadline = time.monotonic() + 120
    while client.stats().num_running + client.stats().num_queued and time.monotonic() < deadline:
        time.sleep(0.2)
    stats = client.stats()
    assert stats.num_running == 0 and stats.num_queued == 0 and stats.num_failed == failed_before


def test_a_missing_model_directory_is_named(ray_cluster: None, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises((InvalidRequest, LongrollError), match="nowhere"):
        start_service(
            model=ModelConfig(path=str(missing)),
            engine=EngineConfig(),
            scheduler=SchedulerConfig(),
            sync=SyncConfig(),
            cluster=ClusterConfig(namespace="tests-missing"),
        )
