"""speculative_decode against plain keyed decoding, against the target's distribution, and against broken targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import AutoModelForCausalLM

from kernels.gumbel_sample import gumbel_noise
from rollout.errors import InvalidRequest
from rollout.speculation.cached_lm import PREFILL_TOKENS, CachedLM
from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.decode import speculative_decode
from rollout.speculation.draft import CausalDrafter, Drafter
from rollout.speculation.growth import ScoredTree
from rollout.speculation.suffix import SiblingIndex
from rollout.speculation.tree import TokenTree
from tests.rollout.speculation_cases import (
    SCRIPTS,
    VOCAB,
    Scripted,
    SmallLM,
    adversarial_script,
    chain_script,
    logits_of,
    naive_decode,
    noisy_copy,
    scored,
)

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SAMPLINGS = [(0.0, None, 1.0), (0.7, None, 0.9), (1.0, None, 0.95), (1.0, 7, 1.0)]


@pytest.fixture(scope="module")
def small() -> SmallLM:
    return SmallLM(1)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    # float64 and plain experts: see SmallLM on why tokens can then be compared outright.
    return AutoModelForCausalLM.from_pretrained(
        "models/tiny", dtype=torch.float64, experts_implementation="eager"
    ).eval()


class Siblings:
    """A drafter over a `SiblingIndex` that takes in what its own sequence generates."""

    vocab_size: int | None = None
    needs_hidden = False

    def __init__(self, siblings: Sequence[Sequence[int]]) -> None:
        self._index = SiblingIndex(10_000)
        for number, tokens in enumerate(siblings):
            self._index.add("prompt", f"sibling {number}", tokens)

    def propose(self, context: Sequence[int], hidden: object, *, sampling: KeyedSampling, **limits: int) -> ScoredTree:
        self._index.add("prompt", "me", context, 0)
        return self._index.propose("prompt", context, **limits)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLINGS)
@pytest.mark.parametrize("drafts", [*SCRIPTS, "model", "sibling"])
def test_tokens_are_those_of_plain_decoding(
    small: SmallLM, drafts: str, temperature: float, top_k: int | None, top_p: float
) -> None:
    for seed in range(3):
        options: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        tokens, logprobs = naive_decode(logits_of(small), PROMPT, 48, KeyedSampling(**options))
        drafter: Drafter
        if drafts == "model":
            drafter = CausalDrafter(noisy_copy(small, 0.05))
        elif drafts == "sibling":
            drafter = Siblings([PROMPT + tokens[:20] + [0] + tokens[20:]])
        else:
            drafter = Scripted(SCRIPTS[drafts](seed), PROMPT + tokens)
        generated = speculative_decode(drafter, small, PROMPT, max_depth=5, budget=12, max_tokens=48, **options)
        assert [token.token_id for token in generated] == tokens
        assert [token.position for token in generated] == list(range(len(PROMPT), len(PROMPT) + 48))
        # Both take the float32 logarithm of a sum over 23 float32 terms: a few units in the last place of about 4.
        np.testing.assert_allclose([token.logprob for token in generated], logprobs, atol=4e-6)
        accepted = [token.depth for token in generated if token.is_drafted]
        assert all(depth > 0 for depth in accepted)
        assert all(token.depth == 0 for token in generated if not token.is_drafted)
        if drafts != "random":
            assert len(accepted) >= 4, "the drafter must be right at times, or the test shows nothing"


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.95), (1.0, 0.95)])
def test_tokens_of_the_tiny_model_are_those_of_plain_decoding(
    tiny: nn.Module, temperature: float, top_p: float
) -> None:
    prompt = list(range(20, 60))
    options: dict[str, Any] = {"seed": 11, "temperature": temperature, "top_p": top_p}

    def logits(context: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return tiny(torch.tensor([context])).logits[0, -1]

    tokens, logprobs = naive_decode(logits, prompt, 40, KeyedSampling(**options))
    for drafter in (
        CausalDrafter(tiny),
        Scripted(adversarial_script(1), prompt + tokens),
        Scripted(chain_script(1), prompt + tokens),
    ):
        generated = speculative_decode(drafter, tiny, prompt, max_depth=6, budget=16, max_tokens=40, **options)
        assert [token.token_id for token in generated] == tokens
        # As above, with 512 terms and log-probabilities down to about -10.
        np.testing.assert_allclose([token.logprob for token in generated], logprobs, atol=1e-5)
        assert sum(token.is_drafted for token in generated) >= 8


def test_a_draft_that_is_the_target_is_always_right(small: SmallLM) -> None:
    for temperature, top_k, top_p in SAMPLINGS:
        tokens = speculative_decode(
            small,
            small,
            PROMPT,
            max_width=1,
            max_depth=3,
            max_tokens=33,
            seed=5,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        # The first token comes from the prompt's pass; then 8 passes of a chain of 3 and one token more.
        assert [token.depth for token in tokens] == [0] + [1, 2, 3, 0] * 8


class Broken(nn.Module):
    """A target that is wrong about trees in one way, and right about everything else."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        super().__init__()
        self.model, self.fault = model, fault
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, **cache: Any
    ) -> Any:
        rows, width = attention_mask.shape[-2:]
        slots = torch.arange(width - rows, width)
        if self.fault == "mask":  # every row sees all slots before its own
            is_hidden = torch.arange(width) > slots[:, None]
            attention_mask = torch.zeros_like(attention_mask).masked_fill(is_hidden, attention_mask.min())
            if not is_hidden.any():
                attention_mask = torch.zeros_like(attention_mask)
        if self.fault == "positions":  # every row stands at its slot
            position_ids = slots[None]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **cache)


