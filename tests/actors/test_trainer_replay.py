"""Routing replay in the Hugging Face model, against a forward written out by hand, and what it is for."""

import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModelForCausalLM

from actors.routing_store import fetch, first_row, put
from actors.trainer_replay import Recorded, RouterReplay, fetch_recorded
from launch.workload import Workload
from rollout.batch import Sample, empty_micro_batch, pad
from rollout.config import ModelConfig, WorkloadConfig
from rollout.errors import InvalidRequest
from rollout.routing import Routing, RoutingRef, pack
from rollout.types import Chunk, SamplingParams, Trajectory

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
LAYERS, TOP_K, NUM_EXPERTS = 4, 2, 8
# float32 sums over at most 512 terms and 4 layers in another order: a hundred ulps of a value of size 10
CLOSE = dict(rtol=1e-4, atol=1e-4)
# Of gradients, whose elements are sums that cancel, relative to the largest element: rounding makes up to 111 ulps
# (1.3e-5) on one processor or another, one token with other experts a tenth; the bound lies between.
GRADIENT_CLOSE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def tiny(experts: str = "eager"):
    config = AutoConfig.from_pretrained(TINY)
    return AutoModelForCausalLM.from_pretrained(
        TINY, config=config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    ).eval()


def drawn(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, Recorded]:
    """Tokens, and experts that no router would have chosen; the last token of each row has none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 500, (batch, length), generator=generator)
    scores = torch.rand(batch, length, LAYERS, NUM_EXPERTS, generator=generator)
    is_recorded = torch.ones(batch, length, dtype=torch.bool)
    is_recorded[:, -1] = False
    ids = scores.topk(TOP_K, dim=-1).indices.to(torch.uint8)
    return tokens, Recorded(ids=ids, is_recorded=is_recorded, num_found=batch, num_missing=0)


def by_hand(model, tokens: torch.Tensor, recorded: Recorded) -> torch.Tensor:
    """Logits of the forward in which each recorded token goes to its recorded experts."""
    body = model.model
    hidden = body.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = body.rotary_emb(hidden, positions)
    for number, layer in enumerate(body.layers):
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
        hidden = hidden + attended
        x = layer.post_attention_layernorm(hidden)
        probabilities = torch.softmax(linear(x, layer.mlp.gate.weight), dim=-1)
        own = probabilities.topk(TOP_K, dim=-1).indices
        chosen = torch.where(recorded.is_recorded[..., None], recorded.ids[:, :, number].long(), own)
        weights = probabilities.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            gate, up = linear(x, layer.mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            share = (weights * (chosen == expert)).sum(dim=-1, keepdim=True)
            out = out + share * linear(silu(gate) * up, layer.mlp.experts.down_proj[expert])
        hidden = hidden + out
    return model.lm_head(body.norm(hidden))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, tokens[:, 1:, None]).mean()


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_forced_routing_and_its_gradients_are_those_written_by_hand(experts: str, checkpointing: bool) -> None:
    tokens, recorded = drawn(batch=2, length=19)
    plain = tiny()
    expected = by_hand(plain, tokens, recorded)
    loss_of(expected, tokens).backward()
    model = tiny(experts)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    replay = RouterReplay(model)
    with replay.replaying(recorded):
        logits = model(input_ids=tokens, use_cache=False).logits
        loss_of(logits, tokens).backward()
    assert torch.allclose(logits, expected, **CLOSE)
    for name, gradient in gradients(model).items():
        wanted = dict(plain.named_parameters())[name].grad
        assert float((gradient - wanted).abs().max()) <= GRADIENT_CLOSE * float(wanted.abs().max()), name
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == LAYERS and all(float(g.abs().max()) > 1e-5 for g in gates)
    assert not torch.allclose(model(input_ids=tokens).logits, logits, **CLOSE), "it would have chosen others"


def test_without_a_record_nothing_changes() -> None:
    tokens, recorded = drawn(batch=2, length=9)
    model = tiny()
    before = model(input_ids=tokens).logits
    replay = RouterReplay(model)
    nothing = Recorded(ids=None, is_recorded=torch.zeros_like(recorded.is_recorded), num_found=0, num_missing=2)
    masked = Recorded(ids=recorded.ids, is_recorded=nothing.is_recorded, num_found=0, num_missing=2)
    assert torch.equal(model(input_ids=tokens).logits, before)
    for record in (nothing, masked):
        with replay.replaying(record):
            assert torch.equal(model(input_ids=tokens).logits, before)
    with replay.replaying(recorded):
        assert not torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_the_load_balancing_loss_is_that_of_the_routers_own_logits() -> None:
    tokens, recorded = drawn(batch=1, length=12)
    model = tiny()
    replay = RouterReplay(model)
    with replay.replaying(recorded):
        output = model(input_ids=tokens, output_router_logits=True)
    seen = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda *a: seen.append(a[2][0])) for layer in model.model.layers]
    with replay.replaying(recorded):
        model(input_ids=tokens)
    assert all(torch.equal(a, b) for a, b in zip(output.router_logits, seen, strict=True)) and len(hooks) == LAYERS
    assert float(output.aux_loss.detach()) > 0 and output.aux_loss.requires_grad


def test_flips_are_counted_over_recorded_tokens() -> None:
    tokens, recorded = drawn(batch=2, length=11)
    model = tiny()
    replay = RouterReplay(model)
    with torch.no_grad(), replay.replaying(recorded), replay.counting() as counts:
        model(input_ids=tokens)
    choices, flips = torch.stack(counts).sum(dim=0).tolist()
    assert choices == 2 * 10 * LAYERS
    # a random pair of 8 is the router's own with probability 1 / 28: mean 2.9 of 80 matches, deviation 1.7
    assert 60 < flips <= 80


def test_a_record_of_another_model_is_refused() -> None:
    _, recorded = drawn(batch=1, length=5)
    wrong = Recorded(ids=recorded.ids[:, :, :3], is_recorded=recorded.is_recorded, num_found=1, num_missing=0)
    with pytest.raises(InvalidRequest, match="recorded routing"), RouterReplay(tiny()).replaying(wrong):
        pass


@torch.no_grad()
def test_replay_removes_most_of_the_gap_that_a_disturbed_router_makes() -> None:
    """What replay is for: a router that differs a little flips some choices, and the flips make most of the gap.

    KL(undisturbed ‖ disturbed) over the whole vocabulary, on what the undisturbed model samples for the demo's
    prompts, mean over four disturbances. Of a single one replay removes between a third and nine tenths.
    """
    sampler = tiny()
    generator = torch.Generator().manual_seed(0)
    problems = Workload(WorkloadConfig(), ModelConfig(path=str(TINY)), 0).batch(0, 12)
    tokens = torch.tensor([prompt.token_ids[-33:] for prompt in problems])
    for _ in range(64):
        probabilities = torch.softmax(sampler(input_ids=tokens).logits[:, -1], dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    chosen: list[torch.Tensor] = []
    for layer in sampler.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *a: chosen.append(a[2][2]))
    reference = torch.log_softmax(sampler(input_ids=tokens).logits[:, 32:-1], dim=-1)
    ids = torch.stack(chosen, dim=1).view(*tokens.shape, LAYERS, TOP_K).to(torch.uint8)
    recorded = Recorded(ids=ids, is_recorded=torch.ones_like(tokens, dtype=torch.bool), num_found=12, num_missing=0)

    def gap(model) -> float:
        mine = torch.log_softmax(model(input_ids=tokens).logits[:, 32:-1], dim=-1)
        return float((reference.exp() * (reference - mine)).sum(dim=-1).mean())

    without = replayed = 0.0
    for seed in range(4):
        trainer, noise = tiny(), torch.Generator().manual_seed(seed)
        for layer in trainer.model.layers:
            weight = layer.mlp.gate.weight
            weight += 0.25 * weight.std() * torch.randn(weight.shape, generator=noise)
        replay = RouterReplay(trainer)
        without += gap(trainer)
        with replay.replaying(recorded), replay.counting() as counts:
            replayed += gap(trainer)
        choices, flips = torch.stack(counts).sum(dim=0).tolist()
        assert flips / choices >= 0.10, f"only {flips / choices:.1%} of the choices flipped"
    assert replayed * 3 <= without, f"{replayed / 4} with replay, {without / 4} without"


def packed(ids: torch.Tensor, first: int) -> bytes:
    return pack(Routing(first_token=first, num_experts=NUM_EXPERTS, ids=ids.to(torch.uint8).numpy()))


def chunk(context: tuple[int, ...], num_prompt_tokens: int) -> Chunk:
    sampling = SamplingParams(max_tokens=9)
    return Chunk(
        trajectory_id="t",
        token_ids=context,
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=9,
        seed=0,
        sampling=sampling,
    )


def test_rows_that_a_chunk_brings() -> None:
    assert first_row(chunk((1, 2, 3), 3)) == 0
    assert first_row(chunk((1, 2, 3, 4, 5), 3)) == 4


def sample(refs: tuple[RoutingRef, ...], num_output: int = 6) -> Sample:
    trajectory = Trajectory(group_id="g", sample_index=0, seed=0, prompt_token_ids=(5, 6, 7), routed_experts=refs)
    trajectory.token_ids = list(range(10, 10 + num_output))
    trajectory.logprobs, trajectory.loss_mask = [-1.0] * num_output, [1] * num_output
    return Sample(trajectory=trajectory, advantage=1.0, weight=0.5)


class Putter:
    """Owns what it puts, as a shard does."""

    def put(self, blob: bytes, one: Chunk, num_new_tokens: int) -> RoutingRef:
        return put(blob, one, num_new_tokens)


@pytest.mark.ray
def test_references_lead_to_the_rows_and_lost_ones_are_counted(ray_cluster: None) -> None:
    _, recorded = drawn(batch=1, length=9)
    ids = recorded.ids[0]
    first, second = chunk((5, 6, 7), 3), chunk((5, 6, 7, 10, 11), 3)
    refs = (put(packed(ids[:5], 0), first, 2), put(packed(ids[4:8], 4), second, 4))  # the first blob has a row too many
    assert [(ref.first_token, ref.num_tokens) for ref in refs] == [(0, 4), (4, 4)]
    assert np.array_equal(fetch(refs, 8), ids[:8].numpy())
    assert fetch(refs[:1], 8) is None and fetch((), 8) is None
    broken = put(packed(ids[:4], 0)[:-1] + b"?", first, 2)
    assert fetch((broken, refs[1]), 8) is None

    owner = ray.remote(Putter).options(num_cpus=0).remote()
    lost = ray.get(owner.put.remote(packed(ids[:4], 0), first, 2))
    assert np.array_equal(fetch((lost, refs[1]), 8), ids[:8].numpy())
    ray.kill(owner)
    deadline = time.monotonic() + 60
    while fetch((lost, refs[1]), 8) is not None:  # Ray may serve its copy until it has noticed the death
        assert time.monotonic() < deadline

    batch = pad([sample(refs), sample((lost, refs[1])), sample((), num_output=4)])
    found = fetch_recorded(batch, torch.device("cpu"))
    assert (found.num_found, found.num_missing) == (1, 2)
    assert found.is_recorded.tolist() == [[True] * 8 + [False], [False] * 9, [False] * 9]
    assert found.ids is not None and torch.equal(found.ids[0, :8], ids[:8])
    empty = fetch_recorded(empty_micro_batch(), torch.device("cpu"))
    assert (empty.ids, empty.num_found, empty.num_missing) == (None, 0, 0)
