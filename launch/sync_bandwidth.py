"""How fast all bytes of a model get into the checked shadows of the shards. A part of launch.bench_sync."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from actors.kept_rows import KeptRows
from actors.service import Service, served_plans, start_service
from actors.transport import Outgoing, shared_memory_transport
from actors.weight_partition import Share
from actors.weight_receiver import ControllerReceiver
from launch.random_model import save_random_model
from rollout.config import RunConfig
from rollout.sync import segments
from rollout.sync.checkpoint_names import checkpoint_files
from rollout.sync.encoding import TensorPlan, encode
from rollout.sync.manifest import Piece

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Transfers of a whole model, each beside a memory copy of as many bytes in the same process.

    Attributes:
        num_parameters, num_bytes: Of the model, and of its encoded rows.
        transfer_s: From buckets sealed in the sender (a sender hashes rows as it encodes them) to shadows whose
            digests have been checked, in all shards; calls through the controller are in it.
        memcpy_s: torch's copy of the same number of bytes, one thread.
    """

    num_parameters: int
    num_bytes: int
    transfer_s: list[float]
    memcpy_s: list[float]

    @property
    def bandwidth_ratio(self) -> float:
        """Median over the pairs of memory-copy time / transfer time."""
        return statistics.median(m / t for m, t in zip(self.memcpy_s, self.transfer_s, strict=True))


def whole_shares(plans: dict[str, TensorPlan], bucket_bytes: int) -> list[list[Share]]:
    """Every tensor whole, in buckets of at most so many bytes."""
    buckets: list[list[Share]] = [[]]
    size = 0
    for plan in plans.values():
        if buckets[-1] and size + plan.num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        piece = Piece(name=plan.name, first_row=0, num_rows=plan.num_rows)
        buckets[-1].append(Share(piece=piece, parameter=plan.name, start=0, stop=plan.numel))
        size += plan.num_bytes
    return buckets


def encoded(directory: Path, plans: dict[str, TensorPlan], buckets: list[list[Share]]) -> KeptRows:
    """The model's rows in shared memory, as a trainer rank keeps them."""
    kept = KeptRows(buckets, plans, segments.create)
    files = checkpoint_files(directory)
    for bucket in buckets:
        for share, rows in zip(bucket, kept.add(), strict=True):
            name = share.piece.name
            with safe_open(files[name], "pt") as opened:
                # Another model than the one that is served: nearly every byte changes.
                tensor = opened.get_tensor(name).float().flip(0) * 1.01
            rows.copy_(encode(tensor, plans[name]))
        kept.seal(version=1, attempt=0, sender=0)
    return kept


def transfer(service: Service, kept: KeptRows, pieces: list[tuple[int, Piece]]) -> float:
    """Send everything once and give it up again. Returns seconds."""
    receiver = ControllerReceiver(service.controller, TIMEOUT_S)
    attempt = receiver.begin(1, None, pieces)
    began = time.perf_counter()
    buckets = (Outgoing(ref=replace(ref, attempt=attempt), payload=torch.empty(0), is_kept=True) for ref in kept.refs)
    fault = shared_memory_transport(receiver).send(buckets)
    took = time.perf_counter() - began
    if fault is not None:
        raise fault.error
    receiver.abandon(1)
    return took


def memory_copy_s(num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros(num_bytes, dtype=torch.uint8)  # its pages exist: only the copy is timed
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def bandwidth(config: RunConfig, repeats: int) -> Bandwidth:
    """Start two INT4 shards of a random model and send it all, `repeats` times, after one that warms up."""
    torch.set_num_threads(1)
    config = copy.deepcopy(config)
    with tempfile.TemporaryDirectory() as directory:
        num_parameters = save_random_model(Path(directory))
        config.model.path, config.model.max_model_len = directory, 1024
        plans = served_plans(config.model, config.engine)
        with start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service:
            buckets = whole_shares(plans, config.sync.bucket_bytes)
            kept = encoded(Path(directory), plans, buckets)
            pieces = [(0, share.piece) for bucket in buckets for share in bucket]
            num_bytes = sum(plan.num_bytes for plan in plans.values())
            transfers, copies = [], []
            try:
                for repeat in range(repeats + 1):
                    copied, took = memory_copy_s(num_bytes), transfer(service, kept, pieces)
                    print(
                        f"{num_bytes / 1e6:.0f} MB  transfer {num_bytes / took / 1e9:.2f} GB/s  "
                        f"memory copy {num_bytes / copied / 1e9:.2f} GB/s{'  (warming up)' if repeat == 0 else ''}",
                        flush=True,
                    )
                    if repeat:
                        transfers.append(took)
                        copies.append(copied)
            finally:
                kept.release()
    return Bandwidth(num_parameters=num_parameters, num_bytes=num_bytes, transfer_s=transfers, memcpy_s=copies)
