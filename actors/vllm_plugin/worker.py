"""vLLM workers that run the keyed-sampling model runner and keep a staged copy of the next weights.

vLLM offers no way to name a runner class, so `init_device` swaps the class the parent would build
while it runs. Delete the swap when vLLM takes a qualified runner name (as it does for workers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from actors.vllm_plugin.runner import KeyedSamplingMixin
from rollout.sync.manifest import BucketRef


class KeyedCpuRunner(KeyedSamplingMixin, CPUModelRunner):
    """CPU runner with keyed sampling."""


@contextmanager
def _runner_class(module: ModuleType, name: str, runner: type) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, runner)
    try:
        yield
    finally:
        setattr(module, name, original)


class StagingMixin:
    """Remote calls, made on all workers of an engine through `collective_rpc`."""

    weight_transfer_engine: Any

    def longroll_stage(self, ref_json: str) -> tuple[bool, str | None]:
        """Copy a bucket aside and check its digests. Returns whether it is done, and the fault."""
        return self.weight_transfer_engine.stage(BucketRef.from_json(ref_json))

    def longroll_stage_outcome(self, version: int) -> tuple[bool, str | None]:
        """The same for a bucket whose staging goes on beside the engine."""
        return self.weight_transfer_engine.stage_outcome(version)

    def longroll_transport_outcome(self) -> tuple[bool, str | None]:
        """Whether the weight transport is open, and the fault."""
        return self.weight_transfer_engine.transport_outcome()

    def longroll_drop_stage(self, version: int) -> None:
        """Forget what was staged for a version."""
        self.weight_transfer_engine.drop(version)

    def longroll_num_local_experts(self) -> int:
        """Routed experts of each layer held by this worker; 0 for a dense model."""
        from actors.vllm_plugin.weights import local_experts

        held = local_experts(self.get_model())  # type: ignore[attr-defined]
        return 0 if held is None else len(held)


class KeyedCpuWorker(StagingMixin, CPUWorker):
    """CPU worker."""

    def init_device(self) -> None:
        with _runner_class(cpu_worker, "CPUModelRunner", KeyedCpuRunner):
            super().init_device()


class KeyedGpuWorker(StagingMixin, Worker):
    """CUDA worker; needs vLLM's V1 model runner (VLLM_USE_V2_MODEL_RUNNER=0)."""

    def _make_model_runner(self) -> Any:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        if self.use_v2_model_runner:
            raise RuntimeError("model runner: got V2, expected V1 (set VLLM_USE_V2_MODEL_RUNNER=0)")

        class KeyedGpuRunner(KeyedSamplingMixin, GPUModelRunner):
            """GPU runner with keyed sampling."""

        return KeyedGpuRunner(self.vllm_config, self.device)
