"""A target's own rollouts on a CPU or one GPU, with the hidden states its draft is trained on.

Owns plain generation with the keyed noise of the service (so that a trajectory here is the one an engine would give,
but for rounding) and the teacher-forced forward. Knows nothing of drafts or of the service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kernels.gumbel_sample import gumbel_sample
from rollout.errors import InvalidRequest
from rollout.journal.export import load_export
from rollout.seeds import trajectory_seed
from rollout.speculation.clover_samples import DraftSample
from rollout.types import Prompt

SIDE_BY_SIDE = 512  # prompts continued together
FORWARD_TOKENS = 8192  # of one teacher-forced forward, padding included
SHRINK_BELOW = 0.7  # finished rows are dropped from the batch once fewer than this share of it still runs


@torch.no_grad()
def sample_tokens(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    *,
    eos_token_id: int,
    max_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Continue every prompt once, all of them side by side.

    Args:
        model: A Hugging Face causal language model.
        prompts: Token ids, of any lengths.
        seeds: Of each trajectory's noise.
        eos_token_id: Ends a trajectory, and belongs to it.
        max_tokens: Most tokens of one continuation.
        temperature: Of sampling, 0 is greedy.

    Returns:
        The continuations, in order.
    """
    device = next(model.parameters()).device
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, length - len(prompt) :] = 1
    keys = torch.tensor(seeds, device=device)
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    rows = torch.arange(len(prompts))  # which prompt each row of the batch continues
    outputs: list[list[int]] = [[] for _ in prompts]
    is_over = torch.zeros(len(prompts), dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    for _ in range(max_tokens):
        out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        sampled, _ = gumbel_sample(
            model.get_output_embeddings()(out.last_hidden_state[:, -1]).float(),
            seeds=keys,
            positions=positions[:, -1] + 1,
            temperature=torch.full(keys.shape, temperature, device=device),
        )
        for row, token in zip(rows.tolist(), sampled.tolist(), strict=True):
            if not is_over[row]:
                outputs[row].append(token)
                is_over[row] = token == eos_token_id
        kept = (~is_over[rows]).nonzero().squeeze(1)
        if not len(kept):
            break
        positions = positions[:, -1:] + 1
        if len(kept) < SHRINK_BELOW * len(rows):
            cache.batch_select_indices(kept.to(device))
            rows, keys, mask, sampled, positions = rows[kept], keys[kept], mask[kept], sampled[kept], positions[kept]
        ids, mask = sampled[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return outputs


@torch.no_grad()
def with_hidden(model: Any, sequences: Sequence[tuple[tuple[int, ...], int, int]]) -> list[DraftSample]:
    """Run the model over finished sequences and keep its last hidden states.

    Args:
        model: A Hugging Face causal language model; the states are those its output head reads.
        sequences: (tokens of prompt and output, prompt length, seed) of each.

    Returns:
        The samples, in order; hidden states in the model's dtype, on the CPU.
    """
    device = next(model.parameters()).device
    samples: dict[int, DraftSample] = {}
    for batch in _by_length([len(tokens) for tokens, _, _ in sequences]):
        length = max(len(sequences[i][0]) for i in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long, device=device)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i][0])] = torch.tensor(sequences[i][0], device=device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.cpu()
        for row, i in enumerate(batch):
            tokens, num_prompt_tokens, seed = sequences[i]
            samples[i] = DraftSample(
                token_ids=torch.tensor(tokens),
                num_prompt_tokens=num_prompt_tokens,
                hidden=hidden[row, : len(tokens)].clone(),
                seed=seed,
            )
    return [samples[i] for i in range(len(sequences))]


def rollouts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    run_seed: int,
    eos_token_id: int,
    max_tokens: int,
    temperature: float,
    say: Callable[[int], None],
) -> list[DraftSample]:
    """Sample one trajectory for every prompt and run the model over it; arguments as above.

    Args:
        run_seed: With a prompt's id it gives the trajectory's seed, see `rollout.seeds`.
        say: Told the number of prompts that are done.
    """
    samples: list[DraftSample] = []
    for start in range(0, len(prompts), SIDE_BY_SIDE):
        some = prompts[start : start + SIDE_BY_SIDE]
        seeds = [trajectory_seed(run_seed, p.prompt_id, 0) for p in some]
        outputs = sample_tokens(
            model,
            [p.token_ids for p in some],
            seeds,
            eos_token_id=eos_token_id,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        sequences = [
            (p.token_ids + tuple(output), len(p.token_ids), seed)
            for p, output, seed in zip(some, outputs, seeds, strict=True)
        ]
        samples += with_hidden(model, sequences)
        say(start + len(some))
    return samples


def exported_rollouts(model: Any, path: Path, limit: int) -> list[DraftSample]:
    """Take trajectories from a run's export, and run the model over them.

    Args:
        model: A Hugging Face causal language model; the nearer to what sampled them, the better.
        path: File that `rollout.journal.export` wrote.
        limit: Trajectories at most, the first ones.

    Raises:
        InvalidRequest: None of them has two tokens.
    """
    sequences: list[tuple[tuple[int, ...], int, int]] = []
    for row in load_export(path):
        one = row.trajectory
        if len(one.token_ids) > 1 and len(sequences) < limit:
            sequences.append((one.prompt_token_ids + tuple(one.token_ids), len(one.prompt_token_ids), one.seed))
    if not sequences:
        raise InvalidRequest("trajectories of an export", f"none of two tokens in {path}", "at least one")
    return with_hidden(model, sequences)


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by similar length, a group padding to FORWARD_TOKENS at most (or holding one)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
