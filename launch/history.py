"""What each step did, kept as one JSON line a step in run_dir, so that a resumed run still knows.

Owns the record of a step and the file; the picture, the summary and the monitor read it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of the main loop. Lengths in tokens, times in seconds.

    Attributes:
        step: 1 after the first optimizer step.
        version: Weight version the rollouts were sampled under.
        reward_mean, exact_rate: Over the trajectories that were scored.
        reward_std: Standard deviation of their rewards.
        length_mean, length_p95, length_max: Of the generated outputs.
        truncated_rate: Share that reached max_tokens.
        num_trajectories, num_failed: In the groups of the step, and of them failed.
        num_tokens: Generated.
        num_groups_filtered: Groups without a learning signal, left out.
        staleness_max: Largest number of versions between sampling and training of a token.
        rollout_s, train_s, sync_s, save_s: Wall time of each part.
        stall_s: Time in which no shard decoded because of the sync.
        mismatch_kl: Sampling against training log-probabilities, mean over tokens.
        mismatch_kl_slice, mismatch_kl_weights, mismatch_kl_kv, mismatch_kl_routing, mismatch_kl_staleness: The same and
            its causes on a slice of the step (see rollout.mismatch); None in steps that do not measure them.
        routing_kl_without_replay, routing_flip_rate: What replay removes of it, and how often the training forward
            alone would choose other experts; None where no routing was captured or measured.
        num_routing_replayed, num_routing_missing: Trajectories trained with and without the routing they should have.
        tis_cap: Cap of the importance weights, which a mismatch budget may have tightened; None without them.
        loss, grad_norm, clip_fraction, entropy, lr: Of the policy update.
        reference_kl: KL of the policy to its reference, mean over tokens; 0 without one.
        tis_weight_mean, tis_capped_fraction: Of the truncated importance weights.
        kv_usage_max: Largest share of a shard's KV cache in use during the step.
        draft_loss, draft_agreement: Of the draft model's update, see rollout.train_metrics; None without one.
        num_chunks, num_migrations, num_cuts: Chunks started; of them on another shard than the one before; chunks cut
            for something more urgent. These and the following are totals since the controller's start.
        num_retries: Chunks lost with their engine and generated again.
        num_tokens_restored, num_regenerated: Tokens that the journal had; trajectories begun anew for being too stale.
        failures: Totals since the controller's start by reason: trajectories that failed, groups of shards that died.
        num_group_restarts: Times such a group was started again.
        is_skipped: Nothing was left to train on; the weights stayed as they were.
        trajectories_digest: Of all tokens of the step; equal digests mean equal trajectories.
    """

    step: int
    version: int
    reward_mean: float
    reward_std: float
    exact_rate: float
    length_mean: float
    length_p95: float
    length_max: int
    truncated_rate: float
    num_trajectories: int
    num_failed: int
    num_tokens: int
    num_groups_filtered: int
    staleness_max: int
    rollout_s: float
    train_s: float
    sync_s: float
    save_s: float
    stall_s: float
    mismatch_kl: float
    loss: float
    grad_norm: float
    clip_fraction: float
    entropy: float
    lr: float
    reference_kl: float
    tis_weight_mean: float
    tis_capped_fraction: float
    kv_usage_max: float
    is_skipped: bool
    trajectories_digest: str
    mismatch_kl_slice: float | None = None
    mismatch_kl_weights: float | None = None
    mismatch_kl_kv: float | None = None
    mismatch_kl_routing: float | None = None
    mismatch_kl_staleness: float | None = None
    routing_kl_without_replay: float | None = None
    routing_flip_rate: float | None = None
    num_routing_replayed: int = 0
    num_routing_missing: int = 0
    tis_cap: float | None = None
    draft_loss: float | None = None
    draft_agreement: float | None = None
    num_chunks: int = 0
    num_migrations: int = 0
    num_cuts: int = 0
    num_retries: int = 0
    num_tokens_restored: int = 0
    num_regenerated: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    num_group_restarts: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(self.rollout_s, 1e-9)

    @property
    def longest_sample_tokens_per_s(self) -> float:
        return self.length_max / max(self.rollout_s, 1e-9)


class History:
    """The steps of a run, in memory and in a file.

    Args:
        path: The file; made when the first step is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: list[StepRecord] = []

    def restore(self, num_steps: int) -> None:
        """Read the steps that a checkpoint after `num_steps` steps contains, and forget any later ones."""
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        records = [StepRecord(**json.loads(line)) for line in lines if line.endswith("}")]
        self.steps = [record for record in records if record.step <= num_steps]
        self._write()

    def _write(self) -> None:
        draft = self._path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.steps))
        draft.replace(self._path)

    def add(self, record: StepRecord) -> None:
        self.steps.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def amend_save_s(self, save_s: float) -> None:
        """Add the time of the checkpoint that was written after the newest step."""
        self.steps[-1] = replace(self.steps[-1], save_s=save_s)
        self._write()
