"""A plan as an experiment: YAML for conf/experiment that launch.compose accepts.

Owns the mapping from a plan to options. What the service cannot run is refused, not left out.
"""

from __future__ import annotations

from omegaconf import OmegaConf

from rollout.errors import InvalidRequest
from rollout.plan.candidate import KV_NAMES, Candidate
from rollout.plan.drafts import NO_DRAFT
from rollout.plan.judge import Judged, judge, own_choices
from rollout.plan.search import Plan
from rollout.plan.workload import Targets, Workload

BASE = "ep8_int4"  # of conf/engine: what a plan does not decide
SAMPLING = {"rl_20k": "reasoning_20k", "rl_32k": "reasoning_32k"}  # of conf/sampling


def experiment_of(judged: Judged, cluster: str, model: str, draft_model: str | None) -> str:
    """The YAML of an experiment.

    Args:
        judged: What was planned. Without a draft model it is planned anew, without speculation.
        cluster, model: Files of conf/cluster and conf/model.
        draft_model: Directory of the draft model that speculates.

    Raises:
        InvalidRequest: There is no plan, or one that the service does not run.
    """
    if draft_model is None:
        kv_dtypes = () if judged.plan is None else (judged.plan.candidate.precision.kv_dtype,)
        choices = own_choices(judged.workload, (NO_DRAFT,), kv_dtypes=kv_dtypes)
        judged = judge(judged.fleet, judged.workload, Targets(), choices)
    plan, workload = judged.plan, judged.workload
    if plan is None:
        raise InvalidRequest("out_experiment", workload.name, "a model that fits the cluster")
    if plan.candidate.tensor_ranks != 1:
        raise InvalidRequest("out_experiment", "tensor parallelism", "a plan without it: the service runs none")
    groups = {"model": model, "engine": BASE, "cluster": cluster}
    if workload.is_training:
        groups |= {"sampling": SAMPLING[workload.name], "sync": "nccl", "trainer": "zero3_64", "workload": "reasoning"}
    defaults = [{f"override /{group}": file} for group, file in groups.items()]
    body = {"defaults": defaults, "run_dir": f"runs/planned_{workload.name}", **_sections(judged, plan, draft_model)}
    return f"{_header(judged, plan)}{OmegaConf.to_yaml(OmegaConf.create(body))}"


def _header(judged: Judged, plan: Plan) -> str:
    steady, fleet, workload = plan.steady, judged.fleet, judged.workload
    ratio = judged.throughput_ratio
    against = "" if ratio is None else f", {ratio:.2f} × bf16"
    return (
        "# @package _global_\n"
        f"# Planned by launch.plan for {workload.prompt_tokens:,} + {workload.output_tokens:,} tokens on "
        f"{fleet.num_gpus} × {fleet.gpu.name}; computed, not measured:\n"
        f"# first token {steady.ttft_s * 1e3:,.0f} ms, token {steady.tpot_s * 1e3:.1f} ms, "
        f"{steady.tokens_per_s_per_gpu:,.0f} tokens/s a GPU{against}.\n"
    )


def _sections(judged: Judged, plan: Plan, draft_model: str | None) -> dict[str, object]:
    workload, candidate = judged.workload, plan.candidate
    longest = workload.prompt_tokens + workload.output_tokens
    sections: dict[str, object] = {
        "model": {"max_model_len": longest},
        "engine": _engine(judged, candidate, draft_model),
        "scheduler": {"max_running_per_shard": candidate.batch},
    }
    if workload.is_training:
        sections["engine"] |= {"enable_return_routed_experts": True}  # type: ignore[operator]
        sections["trainer"] = {"replay_routing": True, "micro_batch_tokens": longest}
        return sections
    return sections | _serving(workload)


def _engine(judged: Judged, candidate: Candidate, draft_model: str | None) -> dict[str, object]:
    engine: dict[str, object] = {
        "num_groups": judged.fleet.num_gpus // candidate.ranks,
        "num_shards": candidate.ranks,
        "max_num_seqs": candidate.batch,
        "max_num_batched_tokens": candidate.chunk,
        "kv_cache_dtype": next(name for name, dtype in KV_NAMES.items() if dtype == candidate.precision.kv_dtype),
    }
    if candidate.ranks == 1:
        engine |= {"enable_expert_parallel": False, "all2all_backend": None}
    if draft_model is not None and candidate.draft.num_tokens:
        engine["speculation"] = {
            "enabled": True,
            "sources": ["clover2"],
            "draft_model": draft_model,
            "max_width": 1,
            "max_depth": candidate.draft.num_tokens,
            "budget_nodes": candidate.draft.num_tokens,
        }
    return engine


def _serving(workload: Workload) -> dict[str, object]:
    """A serving process reads no trainer options; they must only not contradict the rest."""
    return {"sampling": {"max_tokens": workload.output_tokens}, "trainer": {"num_gpus_per_rank": 0}}
