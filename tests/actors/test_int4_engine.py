"""Two expert-parallel shards with INT4 weights, against Hugging Face in float32 on the dequantised values.

How far a bfloat16 forward strays from float32 is measured, not guessed: Hugging Face's own bfloat16
forward of the same values is the yardstick. It rounds as often as the engine, at other places.
"""

import pytest
import ray
import torch

from actors.service import Service
from kernels.int4.reference import dequantise_reference
from rollout.config import Int4Config
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import Encoding, TensorPlan, encode, int4_tensors, plan_tensors
from rollout.types import Chunk, ChunkResult, SamplingParams
from tests.actors.conftest import QUANTISED_GROUP_SIZE, TINY, Reference

pytestmark = pytest.mark.engine

PROMPTS = [tuple(range(5 + i, 25 + 2 * i)) for i in range(8)]
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def plans() -> dict[str, TensorPlan]:
    return plan_tensors(checkpoint_specs(TINY, "bfloat16").values(), Int4Config(group_size=QUANTISED_GROUP_SIZE))


@pytest.fixture(scope="module")
def served(plans: dict[str, TensorPlan], tiny_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that INT4 leaves of the tiny model, float32, by checkpoint name."""
    return {
        name: dequantise_reference(*int4_tensors(encode(tensor, plans[name]), plans[name]))
        if plans[name].encoding is Encoding.INT4
        else tensor
        for name, tensor in tiny_weights.items()
    }


@pytest.fixture(scope="module")
def results(quantised_service: Service) -> list[tuple[tuple[int, ...], ChunkResult]]:
    """Greedy continuations, half of them from each shard, all at once."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    chunks = [
        Chunk(
            trajectory_id=f"int4/{i}",
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            max_tokens=NUM_TOKENS,
            seed=i,
            sampling=sampling,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    shards = quantised_service.shards
    outputs = ray.get([shards[i % 2].generate.remote(chunk) for i, chunk in enumerate(chunks)])
    return list(zip(PROMPTS, outputs, strict=True))


def logprobs(model: torch.nn.Module, results: list[tuple[tuple[int, ...], ChunkResult]]) -> torch.Tensor:
    """[prompts, NUM_TOKENS, V] float32 log-probabilities of a Hugging Face model along the engine's outputs."""
    with torch.no_grad():
        return torch.stack(
            [
                model(torch.tensor([[*p, *r.token_ids]])).logits[0, len(p) - 1 : -1].float().log_softmax(-1)
                for p, r in results
            ]
        )


def errors(expected: torch.Tensor, results: list[tuple[tuple[int, ...], ChunkResult]]) -> torch.Tensor:
    """|log-probability of the engine's tokens - what is expected of them|."""
    tokens = torch.tensor([r.token_ids for _, r in results])
    engine = torch.tensor([r.logprobs for _, r in results])
    return (expected.gather(-1, tokens[..., None])[..., 0] - engine).abs()


def rotated(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every expert's weights in the place of the next one's, as a wrong expert map would have it."""
    turned = {}
    for name, tensor in weights.items():
        prefix, is_expert, rest = name.partition(".experts.")
        if is_expert:
            number, _, leaf = rest.partition(".")
            name = f"{prefix}.experts.{(int(number) + 1) % 8}.{leaf}"
        turned[name] = tensor
    return turned


def test_the_experts_are_split_in_halves(quantised_service: Service) -> None:
    assert [(info.num_experts, info.num_local_experts) for info in quantised_service.infos] == [(8, 4), (8, 4)]


def test_workers_hold_what_the_plans_say(quantised_service: Service, plans: dict[str, TensorPlan]) -> None:
    """And a zero beside each scale, which torch's INT4 matmul on the CPU asks for."""
    expected = 0
    for plan in plans.values():
        num_bytes = 2 * plan.numel
        if plan.encoding is Encoding.INT4:
            num_bytes = plan.numel // 2 + 2 * 2 * plan.numel // QUANTISED_GROUP_SIZE
        expected += num_bytes // 2 if ".experts." in plan.name else num_bytes
    for shard in quantised_service.shards:
        assert [held["weights"] for held in ray.get(shard.held_bytes.remote())] == [expected]


def test_tokens_and_logprobs_are_those_of_the_dequantised_model(results, served, tiny_weights) -> None:
    reference = Reference()
    reference.load(served)
    exact = logprobs(reference.model, results)
    yardstick = (logprobs(reference.model.to(torch.bfloat16), results) - exact).abs()
    tokens = torch.tensor([r.token_ids for _, r in results])
    usual = yardstick.gather(-1, tokens[..., None])[..., 0]
    mine = errors(exact, results)
    assert float(mine.mean()) < 2 * float(usual.mean())
    assert float(mine.max()) < 2 * float(yardstick.max())

    behind = exact.amax(-1) - exact.gather(-1, tokens[..., None])[..., 0]  # 0 where the engine took the best token
    assert float(behind.max()) < 2 * float(yardstick.max()), "a token that is not nearly the best"

    for wrong in (tiny_weights, rotated(served)):  # not quantised; experts at the wrong places
        reference = Reference()
        reference.load(wrong)
        assert float(errors(logprobs(reference.model, results), results).mean()) > 4 * float(usual.mean())
