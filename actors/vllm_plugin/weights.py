"""Loading of staged, digest-checked weights through vLLM's weight-transfer interface.

Buckets are copied out of shared memory and checked one by one while generation goes on. Only when
all of a version is here and right does an update, inside a pause, load it through vLLM's layerwise
reload, which also redoes prepacked (oneDNN) layers.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef
from rollout.sync.segments import read_verified

logger = logging.getLogger(__name__)
Outcome = tuple[bool, str | None]
"""Whether it is done, and what is wrong, if anything is. vLLM's remote calls carry no classes of ours."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass
class StagedInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class StagedUpdateInfo(WeightTransferUpdateInfo):
    """Which staged version to load."""

    version: int


def local_experts(model: torch.nn.Module) -> set[int] | None:
    """Global ids of the routed experts held here, or None for a model without routed experts."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            if module.expert_map is None:
                return set(range(module.global_num_experts))
            return set((module.expert_map >= 0).nonzero().flatten().tolist())
    return None


class StagedWeightEngine(WeightTransferEngine[StagedInitInfo, StagedUpdateInfo]):
    """Worker side of a publication; holds the staged tensors of at most one version."""

    init_info_cls = StagedInitInfo
    update_info_cls = StagedUpdateInfo

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._version: int | None = None
        self._staged: dict[str, torch.Tensor] = {}
        self._local = local_experts(self.model)

    def stage(self, ref: BucketRef) -> Outcome:
        """Copy the bucket's tensors that this rank needs; check the digest of every one.

        Returns:
            Done or not; while it is not, `stage_outcome` tells. On a fault the version's staging is dropped.
        """
        self._adopt(ref.version)
        try:
            for name, tensor in read_verified(ref):
                if self._needs(name):
                    self._staged[name] = tensor.clone()
        except SyncRefused as fault:
            self.drop(ref.version)
            return True, str(fault)
        return True, None

    def stage_outcome(self, version: int) -> Outcome:
        """How the newest bucket of a version fares; here `stage` is done when it returns."""
        return True, None if version == self._version else f"version {version}: it was dropped"

    def transport_outcome(self) -> Outcome:
        """Whether the transport is open; there is nothing to open here."""
        return True, None

    def _adopt(self, version: int) -> None:
        if version != self._version:
            self._version, self._staged = version, {}

    def _needs(self, name: str) -> bool:
        match = _EXPERT.search(name)
        return match is None or self._local is None or int(match.group(1)) in self._local

    def drop(self, version: int) -> None:
        if version == self._version:
            self._version, self._staged = None, {}

    def init_transfer_engine(self, init_info: StagedInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StagedUpdateInfo) -> None:
        if update_info.version != self._version:
            raise ValueError(f"staged version: got {self._version}, expected {update_info.version}")
        self.model.load_weights(iter(self._staged.items()))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._version is not None:
            self.drop(self._version)

    def shutdown(self) -> None:
        self._version, self._staged = None, {}
