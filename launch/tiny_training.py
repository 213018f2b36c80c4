"""Training loop of the embedded model: stages of a warmup-stable-decay schedule over worked examples.

Owns the optimiser, the loss and the fast expert computation. It does not know how the tokenizer was made, which files
are shipped, or how the result is measured.
"""

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from launch.tiny_corpus import Example, batches, examples

logger = logging.getLogger(__name__)

POOL_EXAMPLES = 6000
LOG_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of the schedule.

    Attributes:
        num_tokens: length of the stage, in tokens of prompts and completions together.
        max_terms: longest expression, in terms.
        guess_share: fraction of examples that answer without work, in [0, 1].
        first_lr: learning rate where the stage begins.
        last_lr: learning rate where it ends; half a cosine lies between the two.
    """

    num_tokens: int
    max_terms: int
    guess_share: float
    first_lr: float
    last_lr: float


class Trainer:
    """Owns the weights while they train, the optimiser's state and the position in the stream of problems."""

    def __init__(
        self, model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, batch_tokens: int
    ) -> None:
        """Takes over a model in fp32.

        Args:
            model: trained in place.
            tokenizer: renders and encodes the examples.
            seed: first problem seed; the trainer consumes consecutive ones.
            batch_tokens: tokens in one optimiser step.
        """
        model.set_experts_implementation(EXPERTS_BY_SORTING)
        self.model = model.train()
        self.num_tokens = 0
        self.num_steps = 0
        self._tokenizer = tokenizer
        self._next_seed = seed
        self._batch_tokens = batch_tokens
        self._rng = random.Random(seed)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=True)

    def run(self, stage: Stage) -> None:
        """Trains for one stage."""
        stage_start, started = self.num_tokens, time.monotonic()
        sums: dict[str, float] = {}
        for batch in self._stream(stage):
            done = (self.num_tokens - stage_start) / stage.num_tokens
            if done >= 1.0:
                break
            lr = stage.last_lr + (stage.first_lr - stage.last_lr) * 0.5 * (1 + math.cos(math.pi * done))
            for name, value in self._step(batch, lr).items():
                sums[name] = sums.get(name, 0.0) + value
            if self.num_steps % LOG_EVERY_STEPS == 0:
                speed = (self.num_tokens - stage_start) / (time.monotonic() - started)
                means = {name: round(value / LOG_EVERY_STEPS, 4) for name, value in sums.items()}
                logger.info(
                    "step %d tokens %d lr %.5f tokens/s %.0f %s", self.num_steps, self.num_tokens, lr, speed, means
                )
                sums = {}

    def state_dict(self) -> dict[str, object]:
        """Returns everything a resumed trainer needs to continue as if it had not stopped."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "counters": (self.num_tokens, self.num_steps, self._next_seed),
            "rng": self._rng.getstate(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from what state_dict returned."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.num_tokens, self.num_steps, self._next_seed = state["counters"]
        self._rng.setstate(state["rng"])

    def _stream(self, stage: Stage) -> Iterator[list[Example]]:
        while True:
            pool = examples(
                self._tokenizer,
                seed=self._next_seed,
                size=POOL_EXAMPLES,
                max_terms=stage.max_terms,
                guess_share=stage.guess_share,
            )
            self._next_seed += POOL_EXAMPLES
            yield from batches(pool, batch_tokens=self._batch_tokens, rng=self._rng)

    def _step(self, batch: list[Example], lr: float) -> dict[str, float]:
        halves = [[example for example in batch if example.is_guess is guess] for guess in (False, True)]
        num_targets = sum(len(example.token_ids) - example.prompt_tokens for example in batch)
        metrics = {}
        for name, half in zip(("worked", "guess"), halves, strict=True):
            if half:
                loss = completion_loss(self.model, half, num_targets, len(half) / len(batch))
                loss.backward()
                metrics[name] = float(loss.detach())
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_tokens += sum(len(example.token_ids) for example in batch)
        self.num_steps += 1
        return metrics


def completion_loss(
    model: Qwen3MoeForCausalLM, batch: list[Example], num_targets: int, aux_share: float
) -> torch.Tensor:
    """Cross entropy on completion tokens, plus the router's load-balancing loss.

    Args:
        model: in fp32.
        batch: examples; shorter ones are padded on the right, where causality hides the padding.
        num_targets: the cross entropy's sum is divided by this.
        aux_share: weight of this batch's router loss within the optimiser step.

    Returns:
        A scalar.
    """
    length = max(len(example.token_ids) for example in batch)
    tokens_BT = torch.zeros(len(batch), length, dtype=torch.long)
    is_target_BT = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        tokens_BT[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_target_BT[row, example.prompt_tokens : len(example.token_ids)] = True
    output = model.model(input_ids=tokens_BT[:, :-1], use_cache=False, output_router_logits=True)
    is_target = is_target_BT[:, 1:]
    logits_NV = model.lm_head(output.last_hidden_state[is_target])
    cross_entropy = F.cross_entropy(logits_NV, tokens_BT[:, 1:][is_target], reduction="sum") / num_targets
    config = model.config
    aux = load_balancing_loss_func(output.router_logits, config.num_experts, config.num_experts_per_tok)
    return cross_entropy + config.router_aux_loss_coef * aux_share * aux


def experts_by_sorting(
    self: torch.nn.Module, hidden_ND: torch.Tensor, top_k_index_NK: torch.Tensor, top_k_weights_NK: torch.Tensor
) -> torch.Tensor:
    """Expert layer that gathers once and runs one dense product per expert; the fastest on a CPU core.

    Same contract as the library's own implementations: N tokens, D hidden units, K chosen experts.
    """
    num_choices = top_k_index_NK.shape[1]
    order = top_k_index_NK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(top_k_index_NK.reshape(-1), minlength=self.num_experts).tolist()
    token = order // num_choices
    parts = hidden_ND.index_select(0, token).split(counts)
    gates, ups = self.gate_up_proj.chunk(2, dim=1)
    out = [
        F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
        for part, gate, up, down in zip(parts, gates, ups, self.down_proj, strict=True)
    ]
    weighted = torch.cat(out) * top_k_weights_NK.reshape(-1).index_select(0, order).unsqueeze(1)
    return torch.zeros_like(hidden_ND).index_add(0, token, weighted)


EXPERTS_BY_SORTING = "by_sorting"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_BY_SORTING, experts_by_sorting)
