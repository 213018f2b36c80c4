"""What Longroll's parts inside vLLM's processes are told, as one record in the engine's `additional_config`.

The only way from the shard's actor to code that vLLM constructs itself (schedulers, quantisation
configurations, runners). Knows nothing of what the options mean.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rollout.config import Int4Config
from rollout.speculation_config import SpeculationConfig

KEY = "longroll"  # of vLLM's additional_config


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginOptions:
    """Options of one engine.

    Attributes:
        int4: How weights are quantised; None serves them in the activation dtype.
        initial_version: Version of the weights in the model directory.
        recompute_kv: Prefill running requests again when the weights change.
        capture_routing: Keep the experts chosen for every token.
        speculation: Draft token trees and verify them; None leaves vLLM's runner and attention as they are.
    """

    int4: Int4Config | None = None
    initial_version: int = 0
    recompute_kv: bool = True
    capture_routing: bool = False
    speculation: SpeculationConfig | None = None

    def to_additional_config(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, vllm_config: Any) -> PluginOptions:
        """Options of an engine; the defaults for one that Longroll did not configure."""
        values = dict((vllm_config.additional_config or {}).get(KEY, {}))
        if values.get("int4") is not None:
            int4 = dict(values["int4"])
            values["int4"] = Int4Config(group_size=int4["group_size"], skip=tuple(int4["skip"]))
        if values.get("speculation") is not None:
            speculation = dict(values["speculation"])
            values["speculation"] = SpeculationConfig(**speculation | {"sources": tuple(speculation["sources"])})
        return cls(**values)
