"""One step's attention over the INT8 cache on the CPU where some requests carry trees and the others do not.

Owns the division of a step's rows between ``kernels.kv_attention``, which computes decoding rows and prefill chunks,
and this package's trees.
"""

from dataclasses import dataclass, replace

import torch

from kernels.kv_attention import AttentionPlan, KVCache, paged_attention_cpu, plan_attention
from kernels.kv_attention.plan import ragged
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cpu import paged_tree_attention_cpu
from kernels.tree_attention.plan import TreePlan, plan_tree_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What ``paged_step_attention_cpu`` needs to know of a step, whatever the layer.

    Attributes:
        causal: The requests without a tree; None where all have one.
        trees: The others.
    """

    causal: AttentionPlan | None
    trees: TreePlan


@torch.no_grad()
def plan_step(
    *,
    trees: TreeBatch,
    tree_requests: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_query_heads: int,
    cache: KVCache,
) -> StepPlan:
    """Plan one step for all layers.

    Args:
        trees: Of the requests that have one, in the step's order.
        tree_requests: [b] int64, rising, which requests these are.
        block_table: [B, max_blocks] integer on the CPU; entries past a sequence's end are not read.
        query_start_loc: [B + 1] integer; rows query_start_loc[r] .. query_start_loc[r + 1] - 1 belong to request r.
        seq_lens: [B] integer, lengths with the rows' own tokens.
        num_query_heads: Hq.
        cache: Any layer's cache.

    Raises:
        ValueError: A request's rows are not those of its tree, or lengths do not fit.
    """
    query_lens = query_start_loc.diff().long()
    if not torch.equal(query_lens[tree_requests], trees.counts):
        raise ValueError(
            f"query_start_loc: got {query_lens[tree_requests].tolist()} rows of the requests with trees, expected"
            f" {trees.counts.tolist()}"
        )
    starts = query_start_loc[:-1].long()
    tree_plan = plan_tree_attention(
        trees=trees,
        block_table=block_table[tree_requests],
        seq_lens=seq_lens[tree_requests],
        num_query_heads=num_query_heads,
        cache=cache,
        rows=_rows(starts[tree_requests], trees.counts),
    )
    is_causal = query_lens > 0
    is_causal[tree_requests] = False
    others = is_causal.nonzero().squeeze(1)
    if not len(others):
        return StepPlan(causal=None, trees=tree_plan)
    counts = query_lens[others]
    plan = plan_attention(
        block_table=block_table[others],
        query_start_loc=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        seq_lens=seq_lens[others],
        num_query_heads=num_query_heads,
        cache=cache,
    )
    # Planned as if there were no other rows; here is where they really are.
    rows = _rows(starts[others], counts)
    groups = tuple(replace(group, rows=rows[group.rows]) for group in plan.groups)
    return StepPlan(causal=replace(plan, groups=groups, num_rows=int(rows[-1]) + 1), trees=tree_plan)


def _rows(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    owner, place = ragged(counts)
    return starts[owner] + place


def paged_step_attention_cpu(
    query: torch.Tensor, cache: KVCache, *, plan: StepPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with every row of a step: decoding rows, prefill chunks and trees.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, T at least the plan's rows.
        cache: This layer's cache, already holding the rows' own tokens.
        plan: From ``plan_step`` of this step.
        scale: Factor of the scores.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32); rows of no request give 0 and -inf.

    Raises:
        ValueError: Query or cache are not those the plan was made for.
    """
    if plan.causal is not None:
        output, lse = paged_attention_cpu(query, cache, plan=plan.causal, scale=scale)
    else:
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = torch.full(query.shape[:2], -torch.inf)
    paged_tree_attention_cpu(query, cache, plan=plan.trees, scale=scale, output=output, lse=lse)
    return output, lse
