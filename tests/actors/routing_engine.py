"""Runs one engine in a process of its own and writes what it sampled and captured; see test_routing.py.

    python tests/actors/routing_engine.py <output.json> <KV bytes>

An engine changes its process for good (threads, accelerator calls), so tests do not run one in theirs.
"""

import base64
import json
import os
import random
import sys
from pathlib import Path

os.environ.update(
    VLLM_USE_V2_MODEL_RUNNER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="0", RANK="0"
)

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 32
NUM_TOKENS = 96


def prompts() -> list[list[int]]:
    """Some that begin alike, for the prefix cache, and some longer than a step."""
    draw = random.Random(3)
    shared = [draw.randrange(3, 500) for _ in range(2 * BLOCK_SIZE + 5)]
    return [
        (shared if i % 2 else []) + [draw.randrange(3, 500) for _ in range(draw.randrange(2, 90))] for i in range(10)
    ]


def main(output: Path, kv_bytes: int) -> None:
    from vllm import LLM, SamplingParams

    from actors.vllm_plugin.options import PluginOptions
    from actors.vllm_plugin.routing import routing_args

    llm = LLM(
        model=str(REPOSITORY / "models" / "tiny"),
        dtype="float32",
        max_model_len=512,
        skip_tokenizer_init=True,
        enforce_eager=True,
        worker_cls="actors.vllm_plugin.worker.KeyedCpuWorker",
        kv_cache_memory_bytes=kv_bytes,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        disable_log_stats=False,
        additional_config=PluginOptions(capture_routing=True).to_additional_config(),
    )
    engine = llm.llm_engine
    core, runner = engine.engine_core.engine_core, engine.model_executor.driver_worker.worker.model_runner
    preempted = 0
    preempt = core.scheduler._preempt_request

    def counted(*args, **kwargs):
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    core.scheduler._preempt_request = counted
    records = []

    def run(names: list[str], contexts: list[list[int]], firsts: list[int]) -> None:
        sampling = [
            SamplingParams(
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                detokenize=False,
                extra_args={"longroll_seed": hash(name) & 0xFFFF, **routing_args(name, first)},
            )
            for name, first in zip(names, firsts, strict=True)
        ]
        outputs = llm.generate([{"prompt_token_ids": c} for c in contexts], sampling, use_tqdm=False)
        while core.scheduler.has_requests():  # as an engine of its own does; this one stops with its last output
            core.step_fn()
        for name, first, output in zip(names, firsts, outputs, strict=True):
            blob = runner.take_routing(name, 10.0)
            records.append(
                {
                    "tokens": [*output.prompt_token_ids, *output.outputs[0].token_ids],
                    "first": first,
                    "num_cached": output.num_cached_tokens,
                    "blob": base64.b64encode(blob).decode(),
                }
            )

    started = prompts()
    run([f"a{i}" for i in range(len(started))], started, [0] * len(started))
    longer = [record["tokens"] for record in records]  # a second chunk of each, which brings only its own rows
    run([f"b{i}" for i in range(len(longer))], longer, [len(tokens) - 1 for tokens in longer])
    again = [record["tokens"][: 4 * BLOCK_SIZE + 1] for record in records[: len(started)]]
    run([f"c{i}" for i in range(len(again))], again, [0] * len(again))  # its prompts are cached, output and all
    output.write_text(json.dumps({"records": records, "num_preempted": preempted, "is_gone": _is_gone(runner)}))


def _is_gone(runner) -> bool:
    return runner.take_routing("a0", 1.0) is None and runner.take_routing("never seen", 1.0) is None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
