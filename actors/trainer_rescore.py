"""Scores a slice of a step's trajectories again with one cause of mismatch toggled at a time.

Owns how each cause is brought about in the training forward without a second copy of the model: weights are
rounded one module at a time, while that module runs, and keys and values on their way into attention. Works on
partitioned parameters (ZeRO-3), which are whole exactly while their module runs. What the figures mean is
written in rollout.mismatch; what is done about them is decided there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from actors.trainer_model import full_shape
from actors.trainer_replay import RouterReplay, fetch_recorded
from kernels.int4 import dequantise, quantise
from kernels.kv_attention.reference import quantise as quantise_kv
from rollout.batch import MicroBatch
from rollout.errors import InvalidRequest
from rollout.mismatch import MEASURABLE_KV, NO_MISMATCH, CauseSums, Mismatch, measure, measure_by_version
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.encoding import Encoding, TensorPlan
from rollout.sync.manifest import torch_dtype

Score = Callable[[MicroBatch], torch.Tensor]
"""Log-probabilities [B, T] of the targets under the model as it is; collective, without gradient."""


def as_served(tensor: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    """A weight as the engine computes with it, in its own dtype.

    Args:
        tensor: Floating-point [..., N, K]; all of a tensor of this plan, or several of them stacked.
    """
    if plan.encoding is Encoding.INT4:
        return dequantise(*quantise(tensor, plan.row_elements)).to(tensor.dtype)
    return tensor.to(torch_dtype(plan.dtype)).to(tensor.dtype)


def round_int8(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., D] as an INT8 cache with one scale for each token and head gives them back."""
    codes, scale = quantise_kv(x)
    return (codes.float() * scale.unsqueeze(-1)).to(x.dtype)


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Keys or values as an FP8 (E4M3) cache with scale 1 gives them back."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-limit, limit).to(torch.float8_e4m3fn).to(x.dtype)


KV_ROUNDING = {"auto": None, "int8_per_token_head": round_int8, "fp8": round_fp8, "fp8_e4m3": round_fp8}
assert set(KV_ROUNDING) == set(MEASURABLE_KV)


