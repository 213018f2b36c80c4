from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.errors import InvalidRequest
from rollout.simulate.costs import ACCELERATORS, RooflineCosts
from rollout.simulate.lengths import LengthModel, draw_groups, read_trace
from rollout.simulate.measured import MeasuredCosts, MeasuredStep, read_steps
from rollout.simulate.scenario import Scenario, check_policies


def test_roofline_agrees_with_the_memory_arithmetic_of_the_shipped_engine() -> None:
    costs = RooflineCosts(8)
    assert costs.weight_bytes() == pytest.approx(20e9, rel=0.05)  # conf/engine/ep8_int4.yaml says 20 GB
    assert costs.kv_tokens() == pytest.approx(795_000, rel=0.02)  # and 795,000 tokens
    per_token = 2 * 94 * 4 * (128 + 4)  # bytes, from the same file
    h200 = ACCELERATORS["h200"]
    assert costs.context_token_s * h200.memory_bytes_per_s * 0.7 == pytest.approx(per_token)


def test_roofline_grows_with_rows_and_reads_only_the_experts_that_rows_chose() -> None:
    costs = RooflineCosts(8)
    rows = [1, 8, 64, 512, 4096]
    assert (np.diff([costs.shared_s(n) for n in rows]) > 0).all()
    assert (np.diff([costs.local_s(n, 0, 0.0) for n in rows]) >= 0).all()
    assert costs.local_s(8, 2048, 2e6) > costs.local_s(8, 2048, 0.0) > costs.local_s(8, 0, 0.0)
    # One row reads 8 of 128 experts; two ranks' exchange apart, that is a sixteenth of what many rows read.
    alone = RooflineCosts(1)
    assert alone.shared_s(1) / alone.shared_s(400) == pytest.approx(1 / 16, rel=0.01)


def test_a_model_that_does_not_fit_or_divide_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="shards_per_group"):
        RooflineCosts(3)
    with pytest.raises(InvalidRequest, match="memory"):
        RooflineCosts(1, ACCELERATORS["h100"]).kv_tokens()


def steps(noise: float = 0.0) -> list[MeasuredStep]:
    rng = np.random.default_rng(0)
    result = []
    for batch in (1, 2, 4, 8, 16, 32):
        for context in (50, 200, 900):
            for prefill in (0, 0, 256):
                seconds = 0.004 + 2e-4 * batch + 1e-6 * batch * context + 3e-5 * prefill
                result.append(
                    MeasuredStep(
                        batch=batch,
                        context_tokens=batch * context,
                        prefill_tokens=prefill,
                        step_s=seconds * (1 + noise * rng.standard_normal()),
                    )
                )
    return result


def test_measured_costs_find_the_coefficients() -> None:
    costs = MeasuredCosts(steps())
    assert costs.error.p95_relative < 1e-6
    assert costs.context_token_s == pytest.approx(1e-6, rel=1e-6)
    assert costs.local_s(10, 100, 0.0) == pytest.approx(0.004 + 2e-3 + 3e-3, rel=1e-6)
    assert costs.shared_s(100) == 0


def test_costs_on_a_slower_machine() -> None:
    costs = MeasuredCosts(steps())
    slower = costs.scaled(1.5)
    for step in steps():
        assert costs.step_s(step) == pytest.approx(step.step_s) and slower.step_s(step) == pytest.approx(
            1.5 * step.step_s
        )
    assert slower.context_token_s == 1.5 * costs.context_token_s
    assert slower.local_s(3, 10, 0.0) == pytest.approx(1.5 * costs.local_s(3, 10, 0.0))


def test_measured_costs_tell_how_far_off_they_are() -> None:
    costs = MeasuredCosts(steps(noise=0.05))
    # The mean of |N(0, 0.05)| is 0.05 · sqrt(2 / pi); the fit takes up four of 54 degrees of freedom.
    assert costs.error.mean_relative == pytest.approx(0.05 * (2 / np.pi) ** 0.5, rel=0.3)
    assert costs.error.num_steps == 54


