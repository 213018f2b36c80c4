"""vLLM workers with Longroll's model runner, and the methods that a shard's actor calls beside the engine.

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

from actors.draft_plans import travelling_plans
from actors.vllm_plugin.control import ControlServer
from actors.vllm_plugin.live import LiveWeight, draft_weights
from actors.vllm_plugin.nccl import BroadcastReceiver
from actors.vllm_plugin.options import PluginOptions
from actors.vllm_plugin.routing import RoutingCaptureMixin
from actors.vllm_plugin.runner import KeyedSamplingMixin
from actors.vllm_plugin.tree_runner import TreeRunnerMixin
from actors.vllm_plugin.versioned import VersionedRunnerMixin
from actors.vllm_plugin.weights import WeightDesk, WorkerStore, num_local_experts
from rollout.speculation.clover_training import TENSOR_PREFIX
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import plan_tensors
from rollout.sync.manifest import dtype_name


class KeyedCpuRunner(VersionedRunnerMixin, RoutingCaptureMixin, KeyedSamplingMixin, CPUModelRunner):
    """CPU runner with keyed sampling, versioned weights and captured routing."""


class TreeCpuRunner(VersionedRunnerMixin, TreeRunnerMixin, RoutingCaptureMixin, KeyedSamplingMixin, CPUModelRunner):
    """The same, for engines that speculate."""


@contextmanager
def _runner_class(module: ModuleType, name: str, runner: type) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, runner)
    try:
        yield
    finally:
        setattr(module, name, original)


class ControlledMixin:
    """Opens the control line; `collective_rpc` is used for nothing else."""

    model_runner: Any
    vllm_config: Any

    def longroll_open(self) -> tuple[str, str]:
        """Take over the loaded weights and begin to serve the actor's calls. Returns address and key of the line."""
        options = PluginOptions.of(self.vllm_config)
        config = self.vllm_config.model_config
        plans = plan_tensors(checkpoint_specs(config.model, dtype_name(config.dtype)).values(), options.int4)
        model = self.model_runner.get_model()
        drafts = getattr(self.model_runner, "draft_desk", None)
        store = WorkerStore(model, plans, options.initial_version, self._draft_weights(options, drafts))
        is_alone = self.vllm_config.parallel_config.data_parallel_size == 1
        desk = WeightDesk(store, options.initial_version, is_alone=is_alone)
        self.model_runner.gate = desk.gate
        receiver = BroadcastReceiver(desk.stage, self.model_runner.device)

        def held_bytes() -> dict[str, int]:
            caches = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in self._kv_tensors()}
            return {
                "weights": store.num_live_bytes,
                "shadow": store.num_shadow_bytes,
                "kv_cache": sum(caches.values()),
            }

        self._control = ControlServer(
            {
                **desk.methods(),
                **({} if drafts is None else drafts.methods()),
                "join": receiver.join,
                "receive": receiver.receive,
                "take_routing": self.model_runner.take_routing,
                "take_steps": self.model_runner.take_steps,
                "num_local_experts": lambda: num_local_experts(model),
                "held_bytes": held_bytes,
            },
            bulk=("stage", "verify", "receive"),
        )
        return self._control.line

    def _draft_weights(self, options: PluginOptions, desk: Any) -> list[LiveWeight]:
        """Weights of the draft model, if they travel with the target's."""
        plans = travelling_plans(options.speculation, dtype_name(self.vllm_config.model_config.dtype))
        return draft_weights(desk.draft_model, plans, TENSOR_PREFIX) if plans else []

    def _kv_tensors(self) -> Iterator[Any]:
        for cache in self.model_runner.kv_caches:
            yield from cache if isinstance(cache, (list, tuple)) else (cache,)


class KeyedCpuWorker(ControlledMixin, CPUWorker):
    """CPU worker."""

    def init_device(self) -> None:
        speculates = PluginOptions.of(self.vllm_config).speculation is not None
        runner = TreeCpuRunner if speculates else KeyedCpuRunner
        with _runner_class(cpu_worker, "CPUModelRunner", runner):
            super().init_device()


class KeyedGpuWorker(ControlledMixin, Worker):
    """CUDA worker; needs vLLM's V1 model runner (VLLM_USE_V2_MODEL_RUNNER=0)."""

    def _make_model_runner(self) -> Any:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        if self.use_v2_model_runner:
            raise RuntimeError("model runner: got V2, expected V1 (set VLLM_USE_V2_MODEL_RUNNER=0)")

        class KeyedGpuRunner(VersionedRunnerMixin, RoutingCaptureMixin, KeyedSamplingMixin, GPUModelRunner):
            """GPU runner with keyed sampling, versioned weights and captured routing."""

        class TreeGpuRunner(
            VersionedRunnerMixin, TreeRunnerMixin, RoutingCaptureMixin, KeyedSamplingMixin, GPUModelRunner
        ):
            """The same, for engines that speculate. Not run on a GPU so far."""

        speculates = PluginOptions.of(self.vllm_config).speculation is not None
        return (TreeGpuRunner if speculates else KeyedGpuRunner)(self.vllm_config, self.device)
