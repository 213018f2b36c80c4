"""How the engines of a run serve what its trainer trains: the model, and a draft if one travels. Knows neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.draft_plans import travelling_plans
from rollout.config import EngineConfig, Int4Config, ModelConfig
from rollout.speculation_config import SpeculationConfig
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import TensorPlan, plan_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEncoding:
    """Element type of plain tensors, how matrices are quantised, and how drafts are made; None for not at all."""

    dtype: str
    int4: Int4Config | None
    speculation: SpeculationConfig | None = None

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig) -> ServedEncoding:
        """What engines of this configuration serve."""
        int4 = engine.int4 if engine.quantization == "int4" else None
        speculation = engine.speculation if engine.speculation.enabled else None
        return cls(dtype=engine.dtype or model.dtype, int4=int4, speculation=speculation)

    @property
    def draft_model(self) -> str | None:
        """Directory of the draft model that travels with the weights; None without one."""
        speculation = self.speculation
        return speculation.draft_model if speculation is not None and speculation.draft_travels else None

    def plans(self, model_dir: str | Path) -> dict[str, TensorPlan]:
        """Encoding of every tensor of a model directory. Raises InvalidRequest where it does not fit."""
        return plan_tensors(checkpoint_specs(model_dir, self.dtype).values(), self.int4)

    def draft_plans(self) -> dict[str, TensorPlan]:
        """Encoding of every tensor of the draft that travels; empty without one. Raises InvalidRequest."""
        return travelling_plans(self.speculation, self.dtype)
