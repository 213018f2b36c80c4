"""All trainer ranks together, as the main loop sees them.

Owns the rank actors and the weight version. Decides nothing about the loss or the batch (rollout.loss,
rollout.batch) and touches no tensor of the model; a rank that dies, raises or falls silent ends the
whole group with one clear error, because the others would wait for it in a collective.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from actors.served_encoding import ServedEncoding
from actors.trainer import Continuation, StepResult, TrainerRank
from actors.trainer_draft import fitting_draft
from rollout.batch import Selection, plan_ranks, plan_updates, select
from rollout.checkpoints import CheckpointDir
from rollout.config import ClusterConfig, EngineConfig, ModelConfig, SamplingConfig, SyncConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, EngineDead, InvalidRequest, SyncRefused, TrainerDead
from rollout.fleet import SyncReport
from rollout.lr_schedule import lr_at
from rollout.mismatch import Knobs, MismatchReport, report_of, respond
from rollout.train_metrics import StepSums, TrainMetrics, summarise
from rollout.trainer_config import MismatchConfig, TrainerConfig
from rollout.types import Group

logger = logging.getLogger(__name__)
DYING_WORDS_S = 3.0  # after one rank failed: how long the others may tell why, before all are killed
RELEASE_S = 1.0  # before they are killed: how long ranks may take to give up their shared memory
SURVIVED = (SyncRefused, EngineDead, CheckpointBroken, InvalidRequest)
"""Errors that every rank leaves together, so that the group can go on."""


class TrainerGroup:
    """The driver-side handle of all ranks. Use `TrainerGroup.start`.

    Args:
        ranks: Rank actors, started, by rank.
        config: The update.
        sampling: How the trajectories are sampled.
        checkpoints: Where checkpoints lie.
        publish_timeout_s: Longest wait for a publication.
        has_controller: Whether publications go anywhere.
        mismatch: How the gap to sampling is measured, and what is done about it.
    """

    def __init__(
        self,
        ranks: list[ActorHandle],
        config: TrainerConfig,
        sampling: SamplingConfig,
        checkpoints: CheckpointDir,
        publish_timeout_s: float,
        has_controller: bool,
        mismatch: MismatchConfig,
    ) -> None:
        self._ranks, self._config, self._sampling = ranks, config, sampling
        self._checkpoints, self._publish_timeout_s = checkpoints, publish_timeout_s
        self._has_controller, self._mismatch = has_controller, mismatch
        self._version = 0
        self._knobs = Knobs(tis_cap=config.tis_cap if config.use_tis else None, replay_routing=config.replay_routing)

    @staticmethod
    def start(
        model: ModelConfig,
        trainer: TrainerConfig,
        sampling: SamplingConfig,
        sync: SyncConfig,
        cluster: ClusterConfig,
        run_dir: str | Path,
        controller: ActorHandle | None = None,
        engine: EngineConfig | None = None,
        mismatch: MismatchConfig | None = None,
    ) -> TrainerGroup:
        """Start all ranks and load the model; Ray must be initialised.

        Args:
            run_dir: Checkpoints go to run_dir/checkpoints; every rank's node must reach it.
            controller: Receives publications; None when nothing is served.
            engine: Of the engines it serves with, for the encoding of publications and the draft that travels with
                them; None = the defaults.
            mismatch: How the gap to sampling is measured; None = the defaults.

        Raises:
            InvalidRequest: If the options contradict each other, the model directory is wrong, or a draft that
                travels was made for another model.
            TrainerDead: If a rank could not start in time.
        """
        if sampling.temperature <= 0:
            raise InvalidRequest("sampling.temperature", sampling.temperature, "a number > 0 to train with")
        checkpoints = CheckpointDir((Path(run_dir) / "checkpoints").absolute(), trainer.num_ranks)
        on_gpu = trainer.num_gpus_per_rank > 0
        env = {} if on_gpu else {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        actor = ray.remote(TrainerRank).options(
            num_cpus=cluster.num_cpus_per_trainer,
            num_gpus=trainer.num_gpus_per_rank,
            runtime_env={"env_vars": env},
        )
        engine = engine or EngineConfig()
        encoding, kv = ServedEncoding.of(model, engine), engine.kv_cache_dtype
        if encoding.draft_model is not None:
            fitting_draft(model.path, encoding.draft_model)
        ranks = [
            actor.remote(rank, model, trainer, sync, sampling.temperature, controller, checkpoints, encoding, kv)
            for rank in range(trainer.num_ranks)
        ]
        group = TrainerGroup(
            ranks,
            trainer,
            sampling,
            checkpoints,
            publish_timeout_s=trainer.distributed_timeout_s + 2 * sync.publication_timeout_s,
            has_controller=controller is not None,
            mismatch=mismatch or MismatchConfig(),
        )
        try:
            rendezvous = group._wait([ranks[0].rendezvous.remote()], trainer.start_timeout_s, "start")[0]
            group._wait([r.start.remote(rendezvous) for r in ranks], trainer.start_timeout_s, "start")
        except BaseException:
            group.stop()
            raise
        return group

    @property
    def version(self) -> int:
        """Training steps done, skipped ones included."""
        return self._version

    def train_step(self, groups: Sequence[Group]) -> TrainMetrics:
        """Train on finished groups: updates_per_batch optimizer steps, one new version.

        The version rises by one whatever happens: however many optimizer steps that were, and also when
        nothing was left to train on, so that steps, versions and data stay aligned.

        Raises:
            InvalidRequest: If a group is not as it should be; nothing was changed.
            MismatchOverBudget: If the mismatch is over its budget and that is to end the run; nothing was changed.
            TrainerDead: If a rank failed; the group has been stopped.
        """
        begun = time.monotonic()
        config = self._config
        selection = select(groups, config, self._sampling.max_tokens)
        lr = lr_at(self._version, config.lr, config.lr_warmup_steps)
        version = self._version + 1
        result = StepResult(sums=StepSums(), grad_norm=0.0)
        report = None
        if selection.samples:
            report = self._watch_mismatch(selection)
            plans = plan_updates(selection.samples, config, self._sampling.max_tokens)
            refs = [
                rank.train_step.remote(plan, lr, version, self._knobs)
                for rank, plan in zip(self._ranks, plans, strict=True)
            ]
            result = self._wait(refs, config.distributed_timeout_s, f"step to version {version}")[0]
        else:
            logger.warning("version %d: no trajectory left to train on, weights unchanged", version)
        self._version = version
        return summarise(
            selection,
            result.sums,
            version=version,
            grad_norm=result.grad_norm,
            lr=lr,
            duration_s=time.monotonic() - begun,
            knobs=self._knobs,
            mismatch=report,
            draft=result.draft,
        )

    def _watch_mismatch(self, selection: Selection) -> MismatchReport | None:
        """Measure the mismatch by cause where it is due, before the update, and respond to it."""
        config, version = self._mismatch, self._version
        if config.every_steps == 0 or version % config.every_steps:
            return None
        count = min(config.num_trajectories, len(selection.samples))
        draw = random.Random(self._config.seed * 1_000_003 + version)
        chosen = [selection.samples[i] for i in sorted(draw.sample(range(len(selection.samples)), count))]
        is_captured = any(sample.trajectory.routed_experts for sample in chosen)
        plans = plan_ranks(chosen, self._config.num_ranks, self._config.micro_batch_tokens)
        refs = [
            rank.rescore.remote(plan, self._knobs, is_captured) for rank, plan in zip(self._ranks, plans, strict=True)
        ]
        parts = self._wait(refs, self._config.distributed_timeout_s, f"mismatch under version {version}")
        report = report_of(parts, version)
        response = respond(report, config, self._knobs)
        for message in response.messages:
            logger.warning("version %d: %s", version, message)
        self._knobs = response.knobs
        return report

    def publish(self) -> SyncReport:
        """Send the weights of the current version to the shards.

        Raises:
            InvalidRequest: If the group was started without a controller.
            SyncRefused: The old version goes on serving; the group stays usable.
            EngineDead: The flip failed half-way; the fleet is broken, the group stays usable.
        """
        if not self._has_controller:
            raise InvalidRequest("publish", "a trainer without a controller", "one that serves engines")
        refs = [rank.publish.remote(self._version) for rank in self._ranks]
        what = f"publication of version {self._version}"
        report: SyncReport = self._wait(refs, self._publish_timeout_s, what)[0]
        return report

    def save(self, cursor: Cursor) -> None:
        """Write a checkpoint of the current version; it counts only once every rank has finished.

        Raises:
            InvalidRequest: If the cursor is of another version.
        """
        if cursor.version != self._version:
            raise InvalidRequest("cursor.version", cursor.version, f"the trainer's version {self._version}")
        step = cursor.version
        cursor = replace(cursor, knobs=self._knobs)
        self._checkpoints.begin(step)
        self._everywhere("save", step)
        self._checkpoints.commit(step, cursor, self._config.keep_checkpoints)

    def load_latest(self) -> Cursor | None:
        """Load the newest complete checkpoint; None when there is none yet.

        Raises:
            CheckpointBroken: If it is damaged or of another number of ranks; nothing was loaded.
        """
        found = self._checkpoints.latest()
        if found is None:
            return None
        step, cursor = found
        self._everywhere("verify", step)
        self._everywhere("load", step)
        self._version = cursor.version
        self._knobs = cursor.knobs or self._knobs
        return cursor

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Continuation]:
        """The trainer's own greedy continuations, to compare engines with."""
        plain = [tuple(prompt) for prompt in prompts]
        continuations: list[Continuation] = self._everywhere("greedy", plain, num_tokens)[0]
        return continuations

    def weights_digest(self) -> str:
        """One digest of all weights."""
        digest: str = self._everywhere("weights_digest")[0]
        return digest

    def stop(self) -> None:
        """End all rank actors; harmless when they are gone already."""
        ray.wait([rank.release.remote() for rank in self._ranks], num_returns=len(self._ranks), timeout=RELEASE_S)
        for rank in self._ranks:
            ray.kill(rank)

    def _everywhere(self, method: str, *args: Any) -> list[Any]:
        refs = [getattr(rank, method).remote(*args) for rank in self._ranks]
        return self._wait(refs, self._config.distributed_timeout_s, method)

    def _wait(self, refs: list[Any], timeout_s: float, what: str) -> list[Any]:
        """Results of all refs; the first failure ends the wait.

        Raises:
            SURVIVED errors as they are, once every rank has left the call; TrainerDead otherwise,
            after the group was stopped.
        """
        deadline = time.monotonic() + timeout_s
        pending, faults = list(refs), list[Exception]()
        while pending and not faults:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                faults.append(TimeoutError(f"no answer within {timeout_s:g} s"))
            faults += [fault for ref in done if (fault := _fault_of(ref)) is not None]
        if not faults:
            return list(ray.get(refs))
        if pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=DYING_WORDS_S)
            faults += [fault for ref in done if (fault := _fault_of(ref)) is not None]
        if not pending and all(isinstance(fault, SURVIVED) for fault in faults):
            raise next((f for ref in refs if (f := _fault_of(ref)) is not None), faults[0])
        self.stop()
        fault = next((f for f in faults if isinstance(f, RayActorError)), faults[0])
        raise TrainerDead(f"{what}: a rank failed ({type(fault).__name__}: {fault}); all ranks were stopped")


def _fault_of(ref: Any) -> Exception | None:
    """The exception a finished ref holds, if any."""
    try:
        ray.get(ref, timeout=DYING_WORDS_S)
    except Exception as error:  # whatever the rank raised is reported by the caller
        return error.cause if isinstance(error, RayTaskError) else error
    return None
