"""Stands where the controller stands: a real shadow behind the controller's methods, with faults on demand.

Runs as a Ray actor, or, through `DirectReceiver`, in the trainer's own process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

import torch

from rollout.errors import SyncRefused
from rollout.fleet import SyncReport
from rollout.sync import segments
from rollout.sync.encoding import Encoding, TensorPlan, int4_tensors, plain_tensor
from rollout.sync.manifest import BucketRef, check_tiling
from rollout.sync.shadow import Shadow


def empty_shadow(plans: Mapping[str, TensorPlan], version: int = 0) -> Shadow:
    """Rows of a version nobody ever published: all bytes 255, which no encoding makes of finite weights."""
    rows = {name: torch.full((p.num_rows, p.row_bytes), 255, dtype=torch.uint8) for name, p in plans.items()}
    return Shadow(plans, rows, version)


class ShadowController:
    """One shard's worth of a fleet, with the methods that trainers call.

    `fault` is (sender, index, kind) of a bucket to fail: "refuse", or "truncate" its segment first.
    """

    def __init__(self, plans: Mapping[str, TensorPlan]) -> None:
        self.plans = dict(plans)
        self.shadow = empty_shadow(plans)
        self.live = 0  # served; the shadow beside it is of no version once a full one was dropped half-way
        self.fault: tuple[int, int, str] | None = None
        self.commit_fault: Exception | None = None
        self.calls: list[str] = []
        self.buckets: list[BucketRef] = []
        self.snapshot: tuple[BucketRef, ...] = ()
        self._version: int | None = None
        self._end_reason = ""
        self._attempt = 0
        self._expected: set = set()
        self._lock = threading.Lock()

    def get_plans(self) -> dict[str, TensorPlan]:
        return self.plans

    def live_version(self) -> int:
        return self.live

    def num_workers(self) -> int:
        return 1

    def begin_publish(self, version: int, base: int | None, pieces: Sequence) -> int:
        check_tiling({name: plan.num_rows for name, plan in self.plans.items()}, [piece for _, piece in pieces])
        if version <= self.live:
            raise SyncRefused(f"version: got {version}")
        self.shadow.drop()
        self.shadow.begin(base)
        self.calls, self.buckets = ["begin full" if base is None else "begin delta"], []
        self._version, self._expected = version, set(pieces)
        self._attempt += 1
        return self._attempt

    def publish_bucket(self, ref: BucketRef, payload: Sequence = ()) -> None:
        data = None
        if payload:
            import ray

            data = torch.from_numpy(ray.get(payload[0]).copy())
        with self._lock:
            self._stage(ref, data)

    def _stage(self, ref: BucketRef, payload: torch.Tensor | None) -> None:
        if (ref.version, ref.attempt) != (self._version, self._attempt):
            raise SyncRefused(f"{ref}: its publication is over: {self._end_reason}")
        self.calls.append("stage")
        try:
            if self.fault is not None and self.fault[:2] == (ref.sender, ref.index):
                if self.fault[2] == "refuse":
                    raise SyncRefused(f"{ref}: digest differs")
                os.truncate(segments.SHARED_MEMORY / ref.segment, ref.num_bytes - 1)
            pieces = {(ref.sender, entry.piece) for entry in ref.entries}
            assert pieces <= self._expected, "only what was announced may come"
            self._expected -= pieces
            self.shadow.stage(ref, segments.map(ref) if payload is None else payload)
        except Exception as fault:
            self._version, self._end_reason = None, str(fault)
            self.shadow.drop()
            raise
        self.buckets.append(ref)

    def commit_publish(self, version: int) -> SyncReport:
        self.calls.append("commit")
        if self.commit_fault is not None:
            raise self.commit_fault
        assert version == self._version and not self._expected and not self.shadow.missing()
        self.flip(version)
        self._version = None
        return SyncReport(
            version=version,
            num_tensors=len(self.plans),
            num_bytes=sum(ref.num_bytes for ref in self.buckets),
            num_bytes_full=sum(plan.num_bytes for plan in self.plans.values()),
            num_rows_changed=sum(entry.num_changed for ref in self.buckets for entry in ref.entries),
            stage_s=0.0,
            flip_s=0.0,
            stall_s=0.0,
        )

    def flip(self, version: int) -> None:
        self.shadow.commit(version)
        self.live = version

    def remember_snapshot(self, version: int, refs: Sequence[BucketRef]) -> None:
        assert version == self.live and all(ref.version == version for ref in refs)
        self.snapshot = tuple(refs)

    def abandon_publish(self, version: int) -> None:
        self.calls.append("abandon")
        if version == self._version:
            self._version, self._end_reason = None, "its sender abandoned it"
            self.shadow.drop()

    def set_fault(self, fault: tuple[int, int, str] | None) -> None:
        self.fault = fault

    def state(self) -> tuple[dict[str, torch.Tensor], list[str], list[BucketRef]]:
        """Rows by name, calls since the last begin, and buckets that were staged."""
        return {name: self.shadow.rows(name) for name in self.shadow.names}, self.calls, self.buckets

    def late_rows(self) -> dict[str, torch.Tensor]:
        """Rows of a shadow that starts from nothing and is given the snapshot."""
        late = empty_shadow(self.plans)
        for ref in self.snapshot:
            late.stage(ref, segments.map(ref))
        assert not late.missing()
        return {name: late.rows(name) for name in late.names}


class DirectReceiver:
    """A trainer's Receiver that calls a ShadowController of its own process."""

    def __init__(self, controller: ShadowController) -> None:
        self.live_version = controller.live_version
        self.num_workers = controller.num_workers
        self.begin = controller.begin_publish
        self.stage = controller.publish_bucket
        self.commit = controller.commit_publish
        self.remember = controller.remember_snapshot
        self.abandon = controller.abandon_publish
        self.open_transport = getattr(controller, "open_transport", None)


def decoded(rows: Mapping[str, torch.Tensor], plans: Mapping[str, TensorPlan]) -> dict[str, torch.Tensor]:
    """Float32 tensors by checkpoint name."""
    tensors = {}
    for name, matrix in rows.items():
        plan = plans[name]
        if plan.encoding is Encoding.INT4:
            from kernels.int4 import dequantise

            tensors[name] = dequantise(*int4_tensors(matrix, plan))
        else:
            tensors[name] = plain_tensor(matrix, plan).float()
    return tensors
