"""The Clover-2 draft model: what it computes, over whole sequences and incrementally.

Clover-2 (arXiv 2408.00264, after Clover, arXiv 2405.00263) is a recurrent draft over the target's hidden states:

- Information extraction order: an attention decoder first mixes the token that was chosen into the target's hidden
  state, before the augmenting block, so that the block already knows it.
- Augmenting block: transformer layers over the whole sequence of such states, with a KV cache of their own. It runs
  once a step, over the tokens that the step accepted, and its last state is the root of the tree.
- Regressive connection: a second attention decoder, the same at every depth, mixes each drafted token into the state
  of its parent. Its attention over a single token is a gate for each head: the cosine of query and key.
- Output projector: a linear layer over state and token embedding, then a norm, then the target's own output head.

Added here, since the target draws the arg max of logits + T · Gumbel(seed, position) and the draft knows that noise:

- Trust: how much of a token's score is the draft's logit and how much the noise. Where the draft knows the target's
  distribution, noise decides (drafter-invariant speculation, arXiv 2408.07978); where the draft is unsure of what the
  target is sure of, noise misleads. A linear layer tells the two apart from the state; a candidate's chance to be the
  token drawn is softmax(a · logits + b · T · noise), a and b > 0.

Other differences, all for this house: the embedding is the target's input embedding, shared, not a copy of its output
head; the states read are those after the target's final norm, which engines hand out anyway; the block is of Qwen3's
kind (grouped-query attention, norms of queries and keys) with a dense feed-forward part.

Owns the parameters and the arithmetic. Knows nothing of trees (`clover_trees.py`), losses, engines or versions.

Shape legend: B sequences, n tokens, R rows, H hidden, V vocabulary, K KV heads, D head width, L tokens in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rollout.errors import InvalidRequest
from rollout.speculation.clover_config import DraftConfig
from rollout.speculation.clover_state import DraftState

NORM_EPS = 1e-6  # least length that is divided by
FEW_ROWS = 32  # up to so many new rows a request, attention is two products; more are a prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLayers:
    """The two layers of the target that its draft computes with; never trained here.

    Attributes:
        embed: int64 [...] tokens → [..., H], the input embedding.
        logits: [..., H] what the output head reads → [..., V].
        matrices: The two matrices [V, H], where the layers are no more than these.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]
    matrices: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, embedding: torch.Tensor, head: torch.Tensor) -> TargetLayers:
        """From the two matrices [V, H], which may change in place afterwards."""
        return cls(
            embed=lambda tokens: F.embedding(tokens, embedding),
            logits=lambda rows: F.linear(rows, head),
            matrices=(embedding, head),
        )


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) · weight. torch's own decomposes into twice the calls, which is what counts at a few rows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=NORM_EPS)
        return rows / length * (self.weight * rows.shape[-1] ** 0.5)