def test_measured_costs_have_no_negative_price() -> None:
    falling = [MeasuredStep(batch=b, context_tokens=0, step_s=0.02 - 1e-4 * b) for b in range(1, 33)]
    costs = MeasuredCosts(falling)
    assert costs.local_s(64, 0, 0.0) > 0
    assert costs.local_s(64, 0, 0.0) >= costs.local_s(1, 0, 0.0)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "JSON"),
        ('{"batch": 1}', "list"),
        ('[{"batch": 1}]', "context_tokens"),
        ('[{"batch": 1, "context_tokens": 1, "step_s": "x"}]', "number"),
        ('[{"batch": 1, "context_tokens": 1, "step_s": 1, "speed": 1}]', "speed"),
    ],
)
def test_bad_measured_steps_are_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(InvalidRequest, match=what):
        read_steps(tmp_path / "steps.json")


def test_too_few_or_impossible_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="at least 8"):
        MeasuredCosts(steps()[:7])
    with pytest.raises(InvalidRequest, match="step_s > 0"):
        MeasuredCosts([replace(step, step_s=0.0) for step in steps()])
    with pytest.raises(InvalidRequest, match="measured steps"):
        read_steps(tmp_path / "absent.json")


def test_lengths_have_the_quantiles_and_the_correlation_that_were_asked_for() -> None:
    model = LengthModel(tail_share=0.0)
    drawn = model.draw(np.random.default_rng(0), 20_000, 8, 32_768)
    assert drawn.min() >= 1 and drawn.max() == 32_768
    # The standard error of this quantile is about 0.7 % of it, siblings counted as one: five of them.
    assert np.quantile(drawn, 0.8) == pytest.approx(16_384, rel=0.035)
    free = np.log(LengthModel(tail_share=0.0, p80_share=1e-3).draw(np.random.default_rng(1), 20_000, 8, 10**9))
    pairs = np.corrcoef(free[:, 0], free[:, 1])[0, 1]
    assert pairs == pytest.approx(0.6, abs=5 * (1 - 0.6**2) / 20_000**0.5)
    assert free.std() == pytest.approx(0.9, rel=0.02)


def test_the_pareto_part_lengthens_the_tail() -> None:
    light, heavy = (
        LengthModel(tail_share=share, p80_share=1e-3).draw(np.random.default_rng(0), 4000, 8, 10**6)
        for share in (0.0, 0.2)
    )
    assert (heavy >= light).all()  # the same draws otherwise
    assert np.quantile(heavy, 0.99) > 1.2 * np.quantile(light, 0.99)


def test_draws_follow_the_seed() -> None:
    one, two = (
        [g.output_tokens for g in draw_groups(LengthModel(), np.random.default_rng(7), 0, 5, 3, 100, 1000)]
        for _ in range(2)
    )
    assert one == two


@pytest.mark.parametrize("wrong", [{"sigma": -1.0}, {"rho": 1.5}, {"tail_share": 2.0}, {"tail_index": 0.0}])
def test_parameters_of_lengths_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        LengthModel(**wrong)


def test_a_trace_is_read_in_its_own_order(tmp_path: Path) -> None:
    rows = [("b", 1, 9, 40), ("b", 0, 9, 30), ("a", 0, 5, 10)]
    names = ("group_id", "sample_index", "prompt_tokens", "output_tokens")
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n\n"
    )
    first, second = read_trace(tmp_path / "t.jsonl")
    assert (first.group_id, first.prompt_tokens, first.output_tokens) == ("b", 9, (30, 40))
    assert second.output_tokens == (10,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        '{"group_id": "a"}',
        '{"group_id": "a", "sample_index": 0, "prompt_tokens": 1, "output_tokens": 0}',
        '{"group_id": "a", "sample_index": 0, "prompt_tokens": 1, "output_tokens": 5}\n' * 2,
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InvalidRequest, match="trace"):
        read_trace(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": 0},
        {"gpus": 12},
        {"prompts": 0},
        {"rl_steps": 0},
        {"over_sampling": 0.5},
        {"over_sampling": 1.5},
        {"spec_accept_length": 1.5},
        {"spec_accept_length": 0.5},
        {"max_batched_tokens": 64},
        {"kv_tokens": 30_000},
        {"turnaround_s": -1.0},
        {"restart_s": 0.0},
    ],
)
def test_scenarios_are_checked(wrong: dict[str, float]) -> None:
    names = {"gpus": "gpus|shards_per_group"}
    with pytest.raises(InvalidRequest, match=names.get(next(iter(wrong)), next(iter(wrong)))):
        Scenario(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("policies", [(), ("fastest",), ("static", "static")])
def test_policies_are_checked(policies: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="policies"):
        check_policies(policies)
