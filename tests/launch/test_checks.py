"""Options of routing replay, the mismatch budget and the draft's update that would have no effect are refused."""

import pytest

from launch.compose import compose
from rollout.errors import InvalidRequest
from rollout.trainer_config import OverBudget

CAPTURED = "engine.enable_return_routed_experts=true"

DRAFTS = [
    "engine.speculation.enabled=true",
    "engine.speculation.sources=[clover2]",
    "engine.speculation.draft_model=models/tiny/draft",
    "engine.speculation.draft_travels=true",
]


def test_a_draft_that_travels_may_learn():
    config = compose([*DRAFTS, "trainer.draft.num_steps=4", "trainer.draft.lr=1e-3"])
    assert (config.trainer.draft.num_steps, config.trainer.draft.lr) == (4, 1e-3)


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
        (["trainer.draft.num_steps=2"], "trainer.draft"),
        ([*DRAFTS, "engine.speculation.enabled=false", "trainer.draft.lr=1e-3"], "trainer.draft"),
        ([*DRAFTS, "trainer.draft.num_steps=-1"], "trainer.draft.num_steps"),
        ([*DRAFTS, "trainer.draft.max_tokens=0"], "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_option_without_effect_is_refused(overrides: list[str], what: str):
    with pytest.raises(InvalidRequest, match=what):
        compose(overrides)
