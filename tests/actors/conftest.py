"""Shared by the tests that need engines: one Ray, one service of two shards, one reference model.

The engines take the better part of a minute to start, so they are started once a session. A test that
changes the weights puts the old ones back (fixture `weights`).
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from actors.gateway import RunningGateway, start_gateway
from actors.gateway_app import GatewayOptions
from actors.service import Service, start_service
from kernels.gumbel_sample import gumbel_noise, truncation_threshold
from rollout.client import RolloutClient
from rollout.config import (
    AdmissionConfig,
    ClusterConfig,
    EngineConfig,
    Int4Config,
    ModelConfig,
    SchedulerConfig,
    SyncConfig,
)
from rollout.gateway.keys import KeyFile, Role
from rollout.gateway_config import GatewayConfig
from rollout.speculation_config import SpeculationConfig
from rollout.types import Trajectory

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "models" / "tiny"
QUANTISED_GROUP_SIZE = 64
# A machine that runs tests may miss any target, and nothing of what they ask for is to be refused.
NO_TARGETS = AdmissionConfig(ttft_target_s=None, tpot_target_s=None)
NEAR_TIE = 1e-3  # two candidates closer than this may swap: float32 logits of other batch shapes differ by less


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray for the whole session."""
    ray.init(
        address="local",  # not another one that happens to run on this machine
        num_cpus=8,
        include_dashboard=False,
        namespace="tests",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def service(ray_cluster: None) -> Iterator[Service]:
    """Two expert-parallel shards of the tiny model behind a controller."""
    running = start_service(
        model=ModelConfig(path=str(TINY)),
        engine=EngineConfig(num_shards=2, enable_return_routed_experts=True),
        scheduler=SchedulerConfig(admission=NO_TARGETS),
        sync=SyncConfig(bucket_bytes=2**20),
        cluster=ClusterConfig(namespace="tests"),
    )
    yield running
    running.stop()


@pytest.fixture(scope="session")
def quantised_service(ray_cluster: None) -> Iterator[Service]:
    """The same with INT4 weights, computing in bfloat16."""
    running = start_service(
        model=ModelConfig(path=str(TINY)),
        engine=EngineConfig(
            num_shards=2, dtype="bfloat16", quantization="int4", int4=Int4Config(group_size=QUANTISED_GROUP_SIZE)
        ),
        scheduler=SchedulerConfig(admission=NO_TARGETS),
        sync=SyncConfig(bucket_bytes=2**20),
        cluster=ClusterConfig(namespace="tests-quantised"),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")  # one file's: its engines' memory is needed by what starts services of its own later
def drafting(ray_cluster: None) -> Iterator[Service]:
    """A service that can speculate, with INT4 weights and an INT8 KV cache; it does not until a test turns it on.

    Computed in bfloat16, where every row of a step is computed alone and rounded, so that no token may differ.
    """
    running = start_service(
        model=ModelConfig(path=str(TINY)),
        engine=EngineConfig(
            num_shards=2,
            dtype="bfloat16",
            quantization="int4",
            int4=Int4Config(group_size=QUANTISED_GROUP_SIZE),
            kv_cache_dtype="int8_per_token_head",
            enable_return_routed_experts=True,
            speculation=SpeculationConfig(
                enabled=True,
                sources=("adversarial", "clover2", "random", "sibling"),
                draft_model=str(TINY / "draft"),
                draft_travels=True,
                max_depth=5,
                budget_nodes=12,
            ),
        ),
        scheduler=SchedulerConfig(admission=NO_TARGETS),
        sync=SyncConfig(bucket_bytes=2**20),
        cluster=ClusterConfig(namespace="tests-speculation"),
    )
    ray.get([shard.turn_speculation.remote([]) for shard in running.shards])
    yield running
    running.stop()


@dataclass(frozen=True, kw_only=True)
class Served:
    """The service's HTTP gateway, with a key of each role (and another trainer's, "other")."""

    gateway: RunningGateway
    folder: Path
    keys: dict[str, str]
    model: str = "tiny"

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def weights_root(self) -> Path:
        """Where rollbacks find weights; the original ones lie in it."""
        return self.folder / "weights"

    def openai(self, role: Role = Role.CLIENT) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[role], max_retries=0)

    def http(self, role: Role = Role.CLIENT) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[role]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@pytest.fixture(scope="session")
def served(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One gateway for every test that speaks HTTP to real engines."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "weights").mkdir()
    shutil.copy(TINY / "model.safetensors", folder / "weights")
    file = KeyFile(folder / "keys.json")
    keys: dict[str, str] = {role: file.add(role.value, role) for role in Role}
    keys["other"] = file.add("other", Role.TRAINER)
    options = GatewayOptions(
        gateway=GatewayConfig(port=0, max_body_bytes=100_000, weights_root=str(folder / "weights")),
        model=ModelConfig(path=str(TINY)),
        sync=SyncConfig(bucket_bytes=2**20),
        model_name="tiny",
        keys_file=str(folder / "keys.json"),
        namespace="tests",
    )
    gateway = start_gateway(options)
    yield Served(gateway=gateway, folder=folder, keys=keys)
    gateway.stop()


@pytest.fixture
def client(service: Service) -> RolloutClient:
    return service.client


@dataclass
class Disagreement:
    """A sampled token that is not the reference's; `gap` separates the two perturbed scores."""

    trajectory: str
    index: int
    gap: float


class Reference:
    """The tiny model as plain Hugging Face float32 on the CPU: what every engine must agree with."""

    def __init__(self) -> None:
        config = AutoConfig.from_pretrained(TINY)
        self.model = AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the weights by others in checkpoint names (experts one by one)."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(_fused(name, weights))

    def load_original(self) -> None:
        self.load({name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()})

    @torch.no_grad()
    def logits(self, prompt: tuple[int, ...], output: list[int]) -> torch.Tensor:
        """[len(output), V] logits from which each output token is drawn."""
        ids = torch.tensor([[*prompt, *output]])
        return self.model(ids).logits[0, len(prompt) - 1 : -1]

    @torch.no_grad()
    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        output: list[int] = []
        for _ in range(num_tokens):
            output.append(int(self.model(torch.tensor([[*prompt, *output]])).logits[0, -1].argmax()))
        return output

    def disagreements(
        self, trajectory: Trajectory, temperature: float, top_k: int | None = None, top_p: float = 1.0
    ) -> list[Disagreement]:
        """Tokens that are not argmax(logits / T + Gumbel(seed, position)), with their score gaps."""
        prompt, output = trajectory.prompt_token_ids, trajectory.token_ids
        if not output:
            return []
        logits = self.logits(prompt, output)
        rows, vocabulary = logits.shape
        scores = logits
        if temperature > 0:
            temperatures = torch.full((rows,), temperature)
            positions = torch.arange(len(prompt), len(prompt) + rows)
            seeds = torch.full((rows,), trajectory.seed)
            threshold = truncation_threshold(
                logits,
                temperature=temperatures,
                top_k=torch.full((rows,), top_k or vocabulary),
                top_p=torch.full((rows,), top_p),
            )
            scaled = logits * (1.0 / temperatures)[:, None]  # as the kernel does, one rounding apart from dividing
            noise = gumbel_noise(seeds, positions, vocabulary)
            scores = torch.where(scaled >= threshold[:, None], scaled + noise, -torch.inf)
        best = scores.max(dim=1)
        mine = scores.gather(1, torch.tensor(output)[:, None])[:, 0]
        return [
            Disagreement(trajectory.trajectory_id, i, float(best.values[i] - mine[i]))
            for i in range(rows)
            if int(best.indices[i]) != output[i]
        ]

    def logprobs(self, trajectory: Trajectory, temperature: float = 1.0) -> torch.Tensor:
        """[T] log-probability of each output token under the untruncated softmax."""
        logits = self.logits(trajectory.prompt_token_ids, trajectory.token_ids) / temperature
        return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(trajectory.token_ids)[:, None])[:, 0]


def _fused(name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    if name in weights:
        return weights[name]
    prefix, _, kind = name.rpartition(".")
    count = sum(key.startswith(f"{prefix}.") and key.endswith(".down_proj.weight") for key in weights)
    if kind == "down_proj":
        return torch.stack([weights[f"{prefix}.{e}.down_proj.weight"] for e in range(count)])
    parts = ("gate_proj", "up_proj")
    return torch.stack([torch.cat([weights[f"{prefix}.{e}.{p}.weight"] for p in parts]) for e in range(count)])


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    """The tiny model's weights in float32 by checkpoint name; do not change them in place."""
    return {name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()}


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def restored(client: RolloutClient, reference: Reference, tiny_weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Puts the original weights back after a test that published others."""
    yield
    reference.load(tiny_weights)
    client.publish(client.stats().live_version + 1, tiny_weights)
