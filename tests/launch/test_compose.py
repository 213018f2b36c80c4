from __future__ import annotations

from pathlib import Path

import pytest

from launch.compose import CONF, GROUPS, compose, model_directory, to_yaml
from rollout.config import InFlight, RunConfig
from rollout.errors import InvalidRequest

FILES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
LARGE = ["qwen3_235b_rl_20k", "qwen3_235b_rl_32k", "qwen3_235b_serving"]
COMPANY = {  # what a file cannot do without
    "engine/ep8_int4": ["cluster=h200_8x8"],
    "engine/ep64_low_latency": ["cluster=h200_8x8"],
    "engine/ep64_high_throughput": ["cluster=h200_8x8"],
    "sync/nccl": ["cluster=h200_8x8", "trainer.num_gpus_per_rank=1"],
    "sampling/reasoning_20k": ["model.max_model_len=40960"],
    "sampling/reasoning_32k": ["model.max_model_len=40960"],
}


@pytest.mark.parametrize(("group", "option"), FILES)
def test_every_file_composes(group: str, option: str) -> None:
    config = compose([f"{group}={option}", *COMPANY.get(f"{group}/{option}", [])])
    assert isinstance(config, RunConfig)
    assert "num_shards" in to_yaml(config)


def test_every_group_has_files() -> None:
    assert {group for group, _ in FILES} == set(GROUPS)


def test_overrides_reach_their_fields() -> None:
    config = compose(
        [
            "experiment=tiny_grpo",
            "trainer.lr=1e-4",
            "sync.in_flight=abort",
            "engine.vllm.seed=7",
            "engine.vllm.compilation_config.mode=0",
            "workload.task_options={max_terms: 4}",
            "engine.kv_cache_bytes=null",
        ]
    )
    assert config.trainer.lr == 1e-4
    assert config.sync.in_flight is InFlight.ABORT
    assert config.engine.vllm == {"seed": 7, "compilation_config": {"mode": 0}}
    defaults = compose(["experiment=tiny_grpo"]).workload.task_options
    assert config.workload.task_options == defaults | {"max_terms": 4} != defaults, "dictionaries merge, as in Hydra"
    assert config.engine.kv_cache_bytes is None
    assert isinstance(config.trainer.betas, tuple)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.lrr=1", "trainer.lr"),
        ("lr=1", "trainer.lr"),
        ("+sync.nonsense=1", "sync.nonsense"),
        ("experiment=tiny", "tiny_grpo"),
        ("trainer.lr=fast", "trainer.lr"),
        ("sync.in_flight=sometimes", "WAIT"),
        ("trainer.num_steps=0", "trainer.num_steps"),
        ("sampling.temperature=nan", "temperature"),
        ("sampling.n_samples_per_prompt=0", "n_samples_per_prompt"),
        ("sampling.max_tokens=2048", "max_model_len"),
        ("engine.all2all_backend=deepep_low_latency", "GPUs"),
        ("engine.kv_cache_dtype=fp8", "auto or int8_per_token_head on CPU"),
        ("engine.enforce_eager=false", "graphs"),
        ("engine.gpu_memory_utilization=0.5", "no effect"),
        ("engine.omp_threads_bind=0", "2 core lists"),
        ("sync.transport=nccl", "shared_memory"),
        ("sync.partial_rollout=false", "no effect"),
        ("scheduler.policy=fifo", "static, partial or divided"),
        ("journal.dsn=mysql://x", "sqlite:///"),
        ("trainer.kl_coef=0.1", "reference"),
        ("workload.reward=none", "reward"),
        ("cluster.placement_strategy=ANY", "PACK"),
        ("cluster.placement_strategy=SPREAD", "no effect"),
        ("cluster.num_nodes=2", "no effect"),
        ("engine.kv_cache_bytes=0", "kv_cache_bytes"),
        ("trainer.zero_stage=0", "1, 2 or 3"),
        ("trainer.tis_cap=0", "tis_cap"),
        ("engine.int4.group_size=48", "32, 64 or 128"),
        ("engine.quantization=int3", "int4"),
        ("engine.dtype=int8", "float32, bfloat16"),
        ("engine.tensor_parallel_size=2", "in place"),
    ],
)
def test_a_mistake_is_named(override: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        compose([override])


def test_kv_cache_dtypes_of_each_device() -> None:
    on_gpu = ["cluster=h200_8x8", "engine.omp_threads_bind=null"]
    for dtype in ("auto", "int8_per_token_head"):
        assert compose([f"engine.kv_cache_dtype={dtype}"]).engine.kv_cache_dtype == dtype
        assert compose([f"engine.kv_cache_dtype={dtype}", *on_gpu]).engine.kv_cache_dtype == dtype
    assert compose(["engine.kv_cache_dtype=fp8", *on_gpu]).engine.kv_cache_dtype == "fp8"
    with pytest.raises(InvalidRequest, match=r"engine\.kv_cache_dtype.*int4_per_token_head.*one of auto, int8_per"):
        compose(["engine.kv_cache_dtype=int4_per_token_head", *on_gpu])


def test_no_effect_with_tis_off() -> None:
    with pytest.raises(InvalidRequest, match="use_tis"):
        compose(["trainer.use_tis=false", "trainer.tis_cap=3"])


def test_missing_model_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    assert model_directory("models/tiny") == "models/tiny"
    with pytest.raises(InvalidRequest, match="holds tiny"):
        model_directory("models/tinny")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert model_directory("Qwen/Qwen3-235B-A22B") == "Qwen/Qwen3-235B-A22B"


@pytest.mark.parametrize("experiment", LARGE)
def test_large_experiments_fill_64_gpus_and_fit_the_model(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    num_gpus = config.engine.num_all_shards * config.engine.tensor_parallel_size
    assert num_gpus == config.cluster.num_nodes * config.cluster.num_gpus_per_node == 64
    assert 128 % (config.engine.num_shards * config.engine.tensor_parallel_size) == 0, "experts spread evenly"
    assert config.model.max_model_len <= 40960


@pytest.mark.slow  # importing vLLM alone takes half a minute on two cores
@pytest.mark.parametrize("experiment", LARGE)
def test_large_experiments_build_vllm_arguments(experiment: str) -> None:
    from actors.engine_args import engine_args
    from rollout.fleet import Rendezvous

    config = compose([f"experiment={experiment}"])
    config.model.path = str(Path(__file__).parent.parent / "data" / "qwen3_235b")
    for rank in (0, config.engine.num_shards - 1):
        arguments = engine_args(
            config.model,
            config.engine,
            config.sync,
            rank=rank,
            rendezvous=Rendezvous(host="127.0.0.1", rpc_port=12345),
            on_gpu=True,
        )
        assert arguments.data_parallel_size == config.engine.num_shards
        assert arguments.data_parallel_rank == rank
        assert arguments.enable_expert_parallel
        assert arguments.all2all_backend == config.engine.all2all_backend
        assert arguments.max_model_len == config.model.max_model_len


@pytest.mark.slow
def test_unknown_engine_option_is_refused() -> None:
    from actors.engine_args import engine_args

    config = compose(["engine.vllm.not_an_option=1", "engine.num_shards=1"])
    with pytest.raises(InvalidRequest, match="not_an_option"):
        engine_args(config.model, config.engine, config.sync, rank=0, rendezvous=None, on_gpu=False)
