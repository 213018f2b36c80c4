"""How the engines of a run serve the weights that its trainer trains. Knows neither of the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rollout.config import EngineConfig, Int4Config, ModelConfig
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import TensorPlan, plan_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEncoding:
    """Element type of plain tensors, and how matrices are quantised; None for not at all."""

    dtype: str
    int4: Int4Config | None

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig) -> ServedEncoding:
        """What engines of this configuration serve."""
        int4 = engine.int4 if engine.quantization == "int4" else None
        return cls(dtype=engine.dtype or model.dtype, int4=int4)

    def plans(self, model_dir: str | Path) -> dict[str, TensorPlan]:
        """Encoding of every tensor of a model directory. Raises InvalidRequest where it does not fit."""
        return plan_tensors(checkpoint_specs(model_dir, self.dtype).values(), self.int4)
