"""How the tensors of a draft model travel with a publication: beside the target's, under the same version.

Both ends ask here, so that they agree: whoever publishes, and the workers. Knows nothing of what a draft computes.
"""

from __future__ import annotations

from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_training import TENSOR_PREFIX
from rollout.speculation_config import SpeculationConfig
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.sync.manifest import TensorSpec


def travelling_plans(speculation: SpeculationConfig | None, dtype: str) -> dict[str, TensorPlan]:
    """Encoding of every tensor of the draft that travels, by the name it travels under; empty if none does.

    Args:
        speculation: Of the engines; None for none.
        dtype: That the engines compute in. A draft is never quantised: it is small, and its errors cost acceptance.

    Raises:
        InvalidRequest: There is no such draft.
    """
    if speculation is None or not speculation.draft_travels:
        return {}
    assert speculation.draft_model is not None
    _, tensors = load_draft(speculation.draft_model)
    specs = [
        TensorSpec(name=TENSOR_PREFIX + name, shape=tuple(tensor.shape), dtype=dtype)
        for name, tensor in tensors.items()
    ]
    return plan_tensors(specs, None)
