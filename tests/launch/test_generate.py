from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.compose import compose
from launch.generate import Options, main, prompts_of, sampling_of
from launch.workload import Workload
from rollout.errors import InvalidRequest

CONFIG = compose(["experiment=tiny_grpo"])


def test_prompts_of_the_workload_come_as_they_are_or_behind_others() -> None:
    workload = Workload(CONFIG.workload, CONFIG.model, CONFIG.trainer.seed)
    plain = prompts_of(CONFIG, Options(num_prompts=3))
    assert plain == workload.batch(0, 3)
    long = prompts_of(CONFIG, Options(num_prompts=3, prompt_tokens=500))
    assert [len(prompt.token_ids) for prompt in long] == [500] * 3
    for short, prompt in zip(plain, long, strict=True):
        assert prompt.token_ids[-len(short.token_ids) :] == short.token_ids
        assert prompt.metadata == short.metadata and prompt.prompt_id != short.prompt_id
    assert len({prompt.token_ids[:200] for prompt in long}) == 3, "no two share their beginning"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps({"token_ids": [5, 6, i]}) + "\n" for i in range(4)))
    assert [p.token_ids for p in prompts_of(CONFIG, Options(prompts=str(path)))] == [(5, 6, i) for i in range(4)]
    assert len(prompts_of(CONFIG, Options(prompts=str(path), num_prompts=2))) == 2


def test_the_end_token_may_be_ignored() -> None:
    assert not sampling_of(CONFIG, Options()).ignore_eos
    assert sampling_of(CONFIG, Options(ignore_eos=True)).max_tokens == CONFIG.sampling.max_tokens


def test_bad_options_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequest, match="num_prompts: got 0"):
        Options(num_prompts=0)
    with pytest.raises(InvalidRequest, match="prompt_tokens: got 9, expected none with a file"):
        Options(prompts="some.jsonl", prompt_tokens=9)
    assert main(["n=many"]) == 2 and "n: got many, expected a value of type int" in capsys.readouterr().err
    assert main(["num_promts=3"]) == 2 and "expected num_prompts=" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "launch.replay" in capsys.readouterr().out
