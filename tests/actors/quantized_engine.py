"""Runs engines in a process of their own, overwrites their weights in place and writes what came of it.

    python tests/actors/quantized_engine.py <cases.json> <output.pt>; see test_quantization.py.

An engine changes its process for good (threads, accelerator calls), so tests do not run one in theirs.
"""

import json
import os
import sys
from pathlib import Path

PROMPTS = [list(range(5 + i, 25 + 2 * i)) for i in range(6)]
NUM_TOKENS = 24


def sample(llm) -> list[dict]:
    """Greedy continuations of the prompts with the log-probabilities of their tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    samples = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True)]
        samples.append({"tokens": tokens, "logprobs": logprobs})
    return samples


def exchange(model, plans, other: Path) -> dict:
    """Take the initial rows, check the views they make, then put the other checkpoint's weights in their place."""
    import torch
    from safetensors.torch import load_file

    from actors.vllm_plugin.live import held_bytes, live_weights, take_initial_rows
    from rollout.sync.encoding import encode

    weights = live_weights(model, plans)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    rows = take_initial_rows(model, plans)
    differing = [
        weight.sources
        for weight in weights
        for live, again in zip(weight.live, weight.prepare(rows), strict=True)
        if live.dtype != again.dtype or not torch.equal(live, again)
    ]
    new_rows = {name: encode(t.float(), plans[name]) for name, t in load_file(other).items() if name in plans}
    for weight in weights:
        for live, new in zip(weight.live, weight.prepare(new_rows), strict=True):
            live.copy_(new)
    again = None
    try:
        take_initial_rows(model, plans)
    except RuntimeError as error:
        again = str(error)
    return {
        "sources": [weight.sources for weight in weights],
        "rows": rows,
        "new_rows": new_rows,
        "differing": differing,
        "moved": [name for name, p in model.named_parameters() if p.data_ptr() != pointers[name]],
        "held_bytes": held_bytes(model),
        "second_take": again,
    }


def run(case: dict) -> dict:
    from vllm import LLM

    from actors.vllm_plugin import QUANTIZATIONS
    from actors.vllm_plugin.options import PluginOptions
    from rollout.config import Int4Config
    from rollout.sync.checkpoint_names import checkpoint_specs
    from rollout.sync.encoding import plan_tensors

    int4 = None if case["int4"] is None else Int4Config(**case["int4"])
    llm = LLM(
        model=case["model"],
        dtype=case["dtype"],
        quantization=QUANTIZATIONS["int4" if int4 else None],
        additional_config=PluginOptions(int4=int4).to_additional_config(),
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=2**24,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    plans = plan_tensors(checkpoint_specs(case["model"], case["dtype"]).values(), int4)
    before = sample(llm)
    (found,) = llm.apply_model(lambda model: exchange(model, plans, Path(case["other"]) / "model.safetensors"))
    return {"before": before, "after": sample(llm), **found}


if __name__ == "__main__":
    os.environ.update(VLLM_USE_V2_MODEL_RUNNER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="0")
    import torch

    cases = json.loads(Path(sys.argv[1]).read_text())
    torch.save({name: run(case) for name, case in cases.items()}, sys.argv[2])
