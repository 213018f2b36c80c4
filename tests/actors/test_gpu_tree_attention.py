"""The parts of tree attention on CUDA that run anywhere: what the rows of trees attend to, and the other rows."""

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from actors.vllm_plugin.gpu_tree_attention import DeviceTrees, attend_on_device
from actors.vllm_plugin.tree_steps import kernel_batch, other_rows
from actors.vllm_plugin.trees import TreeBatch
from kernels.tree_attention import PlainCache
from kernels.tree_attention.reference import tree_attention_reference
from rollout.speculation.tree import TokenTree

KV_HEADS, HEADS, HEAD_DIM, BLOCK_SIZE = 2, 4, 32, 16


def step() -> tuple[TreeBatch, np.ndarray, CommonAttentionMetadata]:
    """A prefill chunk of 3, a tree of 4 rows, a decoding request, a chain of 3 rows and a tree of 6 rows."""
    trees = [
        TokenTree.empty(),
        TokenTree.of_lists([1, 2, 3], [0, 0, 1]),
        TokenTree.empty(),
        TokenTree.chain([4, 5]),
        TokenTree.of_lists([1, 2, 3, 4, 5], [0, 0, 1, 2, 2]),
    ]
    starts, bases = np.array([0, 3, 7, 8, 11, 17]), np.array([2, 20, 9, 30, 15])
    batch = TreeBatch(trees=trees, starts=starts, bases=bases)
    lengths = torch.tensor([3, 24, 10, 33, 21], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts.astype(np.int32)),
        query_start_loc_cpu=torch.from_numpy(starts.astype(np.int32)),
        seq_lens=lengths,
        num_reqs=5,
        num_actual_tokens=17,
        max_query_len=6,
        max_seq_len=33,
        block_table_tensor=torch.randperm(20)[:15].view(5, 3).to(torch.int32),
        slot_mapping=torch.arange(17) * 10,
    )
    return batch, np.array(batch.branching()), common


def test_the_other_rows_are_a_step_of_their_own() -> None:
    batch, places, common = step()
    assert places.tolist() == [1, 4]
    others, rows = other_rows(batch, places, common)
    assert others is not None and rows is not None
    assert rows.tolist() == [0, 1, 2, 7, 8, 9, 10]
    assert others.query_start_loc.tolist() == others.query_start_loc_cpu.tolist() == [0, 3, 4, 7]
    assert others.seq_lens.tolist() == [3, 10, 33] and (others.num_reqs, others.num_actual_tokens) == (3, 7)
    assert others.max_query_len == 3 and others.slot_mapping.tolist() == [0, 10, 20, 70, 80, 90, 100]
    assert torch.equal(others.block_table_tensor, common.block_table_tensor[[0, 2, 3]])
    assert other_rows(batch, np.arange(5), common) == (None, None)


def test_rows_of_trees_are_written_and_no_others() -> None:
    batch, places, common = step()
    torch.manual_seed(0)
    cache = PlainCache(
        key=torch.randn(20, BLOCK_SIZE, KV_HEADS, HEAD_DIM), value=torch.randn(20, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    )
    query = torch.randn(17, HEADS, HEAD_DIM)
    rows = torch.tensor([3, 4, 5, 6, 11, 12, 13, 14, 15, 16])
    chosen = torch.from_numpy(places)
    trees = kernel_batch(batch, places)
    table, lengths = common.block_table_tensor[chosen], common.seq_lens[chosen]
    plan = DeviceTrees(trees=trees, rows=rows, block_table=table, seq_lens=lengths, max_seq_len=33)
    output = torch.full_like(query, -7.0)
    attend_on_device(query, cache, plan, 0.2, output)
    expected, _ = tree_attention_reference(
        query[rows], cache, trees=trees, block_table=table, seq_lens=lengths, scale=0.2
    )
    # 32 products a score, at most 26 terms a sum, values below 5: (32 + 26) × 5 × 2^-24 < 2e-5.
    torch.testing.assert_close(output[rows], expected, atol=2e-5, rtol=0)
    rest = torch.ones(17, dtype=torch.bool)
    rest[rows] = False
    assert (output[rest] == -7.0).all()
