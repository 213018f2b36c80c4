"""Problems are repeatable and disjoint, verdicts please no luck, and both survive the way into a worker process."""

import itertools
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from rollout.tasks import (
    ANSWER_INSTRUCTION,
    EVAL_SEED,
    SEED_SPACING,
    TRAIN_SEED,
    WARM_START_SEED,
    TaskSpec,
    make_task,
    render,
    verify,
)

OPTIONS = {"min_terms": 2, "max_terms": 14, "min_digits": 1, "max_digits": 1}


def chain_sum(*, seed=TRAIN_SEED, size=100):
    return make_task("chain_sum", seed=seed, size=size, options=OPTIONS)


class RecordingTokenizer:
    """Stands for any chat tokenizer: keeps the conversation, answers with fixed ids."""

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, return_dict):
        self.conversation = conversation
        self.flags = (add_generation_prompt, tokenize, return_dict)
        return [1, 2, 3]


def test_same_seed_same_problems():
    first, second = chain_sum(), chain_sum()
    assert [first.problem(i) for i in range(20)] == [second.problem(i) for i in range(20)]


def test_adjacent_seeds_shift_the_same_problems():
    """The reason for SEED_SPACING; when this fails, the library has changed and the spacing may go."""
    task, neighbour = chain_sum(seed=7), chain_sum(seed=8)
    assert task.problem(1).question == neighbour.problem(0).question


def test_default_seed_ranges_are_disjoint():
    starts = sorted((WARM_START_SEED, TRAIN_SEED, EVAL_SEED))
    assert all(right - left >= SEED_SPACING for left, right in itertools.pairwise(starts))


def test_keys_tell_tasks_and_problems_apart():
    tasks = [
        chain_sum(),
        chain_sum(seed=EVAL_SEED),
        make_task("chain_sum", seed=TRAIN_SEED, size=100),
        make_task("basic_arithmetic", seed=TRAIN_SEED, size=100),
    ]
    keys = [task.problem(index).key for task in tasks for index in (0, 1, 99)]
    assert len(set(keys)) == len(keys)


def test_problem_carries_the_library_text():
    problem = chain_sum().problem(5)
    assert problem.question.startswith("State the final answer to the following arithmetic problem: ")
    assert eval(problem.metadata["expression"]) == int(problem.answer)
    assert problem.index == 5


def test_render_is_one_user_turn_with_the_instruction():
    tokenizer, problem = RecordingTokenizer(), chain_sum().problem(0)
    assert render(problem, tokenizer) == [1, 2, 3]
    assert tokenizer.conversation == [{"role": "user", "content": f"{problem.question}\n{ANSWER_INSTRUCTION}"}]
    assert tokenizer.flags == (True, True, False)


@given(index=st.integers(0, 99), work=st.text(alphabet="0123456789+- \n", max_size=40))
def test_right_answer_earns_the_reward_whatever_the_work(index, work):
    task = chain_sum()
    verdict = task.verify(index, f"{work}<answer>{task.problem(index).answer}</answer>")
    assert (verdict.reward, verdict.exact, verdict.error) == (1.0, True, None)


@given(index=st.integers(0, 99), offset=st.integers(-200, 200).filter(bool))
def test_wrong_number_earns_nothing(index, offset):
    task = chain_sum()
    answer = int(task.problem(index).answer) + offset
    verdict = task.verify(index, f"<answer>{answer}</answer>")
    assert (verdict.reward, verdict.exact, verdict.answer) == (0.0, False, str(answer))


def test_answer_hidden_in_a_longer_one_earns_nothing_but_is_reported():
    task = chain_sum()
    verdict = task.verify(0, f"<answer>{task.problem(0).answer} or 77</answer>")
    assert verdict.reward == 0.0 and not verdict.exact
    assert 0.0 < verdict.raw_score < 1.0


@pytest.mark.parametrize("completion", ["", "12", "<answer>12", "12</answer>", "<Answer>12</Answer>"])
def test_no_answer_pair_earns_nothing(completion):
    verdict = chain_sum().verify(0, completion)
    assert (verdict.reward, verdict.answer, verdict.raw_score) == (0.0, None, 0.0)


def test_the_last_answer_counts():
    task = chain_sum()
    right = task.problem(0).answer
    assert task.verify(0, f"<answer>x</answer>\n<answer>{right}</answer>").exact
    assert not task.verify(0, f"<answer>{right}</answer>\n<answer>x</answer>").exact


@given(answer=st.text(max_size=30))
def test_any_text_gets_a_verdict(answer):
    verdict = chain_sum().verify(3, f"<answer>{answer}</answer>")
    assert verdict.reward in (0.0, 1.0) and 0.0 <= verdict.raw_score <= 1.0


def test_verdict_is_the_same_in_a_fresh_process():
    task = chain_sum(seed=EVAL_SEED)
    completion = f"<answer>{task.problem(9).answer}</answer>"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        remote = pool.submit(verify, task.spec, 9, completion).result()
    assert remote == task.verify(9, completion)
    assert remote.exact


def test_spec_is_plain_data():
    spec = chain_sum().spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(TaskSpec(name="chain_sum", seed=TRAIN_SEED, size=100, options=spec.options))


def test_option_order_does_not_matter():
    swapped = make_task("chain_sum", seed=TRAIN_SEED, size=100, options=dict(reversed(OPTIONS.items())))
    assert swapped.spec == chain_sum().spec


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"'chain_sums'.*chain_sum"):
        make_task("chain_sums", seed=0, size=1)


def test_unknown_option_lists_the_allowed_ones():
    with pytest.raises(ValueError, match=r"'max_term'.*max_terms.*min_terms"):
        make_task("chain_sum", seed=0, size=1, options={"max_term": 3})


@pytest.mark.parametrize("option", ["seed", "size"])
def test_seed_and_size_are_not_options(option):
    with pytest.raises(ValueError, match=option):
        make_task("chain_sum", seed=0, size=1, options={option: 3})


def test_refused_option_values_are_the_callers_fault():
    with pytest.raises(ValueError, match="max_terms must be >= min_terms"):
        make_task("chain_sum", seed=0, size=1, options={"min_terms": 5, "max_terms": 2})


@pytest.mark.parametrize("size", [0, -1, SEED_SPACING + 1])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        make_task("chain_sum", seed=0, size=size)


@pytest.mark.parametrize("index", [-1, 100])
def test_index_out_of_range(index):
    task = chain_sum()
    with pytest.raises(ValueError, match=f"got {index}"):
        task.problem(index)
    with pytest.raises(ValueError, match=f"got {index}"):
        verify(task.spec, index, "")


@pytest.mark.parametrize("name", ["basic_arithmetic", "countdown", "leg_counting", "number_sorting", "word_sorting"])
def test_reference_answers_of_other_data_sets_verify(name):
    assert name in DATASETS
    task = make_task(name, seed=TRAIN_SEED, size=3)
    for index in range(3):
        assert task.verify(index, f"<answer>{task.problem(index).answer}</answer>").reward == 1.0
