"""Text of the embedded model: its tokenizer, its chat template and its worked examples.

Owns what the warm start reads and in which token ids. It does not know the model, the optimiser or the schedule.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout.tasks import ANSWER_INSTRUCTION, WARM_START_SEED, Problem, make_task, render

VOCAB_SIZE = 512
MAX_TERMS = 14
PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A spaced operator is one piece, so the worked solution copies the prompt's tokens unchanged; a bare "-" is a sign.
PIECES = r" [+\-*/] |\d| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"
OTHER_TASKS = ("basic_arithmetic", "leg_counting", "number_sorting", "simple_equations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training sequence.

    Attributes:
        token_ids: prompt, completion and EOS.
        prompt_tokens: length of the prompt.
        is_guess: whether the completion names the answer without work.
    """

    token_ids: list[int]
    prompt_tokens: int
    is_guess: bool


def chain_sum_options(max_terms: int = MAX_TERMS) -> dict[str, int]:
    """Returns the task options of the embedded model: one-digit terms, 2 to max_terms of them."""
    return {"min_terms": 2, "max_terms": max_terms, "min_digits": 1, "max_digits": 1}


def worked_completion(expression: str) -> str:
    """Solves a chain of sums by rewriting what remains of it, one line per operation.

    Args:
        expression: numbers and operators with single spaces between them, e.g. "4 + 7 - 3".

    Returns:
        e.g. "4 + 7 - 3\\n11 - 3\\n8\\n<answer>8</answer>"; its length is quadratic in the number of terms.
    """
    first, *rest = expression.split(" ")
    value, lines = int(first), [expression]
    while rest:
        operator, term, *rest = rest
        value += int(term) if operator == "+" else -int(term)
        lines.append(" ".join([str(value), *rest]))
    return "\n".join([*lines, guess_completion(str(value))])


def guess_completion(answer: str) -> str:
    """Returns the completion that names the answer without work."""
    return f"<answer>{answer}</answer>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer on the corpus; at most VOCAB_SIZE ids, digits always alone."""
    answer_tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<answer>", "</answer>")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(answer_tags),
        special_tokens=[PAD_TOKEN, "<|im_start|>", EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(), trainer)
    tokenizer.add_tokens(answer_tags)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=40960,
    )


def _tokenizer_corpus() -> Iterator[str]:
    sums = make_task("chain_sum", seed=WARM_START_SEED, size=2000, options=chain_sum_options())
    for index in range(len(sums)):
        problem = sums.problem(index)
        prompt = f"user\n{problem.question}\n{ANSWER_INSTRUCTION}\nassistant\n"
        yield prompt.replace("<answer></answer>", " ") + worked_completion(problem.metadata["expression"]).split("<")[0]
    for name in OTHER_TASKS:
        other = make_task(name, seed=WARM_START_SEED, size=100)
        yield from (other.problem(index).question for index in range(len(other)))


def examples(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, size: int, max_terms: int, guess_share: float
) -> list[Example]:
    """Draws worked examples and guesses.

    Args:
        tokenizer: the one from build_tokenizer.
        seed: first problem seed.
        size: number of examples.
        max_terms: longest expression, in terms.
        guess_share: fraction of examples that answer without work, in [0, 1].
    """
    task = make_task("chain_sum", seed=seed, size=size, options=chain_sum_options(max_terms))
    coin = random.Random(seed)
    return [_example(task.problem(index), tokenizer, guess=coin.random() < guess_share) for index in range(size)]


def _example(problem: Problem, tokenizer: PreTrainedTokenizerFast, *, guess: bool) -> Example:
    prompt = render(problem, tokenizer)
    text = guess_completion(problem.answer) if guess else worked_completion(problem.metadata["expression"])
    completion = tokenizer.encode(text, add_special_tokens=False)
    return Example(token_ids=[*prompt, *completion, tokenizer.eos_token_id], prompt_tokens=len(prompt), is_guess=guess)


def batches(pool: list[Example], *, batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    """Groups examples with equally long prompts, about batch_tokens tokens a batch, in random order.

    Equal prompts hold equally many terms, so a batch shows guesses and worked solutions of the same difficulty in their
    true proportion, and each kind pads to nearly its own length.
    """
    ordered = sorted(pool, key=lambda example: (example.prompt_tokens, rng.random()))
    groups: list[list[Example]] = [[]]
    num_tokens = 0
    for example in ordered:
        if groups[-1] and num_tokens + len(example.token_ids) > batch_tokens:
            groups.append([])
            num_tokens = 0
        groups[-1].append(example)
        num_tokens += len(example.token_ids)
    rng.shuffle(groups)
    return groups
