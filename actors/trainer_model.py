"""The policy inside a DeepSpeed engine: configuration, process group, partitioned construction.

Owns how a model directory becomes a partitioned module. Parameters are born partitioned (zero.Init)
and filled one at a time from the safetensors files, so that no rank ever holds the whole model;
transformers' own ZeRO-3 loading reads the whole state dict on every rank. Knows nothing of losses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rollout.config import ModelConfig
from rollout.errors import InvalidRequest
from rollout.fleet import Rendezvous
from rollout.sync.checkpoint_names import checkpoint_files, checkpoint_specs, split_parameter
from rollout.sync.manifest import torch_dtype
from rollout.trainer_config import TrainerConfig

NICENESS = 10  # a rank encodes and sends weights while the engines decode


def share_the_cpu(config: TrainerConfig) -> None:
    """One thread a CPU rank, so that sums have one order, behind the engines' steps, with which it shares the cores."""
    if config.num_gpus_per_rank == 0:
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def open_store(rank: int, num_ranks: int, host: str, timeout_s: float) -> dist.TCPStore:
    """Open the meeting point of the group on rank 0, on a port the system picks."""
    assert rank == 0, "only rank 0 hosts the store"
    return dist.TCPStore(
        host, 0, num_ranks, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def join_group(rank: int, rendezvous: Rendezvous, config: TrainerConfig, store: dist.TCPStore | None) -> torch.device:
    """Join the process group and hand it to DeepSpeed.

    Args:
        rank: This rank.
        rendezvous: Where rank 0 listens.
        config: Number of ranks, GPUs, time limit of a collective.
        store: The open store on rank 0, None elsewhere.

    Returns:
        The device this rank computes on.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(config.num_ranks),
        LOCAL_RANK="0",
        MASTER_ADDR=rendezvous.host,
        MASTER_PORT=str(rendezvous.rpc_port),
    )
    timeout = timedelta(seconds=config.distributed_timeout_s)
    if store is None:
        store = dist.TCPStore(
            rendezvous.host,
            rendezvous.rpc_port,
            config.num_ranks,
            is_master=False,
            timeout=timedelta(seconds=config.start_timeout_s),
        )
    on_gpu = config.num_gpus_per_rank > 0
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=config.num_ranks, timeout=timeout)
    # Optional and compiled at first use under a file lock that a killed process leaves behind, after
    # which every later start waits for ever (torch/utils/file_baton.py). gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def deepspeed_config(config: TrainerConfig, dtype: str) -> dict[str, Any]:
    """The DeepSpeed configuration of the policy, with `trainer.deepspeed` merged over it.

    Accumulation is the caller's (managed_gradient_accumulation off): any number of backward passes,
    then one step. DeepSpeed averages gradients over ranks, which `TrainerRank` undoes in the loss.
    """
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "weight_decay": config.weight_decay,
                "torch_adam": True,
            },
        },
    }
    if dtype == "bfloat16":
        own["bf16"] = {"enabled": True}
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype != "float32":
        raise InvalidRequest("model.dtype", dtype, "float32 or bfloat16 (the dtypes that can be trained)")
    return _merge(own, config.deepspeed)


def build_module(model: ModelConfig, config: TrainerConfig, ds_config: dict[str, Any]) -> torch.nn.Module:
    """Construct the model, partitioned under ZeRO-3, and fill it from its directory. Collective."""
    hf_config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    on_gpu = config.num_gpus_per_rank > 0
    dtype = torch_dtype(model.dtype)
    with (
        # Its dtype comes from ds_config. The argument `dtype` must stay unset: without float16 support it
        # silently becomes bfloat16 (operator precedence in DeepSpeed 0.19.8, partition_parameters.py:409).
        deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=config.zero_stage == 3),
        no_init_weights(),
    ):
        module = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=dtype,
            attn_implementation="sdpa",
            # As fast as the others on a CPU (batched_mm copies the experts for every token).
            experts_implementation="grouped_mm" if on_gpu else "eager",
            trust_remote_code=model.trust_remote_code,
        )
    assert {p.dtype for p in module.parameters()} == {dtype}, "parameters in another dtype than configured"
    fill_from_checkpoint(module, Path(model.path))
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    return module


def restore_rotary_frequencies(module: torch.nn.Module) -> None:
    """Compute rotary frequencies anew in float32, as inference engines do.

    zero.Init and the DeepSpeed engine round every floating-point buffer to the training dtype.
    """
    for part in module.modules():
        if isinstance(getattr(part, "inv_freq", None), torch.Tensor):
            device = next(module.parameters()).device
            fresh = type(part)(config=part.config)
            for name, buffer in fresh.named_buffers():
                setattr(part, name, buffer.to(device))


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of a parameter, whether ZeRO-3 has partitioned it or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: list[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Context in which parameters are whole on every rank; plain parameters always are."""
    is_partitioned = any(hasattr(p, "ds_id") for p in parameters)
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank, enabled=is_partitioned)


def trained_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by name, tied ones once."""
    return module.named_parameters()


def fill_from_checkpoint(module: torch.nn.Module, model_dir: Path) -> None:
    """Copy checkpoint tensors into a module, one parameter in memory at a time. Collective.

    Rank 0 reads and ZeRO-3 broadcasts; without ZeRO-3 every rank reads.

    Raises:
        InvalidRequest: If a tensor is missing, left over, or of another shape. On every rank alike,
            because only headers are compared, before anything collective.
    """
    files = checkpoint_files(model_dir)
    stored = {name: spec.shape for name, spec in checkpoint_specs(model_dir, "float32").items()}
    wanted = {
        name: tuple(piece.shape)
        for key, p in trained_parameters(module)
        for name, piece in split_parameter(key, torch.empty(full_shape(p), device="meta"))
    }
    if wanted != stored:
        some = sorted(dict(wanted.items() ^ stored.items()))[:5]
        raise InvalidRequest(f"weights of {model_dir}", f"other tensors: {some}", "those of its config.json")
    for key, parameter in trained_parameters(module):
        is_partitioned = hasattr(parameter, "ds_id")
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            if is_partitioned and dist.get_rank() != 0:
                continue
            for name, view in split_parameter(key, parameter.data):
                with safe_open(files[name], "pt") as opened:
                    view.copy_(opened.get_tensor(name))
