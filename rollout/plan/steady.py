"""What a group does under a steady stream of requests: time to first token, time per token, tokens per second.

Owns the queueing and the mixing of prefills with decoding; every step is priced by the cost model. In a step a rank
decodes all its sequences, and what is left of its chunk prefills. A rank prefills in a share of the steps; the group
waits for whichever of its ranks does, for the exchange of rows is a barrier in every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rollout.plan.candidate import Candidate
from rollout.plan.workload import Workload
from rollout.simulate.accelerators import Accelerator
from rollout.simulate.costs import Efficiency, MoeShape, RooflineCosts, StepTerms

PERCENTILE = 0.95  # of requests whose time to first token is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """Figures of a candidate.

    Attributes:
        ttft_s: 95th percentile, arrivals being random: the rest of the step under way, the prompts ahead, its own
            prefill. The percentiles of the first two are added, which is a little more than that of their sum.
        prefill_s: Of a whole prompt, without waiting.
        tpot_s: Mean.
        step_s: Mean.
        longest_step_s: One with a prefill in it: the longest gap between two tokens of a running request.
        tokens_per_s_per_gpu: Generated.
        prefill_share: Share of the steps in which a rank prefills.
        terms: Parts of the mean step, drafting apart.
        draft_s: Drafting, of the mean step.
    """

    ttft_s: float
    prefill_s: float
    tpot_s: float
    step_s: float
    longest_step_s: float
    tokens_per_s_per_gpu: float
    prefill_share: float
    terms: StepTerms
    draft_s: float


def steady(
    candidate: Candidate,
    workload: Workload,
    gpu: Accelerator,
    shape: MoeShape,
    efficiency: Efficiency,
    costs: RooflineCosts | None = None,
    is_aligned: bool = False,
) -> Steady | None:
    """Figures of a group at its full batch.

    Args:
        costs: Of the candidate's group, where they are at hand.
        is_aligned: All ranks prefill in the same steps, as they do where everything arrives at once.

    Returns:
        None if requests arrive faster than they can be prefilled.
    """
    costs = costs or RooflineCosts(candidate.ranks, gpu, shape, efficiency, candidate.layout())
    draft, ranks = candidate.draft, candidate.data_ranks
    rows_per_sequence = 1 + draft.num_tokens
    decode_rows = candidate.batch * rows_per_sequence
    room = candidate.chunk - decode_rows
    gained = candidate.batch * draft.accept_length  # tokens a step and rank
    arriving = gained / workload.mean_output  # requests a step and rank
    prefilled = arriving * workload.prefilled_tokens
    if prefilled > room:
        return None
    part = max(prefilled, min(room, workload.prompt_tokens))
    share = prefilled / part
    any_share = share if is_aligned else 1 - (1 - share) ** ranks
    context = candidate.batch * workload.held_tokens

    def terms(prefill: float, num_prefilling: float) -> StepTerms:
        all_rows = ranks * decode_rows + prefill * num_prefilling
        reads = prefill * workload.prompt_tokens / 2
        return costs.terms(decode_rows, context, prefill, reads, all_rows, rows_per_sequence)

    full, bare = terms(part, ranks * share / any_share), terms(0, 0)
    mean = _mix(full, bare, any_share)
    bytes_per_s, flops = gpu.memory_bytes_per_s * efficiency.memory, gpu.flops * efficiency.compute
    draft_s = draft.draft_s(candidate.batch, shape, bytes_per_s, flops) if draft.num_tokens else 0.0
    step_s, full_s = mean.total_s + draft_s, full.total_s + draft_s
    prefill_s = math.ceil(workload.prompt_tokens / part) * full_s
    busy = share * full_s / step_s
    return Steady(
        ttft_s=residual_s(full_s, bare.total_s + draft_s, any_share) + _waiting_s(busy, prefill_s) + prefill_s,
        prefill_s=prefill_s,
        tpot_s=step_s / draft.accept_length,
        step_s=step_s,
        longest_step_s=full_s,
        tokens_per_s_per_gpu=gained / step_s / candidate.tensor_ranks,
        prefill_share=share,
        terms=mean,
        draft_s=draft_s,
    )


def residual_s(full_s: float, bare_s: float, share: float) -> float:
    """95th percentile of what is left of the step in which a request arrives.

    Args:
        full_s, bare_s: Steps with and without a prefill.
        share: Of the former among all.
    """
    inside = share * full_s / (share * full_s + (1 - share) * bare_s)
    beyond = full_s * (1 - (1 - PERCENTILE) / inside) if inside > 0 else 0.0
    return max(beyond, PERCENTILE / (inside / full_s + (1 - inside) / bare_s))


def _waiting_s(busy: float, service_s: float) -> float:
    """95th percentile of the wait for earlier prompts: M/D/1, those who wait at all waiting exponentially long."""
    if busy <= 1 - PERCENTILE:
        return 0.0
    if busy >= 1:
        return math.inf
    mean_of_waiting = service_s / (2 * (1 - busy))
    return mean_of_waiting * math.log(busy / (1 - PERCENTILE))


def _mix(full: StepTerms, bare: StepTerms, share: float) -> StepTerms:
    rest = 1 - share
    return StepTerms(
        fixed_s=share * full.fixed_s + rest * bare.fixed_s,
        attention_s=share * full.attention_s + rest * bare.attention_s,
        scores_s=share * full.scores_s + rest * bare.scores_s,
        kv_s=share * full.kv_s + rest * bare.kv_s,
        experts_s=share * full.experts_s + rest * bare.experts_s,
        exchange_s=share * full.exchange_s + rest * bare.exchange_s,
        reduce_s=share * full.reduce_s + rest * bare.reduce_s,
    )
