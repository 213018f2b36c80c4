"""The planner's command: clusters, tables, records, pictures, and experiments that compose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import launch.compose
import launch.plan_check
from launch.bench_memory import Options as MemoryOptions
from launch.bench_memory import laid_out
from launch.compose import CONF, compose
from launch.plan import main, read_cluster
from launch.plan_check import Options as CheckOptions
from launch.plan_check import main as check
from rollout.config import Int4Config
from rollout.errors import InvalidRequest
from rollout.plan.candidate import BF16, int4
from rollout.plan.shape import shape_of
from rollout.simulate.accelerators import ACCELERATORS
from rollout.simulate.costs import Efficiency, Layout, RooflineCosts

QUICK = ["cluster=h200_1x8", "prompts=8", "trainer_gpus=8"]
CLUSTERS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml") if path.stem != "local")


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_named_after_what_they_are(name: str) -> None:
    accelerator, num_gpus = read_cluster(name)
    nodes, each = name.split("_")[1].split("x")
    assert name.startswith(f"{accelerator}_") and num_gpus == int(nodes) * int(each)


def test_a_plan_is_told_recorded_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main([*QUICK, "workload=rl_20k", f"out={out}", f"picture={picture}"]) == 0
    said = capsys.readouterr().out
    for words in ("first token", "limited by", "headroom", "bf16 (baseline)", "+ speculation", "752 bytes", "Computed"):
        assert words in said
    record = json.loads(out.read_text())
    (plan,) = record["plans"]
    assert [row["requirement"] for row in plan["rows"]] == ["ttft", "tpot", "memory", "throughput"]
    assert plan["step"]["rollout_s"] > 0 and plan["judged"]["plan"]["candidate"]["precision"]["name"].startswith("int4")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_survey_has_a_line_for_each_kind_of_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["survey=h200,b200", "gpus=8", "workload=rl_20k"]) == 0
    said = capsys.readouterr().out
    assert "8 × h200" in said and "8 × b200" in said


@pytest.mark.parametrize(("workload", "draft"), [("serving", None), ("rl_32k", "drafts/qwen")])
def test_a_plan_is_an_experiment_that_composes(
    workload: str, draft: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    monkeypatch.setattr(launch.compose, "CONF", conf)
    file = conf / "experiment" / "planned.yaml"
    speculating = [] if draft is None else [f"draft_model={draft}"]
    arguments = [*QUICK, f"workload={workload}", "simulate=false", f"out_experiment={file}", *speculating]
    assert main(arguments) == 0
    config = compose(["experiment=planned"])
    engine = config.engine
    assert engine.num_all_shards == 8 and engine.quantization == "int4"
    assert (engine.kv_cache_dtype, engine.tensor_parallel_size) == ("int8_per_token_head", 1)
    assert engine.max_num_seqs == config.scheduler.max_running_per_shard
    assert engine.speculation.enabled == (draft is not None)
    assert engine.max_num_batched_tokens > engine.max_num_seqs * (
        1 + engine.speculation.budget_nodes * (draft is not None)
    )
    prompt = 4096 if workload == "serving" else 2048
    assert config.model.max_model_len == prompt + config.sampling.max_tokens
    assert "computed, not measured" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["cluster=moon_1x8"], "h200_8x8"),
        (["cluster=local"], "with GPUs"),
        (["workload=chess"], "serving,rl_20k,rl_32k"),
        (["model=models/absent"], "config.json"),
        (["survey=abacus"], "abacus"),
        (["imbalance=0.5"], "imbalance"),
        (["accept_length=9"], "accept_length"),
        (["out_experiment=x.yaml"], "one workload"),
        (["gpu=8"], "gpus"),
        (["speed=1"], "speed"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert what in capsys.readouterr().err


def test_a_model_that_fits_no_cluster_is_no_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    assert main(["cluster=h100_2x8", "gpus=1", "workload=rl_20k", f"out_experiment={file}"]) == 2
    assert "fits" in capsys.readouterr().err and not file.exists()


def test_bytes_are_those_of_the_tensors_themselves() -> None:
    """The planner reckons with shapes; launch.bench_memory lays every tensor out. Norms are all that differ."""
    (exact,) = laid_out(MemoryOptions(shards=(8,)), Int4Config(group_size=128))
    for precision, num_bytes in ((int4(), exact.weights_int4), (BF16, exact.weights_bf16)):
        layout = Layout(weight_bits=precision.weight_bits, kv_dtype=precision.kv_dtype)
        costs = RooflineCosts(8, ACCELERATORS["h200"], layout=layout)
        assert costs.weight_bytes() == pytest.approx(num_bytes, rel=1e-3)
    assert RooflineCosts(8).kv_bytes_per_token == exact.kv_token_int8


def test_steps_timed_before_are_predicted_without_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = replace(ACCELERATORS["h100"], name="cpu", memory_bytes_per_s=10e9, flops=50e9)
    monkeypatch.setattr(launch.plan_check, "measured_device", lambda: device)  # a busy machine is another device
    truth = Efficiency(memory=1, kv=0.2, compute=1, link=1, collective_s=0, step_s=0.008, row_s=1e-4)
    layout = Layout(weight_bits=32, kv_dtype="float32")
    costs = RooflineCosts(1, device, shape_of(str(CONF.parent / "models/tiny")), truth, layout)
    rows = [
        {"batch": b, "context_tokens": b * c, "step_s": costs.terms(b, b * c, 0, 0, b).total_s}
        for b in (1, 4, 32)
        for c in (32, 1024)
    ]
    (tmp_path / "steps.json").write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    assert check([f"steps={tmp_path}/steps.json", f"out={out}"]) == 0
    assert json.loads(out.read_text())["mean_error"] < 1e-6
    assert "calibrates" in capsys.readouterr().out


def test_what_is_timed_is_checked() -> None:
    assert check(["batches=1,2"]) == 2
    with pytest.raises(InvalidRequest, match="within"):
        CheckOptions(within=0)
