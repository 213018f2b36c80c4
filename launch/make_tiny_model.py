"""Makes models/tiny, the embedded model: a small mixture-of-experts model that has begun to do sums.

    python -m launch.make_tiny_model --output models/tiny

It learns to solve chains of one-digit sums by rewriting them line by line, and then that about two answers in three are
bare guesses. What is left for RL to find is that working pays: reward and response length rise together.

Fixed seeds and one thread make the run repeatable on one kind of CPU. With --work a killed run resumes after its last
finished stage.
"""

import argparse
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from launch.tiny_corpus import MAX_TERMS, VOCAB_SIZE, build_tokenizer
from launch.tiny_training import Stage, Trainer
from rollout.tasks import WARM_START_SEED

logger = logging.getLogger(__name__)

MODEL_SEED = 20
BATCH_TOKENS = 3072
MAX_NEW_TOKENS = 320
PEAK_LR = 4e-3
GUESS_SHARE = 0.62

# Copying is learnt first and only from short expressions; guesses come last, so that they cost no skill.
STAGES = (
    Stage(num_tokens=100_000, max_terms=3, guess_share=0.0, first_lr=PEAK_LR / 10, last_lr=PEAK_LR),
    Stage(num_tokens=900_000, max_terms=4, guess_share=0.0, first_lr=PEAK_LR, last_lr=PEAK_LR),
    Stage(num_tokens=1_500_000, max_terms=6, guess_share=0.0, first_lr=PEAK_LR, last_lr=PEAK_LR),
    Stage(num_tokens=2_500_000, max_terms=10, guess_share=0.0, first_lr=PEAK_LR, last_lr=PEAK_LR),
    Stage(num_tokens=3_000_000, max_terms=MAX_TERMS, guess_share=0.0, first_lr=PEAK_LR, last_lr=PEAK_LR),
    Stage(num_tokens=2_500_000, max_terms=MAX_TERMS, guess_share=GUESS_SHARE, first_lr=PEAK_LR, last_lr=0.0),
)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Returns the untrained model in fp32; every matrix dimension is a multiple of 32, for INT4 groups of 32."""
    torch.manual_seed(MODEL_SEED)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=192,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def ship(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the model directory in bf16; files of the same name are replaced one by one, each atomically."""
    staging = output.with_name(f".{output.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    shipped = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shipped.save_pretrained(staging)
    tokenizer.save_pretrained(staging, save_jinja_files=False)
    output.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, output / path.name)
    staging.rmdir()


def train(trainer: Trainer, work: Path | None) -> None:
    """Runs every stage, resuming after the last one found in work."""
    first = 0
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        finished = [number for number in range(len(STAGES)) if (work / f"stage{number}.pt").exists()]
        if finished:
            first = finished[-1] + 1
            trainer.load_state_dict(torch.load(work / f"stage{finished[-1]}.pt", weights_only=False))
    for number in range(first, len(STAGES)):
        logger.info("stage %d of %d: %s", number + 1, len(STAGES), STAGES[number])
        trainer.run(STAGES[number])
        if work is not None:
            torch.save(trainer.state_dict(), work / f"stage{number}.pt")


def main() -> None:
    """Parses the command line, trains and ships."""
    parser = argparse.ArgumentParser(description="Makes the embedded model.")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--work", type=Path, default=None, help="directory for the state after each stage")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    trainer = Trainer(build_model(tokenizer), tokenizer, seed=WARM_START_SEED, batch_tokens=BATCH_TOKENS)
    train(trainer, arguments.work)
    ship(trainer.model, tokenizer, arguments.output)
    logger.info("wrote %s after %d tokens in %d steps", arguments.output, trainer.num_tokens, trainer.num_steps)


if __name__ == "__main__":
    main()
