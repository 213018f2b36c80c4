"""Random trees, small language models and drafters for the tests of speculation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import MAX_WIDTH, TokenTree

VOCAB = 23


def grow_tree(draw: Callable[[int], int], num_nodes: int, vocab_size: int, max_width: int = MAX_WIDTH) -> TokenTree:
    """A tree of at most `num_nodes` nodes; draw(n) gives an integer below n."""
    tokens: list[int] = []
    parents: list[int] = []
    depths, widths = [0], {0: 1}
    for _ in range(num_nodes):
        parent, token = draw(len(depths)), draw(vocab_size)
        depth = depths[parent] + 1
        if widths.get(depth, 0) == max_width or (parent, token) in zip(parents, tokens, strict=True):
            continue
        widths[depth] = widths.get(depth, 0) + 1
        tokens.append(token)
        parents.append(parent)
        depths.append(depth)
    return TokenTree.of_lists(tokens, parents)


@st.composite
def trees(draw: Any, max_nodes: int = 24, vocab_size: int = 5) -> TokenTree:
    """Trees of up to max_nodes nodes, small vocabularies so that tokens repeat among branches."""
    num_nodes = draw(st.integers(0, max_nodes))
    return grow_tree(lambda below: draw(st.integers(0, below - 1)), num_nodes, vocab_size)


def scored(tree: TokenTree) -> ScoredTree:
    """A proposal that claims nothing: each layer down is a little less likely."""
    return ScoredTree(tree=tree, scores=-tree.depths[1:].astype(float), sources=np.ones(tree.num_nodes, np.int32))


class SmallLM(nn.Module):
    """Two layers of causal attention with rotary-free learned positions, called as Hugging Face models are."""

    def __init__(self, seed: int, vocab_size: int = VOCAB, size: int = 16, max_positions: int = 512) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, size)
        self.place = nn.Embedding(max_positions, size)
        self.layers = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(2))
        self.head = nn.Linear(size, vocab_size)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        # In float64 a row's logits differ by some 1e-15 between passes of different shape, so tokens are compared
        # outright: two perturbed logits as close as that, after rounding to float32, are not met in a test.
        self.double().eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: DynamicCache,
        use_cache: bool,
        output_hidden_states: bool = False,
    ) -> SimpleNamespace:
        assert use_cache
        state = self.embed(input_ids) + self.place(position_ids)
        for number, layer in enumerate(self.layers):
            query, key, value = (rows.unflatten(-1, (2, -1)).transpose(1, 2) for rows in layer(state).chunk(3, -1))
            key, value = past_key_values.update(key, value, number)
            weights = (query @ key.transpose(-1, -2) / 4 + attention_mask).softmax(-1)
            state = state + torch.tanh((weights @ value).transpose(1, 2).flatten(2))
        return SimpleNamespace(logits=self.head(state), hidden_states=(state,) if output_hidden_states else None)


def noisy_copy(model: SmallLM, noise: float) -> SmallLM:
    """A draft model: the same weights, each off by about this share of the layer's spread."""
    copy = SmallLM(0, model.vocab_size)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    return copy


def naive_decode(
    logits_of: Callable[[list[int]], torch.Tensor], prompt: Sequence[int], num_tokens: int, sampling: KeyedSampling
) -> tuple[list[int], list[float]]:
    """Plain keyed decoding: the whole context anew for every token, no cache.

    Args:
        logits_of: Gives the logits [V] after a context.
    """
    context, logprobs = list(prompt), []
    for _ in range(num_tokens):
        token, logprob = sampling.sample(logits_of(context)[None], [len(context)])
        context.append(int(token))
        logprobs.append(float(logprob))
    return context[len(prompt) :], logprobs


def logits_of(model: nn.Module) -> Callable[[list[int]], torch.Tensor]:
    """For `naive_decode`: one forward of the whole context with an ordinary causal mask."""

    def logits(context: list[int]) -> torch.Tensor:
        size = len(context)
        dtype = next(model.parameters()).dtype
        bias = torch.full((size, size), torch.finfo(dtype).min, dtype=dtype).triu(1)
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([context]),
                attention_mask=bias[None, None],
                position_ids=torch.arange(size)[None],
                past_key_values=DynamicCache(),
                use_cache=True,
            )
        return output.logits[0, -1]

    return logits


class Scripted:
    """A drafter that knows the answer and does with it what it is told.

    Args:
        script: Gives the tree for (true continuation, max_depth, budget, max_width).
        truth: Prompt and true output.
    """

    vocab_size: int | None = None
    needs_hidden = False

    def __init__(self, script: Callable[[list[int], int, int, int], TokenTree], truth: Sequence[int]) -> None:
        self._script, self._truth = script, list(truth)

    def propose(
        self,
        context: Sequence[int],
        hidden: torch.Tensor | None,
        *,
        sampling: KeyedSampling,
        max_width: int,
        max_depth: int,
        budget: int,
    ) -> ScoredTree:
        assert hidden is None
        return scored(self._script(self._truth[len(context) :], max_depth, budget, max_width))


def chain_script(seed: int) -> Callable[..., TokenTree]:
    """A chain that goes wrong somewhere."""
    chance = random.Random(seed)

    def script(truth: list[int], max_depth: int, budget: int, max_width: int) -> TokenTree:
        right = chance.randint(0, max_depth)
        tokens = [token if depth < right else chance.randrange(VOCAB) for depth, token in enumerate(truth)]
        return TokenTree.chain(tokens[: min(max_depth, budget)])

    return script


def random_script(seed: int) -> Callable[..., TokenTree]:
    """Any tree, any tokens."""
    chance = random.Random(seed)

    def script(truth: list[int], max_depth: int, budget: int, max_width: int) -> TokenTree:
        tree = grow_tree(chance.randrange, chance.randint(0, budget), VOCAB, max_width)
        return tree if tree.depth <= max_depth else TokenTree.empty()

    return script


def adversarial_script(seed: int) -> Callable[..., TokenTree]:
    """The true tokens, deep below wrong parents as well as below right ones, so that every shortcut is punished."""
    chance = random.Random(seed)

    def script(truth: list[int], max_depth: int, budget: int, max_width: int) -> TokenTree:
        tokens: list[int] = []
        parents: list[int] = []
        right = 0
        for depth, token in enumerate(truth[:max_depth]):
            # All of a layer hangs below the last layer's wrong node, its right one, or both.
            layer = []
            wrong = len(tokens) if depth and chance.random() < 0.7 else right
            if wrong != right:
                layer += [(token, wrong)]
            layer += [((token + 1) % VOCAB, right)]
            if chance.random() < 0.8:
                layer.insert(chance.randint(0, len(layer)), (token, right))
            layer = layer[:max_width][: budget - len(tokens)]
            found = None
            for candidate in layer:
                tokens.append(candidate[0])
                parents.append(candidate[1])
                if candidate == (token, right):
                    found = len(tokens)
            if found is None or len(tokens) == budget:
                break
            right = found
        return TokenTree.of_lists(tokens, parents)

    return script


SCRIPTS = {"chain": chain_script, "random": random_script, "adversarial": adversarial_script}
