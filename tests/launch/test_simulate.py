from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.simulate import main, parse, simulate, speedups
from rollout.errors import InvalidRequest

TINY = (
    "gpus=4 shards_per_group=2 prompts=6 n_samples_per_prompt=4 prompt_tokens=20 output_tokens=400 chunk_tokens=64 "
    "max_running=5 kv_tokens=1500 max_batched_tokens=32"
).split()


def test_compares_policies_and_writes_record_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "picture.png"
    assert main([*TINY, "seeds=0,1", f"out={out}", f"picture={picture}"]) == 0
    record = json.loads(out.read_text())
    shipped = {"divided + eagle3-rl", "divided + eagle3-235b"}
    assert set(record["outcomes"]) == {"static", "partial", "divided"} | shipped
    assert set(record["acceptance"]) == shipped and all(one["source"] for one in record["acceptance"].values())
    assert all(len(runs) == 2 for runs in record["outcomes"].values())
    first, other = record["outcomes"]["static"][0], record["outcomes"]["divided"][0]
    assert record["makespan_speedup"]["divided"][0] == pytest.approx(first["makespan_s"] / other["makespan_s"])
    assert first["num_tokens"] == other["num_tokens"], "all policies do the same work"
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "vs static" in said and "vs partial" in said
    assert "2.47 tokens a step with 3 drafts (EAGLE-3 on Qwen3-8B" in said


def test_replays_a_trace_at_measured_costs(tmp_path: Path) -> None:
    rows = [
        {"group_id": g, "sample_index": i, "prompt_tokens": 10 + g, "output_tokens": 5 + 7 * i + g}
        for g in range(4)
        for i in range(2)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = [
        {"batch": b, "context_tokens": b * c, "prefill_tokens": 0, "step_s": 0.01 + 1e-3 * b, "spec": 1}
        for b in (1, 2, 4, 8)
        for c in (10, 50, 100)
    ]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    arguments = [f"trace={tmp_path}/trace.jsonl", f"costs={tmp_path}/steps.json", "gpus=2", "shards_per_group=1"]
    request = parse([*arguments, "output_tokens=64", "prompt_tokens=16", "kv_tokens=4000", "max_running=4"])
    assert (request.scenario.prompts, request.scenario.n_samples_per_prompt) == (4, 2)
    runs = simulate(request, lambda line: None)
    assert {run.outcome.num_tokens for mine in runs.values() for run in mine} == {sum(r["output_tokens"] for r in rows)}
    assert speedups(runs)["static"] == [1.0]


def test_a_given_acceptance_takes_the_place_of_the_published_ones() -> None:
    request = parse([*TINY, "spec_draft_tokens=2", "spec_accept_length=1.5", "speculating=static,divided"])
    assert [row.name for row in request.rows[3:]] == ["static + 1.5 of 2", "divided + 1.5 of 2"]
    assert [row.scenario(request.scenario).spec_draft_tokens for row in request.rows] == [0, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["gpus=many"], "gpus"),
        (["gpu=64"], "gpu=64"),
        (["policies=static,fastest"], "policies"),
        (["accelerator=abacus"], "accelerator"),
        (["accelerator=h100", "shards_per_group=1"], "memory"),
        (["seed=1"], "seed"),
        (["seeds=1,1"], "seeds"),
        (["costs=absent.json", "kv_tokens=100000"], "absent.json"),
        (["costs=absent.json"], "kv_tokens"),
        (["trace=absent.jsonl"], "absent.jsonl"),
        (["kv_tokens=1000"], "kv_tokens"),
        (["over_sampling=1.5"], "over_sampling"),
        (["speculating=all"], "speculating"),
        (["acceptance=hoped"], "acceptance"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRequest, match=what):
        parse(arguments)
    assert main(arguments) == 2
    assert what in capsys.readouterr().err
