"""The draft model on a trainer rank: a whole copy on every rank, taught alike on all of them after each policy update.

    policy's forward ─► hidden states of some fresh trajectories ─► distillation steps, gradients averaged over ranks
    ─► published beside the policy, under its version

A draft is small, so it is not partitioned: every rank takes the same steps from the same tensors and sends its part.
Owns the rank's copy and what it learns from. Knows nothing of the policy's loss, nor of how weights travel.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.trainer_model import gathered
from rollout.batch import MicroBatch, MiniBatch
from rollout.errors import CheckpointBroken, InvalidRequest, LongrollError
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import DraftConfig, load_draft, vocabulary_digest
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_training import TENSOR_PREFIX, DraftTrainer, DraftTrainingConfig, StepResult
from rollout.train_metrics import DraftMetrics
from rollout.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)
DRAFT_FILE = "draft.pt"
LESSON_TOKENS = 2  # a root and the token after it: fewer teach nothing


def fitting_draft(model_dir: str | Path, directory: str | Path) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Read a draft that is to follow a model from its first version.

    Args:
        model_dir: Of the model, version 0 of which is trained.
        directory: Of the draft.

    Raises:
        InvalidRequest: There is no draft, or it was made for another model: its vocabulary, its hidden size or the
            version of the weights that it was fitted to differs.
    """
    config, tensors = load_draft(directory)
    settings = json.loads((Path(model_dir) / "config.json").read_text())
    config.check_target(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        vocabulary=vocabulary_digest(model_dir),
        version=0,
    )
    return config, tensors