class ServedWeights:
    """Lets a model compute with its weights as the engine has them.

    Args:
        module: The model, taken by DeepSpeed or not.
        plans: How each checkpoint tensor is served.
    """

    def __init__(self, module: torch.nn.Module, plans: Mapping[str, TensorPlan]) -> None:
        self._plans = plans
        self._names = {id(p): name for name, p in module.named_parameters() if self._changes(name, p)}
        self._parts = [
            part for part in module.modules() if any(id(p) in self._names for p in part.parameters(recurse=False))
        ]
        self._trained: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}

    @property
    def is_exact(self) -> bool:
        """Whether every weight is served as it is trained."""
        return not self._names

    @contextmanager
    def active(self) -> Iterator[None]:
        """Every forward inside uses the served weights; only without gradient."""
        assert not torch.is_grad_enabled(), "rounded weights would leak into the backward pass"
        handles = []
        for part in self._parts:
            # After DeepSpeed has gathered the parameters, and before it lets go of them.
            handles.append(part.register_forward_pre_hook(self._enter))
            handles.append(part.register_forward_hook(self._leave, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, trained in self._trained.values():  # of a forward that raised
                parameter.data = trained
            self._trained.clear()

    def _enter(self, part: torch.nn.Module, args: Any) -> None:
        for parameter in part.parameters(recurse=False):
            name = self._names.get(id(parameter))
            if name is not None:
                self._trained[id(parameter)] = parameter, parameter.data
                parameter.data = self._served(name, parameter.data)

    def _leave(self, part: torch.nn.Module, args: Any, output: Any) -> None:
        for parameter in part.parameters(recurse=False):
            if id(parameter) in self._trained:
                parameter.data = self._trained.pop(id(parameter))[1]

    def _served(self, name: str, trained: torch.Tensor) -> torch.Tensor:
        pieces = [self._plan(piece) for piece, _ in split_parameter(name, trained)]
        if len({(p.encoding, p.row_elements, p.dtype) for p in pieces}) == 1:  # groups lie within the last dimension
            return as_served(trained, pieces[0])
        served = torch.empty_like(trained)
        views = zip(split_parameter(name, trained), split_parameter(name, served), pieces, strict=True)
        for (_, before), (_, after), plan in views:
            after.copy_(as_served(before, plan))
        return served

    def _changes(self, name: str, parameter: torch.nn.Parameter) -> bool:
        whole = torch.empty(full_shape(parameter), device="meta")
        plans = [self._plan(piece) for piece, _ in split_parameter(name, whole)]
        return any(p.encoding is Encoding.INT4 or torch_dtype(p.dtype) != parameter.dtype for p in plans)

    def _plan(self, name: str) -> TensorPlan:
        plan = self._plans.get(name)
        if plan is None:
            raise InvalidRequest(f"trained tensor {name}", "no encoding for it", "a tensor that the engine serves")
        return plan


class RoundedKv(TorchFunctionMode):
    """While entered, attention gets keys and values that went through the engine's cache.

    They are rounded token by token and head by head where attention takes them, after the rotary embedding.
    """

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._rounding = rounding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, key, value, *rest = args
            args = (query, self._rounding(key), self._rounding(value), *rest)
        return func(*args, **(kwargs or {}))


class Rescorer:
    """Measures the causes on one rank. Every rank measures the same number of micro-batches together.

    Args:
        weights: The engine's weights.
        replay: The model's routers.
        kv_cache_dtype: Of the engine, as in engine.kv_cache_dtype.
        score: Of the trainer.
        device: Records are fetched to.

    Raises:
        InvalidRequest: The engine's KV cache has a type whose rounding is not known here.
    """

    def __init__(
        self, weights: ServedWeights, replay: RouterReplay, kv_cache_dtype: str, score: Score, device: torch.device
    ) -> None:
        if kv_cache_dtype not in KV_ROUNDING:
            expected = f"one of {', '.join(MEASURABLE_KV)} to measure the mismatch by cause"
            raise InvalidRequest("engine.kv_cache_dtype", kv_cache_dtype, expected)
        self._weights, self._replay, self._score, self._device = weights, replay, score, device
        self._kv_rounding = KV_ROUNDING[kv_cache_dtype]

    @torch.no_grad()
    def measure(self, batch: MicroBatch, *, replays: bool, is_captured: bool) -> CauseSums:
        """Score one micro-batch as trained and with each cause toggled.

        Args:
            batch: On the CPU.
            replays: Whether the update replays routing.
            is_captured: Whether any row of any rank's slice has captured routing; the same on every rank.
        """
        recorded = fetch_recorded(batch, self._device)
        is_trained, sampled = (batch.weights > 0).to(self._device), batch.sampling_logprobs.to(self._device)
        has_record = is_trained & recorded.is_recorded.any(dim=1, keepdim=True)
        own = self._score(batch) if is_captured or not replays else None
        routed, counts = None, torch.zeros(2, dtype=torch.int64)
        if is_captured or replays:
            with self._replay.replaying(recorded), self._replay.counting() as counted:
                routed = self._score(batch)
            counts = sum(counted, counts.to(self._device))
        trained = routed if replays else own
        assert trained is not None
        with self._replay.replaying(recorded) if replays else nullcontext():
            weights = self._with_served_weights(batch, trained, is_trained)
            kv = self._with_rounded_kv(batch, trained, is_trained)
        return CauseSums(
            all=measure(trained, sampled, is_trained),
            weights=weights,
            kv=kv,
            routing=NO_MISMATCH if routed is None else measure(trained, routed, has_record),
            unreplayed=NO_MISMATCH if routed is None or own is None else measure(own, routed, has_record),
            by_version=measure_by_version(trained, sampled, is_trained, batch.versions.to(self._device)),
            num_choices=int(counts[0]),
            num_flips=int(counts[1]),
            is_captured=recorded.num_found > 0,
        )

    def _with_served_weights(self, batch: MicroBatch, trained: torch.Tensor, is_trained: torch.Tensor) -> Mismatch:
        if self._weights.is_exact:
            return NO_MISMATCH
        with self._weights.active():
            return measure(trained, self._score(batch), is_trained)

    def _with_rounded_kv(self, batch: MicroBatch, trained: torch.Tensor, is_trained: torch.Tensor) -> Mismatch:
        if self._kv_rounding is None:
            return NO_MISMATCH
        with RoundedKv(self._kv_rounding):
            return measure(trained, self._score(batch), is_trained)
