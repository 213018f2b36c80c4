"""Sampling in a step with trees: what the metadata of B requests is for S rows, and what vLLM is given in the end.

Only requests that nothing but the last token's logits, temperature, top-k and top-p concerns have trees. So what logits
processors do concerns the first row of each request alone. Knows nothing of walks or drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from actors.vllm_plugin.trees import TreeBatch
from rollout.speculation.walk import Accepted


def can_speculate(params: Any) -> bool:
    """Whether nothing but the last token's logits, temperature, top-k and top-p decides what a request draws."""
    return not (
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.min_p
        or params.min_tokens
        or params.bad_words
        or params.logit_bias
        or params.allowed_token_ids
        or params.structured_outputs
        or params.thinking_token_budget is not None
        or params.prompt_logprobs is not None
    )


def has_processors(metadata: SamplingMetadata) -> bool:
    """Whether logits processors would change anything."""
    holder = metadata.thinking_budget_state_holder
    return bool(
        not metadata.no_penalties
        or metadata.bad_words_token_ids
        or metadata.allowed_token_ids_mask is not None
        or (holder is not None and holder.has_tracked_requests())
        or any(
            getattr(processor, "biases", None) or getattr(processor, "min_toks", None)
            for processor in metadata.logitsprocs.non_argmax_invariant
        )
    )


def by_row(metadata: SamplingMetadata, owner: torch.Tensor) -> SamplingMetadata:
    """The metadata of B requests as that of S rows, as far as keyed sampling reads it."""

    def spread(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[owner]

    return replace(
        metadata,
        logitsprocs=LogitsProcessors(),
        temperature=spread(metadata.temperature),
        top_p=spread(metadata.top_p),
        top_k=spread(metadata.top_k),
    )


def put_rows(sampled: SamplerOutput, rows: torch.Tensor, others: SamplerOutput) -> None:
    """Overwrite rows of an output by those of another one."""
    sampled.sampled_token_ids[rows] = others.sampled_token_ids
    if sampled.logprobs_tensors is not None and others.logprobs_tensors is not None:
        for mine, theirs in zip(sampled.logprobs_tensors[:3], others.logprobs_tensors[:3], strict=True):
            mine[rows] = theirs


def is_stop(token: int, params: Any) -> bool:
    """Whether a token ends a request, by vLLM's rule."""
    return token == params.eos_token_id or token in (params.stop_token_ids or ())


def until_stop(walked: Accepted, params: Any) -> Accepted:
    """The walk up to a token that ends the request, at which vLLM cuts it: what follows is not accepted."""
    for end, token in enumerate(walked.tokens[:-1], 1):
        if is_stop(token, params):
            return Accepted(tokens=walked.tokens[:end], rows=walked.rows[:end])
    return walked


def emitted(accepted: Sequence[Accepted], trees: TreeBatch, sampled: SamplerOutput) -> SamplerOutput:
    """What vLLM takes: [B, most] tokens padded with -1, and log-probabilities of all B × most places, flat."""
    most = max(len(walked.tokens) for walked in accepted)
    tokens: np.ndarray = np.full((len(accepted), most), -1, dtype=np.int32)
    places: np.ndarray = np.zeros((len(accepted), most), dtype=np.int64)
    start = 0
    for request, (walked, tree) in enumerate(zip(accepted, trees.trees, strict=True)):
        tokens[request, : len(walked.tokens)] = walked.tokens
        places[request, : len(walked.rows)] = np.array(walked.rows) + start
        start += tree.num_rows
    device = sampled.sampled_token_ids.device
    logprobs = sampled.logprobs_tensors
    if logprobs is not None:
        flat = torch.from_numpy(places.ravel()).to(device)
        logprobs = LogprobsTensors(*(tensor[flat] for tensor in logprobs[:3]))
    return SamplerOutput(sampled_token_ids=torch.from_numpy(tokens).to(device), logprobs_tensors=logprobs)
