"""Options of routing replay and the mismatch budget that would have no effect are refused."""

import pytest

from launch.compose import compose
from rollout.errors import InvalidRequest
from rollout.trainer_config import OverBudget

CAPTURED = "engine.enable_return_routed_experts=true"


def test_a_full_budget_composes():
    config = compose(
        [
            CAPTURED,
            "trainer.replay_routing=true",
            "mismatch.every_steps=2",
            "mismatch.action=tighten",
            "mismatch.budget_kl.routing=0.01",
            "mismatch.budget_kl.all=0.05",
        ]
    )
    assert config.mismatch.action is OverBudget.TIGHTEN
    assert (config.mismatch.budget_kl.routing, config.mismatch.budget_kl.kv) == (0.01, None)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["trainer.replay_routing=true"], "trainer.replay_routing"),
        (["mismatch.budget_kl.all=0.1"], "mismatch"),
        (["mismatch.action=stop"], "mismatch"),
        (["mismatch.every_steps=1", "mismatch.budget_kl.routing=0.1"], "mismatch.budget_kl.routing"),
        (["mismatch.every_steps=1", "mismatch.action=tighten", "trainer.use_tis=false"], "mismatch.action"),
        (["mismatch.every_steps=1", "mismatch.budget_kl.kv=0"], "mismatch.budget_kl.kv"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_option_without_effect_is_refused(overrides: list[str], what: str):
    with pytest.raises(InvalidRequest, match=what):
        compose(overrides)
