"""A model-runner mix-in that draws every token with position-keyed Gumbel noise.

It replaces vLLM's sampler for all requests. Logits processors (penalties, allowed tokens, bias,
grammar bit masks, min-p) run as in vLLM; temperature, top-k and top-p are then applied by the
keyed sampler itself.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from actors.vllm_plugin import SEED_KEY
from kernels.gumbel_sample import gumbel_sample, truncation_threshold

_SEED_MASK = 2**63 - 1


def fallback_seed(request_id: str, seed: int | None) -> int:
    """Gumbel key of a request that came without one: its own `seed`, else a hash of its id."""
    if seed is not None:
        return seed & _SEED_MASK
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little") & _SEED_MASK


def seed_of(request_id: str, params: Any) -> int:
    """Gumbel key of a request with these sampling parameters."""
    key = (params.extra_args or {}).get(SEED_KEY)
    return fallback_seed(request_id, params.seed) if key is None else key & _SEED_MASK


class KeyedSamplingMixin:
    """Mix in before a vLLM V1 model runner (`GPUModelRunner` or `CPUModelRunner`).

    The key of a token is (seed of its request, absolute index in prompt + output), so its noise does
    not depend on the batch, on where a request was cut, or on which engine runs it.
    """

    _logits_indices: torch.Tensor

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        self._logits_indices = prepared[0]
        return prepared

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        if logits is None or spec_decode_metadata is not None:
            raise RuntimeError(
                "keyed sampling: got speculative rows, expected one row for each request "
                "(speculation is not part of this runner)"
            )
        batch = self.input_batch  # type: ignore[attr-defined]
        batch.update_async_output_token_ids()
        metadata: SamplingMetadata = batch.sampling_metadata
        logits = self.sampler.apply_logits_processors(  # type: ignore[attr-defined]
            logits.to(torch.float32), metadata, False
        )
        positions = self.positions[self._logits_indices] + 1  # type: ignore[attr-defined]
        return keyed_sample(
            logits,
            metadata,
            seeds=self._seeds(logits.device),
            positions=positions.to(torch.int64),
            sampler=self.sampler,  # type: ignore[attr-defined]
        )

    def _seeds(self, device: torch.device) -> torch.Tensor:
        """[B] int64 Gumbel keys of the requests in batch order."""
        num_requests = self.input_batch.num_reqs  # type: ignore[attr-defined]
        seeds: np.ndarray = np.empty(num_requests, dtype=np.int64)
        for row, request_id in enumerate(self.input_batch.req_ids):  # type: ignore[attr-defined]
            seeds[row] = seed_of(request_id, self.requests[request_id].sampling_params)  # type: ignore[attr-defined]
        return torch.from_numpy(seeds).to(device, non_blocking=True)


def keyed_sample(
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    *,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sampler: Any,
    draws: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SamplerOutput:
    """One token for each row, and the log-probabilities vLLM was asked for.

    Args:
        logits: [B, V] float32 after penalties and masks, before temperature.
        metadata: vLLM's description of the batch.
        seeds: [B] int64.
        positions: [B] int64, absolute index of the token being drawn.
        sampler: vLLM's sampler, used to gather top log-probabilities.
        draws: Which rows have seed and position in common: see `gumbel_sample`.
    """
    rows = logits.shape[0]
    if metadata.all_greedy or metadata.temperature is None:
        temperature = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    else:
        temperature = metadata.temperature[:rows].to(torch.float32)
        if any(getattr(p, "min_p_count", 1) for p in metadata.logitsprocs.argmax_invariant):
            logits, temperature = _apply_argmax_invariant(logits, temperature, metadata)
    threshold = None
    if metadata.top_k is not None or metadata.top_p is not None:
        threshold = truncation_threshold(logits, temperature=temperature, top_k=metadata.top_k, top_p=metadata.top_p)
    tokens, chosen_logprobs = gumbel_sample(
        logits, seeds=seeds, positions=positions, temperature=temperature, threshold=threshold, draws=draws
    )
    return SamplerOutput(
        sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1),
        logprobs_tensors=_logprobs(
            logits, temperature, threshold, tokens, chosen_logprobs, metadata.max_num_logprobs, sampler
        ),
    )


def _apply_argmax_invariant(
    logits: torch.Tensor, temperature: torch.Tensor, metadata: SamplingMetadata
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run processors that expect logits / T (min-p); afterwards the temperature of sampled rows is 1."""
    is_random = temperature > 0
    logits = logits / torch.where(is_random, temperature, 1.0).unsqueeze(1)
    for processor in metadata.logitsprocs.argmax_invariant:
        logits = processor.apply(logits)
    return logits, is_random.to(torch.float32)


def _logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None,
    tokens: torch.Tensor,
    chosen_logprobs: torch.Tensor,
    num_logprobs: int | None,
    sampler: Any,
) -> LogprobsTensors | None:
    """Log-probabilities under the distribution that was sampled from (processed logits / T, truncated).

    With `num_logprobs == 0` only the chosen token's is returned, straight from the kernel, and its
    rank, which would cost another pass over the vocabulary, is reported as 0.
    """
    if num_logprobs is None:
        return None
    if num_logprobs == 0:
        return LogprobsTensors(
            logprob_token_ids=tokens.to(torch.int32).unsqueeze(-1),
            logprobs=chosen_logprobs.to(torch.float32).unsqueeze(-1),
            selected_token_ranks=torch.zeros_like(tokens, dtype=torch.int32),
        )
    scaled = logits * (1.0 / torch.where(temperature > 0, temperature, 1.0)).unsqueeze(1)  # as the kernel does
    if threshold is not None:
        scaled = scaled.masked_fill(scaled < threshold.unsqueeze(1), float("-inf"))
    logprobs = torch.log_softmax(scaled, dim=-1)
    if num_logprobs == -1:
        return LogprobsTensors(torch.empty(0), logprobs, torch.empty(0))
    return sampler.gather_logprobs(logprobs, num_logprobs, token_ids=tokens)
