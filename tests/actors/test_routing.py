"""Captured routing: the log beside the KV cache, and real engines against the Hugging Face model's router."""

import base64
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.routing_store import fetch
from actors.service import Service
from actors.vllm_plugin.routing import RoutingLog, Watched
from rollout.routing import Routing, pack, unpack
from rollout.types import Chunk, SamplingParams, Trajectory

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 10.0
NEAR_TIE = 1e-4  # of router probabilities: float32 forwards of other batch shapes differ by less (logits by 1e-5)


def make_log(**options) -> RoutingLog:
    return RoutingLog(num_blocks=8, block_size=4, num_layers=2, top_k=2, num_experts=16, **options)


def row_of(seed: int, positions: list[int]) -> torch.Tensor:
    """Recognisable rows [T, 2, 2]."""
    base = torch.tensor([[(7 * p + seed) % 16] for p in positions], dtype=torch.uint8)
    return torch.cat([base, (base + 1) % 16, (base + 2) % 16, (base + 3) % 16], dim=1).view(-1, 2, 2)


def forward(log: RoutingLog, request: Watched, blocks: list[int], start: int, stop: int, seed: int = 0) -> None:
    positions = list(range(start, stop))
    slots = torch.tensor([blocks[p // 4] * 4 + p % 4 for p in positions])
    log.write(slots, row_of(seed, positions), None)
    request.num_computed = stop


def taken(log: RoutingLog, key: str) -> np.ndarray:
    blob = log.take(key, WAIT_S)
    assert blob is not None
    return unpack(blob).ids


def test_rows_come_back_in_order_and_once():
    log = make_log()
    request = log.watch("r", 2)
    blocks = [5, 1, 7]
    forward(log, request, blocks, 0, 6)
    forward(log, request, blocks, 6, 9)
    log.end(request, blocks)
    got = unpack(log.take("r", WAIT_S))
    assert got.first_token == 2 and got.num_experts == 16
    assert (got.ids == row_of(0, list(range(2, 9))).numpy()).all()
    assert log.take("r", WAIT_S) is None, "it is handed out once"


def test_blocks_may_be_reused_as_soon_as_the_request_has_ended():
    log = make_log()
    first, second = log.watch("first", 0), log.watch("second", 0)
    forward(log, first, [3], 0, 4)
    log.end(first, [3])
    forward(log, second, [3], 0, 4, seed=5)
    log.end(second, [3])
    assert (taken(log, "first") == row_of(0, [0, 1, 2, 3]).numpy()).all()
    assert (taken(log, "second") == row_of(5, [0, 1, 2, 3]).numpy()).all()


def test_a_preempted_request_keeps_the_rows_its_tokens_were_sampled_with():
    log = make_log()
    request, other = log.watch("r", 0), log.watch("other", 0)
    forward(log, request, [0, 1], 0, 7)  # 7 positions computed, an eighth token sampled
    log.keep(request, [0, 1])
    forward(log, other, [0, 1], 0, 8, seed=3)  # somebody else has its blocks now
    log.resume(request, 7)  # the eighth token was dropped: row 6 will be computed anew
    forward(log, request, [4, 6], 0, 7, seed=9)
    forward(log, request, [4, 6], 7, 8, seed=9)
    log.end(request, [4, 6])
    expected = torch.cat([row_of(0, list(range(6))), row_of(9, [6, 7])])
    assert (taken(log, "r") == expected.numpy()).all()


def test_a_request_that_ends_while_preempted_keeps_its_rows():
    log = make_log()
    request = log.watch("r", 1)
    forward(log, request, [0, 1], 0, 5)
    log.keep(request, [0, 1])
    forward(log, log.watch("other", 0), [0, 1], 0, 8, seed=3)
    log.end(request, [0, 1])
    assert (taken(log, "r") == row_of(0, [1, 2, 3, 4]).numpy()).all()


def test_copied_blocks_carry_their_routing():
    log = make_log()
    forward(log, log.watch("owner", 0), [2], 0, 4, seed=6)
    log.copy_blocks([(2, 5)])
    sharer = log.watch("sharer", 0)
    sharer.num_computed = 4
    log.end(sharer, [5])
    assert (taken(log, "sharer") == row_of(6, [0, 1, 2, 3]).numpy()).all()


def test_what_nobody_fetches_is_dropped_oldest_first_and_counted():
    size = len(pack(Routing(first_token=0, num_experts=16, ids=row_of(0, list(range(8))).numpy())))
    log = make_log(max_bytes=3 * size)
    for i in range(5):
        request = log.watch(str(i), 0)
        forward(log, request, [i, i + 1], 0, 8)
        log.end(request, [i, i + 1])
        assert len(log._packed[str(i)].result(WAIT_S)) == size
    assert log.take("4", WAIT_S) is not None
    assert log.num_dropped == 2
    assert [log.take(str(i), WAIT_S) is None for i in range(4)] == [True, True, False, False]


def test_nobody_waits_for_what_will_not_come():
    log = make_log()
    assert log.take("never seen", 1e6) is None
    log.forget(log.watch("without a token", 0))
    assert log.take("without a token", 1e6) is None
    log.watch("still running", 0)
    assert log.take("still running", 0.01) is None


def reference_rows(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [N − 1, layers, 2], sorted, and the gap between the last one chosen and the next [N − 1, layers]."""
    found = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda *a: found.append(a[2][0])) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    best = torch.stack([torch.softmax(logits[:-1], dim=-1).topk(3, dim=-1).values for logits in found], dim=1)
    ids = torch.stack([logits[:-1].topk(2, dim=-1).indices for logits in found], dim=1)
    return ids.sort(dim=-1).values, best[..., 1] - best[..., 2]


@pytest.mark.engine
@pytest.mark.parametrize("kv_bytes", [2_500_000, 32_000_000], ids=["preempting", "roomy"])
def test_an_engine_reports_the_experts_of_the_reference_router(kv_bytes: int, reference, tmp_path: Path) -> None:
    """Over chunked prefill, prefix-cache hits, preemption and continued requests."""
    output = tmp_path / "records.json"
    script = REPOSITORY / "tests" / "actors" / "routing_engine.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), str(output), str(kv_bytes)], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said = json.loads(output.read_text())
    assert (said["num_preempted"] > 0) == (kv_bytes < 10_000_000) and said["is_gone"]
    assert sum(record["num_cached"] for record in said["records"]) > 0
    num_rows = num_ties = 0
    for record in said["records"]:
        routing = unpack(base64.b64decode(record["blob"]))
        num_wanted = len(record["tokens"]) - 1 - record["first"]
        assert routing.first_token == record["first"] and len(routing.ids) == num_wanted
        expected, gaps = reference_rows(reference.model, record["tokens"])
        got = torch.from_numpy(routing.ids.astype(np.int64)).sort(dim=-1).values
        differs = (got != expected[record["first"] :]).any(dim=-1)
        assert (gaps[record["first"] :][differs] < NEAR_TIE).all()
        num_rows, num_ties = num_rows + differs.numel(), num_ties + int(differs.sum())
    assert num_rows > 10_000 and num_ties < num_rows / 1000


def check_against_reference(model, trajectory: Trajectory) -> int:
    """Compare a trajectory's routing with the reference; returns the number of choices compared."""
    tokens = [*trajectory.prompt_token_ids, *trajectory.token_ids]
    rows = fetch(trajectory.routed_experts, len(tokens) - 1)
    assert rows is not None, "the chunks' routing must tile the trajectory"
    expected, gaps = reference_rows(model, tokens)
    got = torch.from_numpy(rows.astype(np.int64)).sort(dim=-1).values
    differs = (got != expected).any(dim=-1)
    assert (gaps[differs] < NEAR_TIE).all()
    return differs.numel()


@pytest.mark.engine
def test_an_expert_parallel_group_delivers_each_shards_own_tokens(service: Service, reference) -> None:
    """Both shards of a group at once, requests cut in pieces that move from one to the other, and an abort."""
    draw = random.Random(8)
    prompts = [tuple(draw.randrange(3, 500) for _ in range(draw.randrange(3, 70))) for _ in range(8)]
    sampling = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True)
    trajectories = [
        Trajectory(group_id="routing", sample_index=i, seed=100 + i, prompt_token_ids=prompt)
        for i, prompt in enumerate(prompts)
    ]
    for piece, budget in enumerate((25, 1, 34)):
        calls = []
        for i, trajectory in enumerate(trajectories):
            chunk = Chunk(
                trajectory_id=f"routing/{i}",
                token_ids=trajectory.prompt_token_ids + tuple(trajectory.token_ids),
                num_prompt_tokens=len(trajectory.prompt_token_ids),
                max_tokens=budget,
                seed=trajectory.seed,
                sampling=sampling,
            )
            calls.append(service.shards[(i + piece) % 2].generate.remote(chunk))
        for trajectory, result in zip(trajectories, ray.get(calls), strict=True):
            trajectory.append(result)
    assert all(len(t.routed_experts) == 3 and len(t.token_ids) == 60 for t in trajectories)
    assert sum(check_against_reference(reference.model, t) for t in trajectories) > 2000
    bits = trajectories[0].routed_experts[0]
    assert bits.num_bytes == len(ray.get(bits.ref)) < 100 + bits.num_tokens * LAYER_BYTES


LAYER_BYTES = 4 * 2 * 3 / 8  # layers × experts of a token × bits of an id among 8


@pytest.mark.engine
def test_an_aborted_chunk_brings_the_routing_of_what_it_has(service: Service, reference) -> None:
    prompt = (9, 8, 7, 6)
    trajectory = Trajectory(group_id="aborted", sample_index=0, seed=3, prompt_token_ids=prompt)
    chunk = Chunk(
        trajectory_id="aborted/0",
        token_ids=prompt,
        num_prompt_tokens=4,
        max_tokens=900,
        seed=3,
        sampling=SamplingParams(max_tokens=900, ignore_eos=True),
    )
    running = service.shards[1].generate.remote(chunk)
    ready: list = []
    while not ready:  # an abort may overtake its request
        ray.get(service.shards[1].abort.remote(["aborted/0"]))
        ready, _ = ray.wait([running], timeout=0.2)
    result = ray.get(running)
    trajectory.append(result)
    if trajectory.token_ids:
        check_against_reference(reference.model, trajectory)
    else:
        assert result.routing is None
