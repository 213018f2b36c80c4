"""Requests, limits and options that tests of drafting share."""

from types import SimpleNamespace

import numpy as np

from actors.vllm_plugin.draft_records import DraftLimits, DraftRequest
from rollout.speculation_config import SpeculationConfig

VOCAB = 50
MODEL = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))
LIMITS = DraftLimits(max_width=4, max_depth=5)


def config(**options) -> SpeculationConfig:
    return SpeculationConfig(**{"enabled": True, "governor": False, "budget_nodes": 6} | options)


def request(name: str = "a", tokens=(1, 2, 3, 4), budget: int = 6, max_depth: int = 8, group=None) -> DraftRequest:
    return DraftRequest(
        request_id=name,
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt_tokens=2,
        seed=5,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        group=group,
        member=name,
        max_depth=max_depth,
        budget=budget,
    )