@pytest.mark.parametrize("fault", ["mask", "positions", "moves", "none"])
def test_a_target_that_is_wrong_about_trees_shows(small: SmallLM, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _ = naive_decode(logits_of(small), PROMPT, 48, KeyedSampling(seed=2))
    target = Broken(small, fault)
    keep = CachedLM.keep
    if fault == "moves":  # the first slots stay, whichever rows were accepted
        monkeypatch.setattr(CachedLM, "keep", lambda lm, base, rows=(): keep(lm, base, range(len(rows))))

    def generate(script: Callable[[int], Callable[..., TokenTree]]) -> list[int]:
        drafter = Scripted(script(2), PROMPT + tokens)
        generated = speculative_decode(drafter, target, PROMPT, max_depth=4, budget=12, max_tokens=48, seed=2)
        return [token.token_id for token in generated]

    assert generate(chain_script) == tokens  # a chain's mask, positions and slots are those of plain decoding
    assert (generate(adversarial_script) == tokens) == (fault == "none")


class MarkovLM(nn.Module):
    """The next token depends on the last two, which each row finds through mask and positions, as attention would."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.vocab_size = logits, logits.shape[-1]
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        use_cache: bool,
    ) -> SimpleNamespace:
        stored = torch.stack([position_ids.float(), input_ids.float()], -1)[:, None]
        keys, _ = past_key_values.update(stored, stored[..., :0], 0)
        is_parent = (attention_mask[0, 0] == 0) & (keys[0, 0, :, 0] == position_ids[0, :, None] - 1)
        # With a wrong mask several slots answer, and their sum is some other token.
        parent = (is_parent * keys[0, 0, :, 1]).sum(-1).long() % self.vocab_size
        return SimpleNamespace(logits=self.logits[parent, input_ids[0]][None])


class MarkovDrafter:
    """Two candidates in each layer, by logits that are off and the target's noise, drawn once for a sequence."""

    needs_hidden = False

    def __init__(self, logits: np.ndarray, seed: int, num_positions: int) -> None:
        self.vocab_size: int | None = logits.shape[-1]
        noise = gumbel_noise(torch.full((num_positions,), seed), torch.arange(num_positions), self.vocab_size)
        self._logits, self._noise = logits, noise.numpy()

    def propose(
        self, context: Sequence[int], hidden: object, *, max_depth: int, budget: int, **_: object
    ) -> ScoredTree:
        before, last = context[-2:]
        tokens: list[int] = []
        parents: list[int] = []
        row = 0
        for position in range(len(context), len(context) + min(max_depth, budget // 2)):
            ranks = self._logits[before, last] + self._noise[position]
            second, first = np.argsort(ranks)[-2:].tolist()
            # The likelier one comes second, so that accepted rows are not the first ones.
            tokens += [second, first]
            parents += [row, row]
            row, before, last = len(tokens), last, first
        return scored(TokenTree.of_lists(tokens, parents))


def test_tokens_follow_the_targets_distribution() -> None:
    """Chi-square of 100,000 tokens: given the two before it, each is an independent draw from one row of a table."""
    vocab_size, length, num_sequences = 6, 250, 400
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(vocab_size, vocab_size, vocab_size)).astype(np.float32)
    draft = logits + 0.3 * generator.normal(size=logits.shape).astype(np.float32)
    target = MarkovLM(torch.from_numpy(logits))
    counts = np.zeros((vocab_size,) * 3)
    num_drafted = 0
    for seed in range(num_sequences):
        drafter = MarkovDrafter(draft, seed, length + 8)
        tokens = speculative_decode(drafter, target, [0, 1], max_depth=12, budget=24, max_tokens=length, seed=seed)
        ids = np.array([0, 1] + [token.token_id for token in tokens])
        np.add.at(counts, (ids[:-2], ids[1:-1], ids[2:]), 1)
        num_drafted += sum(token.is_drafted for token in tokens)
    assert counts.sum() == 100_000
    assert 60_000 < num_drafted < 92_000, "most tokens must have come through trees, and many trees have failed"

    def p_value(table: np.ndarray) -> float:
        chances = torch.from_numpy(table).double().softmax(-1).numpy()
        expected = counts.sum(-1, keepdims=True) * chances
        # The usual rule for the approximation: at least 5 expected in a cell. Contexts with rarer cells are left out.
        contexts = expected.min(-1) >= 5
        statistic = ((counts - expected) ** 2 / expected)[contexts].sum()
        return float(stats.chi2.sf(statistic, contexts.sum() * (vocab_size - 1)))

    # The seeds are fixed, so this is one number, not a chance; 1e-3 is where it would be called unlikely.
    assert p_value(logits) > 1e-3
    # The test sees what it should: a temperature off by 6 %, or tokens that lean a third of the way to the draft.
    assert p_value(logits * 1.06) < 1e-9
    assert p_value(logits + (draft - logits) / 3) < 1e-9


def test_the_target_hands_its_hidden_states_to_a_drafter_that_reads_them(small: SmallLM) -> None:
    tokens, _ = naive_decode(logits_of(small), PROMPT, 30, KeyedSampling(seed=1))
    lm = CachedLM(small, wants_hidden=True)
    states = lm.extend(PROMPT + tokens).hidden
    assert states is not None

    class Reader(Scripted):
        needs_hidden = True
        num_read = 0

        def propose(self, context: Sequence[int], hidden: Any, **limits: Any) -> ScoredTree:
            assert hidden is not None
            expected = states[self.num_read : len(context) - 1]
            # float64 sums of different shape
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
            self.num_read += len(hidden)
            return super().propose(context, None, **limits)

    reader = Reader(adversarial_script(1), PROMPT + tokens)
    speculative_decode(reader, small, PROMPT, max_tokens=30, seed=1)
    assert reader.num_read > len(PROMPT) + 20


def test_a_long_prompt_is_forwarded_in_parts() -> None:
    model = SmallLM(3, max_positions=2 * PREFILL_TOKENS)
    prompt = [(7 * place) % VOCAB for place in range(PREFILL_TOKENS + 9)]
    rows = CachedLM(model).extend(prompt).logits
    assert len(rows) == len(prompt)
    for place in (0, PREFILL_TOKENS - 1, PREFILL_TOKENS, len(prompt) - 1):
        # float64 sums of different shape
        torch.testing.assert_close(rows[place], logits_of(model)(prompt[: place + 1]), rtol=0, atol=1e-10)


def test_generation_ends_at_a_stop_token_and_at_the_limit(small: SmallLM) -> None:
    tokens, _ = naive_decode(logits_of(small), PROMPT, 40, KeyedSampling(seed=4))
    stop = tokens[17]
    end = tokens.index(stop) + 1
    for max_tokens in (1, 2, 5, 40):
        drafter = Scripted(adversarial_script(3), PROMPT + tokens)
        generated = speculative_decode(
            drafter, small, PROMPT, max_tokens=max_tokens, max_depth=6, seed=4, stop_token_ids=[stop]
        )
        assert [token.token_id for token in generated] == tokens[: min(end, max_tokens)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_width": 5}, r"max_width: got 5, expected a number of nodes in a layer in \[1, 4\]"),
        ({"budget": 0}, "budget: got 0, expected at least 1 node"),
        ({"max_depth": 0}, "max_depth: got 0, expected at least 1"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected at least 1"),
        ({"prompt": []}, "prompt's length: got 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"seed": -1}, "seed: got -1"),
        (
            {"draft_model": SmallLM(0, vocab_size=24)},
            "vocabulary of the draft model: got 24, expected the target's, 23",
        ),
        ({"draft_model": "models/tiny"}, "draft_model: got str, expected a Drafter"),
        ({"draft_model": SmallLM(0).train()}, "training mode, expected one in evaluation mode"),
        ({"draft_model": Scripted(lambda *_: TokenTree.chain([VOCAB]), [])}, "token of a draft tree: got 23"),
        ({"draft_model": Scripted(lambda *_: TokenTree.chain([1] * 9), [])}, "nodes of a draft tree: got 9"),
        ({"draft_model": Scripted(lambda *_: TokenTree.chain([1] * 5), [])}, "depth of a draft tree: got 5"),
        ({"draft_model": Scripted(lambda *_: TokenTree.of_lists([1, 2, 3], [0] * 3), []), "max_width": 2}, "got 3"),
        ({"draft_model": Scripted(lambda *_: TokenTree.of_lists([1, 2], [0, 2]), [])}, "no cycles"),
    ],
)
def test_bad_input_is_refused(small: SmallLM, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"draft_model": small, "target_model": small, "prompt": PROMPT, "budget": 8} | options
    with pytest.raises(InvalidRequest, match=message):
        speculative_decode(**arguments)