class AttentionDecoder(nn.Module):
    """Mixes a token into a state: state + gate(state, token) · value(token), the gate a cosine for each head."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_heads
        self.norm = RootMeanSquareNorm(size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)

    def forward(self, state: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """state [..., H] and key_value(embedding) [..., 2H] → [..., H]."""
        split = (self.heads, state.shape[-1] // self.heads)
        query = self.query(self.norm(state)).unflatten(-1, split)
        key, value = key_value.chunk(2, dim=-1)
        key = key.unflatten(-1, split)
        norms = [torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (query, key)]
        gate = (query * key).sum(-1, keepdim=True) / (norms[0] * norms[1]).clamp(min=NORM_EPS)
        return state + (value.unflatten(-1, split) * gate).flatten(-2)


class BlockLayer(nn.Module):
    """One transformer layer of the augmenting block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, width
        self.input_norm = RootMeanSquareNorm(size)
        self.qkv_proj = nn.Linear(size, (self.heads + 2 * self.kv_heads) * width, bias=False)
        self.q_norm = RootMeanSquareNorm(width)
        self.k_norm = RootMeanSquareNorm(width)
        self.o_proj = nn.Linear(self.heads * width, size, bias=False)
        self.post_norm = RootMeanSquareNorm(size)
        self.gate_up_proj = nn.Linear(size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def qkv(
        self, state: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """state [..., n, H] → queries [..., n, heads, D], keys and values [..., n, K, D]."""
        rows = self.qkv_proj(self.input_norm(state)).unflatten(-1, (-1, self.width))
        query, key, value = rows.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        return _rotate(self.q_norm(query), rotation), _rotate(self.k_norm(key), rotation), value

    def finish(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Attention output [..., n, heads · D] and what follows it, onto state [..., n, H]."""
        state = state + self.o_proj(attended)
        gate, up = self.gate_up_proj(self.post_norm(state)).chunk(2, dim=-1)
        return state + self.down_proj(F.silu(gate) * up)


class CloverDraft(nn.Module):
    """The draft model; embedding and output head stay the target's and are handed to the calls that need them.

    Args:
        config: Its shape.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.extract = AttentionDecoder(config)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.block_norm = RootMeanSquareNorm(size)
        self.regress = AttentionDecoder(config)
        self.root_project = nn.Linear(size, size)
        self.state_project = nn.Linear(size, size)
        self.token_project = nn.Linear(size, size, bias=False)  # with state_project: one layer over [state, token]
        self.head_norm = RootMeanSquareNorm(size)
        self.trust = nn.Linear(size, 2)
        self.trust_by_depth = nn.Parameter(torch.zeros(config.num_steps, 2))
        self._initialise()

    def _initialise(self) -> None:
        """At first the draft repeats the target's own state: projectors are the identity, as published."""
        for decoder in (self.extract, self.regress):
            nn.init.eye_(decoder.query.weight)
            nn.init.eye_(decoder.key_value.weight[: self.config.hidden_size])
            nn.init.normal_(decoder.key_value.weight[self.config.hidden_size :], std=0.02)
            nn.init.zeros_(decoder.query.bias)
            nn.init.zeros_(decoder.key_value.bias)
        for layer in self.layers:
            nn.init.normal_(layer.qkv_proj.weight, std=self.config.hidden_size**-0.5)
            nn.init.normal_(layer.gate_up_proj.weight, std=self.config.hidden_size**-0.5)
            nn.init.zeros_(layer.o_proj.weight)
            nn.init.zeros_(layer.down_proj.weight)
        for project in (self.root_project, self.state_project):
            nn.init.eye_(project.weight)
            nn.init.zeros_(project.bias)
        nn.init.zeros_(self.token_project.weight)
        nn.init.zeros_(self.trust.weight)
        nn.init.zeros_(self.trust.bias)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors by name into the parameters.

        Raises:
            InvalidRequest: A tensor is missing, left over or of another shape.
        """
        own = self.state_dict()
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        want = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if got != want:
            some = sorted(dict(got.items() ^ want.items()))[:3]
            raise InvalidRequest("draft model's tensors", f"others: {', '.join(some)}", "those of its configuration")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def roots(self, tokens: torch.Tensor, hidden: torch.Tensor, target: TargetLayers) -> torch.Tensor:
        """States of the augmenting block over whole sequences.

        Args:
            tokens: int64 [B, n].
            hidden: [B, n, H], the target's; row t is token t's.
            target: Whose embedding is shared.

        Returns:
            [B, n - 1, H]: state t is the root of the tree that follows token t + 1.
        """
        length = tokens.shape[1] - 1
        state = self._mix(hidden[:, :-1], target.embed(tokens[:, 1:]))
        rotation = self._rotation(torch.arange(1, length + 1, device=tokens.device), state.dtype)
        for layer in self.layers:
            query, key, value = (rows.transpose(1, 2) for rows in layer.qkv(state, rotation))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            state = layer.finish(state, attended.transpose(1, 2).flatten(-2))
        return self.block_norm(state)

    def extend(
        self,
        states: Sequence[DraftState],
        counts: Sequence[int],
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        target: TargetLayers,
    ) -> None:
        """Take tokens that were just accepted (or prefilled) into the states of B requests, and set their roots.

        Args:
            states: One for each request, each once.
            counts: How many rows each request has, at least 1; they lie one request after the other.
            tokens: int64 [R], tokens at positions state.position + 1, + 2, …
            hidden: [R, H], the target's hidden state of the row that emitted each token, that is of the token
                before it.
            target: Whose embedding is shared.

        Raises:
            InvalidRequest: The numbers of rows differ.
        """
        check_rows(counts, tokens, hidden)
        positions = [s.position + 1 + i for s, count in zip(states, counts, strict=True) for i in range(count)]
        state = self._mix(hidden, target.embed(tokens))
        rotation = self._rotation(torch.tensor(positions, device=hidden.device), state.dtype)
        unseen = []
        for one, count in zip(states, counts, strict=True):
            one.reserve(self.config, count, state)
            unseen.append(_unseen(count, one.length + count, state.device))
        for number, layer in enumerate(self.layers):
            query, key, value = (rows.split(list(counts)) for rows in layer.qkv(state, rotation))
            attended = [
                _attend(mine, *one.write(number, k, v), later)
                for one, mine, k, v, later in zip(states, query, key, value, unseen, strict=True)
            ]
            state = layer.finish(state, torch.cat(attended))
        roots = self.block_norm(state)
        for one, count, rows in zip(states, counts, roots.split(list(counts)), strict=True):
            one.advance(count, rows[-1])

    def next_state(self, state: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the regressive connection.

        Args:
            state: [..., H], of the parents.
            token: [..., H], embeddings of the drafted tokens.

        Returns:
            The new states [..., H], and what the output head reads [..., H].
        """
        state = self.regress(state, self.regress.key_value(token))
        return state, self.head_norm(self.state_project(state) + self.token_project(token))

    def root_output(self, root: torch.Tensor) -> torch.Tensor:
        """What the output head reads at the root: [..., H] → [..., H]."""
        return self.head_norm(self.root_project(root))

    def keyed_scores(self, output: torch.Tensor, logits: torch.Tensor, noise: torch.Tensor, depth: int) -> torch.Tensor:
        """Scores whose softmax is each token's chance to be the one that the target draws.

        Args:
            output: [..., H], what the output head read.
            logits: [..., V], what it said.
            noise: T · Gumbel noise of the position, broadcast with logits.
            depth: Layer of the tree, the first being 0; layers beyond those trained count as the last of them.
        """
        weights = F.softplus(self.trust(output) + self.trust_by_depth[min(depth, self.config.num_steps - 1)])
        return weights[..., :1] * logits + weights[..., 1:] * noise

    def _mix(self, hidden: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return self.extract(hidden, self.extract.key_value(token))

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [n, 1, D / 2] of positions [n]; angles in float32, which a buffer would not stay in."""
        width = self.config.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / -width
        angles = (positions.unsqueeze(-1) * self.config.rope_theta**exponents).unsqueeze(-2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def check_rows(counts: Sequence[int], tokens: torch.Tensor, hidden: torch.Tensor) -> None:
    """Refuse what `CloverDraft.extend` cannot take in.

    Raises:
        InvalidRequest: The numbers of rows differ.
    """
    if min(counts, default=1) < 1 or not sum(counts) == len(tokens) == len(hidden):
        got = f"counts {list(counts)}, {len(tokens)} tokens, {len(hidden)} hidden states"
        raise InvalidRequest("rows of accepted tokens", got, "as many tokens and hidden states as counted")


def _rotate(rows: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions on rows [..., n, heads, D]: halves of a head are the pairs, as in the target."""
    cos, sin = rotation
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _unseen(count: int, length: int, device: torch.device) -> torch.Tensor | None:
    """bool [count, length]: what each of the last rows of a sequence must not attend to; None for a single one."""
    if count == 1:
        return None
    return torch.ones(count, length, dtype=torch.bool, device=device).triu(length - count + 1)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, unseen: torch.Tensor | None) -> torch.Tensor:
    """Attention of the last rows of one sequence: [n, heads, D] over [K, L, D] twice → [n, heads · D]."""
    count = len(query)
    if count > FEW_ROWS:
        seen = None if unseen is None else ~unseen
        attended = F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=seen, enable_gqa=True)
        return attended.transpose(0, 1).flatten(-2)
    # torch's general path repeats keys and values for each query head, which costs more than the attention itself.
    grouped = query.unflatten(1, (len(keys), -1)).transpose(0, 1).flatten(1, 2)  # [K, n · heads / K, D]
    scores = (grouped * query.shape[-1] ** -0.5) @ keys.transpose(1, 2)
    if unseen is not None:
        scores.view(len(keys), count, -1, keys.shape[1]).masked_fill_(unseen[:, None], -torch.inf)
    attended = scores.softmax(-1) @ values
    return attended.unflatten(1, (count, -1)).transpose(0, 1).flatten(1)
