"""Runs engines in a process of their own and writes what they sampled; see test_int8_kv.py.

    python tests/actors/int8_kv_engine.py <output.json>

An engine changes its process for good (threads, accelerator calls), so tests do not run one in theirs.
"""

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
NUM_TOKENS = 128
PIECE = 64
KV_BYTES = 9 * 2**18  # two thirds of what 32 sequences come to need in INT8, so that some are preempted


def prompts() -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, 500) for _ in range(draw.randrange(3, 90))] for _ in range(32)]


class Engine:
    """The tiny model with few KV blocks and short steps: prefills are cut, and mixed with decoding."""

    def __init__(self, dtype: str, kv_cache_dtype: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(REPOSITORY / "models" / "tiny"),
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=512,
            skip_tokenizer_init=True,
            enforce_eager=True,
            worker_cls="actors.vllm_plugin.worker.KeyedCpuWorker",
            quantization="longroll_plain",
            kv_cache_memory_bytes=KV_BYTES,
            block_size=BLOCK_SIZE,
            max_num_seqs=32,
            max_num_batched_tokens=80,
            logprobs_mode="processed_logprobs",
        )
        self.num_blocks = self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        self.num_preempted = 0
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*args, **kwargs):
            self.num_preempted += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def sample(self, places: list[int], contexts: list[list[int]], num_tokens: int) -> list[dict]:
        """Tokens and log-probabilities; `places` choose the seeds."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args={"longroll_seed": 1000 + place},
            )
            for place in places
        ]
        outputs = self.llm.generate([{"prompt_token_ids": c} for c in contexts], sampling, use_tqdm=False)
        samples = []
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            logprobs = [step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True)]
            samples.append({"tokens": tokens, "logprobs": logprobs, "num_cached": output.num_cached_tokens})
        return samples


def record(dtype: str) -> dict:
    engine, batch = Engine(dtype, "int8_per_token_head"), prompts()
    places = list(range(len(batch)))
    together = engine.sample(places, batch, NUM_TOKENS)
    num_preempted = engine.num_preempted
    reordered = engine.sample(places[::-1], batch[::-1], NUM_TOKENS)[::-1]
    alone = [engine.sample([i], [batch[i]], NUM_TOKENS)[0] for i in places[:2]]
    cut = [{"tokens": [], "logprobs": [], "num_cached": 0} for _ in batch]
    for _ in range(NUM_TOKENS // PIECE):
        contexts = [p + c["tokens"] for p, c in zip(batch, cut, strict=True)]
        pieces = engine.sample(places, contexts, PIECE)
        cut = [{key: so_far[key] + new[key] for key in so_far} for so_far, new in zip(cut, pieces, strict=True)]
    return {
        "num_blocks": engine.num_blocks,
        "num_preempted": num_preempted,
        "together": together,
        "reordered": reordered,
        "alone": alone,
        "cut": cut,
    }


def main(output: Path) -> None:
    records = {dtype: record(dtype) for dtype in ("float32", "bfloat16")}
    auto = {dtype: Engine(dtype, "auto").num_blocks for dtype in records}
    written = {"records": records, "num_blocks_auto": auto, "prompts": prompts()}
    output.write_text(json.dumps(written | {"kv_bytes": KV_BYTES, "block_size": BLOCK_SIZE}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
