"""A trainer rank: one DeepSpeed data-parallel rank in one Ray actor.

Owns the engine process of its rank. It knows nothing of groups, rewards, files' protocol or the other
actors: it is handed mini-batches whose tokens carry their weight in the global loss, does one
optimizer step on each, and takes part in gathers and checkpoints as `TrainerGroup` tells all ranks together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from actors.rank_group import RankGroup
from actors.served_encoding import ServedEncoding
from actors.trainer_draft import OnlineDraft, fitting_draft
from actors.trainer_model import (
    build_module,
    deepspeed_config,
    join_group,
    open_store,
    restore_rotary_frequencies,
    share_the_cpu,
)
from actors.trainer_replay import RouterReplay, fetch_recorded
from actors.trainer_rescore import Rescorer, ServedWeights
from actors.transport import make_transport
from actors.weight_receiver import ControllerReceiver
from actors.weight_source import WeightSource, weights_digest
from rollout.batch import MicroBatch, MiniBatch
from rollout.checkpoints import CheckpointDir
from rollout.config import ModelConfig, SyncConfig
from rollout.errors import CheckpointBroken, InvalidRequest, LongrollError
from rollout.fleet import Rendezvous, SyncReport
from rollout.loss import importance_weights, policy_loss, ratio_base, selected_logprobs
from rollout.mismatch import CauseSums, Knobs, measure
from rollout.train_metrics import DraftMetrics, StepSums
from rollout.trainer_config import Reference, TrainerConfig

RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step came to, on every rank alike.

    Attributes:
        sums: Over all ranks.
        grad_norm: The largest of its updates' gradient norms before clipping.
        draft: Of the draft model that travels.
    """

    sums: StepSums
    grad_norm: float
    draft: DraftMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Greedy tokens, and for each the gap between the two largest logits (small = near tie)."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


