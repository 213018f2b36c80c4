"""A model-runner mix-in that verifies token trees and drafts the next ones.

Trees travel through vLLM as ordinary draft tokens, parents first; their parents stay here, by request. vLLM itself
runs without a speculative configuration: its scheduler takes draft tokens of any request that has some, and a step in
which nobody has any is a step of the plain runner. What is different in a step with trees:

1. positions are those of depth, while KV slots stay consecutive;
2. attention sees trees (tree_attention.py);
3. every row is sampled with its own key, and a walk from the root finds what is accepted;
4. the KV of accepted rows moves to where the next step expects it, before the next step can begin.

Then new trees are asked for and sent along with the step's output. Knows nothing of how drafts are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from actors.vllm_plugin import GROUP_KEY, MEMBER_KEY, PROMPT_KEY
from actors.vllm_plugin.draft_records import DraftRequest, StepSize, Verified
from actors.vllm_plugin.drafters import make_desk
from actors.vllm_plugin.drafting import DRAFTS_ATTRIBUTE, DraftDesk
from actors.vllm_plugin.patches import announce, size_of_peers
from actors.vllm_plugin.runner import keyed_sample, seed_of
from actors.vllm_plugin.tree_sampling import (
    by_row,
    can_speculate,
    emitted,
    has_processors,
    is_stop,
    put_rows,
    until_stop,
)
from actors.vllm_plugin.trees import TreeBatch
from kernels.gumbel_sample.native import native_sample
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted, walk_batch

LEARN_STEPS = 32  # between two looks of the drafters at a request that they do not draft for


class TreeRunnerMixin:
    """Mix in before a vLLM V1 model runner with keyed sampling and routing capture (which owns rows beside the KV)."""

    draft_desk: DraftDesk | None = None
    _trees: TreeBatch | None = None  # of the step under way, until it has been sampled
    _logits_indices: torch.Tensor

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)  # type: ignore[misc]
        for builder in self._tree_builders():
            if not hasattr(builder, "trees"):
                raise ValueError(f"speculation: got attention of {type(builder).__name__}, expected one that has trees")
        if len(kv_cache_config.kv_cache_groups) > 1 or self.uses_mrope:  # type: ignore[attr-defined]
            raise ValueError("speculation: got a hybrid or multi-modal model, expected one kind of attention layer")
        if not is_profiling:
            self._accepted: list[Accepted] = []
            self._verified_trees: list[tuple[str, TokenTree, Accepted]] = []
            self._last_ids: frozenset[str] = frozenset()
            self._num_steps = 0
            self.draft_desk = make_desk(self.vllm_config, self.get_model())  # type: ignore[attr-defined]

    def _tree_builders(self) -> Iterator[Any]:
        for group in self._attn_group_iterator():  # type: ignore[attr-defined]
            yield group.get_metadata_builder(0)

    def _update_states(self, scheduler_output: Any) -> Any:
        desk, requests = self.draft_desk, self.requests  # type: ignore[attr-defined]
        if desk is not None and scheduler_output.finished_req_ids:
            for request_id in scheduler_output.finished_req_ids:
                if (state := requests.get(request_id)) is not None:
                    tokens = np.array([*state.prompt_token_ids, *state.output_token_ids], dtype=np.int32)
                    desk.end(draft_request(request_id, state, tokens, max_depth=1, budget=1))
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        self._trees = self._take_trees(scheduler_output.scheduled_spec_decode_tokens)
        num_sequences = self.input_batch.num_reqs  # type: ignore[attr-defined]
        if self._trees is None:
            announce(num_sequences, num_sequences)
            return prepared
        announce(num_sequences, int(self._trees.num_rows.sum()))
        rows, _, positions = self._trees.sampled_rows
        indices = torch.from_numpy(rows).to(self.device)  # type: ignore[attr-defined]
        self.positions[indices] = torch.from_numpy(positions).to(self.device)  # type: ignore[attr-defined]
        self._logits_indices = indices
        return indices, None, max(tree.num_rows for tree in self._trees.trees)

    def _take_trees(self, scheduled: dict[str, list[int]]) -> TreeBatch | None:
        """Trees of this step's requests; those of requests that the scheduler gave no draft tokens are dropped."""
        batch, desk = self.input_batch, self.draft_desk  # type: ignore[attr-defined]
        if desk is None or (not scheduled and not desk.num_pending):
            return None
        trees = []
        for request_id in batch.req_ids:
            tree, tokens = desk.tree_of(request_id), scheduled.get(request_id)
            if not tokens:
                desk.drop(request_id)
                trees.append(TokenTree.empty())
                continue
            assert tree is not None, f"request {request_id}: draft tokens without a tree"
            tree = tree.prefix(len(tokens))
            assert tree.tokens.tolist() == tokens, f"request {request_id}: draft tokens of another tree"
            trees.append(tree)
        if not any(tree.num_nodes for tree in trees):
            return None
        starts = self.query_start_loc.np[: len(trees) + 1].astype(np.int64)  # type: ignore[attr-defined]
        ends = batch.num_computed_tokens_cpu[: len(trees)] + np.diff(starts)
        sizes = np.fromiter((tree.num_rows for tree in trees), np.int64, len(trees))
        return TreeBatch(trees=trees, starts=starts, bases=ends - sizes)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Metadata builders know the step's trees while they build."""
        if self._trees is None:
            return super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        builders = list(self._tree_builders())
        for builder in builders:
            builder.trees = self._trees
        try:
            return super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        finally:
            for builder in builders:
                builder.trees = None

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state  # type: ignore[attr-defined]
        self._accepted, self._verified_trees = [], []
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        if state is not None and self.draft_desk is not None:
            drafts = self._draft(self.draft_desk, state)
            if drafts:
                setattr(output, DRAFTS_ATTRIBUTE, drafts)
        return output

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        trees, self._trees = self._trees, None
        if trees is None:
            return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        if logits is None:
            raise RuntimeError("speculation: got no logits, expected pipeline parallelism to be off")
        sampled = self._sample_rows(logits, trees)
        ids = self.input_batch.req_ids  # type: ignore[attr-defined]
        walks = walk_batch(trees.trees, sampled.sampled_token_ids[:, 0].cpu().numpy())
        self._accepted = [
            until_stop(one, self.requests[request_id].sampling_params)  # type: ignore[attr-defined]
            for request_id, one in zip(ids, walks, strict=True)
        ]
        slots = self.input_batch.block_table[0].slot_mapping.gpu  # type: ignore[attr-defined]
        moved, target_slots = trees.move(self._accepted, slots)
        if len(moved):
            self.kv_moved(moved, target_slots)  # type: ignore[attr-defined]
        for request_id, tree, walked in zip(ids, trees.trees, self._accepted, strict=True):
            if tree.num_nodes:
                self._verified_trees.append((request_id, tree, walked))
                self.kv_rejected(request_id, tree.num_nodes - walked.num_drafted)  # type: ignore[attr-defined]
        return emitted(self._accepted, trees, sampled)

    def _draft(self, desk: DraftDesk, state: Any) -> dict[str, list[int]]:
        """Tell the desk of the step that was just sampled; draft tokens for the next one, by request."""
        batch = self.input_batch  # type: ignore[attr-defined]
        ids, count = batch.req_ids, batch.num_reqs
        self._num_steps += 1
        if desk.is_turned_off and not desk.num_pending and not self._verified_trees:
            self._last_ids = frozenset()
            return {}
        if desk.needs_hidden:
            self._hand_over_hidden(desk, state)
        if desk.rests(count, self._step_number()):
            self._let_learn(desk)
            return {}
        is_going_on = ~self.discard_request_mask.np[:count]  # type: ignore[attr-defined]
        lengths = batch.num_tokens_no_spec[:count]
        scheduled = state.scheduler_output.total_num_scheduled_tokens
        nodes = sum(tree.num_nodes for _, tree, _ in self._verified_trees)
        num_tokens = int(is_going_on.sum()) + sum(walked.num_drafted for _, _, walked in self._verified_trees)
        context_tokens, version = int(lengths.sum()), self._weight_version()
        peers = size_of_peers(self.parallel_config.data_parallel_rank)  # type: ignore[attr-defined]
        desk.verified(
            Verified(
                size=StepSize(sequences=count, rows=count + nodes, has_prefill=scheduled != count + nodes),
                peers=peers,
                context_tokens=context_tokens,
                num_tokens=num_tokens,
                version=version,
                trees=self._verified_trees,
                is_continued=not self._last_ids.isdisjoint(ids),
            )
        )
        self._last_ids = frozenset(ids)
        choice = desk.choose(int(is_going_on.sum()), context_tokens, version, peers)
        if choice.is_off:
            self._let_learn(desk)
            return {}
        places = is_going_on.nonzero()[0].tolist()
        budgets = desk.budgets([ids[place] for place in places])
        requests = [
            request
            for place, budget in zip(places, budgets, strict=True)
            if budget and (request := self._draft_request(place, budget)) is not None
        ]
        return {name: tree.tokens.tolist() for name, tree in desk.propose(requests).items()}

    def _draft_request(self, place: int, budget: int) -> DraftRequest | None:
        """The request at a place of the batch; None if it has no use for a tree, or cannot have one."""
        batch = self.input_batch  # type: ignore[attr-defined]
        request_id = batch.req_ids[place]
        state = self.requests[request_id]  # type: ignore[attr-defined]
        params, num_tokens = state.sampling_params, int(batch.num_tokens_no_spec[place])
        room = min(params.max_tokens - len(state.output_token_ids), self.max_model_len - num_tokens)  # type: ignore[attr-defined]
        tokens = batch.token_ids_cpu[place, :num_tokens]
        if room < 2 or is_stop(int(tokens[-1]), params) or not can_speculate(params):
            return None
        return draft_request(request_id, state, tokens, max_depth=room - 1, budget=budget)

    def _let_learn(self, desk: DraftDesk) -> None:
        """Show the drafters some of the requests that they do not draft for: each one every LEARN_STEPS steps."""
        if not desk.learns:
            return
        batch = self.input_batch  # type: ignore[attr-defined]
        for place in range(self._num_steps % LEARN_STEPS, batch.num_reqs, LEARN_STEPS):
            request_id = batch.req_ids[place]
            tokens = batch.token_ids_cpu[place, : int(batch.num_tokens_no_spec[place])]
            desk.learn(draft_request(request_id, self.requests[request_id], tokens, max_depth=1, budget=1))  # type: ignore[attr-defined]

    def _hand_over_hidden(self, desk: DraftDesk, state: Any) -> None:
        """Give the desk the hidden states of the rows that count: what was prefilled, and what was accepted."""
        ids = self.input_batch.req_ids  # type: ignore[attr-defined]
        first = self.input_batch.num_computed_tokens_cpu[: len(ids)]  # type: ignore[attr-defined]
        if state.scheduler_output.total_num_scheduled_tokens == len(ids):
            desk.take_hidden(ids, None, first, state.hidden_states[: len(ids)])
            return
        starts = self.query_start_loc.np[: len(ids) + 1]  # type: ignore[attr-defined]
        if not self._accepted:
            desk.take_hidden(ids, starts[1:] - starts[:-1], first, state.hidden_states[: starts[-1]])
            return
        trees = {name: tree for name, tree, _ in self._verified_trees}
        rows, counts = [], []
        for place, (name, walked) in enumerate(zip(ids, self._accepted, strict=True)):
            begin, end = int(starts[place]), int(starts[place + 1])
            own = np.array(walked.rows) + begin if name in trees else np.arange(begin, end)
            rows.append(own)
            counts.append(len(own))
        flat = torch.from_numpy(np.concatenate(rows)).to(state.hidden_states.device)
        desk.take_hidden(ids, np.array(counts), first, state.hidden_states[flat])

    def _step_number(self) -> int:
        """Of the vote before it, which is the same on all ranks of the group."""
        forward = getattr(self, "_forward", None)
        return self._num_steps if forward is None else forward[0]

    def _weight_version(self) -> int:
        gate = getattr(self, "gate", None)
        return 0 if gate is None else gate.version

    def _sample_rows(self, logits: torch.Tensor, trees: TreeBatch) -> SamplerOutput:
        """One token for each of the S rows.

        Only requests without processors (penalties, bias, masks, grammar, min-p) have trees, so what a processor does
        concerns the first row of each request alone, which is sampled as in a step without trees.
        """
        batch = self.input_batch  # type: ignore[attr-defined]
        batch.update_async_output_token_ids()
        metadata: SamplingMetadata = batch.sampling_metadata
        device = logits.device
        _, owners, _ = trees.sampled_rows
        owner = torch.from_numpy(owners).to(device)
        positions = (self.positions[self._logits_indices] + 1).to(torch.int64)  # type: ignore[attr-defined]
        seeds = self._seeds(device)  # type: ignore[attr-defined]
        logits = logits.to(torch.float32)
        counts = trees.num_rows
        first = torch.from_numpy(counts.cumsum() - counts).to(device)
        draws = None  # kernels draw in registers
        if device.type == "cpu" and native_sample() is None:
            draws = tuple(torch.from_numpy(places) for places in trees.draws)
        if has_processors(metadata):
            logits[first] = self.sampler.apply_logits_processors(logits[first], metadata, False)  # type: ignore[attr-defined]
        sampled = keyed_sample(
            logits,
            by_row(metadata, owner),
            seeds=seeds[owner],
            positions=positions,
            sampler=self.sampler,  # type: ignore[attr-defined]
            draws=draws,
        )
        if any(getattr(processor, "min_p_count", 1) for processor in metadata.logitsprocs.argmax_invariant):
            alone = keyed_sample(
                logits[first],
                metadata,
                seeds=seeds,
                positions=positions[first],
                sampler=self.sampler,  # type: ignore[attr-defined]
            )
            put_rows(sampled, first, alone)
        return sampled


def draft_request(request_id: str, state: Any, tokens: np.ndarray, *, max_depth: int, budget: int) -> DraftRequest:
    """A request as drafters see it; `state` is the runner's."""
    params = state.sampling_params
    extra = params.extra_args or {}
    return DraftRequest(
        request_id=request_id,
        token_ids=tokens,
        num_prompt_tokens=extra.get(PROMPT_KEY, state.num_prompt_tokens),
        seed=seed_of(request_id, params),
        temperature=params.temperature,
        top_k=params.top_k or None,
        top_p=params.top_p,
        group=extra.get(GROUP_KEY),
        member=extra.get(MEMBER_KEY),
        max_depth=max_depth,
        budget=budget,
    )
