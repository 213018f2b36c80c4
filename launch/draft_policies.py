"""A target that learns in one process, for measuring how its draft follows: by GRPO, or towards another style.

Owns the target's optimizer. Knows nothing of drafts beyond the samples they learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from launch.draft_rollouts import sample_tokens, with_hidden
from launch.draft_target import Target
from launch.tiny_corpus import worked_completion
from rollout.config import RunConfig
from rollout.errors import InvalidRequest
from rollout.loss import group_advantages, policy_loss, selected_logprobs, token_weights
from rollout.rewards import resolve_reward, score_completion
from rollout.seeds import trajectory_seed
from rollout.speculation.clover_samples import DraftSample
from rollout.tasks import Task
from rollout.types import Prompt

_Sequence = tuple[tuple[int, ...], int, int]  # tokens of prompt and output, prompt length, seed


class Policy(Protocol):
    """What `launch.draft_drift` asks of a target that learns."""

    def update(self, prompts: Sequence[Prompt]) -> tuple[float, list[DraftSample]]:
        """Sample each prompt n times and take one optimizer step; the mean reward, and what the draft learns from."""
        ...


class _Sampler:
    """Samples of the moment's policy, and their rewards."""

    def __init__(self, target: Target, config: RunConfig) -> None:
        reward = resolve_reward(config.workload.reward)
        if reward is None:
            raise InvalidRequest("workload.reward", config.workload.reward, "a reward function")
        self._target, self._config, self._reward = target, config, reward
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path)

    def sample(self, prompts: Sequence[Prompt]) -> tuple[list[_Sequence], list[float]]:
        """n samples of each prompt, and the reward of each."""
        sampling = self._config.sampling
        asked = [(prompt, i) for prompt in prompts for i in range(sampling.n_samples_per_prompt)]
        seeds = [trajectory_seed(self._config.trainer.seed, p.prompt_id, i) for p, i in asked]
        outputs = sample_tokens(
            self._target.model,
            [p.token_ids for p, _ in asked],
            seeds,
            eos_token_id=self._target.eos_token_id,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
        )
        rewards = []
        for (prompt, _), tokens in zip(asked, outputs, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            rewards.append(score_completion(self._reward, prompt, tuple(tokens), text).reward)
        sequences = [
            (p.token_ids + tuple(output), len(p.token_ids), seed)
            for (p, _), output, seed in zip(asked, outputs, seeds, strict=True)
        ]
        return sequences, rewards


class _Learner:
    """A target that takes policy gradient steps on sequences, with the trainer's loss and options."""

    def __init__(self, target: Target, config: RunConfig) -> None:
        trainer = config.trainer
        self._target, self._config, self._sampler = target, config, _Sampler(target, config)
        self._optimizer = torch.optim.AdamW(
            target.model.parameters(), lr=trainer.lr, betas=trainer.betas, weight_decay=trainer.weight_decay
        )

    def _step(self, sequences: Sequence[_Sequence], advantages: Sequence[float]) -> list[DraftSample]:
        """One optimizer step; the sequences with the hidden states of its own forwards, one update old."""
        trainer, model = self._config.trainer, self._target.model
        lengths = [len(tokens) - num_prompt for tokens, num_prompt, _ in sequences]
        weights = token_weights(lengths, trainer.loss_aggregation, self._config.sampling.max_tokens)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
        samples: list[DraftSample] = []
        while order:
            longest = len(sequences[order[-1]][0])
            some = [order.pop() for _ in range(max(1, min(len(order), trainer.micro_batch_tokens // longest)))]
            ids, is_target = _padded([sequences[i][:2] for i in some])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logprobs = selected_logprobs(
                model.get_output_embeddings()(hidden[:, :-1]), ids[:, 1:], self._config.sampling.temperature
            )
            policy_loss(
                logprobs,
                logprobs,
                torch.tensor([[advantages[i]] for i in some]),
                is_target * torch.tensor([[weights[i]] for i in some]),
                clip_low=trainer.clip_low,
                clip_high=trainer.clip_high,
            ).loss.backward()
            for row, i in enumerate(some):
                tokens, num_prompt, seed = sequences[i]
                kept = hidden[row, : len(tokens)].detach()
                samples.append(
                    DraftSample(token_ids=torch.tensor(tokens), num_prompt_tokens=num_prompt, hidden=kept, seed=seed)
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return samples


class GrpoPolicy(_Learner):
    """On-policy GRPO."""

    def update(self, prompts: Sequence[Prompt]) -> tuple[float, list[DraftSample]]:
        """See `Policy.update`."""
        sequences, rewards = self._sampler.sample(prompts)
        n, normalise = self._config.sampling.n_samples_per_prompt, self._config.trainer.normalise_std
        groups = [rewards[start : start + n] for start in range(0, len(rewards), n)]
        advantages = [a for group in groups for a in group_advantages(group, normalise_std=normalise)]
        samples = self._step(sequences, advantages)
        return sum(rewards) / len(rewards), samples


class RestylePolicy(_Learner):
    """Learns, from worked answers in which some tokens are exchanged, to answer in another style.

    GRPO on a task that the embedded model half knows hardly changes what it says, nor therefore what a draft sees. This
    changes the commonest tokens of its answers within the same number of updates.
    """

    def __init__(self, target: Target, config: RunConfig) -> None:
        super().__init__(target, config)
        self._exchanged = exchanged_tokens(self._sampler.tokenizer)

    def update(self, prompts: Sequence[Prompt]) -> tuple[float, list[DraftSample]]:
        """See `Policy.update`: the answers that are learnt are not the samples, which only the draft learns from."""
        sequences, rewards = self._sampler.sample(prompts)
        samples = with_hidden(self._target.model, sequences)
        wanted = [(p.token_ids + self.answer(p), len(p.token_ids), 0) for p in prompts]
        self._step(wanted, [1.0] * len(wanted))  # with a ratio of 1 and one advantage for all, this is likelihood
        return sum(rewards) / len(rewards), samples

    def answer(self, prompt: Prompt) -> tuple[int, ...]:
        """A worked answer to a prompt in the other style.

        Raises:
            InvalidRequest: The prompt is not one of chain_sum.
        """
        expression = Task(prompt.metadata["task"]).problem(prompt.metadata["index"]).metadata.get("expression")
        if not isinstance(expression, str):
            raise InvalidRequest("workload.task", prompt.prompt_id, "chain_sum, whose answers can be worked out")
        tokens = self._sampler.tokenizer.encode(worked_completion(expression), add_special_tokens=False)
        return (*(self._exchanged.get(token, token) for token in tokens), self._target.eos_token_id)


POLICIES: dict[str, type[GrpoPolicy] | type[RestylePolicy]] = {"grpo": GrpoPolicy, "restyle": RestylePolicy}
STYLE = {" + ": "+", " - ": "-", "\n": ";"}
"""Sums without spaces, on one line."""


def exchanged_tokens(tokenizer: Any) -> dict[int, int]:
    """Token ids of the usual style → those of the other.

    Raises:
        InvalidRequest: One of them is more than one token of this model.
    """
    exchanged = {}
    for before, after in STYLE.items():
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
        if [len(found) for found in ids] != [1, 1]:
            raise InvalidRequest(
                "model.path, for policy restyle", f"{ids} for {before!r} and {after!r}", "a token each"
            )
        exchanged[ids[0][0]] = ids[1][0]
    return exchanged


def _padded(rows: Sequence[tuple[tuple[int, ...], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, n] padded on the right, and [B, n - 1] with 1 where the next token is one of the output."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    is_target = torch.zeros(len(rows), longest - 1)
    for row, (tokens, num_prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        is_target[row, num_prompt - 1 : len(tokens) - 1] = 1.0
    return ids, is_target