class TrainerRank:
    """One rank. Every method but the first two is collective: all ranks are called together.

    Args:
        rank: Data-parallel rank.
        model: The policy, and the reference of the KL penalty when there is one.
        config: The update.
        sync: How weights are published.
        temperature: Of sampling; log-probabilities are taken at the same one.
        controller: Receives publications; None when nothing is served.
        checkpoints: Where checkpoints lie.
        encoding: How the engines serve the weights, and which draft travels with them.
        kv_cache_dtype: Of the engines.
    """

    def __init__(
        self,
        rank: int,
        model: ModelConfig,
        config: TrainerConfig,
        sync: SyncConfig,
        temperature: float,
        controller: ActorHandle | None,
        checkpoints: CheckpointDir,
        encoding: ServedEncoding,
        kv_cache_dtype: str = "auto",
    ) -> None:
        share_the_cpu(config)
        self._rank, self._model, self._config, self._sync = rank, model, config, sync
        self._temperature, self._controller, self._checkpoints = temperature, controller, checkpoints
        self._encoding, self._kv_cache_dtype = encoding, kv_cache_dtype
        self._store: dist.TCPStore | None = None
        self._engine: Any = None
        self._reference: Any = None
        self._source: WeightSource | None = None
        self._draft: OnlineDraft | None = None
        self._rescorer: Rescorer | None = None
        self._knobs = Knobs(tis_cap=None, replay_routing=False)

    def rendezvous(self) -> Rendezvous:
        """Open the meeting point on this node. Asked of rank 0 only."""
        host = ray.util.get_node_ip_address()
        self._store = open_store(self._rank, self._config.num_ranks, host, self._config.start_timeout_s)
        return Rendezvous(host=host, rpc_port=self._store.port)

    def start(self, rendezvous: Rendezvous) -> None:
        """Join the group and load the model."""
        config = self._config
        self._device = join_group(self._rank, rendezvous, config, self._store)
        torch.manual_seed(config.seed)
        ds_config = deepspeed_config(config, self._model.dtype)
        module = build_module(self._model, config, ds_config)
        self._engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=ds_config)
        restore_rotary_frequencies(module)
        self._replay = RouterReplay(module)
        if config.replay_routing and not self._replay.can_replay:
            raise InvalidRequest("trainer.replay_routing", True, "false: this model has no router that can replay")
        if config.kl_reference is not Reference.NONE:
            ds_reference = {key: value for key, value in ds_config.items() if key != "optimizer"}
            frozen = build_module(self._model, config, ds_config).requires_grad_(False).eval()
            self._reference, *_ = deepspeed.initialize(model=frozen, config=ds_reference)
            restore_rotary_frequencies(frozen)
        if self._encoding.draft_model is not None:
            draft = fitting_draft(self._model.path, self._encoding.draft_model)
            self._draft = OnlineDraft(config, module, draft, self._temperature, self._rank, self._device)

    def train_step(self, updates: list[MiniBatch], lr: float, version: int, knobs: Knobs) -> StepResult:
        """Take one optimizer step on each mini-batch, in turn.

        Args:
            updates: This rank's shares, the same number on every rank.
            lr: Step size of all of them.
            version: Weight version after the last; seeds the random state, so that a resumed run
                repeats it.
            knobs: What may have been tightened since the start.

        Raises:
            LongrollError: On every rank, before that update changes the weights, when a loss is not finite.
        """
        torch.manual_seed(self._config.seed * 1_000_003 + version * self._config.num_ranks + self._rank)
        self._knobs = knobs
        starts = self._start_logprobs(updates)
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._draft is not None:
            self._draft.begin(updates, version)
        done = [self._update(mini, start, version) for mini, start in zip(updates, starts, strict=True)]
        return StepResult(
            sums=StepSums.over_updates([result.sums for result in done]),
            grad_norm=max(result.grad_norm for result in done),
            draft=None if self._draft is None else self._draft.update(version),
        )

    def _start_logprobs(self, updates: list[MiniBatch]) -> list[list[torch.Tensor | None]]:
        """Log-probabilities of every micro-batch before the first update.

        None in the first mini-batch: its own forwards are by that policy still.
        """
        self._engine.eval()
        with torch.no_grad():
            later = [[self._start_of(batch) for batch in mini.batches] for mini in updates[1:]]
        return [[None] * len(updates[0].batches), *later]

    def _start_of(self, batch: MicroBatch) -> torch.Tensor:
        with self._as_sampled(batch):
            return self._logprobs(self._engine, batch)[0]

    @contextmanager
    def _as_sampled(self, batch: MicroBatch, sums: StepSums | None = None) -> Iterator[None]:
        """Replay the experts of sampling in the policy's forwards and recomputations, if that is wanted."""
        if not self._knobs.replay_routing:
            yield
            return
        recorded = fetch_recorded(batch, self._device)
        if sums is not None:
            sums.routing_replayed += recorded.num_found
            sums.routing_missing += recorded.num_missing
        with self._replay.replaying(recorded):
            yield

    def _update(self, mini: MiniBatch, starts: list[torch.Tensor | None], version: int) -> StepResult:
        local = StepSums()
        for batch, start in zip(mini.batches, starts, strict=True):
            with ExitStack() as around:
                around.enter_context(self._as_sampled(batch, local))
                if self._draft is not None:
                    around.enter_context(self._draft.watching(batch))
                loss = self._micro_batch_loss(batch, start, mini.num_tokens, local)
                # DeepSpeed divides the summed gradient by the number of ranks; the weights of the tokens
                # already are those of the mini-batch over all ranks.
                self._engine.backward(loss * self._config.num_ranks)
        sums = self._reduce(local)
        if not torch.isfinite(sums.to_tensor()).all():
            raise LongrollError(f"version {version}: got a loss that is not finite ({sums}); no step was taken on it")
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        if not grad_norm < float("inf"):
            raise LongrollError(f"version {version}: gradient norm {grad_norm}, the weights are lost")
        return StepResult(sums=sums, grad_norm=grad_norm)

    def _micro_batch_loss(
        self, batch: MicroBatch, start: torch.Tensor | None, num_update_tokens: int, sums: StepSums
    ) -> torch.Tensor:
        config = self._config
        weights = batch.weights.to(self._device)
        sampling = batch.sampling_logprobs.to(self._device)
        is_trained = weights > 0
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference, _ = self._logprobs(self._reference, batch)
        logprobs, aux_loss = self._logprobs(self._engine, batch)
        if start is None:
            start = logprobs.detach()
        cap = self._knobs.tis_cap
        tis = None if cap is None else importance_weights(start, sampling, cap)
        terms = policy_loss(
            logprobs,
            ratio_base(start, sampling, use_tis=config.use_tis),
            batch.advantages.to(self._device),
            weights,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            tis_weights=tis,
            reference_logprobs=reference,
            kl_coef=config.kl_coef,
        )
        sums.add(terms, measure(start, sampling, is_trained))
        sums.neg_logprob -= float(start[is_trained].sum())
        sums.tis_weight += float(is_trained.sum() if tis is None else tis[is_trained].sum())
        sums.tis_capped += 0.0 if tis is None or cap is None else float((tis[is_trained] >= cap).sum())
        if aux_loss is None:
            return terms.loss
        # The load-balancing loss is not a sum over tokens; each micro-batch counts by its share of them.
        share = float(batch.lengths.sum()) / num_update_tokens if bool(is_trained.any()) else 0.0
        aux_loss = aux_loss * (config.router_aux_loss_coef * share)
        sums.router_aux_loss += float(aux_loss.detach())
        return terms.loss + aux_loss

    def _logprobs(self, engine: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the targets [B, T], and the router loss when it is used.

        Rows are padded on the right and attention is causal, so no real token sees a pad and no mask
        is needed; only the router loss must be told which tokens are real.
        """
        ids = batch.input_ids.to(self._device)
        length = ids.shape[1]
        keep = torch.arange(batch.first_target - 1, length - 1, device=self._device)
        needs_router = self._config.router_aux_loss_coef > 0
        mask = None
        if needs_router:
            mask = (torch.arange(length)[None, :] < batch.lengths[:, None]).long().to(self._device)
        output = engine(
            input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False, output_router_logits=needs_router
        )
        logprobs = selected_logprobs(output.logits, ids[:, batch.first_target :], self._temperature)
        return logprobs, output.aux_loss if needs_router else None

    def _reduce(self, sums: StepSums) -> StepSums:
        total = sums.to_tensor().to(self._device)
        largest = total[-1:].clone()
        dist.all_reduce(total)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total[-1:] = largest
        return StepSums.from_tensor(total)

    def rescore(self, batches: list[MicroBatch], knobs: Knobs, is_captured: bool) -> CauseSums:
        """Measure the mismatch by cause on this rank's share of a slice; see Rescorer.measure.

        Args:
            batches: The same number on every rank.
            knobs: Of the update that comes next.
            is_captured: Whether any trajectory of the slice has captured routing.
        """
        if self._rescorer is None:
            weights = ServedWeights(self._engine.module, self._encoding.plans(self._model.path))
            self._rescorer = Rescorer(weights, self._replay, self._kv_cache_dtype, self._score, self._device)
        self._engine.eval()
        found = [self._rescorer.measure(b, replays=knobs.replay_routing, is_captured=is_captured) for b in batches]
        return sum(found, CauseSums())

    def _score(self, batch: MicroBatch) -> torch.Tensor:
        return self._logprobs(self._engine, batch)[0]

    def publish(self, version: int) -> SyncReport | None:
        """Send the weights to the controller; see WeightSource.publish."""
        if self._controller is None:
            raise InvalidRequest("publish", "a trainer without a controller", "one that serves engines")
        if self._source is None:  # kept: what it last sent is what it compares with
            receiver = ControllerReceiver(self._controller, 2 * self._sync.publication_timeout_s)
            ranks = RankGroup(dist.group.WORLD, self._device)
            transport = make_transport(self._sync, receiver, ranks, ray.util.get_node_ip_address(), self._device)
            plans = self._encoding.plans(self._model.path) | self._encoding.draft_plans()
            beside = None if self._draft is None else self._draft.parameters
            self._source = WeightSource(self._engine.module, plans, self._sync, receiver, transport, ranks, beside)
        return self._source.publish(version)

    def release(self) -> None:
        """Give up shared memory, before the process is killed. Not collective."""
        if self._source is not None:
            self._source.release()

    def save(self, step: int) -> None:
        """Write this rank's part of a checkpoint and seal it."""
        self._engine.save_checkpoint(str(self._checkpoints.root), tag=self._checkpoints.tag(step), save_latest=False)
        if self._draft is not None and self._rank == 0:
            self._draft.save(self._checkpoints.path(step), step)
        mine = []
        for file in sorted(self._checkpoints.path(step).glob("*.pt")):
            match = RANK_FILE.search(file.name)
            if (int(match.group(1)) if match else 0) == self._rank:
                mine.append(file)
        self._checkpoints.seal(step, self._rank, mine)

    def verify(self, step: int) -> None:
        """Check this rank's files of a checkpoint. Not collective."""
        self._checkpoints.verify(step, self._rank)

    def load(self, step: int) -> None:
        """Load a checkpoint that every rank has verified."""
        path, _ = self._engine.load_checkpoint(str(self._checkpoints.root), tag=self._checkpoints.tag(step))
        if path is None:
            raise CheckpointBroken(f"checkpoint {self._checkpoints.path(step)}: DeepSpeed could not load it")
        if self._draft is not None:
            self._draft.load(self._checkpoints.path(step), step)

    def greedy(self, prompts: list[tuple[int, ...]], num_tokens: int) -> list[Continuation]:
        """Continue prompts greedily with plain forwards in the training dtype; the lowest id wins a tie."""
        rows = [list(p) for p in prompts]
        gaps: list[list[float]] = [[] for _ in prompts]
        self._engine.eval()
        for _ in range(num_tokens):
            length = max(map(len, rows))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self._device)
            with torch.no_grad():
                logits = self._engine(input_ids=ids, use_cache=False).logits.float()
            for row, row_gaps, row_logits in zip(rows, gaps, logits, strict=True):
                last = row_logits[len(row) - 1]
                best, second = last.topk(2).values.tolist()
                row.append(int((last == best).nonzero()[0]))
                row_gaps.append(best - second)
        return [
            Continuation(token_ids=tuple(row[-num_tokens:]), gaps=tuple(g)) for row, g in zip(rows, gaps, strict=True)
        ]

    def weights_digest(self) -> str:
        """One digest of all weights, computed bucket by bucket."""
        return weights_digest(self._engine.module, self._sync.bucket_bytes)