class OnlineDraft:
    """One rank's copy of the draft. `update` is collective.

    Args:
        config: The update; its section `draft`.
        policy: The module that is trained; its embedding and output head are shared.
        draft: Shape and tensors of the draft, see `fitting_draft`.
        temperature: Of sampling.
        rank: This rank.
        device: What it computes on.
    """

    def __init__(
        self,
        config: TrainerConfig,
        policy: Any,
        draft: tuple[DraftConfig, Mapping[str, torch.Tensor]],
        temperature: float,
        rank: int,
        device: torch.device,
    ) -> None:
        own = config.draft
        self._config, self._policy, self._rank, self._device = config, policy, rank, device
        model = CloverDraft(draft[0])
        model.load(draft[1])
        training = DraftTrainingConfig(online_lr=own.lr, batch_tokens=own.batch_tokens, temperature=temperature)
        self._trainer = DraftTrainer(model.to(device), training, self._average)
        self._order = torch.Generator()
        self._rows: Iterator[list[int]] = iter(())
        self._samples: list[DraftSample] = []
        self._num_teachers = 0

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """By the names that they travel under."""
        return {TENSOR_PREFIX + name: p for name, p in self._trainer.draft.named_parameters()}

    def begin(self, updates: Sequence[MiniBatch], version: int) -> None:
        """Choose what to learn from before the forwards of a training step.

        Args:
            updates: This rank's shares; every micro-batch is watched next, in this order.
            version: After the step; with the run's seed and the rank it decides the choice.
        """
        self._order.manual_seed(self._config.seed * 1_000_003 + version * self._config.num_ranks + self._rank)
        self._samples = []
        batches = [batch for mini in updates for batch in mini.batches]
        rows = chosen_rows(batches, self._config.draft.max_tokens, self._order)
        self._rows = iter(rows if self._config.draft.num_steps else [[] for _ in batches])

    @contextmanager
    def watching(self, batch: MicroBatch) -> Iterator[None]:
        """Keep the hidden states of the chosen rows from the one forward of the policy inside."""
        rows = next(self._rows)
        if not rows:
            yield
            return
        seen: list[torch.Tensor] = []
        handle = self._policy.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
        try:
            yield
        finally:
            handle.remove()
        (hidden,) = seen
        for row in rows:
            length = int(batch.lengths[row])
            is_sampled = _is_sampled(batch, row)
            self._samples.append(
                DraftSample(
                    token_ids=batch.input_ids[row, :length],
                    num_prompt_tokens=int(is_sampled.nonzero()[0]),
                    hidden=hidden[row, :length].detach().clone(),  # a view would keep the padded batch alive
                    seed=int(batch.seeds[row]),
                    is_sampled=is_sampled,
                )
            )

    def update(self, version: int) -> DraftMetrics | None:
        """Take the distillation steps of a training step; the same on every rank.

        Args:
            version: Of the policy as it is now.

        Returns:
            Means over steps and ranks; None where nothing could be learnt.
        """
        num_steps = self._config.draft.num_steps
        self._num_teachers = int(self._sum(float(bool(self._samples))))
        if not num_steps or not self._num_teachers:
            return None
        embedding = self._policy.get_input_embeddings().weight
        head = self._policy.get_output_embeddings().weight
        with gathered([embedding] if head is embedding else [embedding, head]):
            layers = TargetLayers.of(embedding.detach().float(), head.detach().float())
            try:
                results = self._trainer.update(
                    self._samples, target=layers, num_steps=num_steps, generator=self._order, version=version
                )
            except LongrollError as error:  # averaged, so on every rank; a poor draft costs time, never a token
                logger.warning("version %d: %s", version, error)
                return None
            finally:
                self._samples = []
        self._check_alike(version)
        return self._means(results)

    def _means(self, results: Sequence[StepResult]) -> DraftMetrics:
        """Over the ranks that had samples."""
        mine = [one for one in results if one.agreement]
        depths = [share for one in mine for share in one.agreement]
        num_steps = max(self._sum(float(len(mine))), 1.0)
        return DraftMetrics(
            loss=self._sum(sum(one.loss for one in mine)) / num_steps,
            agreement=self._sum(sum(depths)) / max(self._sum(float(len(depths))), 1.0),
        )

    def save(self, folder: Path, version: int) -> None:
        """Write the draft and its optimiser beside the policy's checkpoint. Not collective: one rank's is all."""
        tensors = self._trainer.draft.state_dict()
        torch.save({"version": version, "tensors": tensors, "training": self._trainer.state()}, folder / DRAFT_FILE)

    def load(self, folder: Path, version: int) -> None:
        """Go on from what `save` wrote.

        Raises:
            InvalidRequest: The checkpoint was written without a draft.
            CheckpointBroken: It holds another draft, or one of another version.
        """
        path = folder / DRAFT_FILE
        if not path.is_file():
            expected = f"false: checkpoint {folder} was written without a draft, and the first one is behind its policy"
            raise InvalidRequest("engine.speculation.draft_travels", True, expected)
        try:
            saved = torch.load(path, map_location=self._device, weights_only=True)
            if saved["version"] != version:
                raise CheckpointBroken(f"checkpoint {path}: got a draft of version {saved['version']}, not {version}")
            self._trainer.draft.load(saved["tensors"])
            self._trainer.restore(saved["training"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointBroken(f"checkpoint {path}: not of this draft model ({error})") from error

    def _check_alike(self, version: int) -> None:
        """Every rank sends its part of the draft, so they must hold the same one. Raises LongrollError."""
        size = sum(float(p.detach().double().abs().sum()) for p in self._trainer.draft.parameters())
        bounds = torch.tensor([size, -size], dtype=torch.float64, device=self._device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if float(bounds.sum()):
            raise LongrollError(f"version {version}: the ranks hold different copies of the draft, expected equal ones")

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """Mean over the ranks that have samples; the others' gradients are 0."""
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        for gradient in gradients:
            gradient.div_(self._num_teachers)

    def _sum(self, value: float) -> float:
        """Over all ranks."""
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)


def chosen_rows(batches: Sequence[MicroBatch], max_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Random rows of each batch, of max_tokens tokens together at most, but one at least; none that teach nothing."""
    able = [
        (place, row)
        for place, batch in enumerate(batches)
        for row, num_trained in enumerate((batch.weights > 0).sum(dim=1).tolist())
        if num_trained >= LESSON_TOKENS
    ]
    rows: list[list[int]] = [[] for _ in batches]
    room = max_tokens
    for i in torch.randperm(len(able), generator=generator).tolist():
        place, row = able[i]
        length = int(batches[place].lengths[row])
        if length <= room or room == max_tokens:
            rows[place].append(row)
            room -= length
    return [sorted(some) for some in rows]


def _is_sampled(batch: MicroBatch, row: int) -> torch.Tensor:
    """bool [length]: the tokens of a row that are trained, which are those that the policy drew."""
    is_sampled = torch.zeros(int(batch.lengths[row]), dtype=torch.bool)
    num_targets = len(is_sampled) - batch.first_target
    is_sampled[batch.first_target :] = batch.weights[row, :num_targets] > 0
    return is_sampled
