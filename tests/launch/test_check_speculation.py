"""The campaign's own arithmetic; with engines it is run in tests/actors/test_speculation_service.py."""

import pytest

from launch.check_speculation import DrafterReport, Options, Tally, main, verdict
from launch.near_ties import Difference
from rollout.errors import InvalidRequest
from rollout.types import Trajectory


def trajectory(num_tokens: int, trees: int, nodes: int, accepted: int) -> Trajectory:
    counts = {"num_draft_trees": trees, "num_draft_nodes": nodes, "num_draft_accepted": accepted}
    return Trajectory(
        group_id="g", sample_index=0, seed=1, prompt_token_ids=(1,), token_ids=[7] * num_tokens, metadata=counts
    )


def difference(is_near_tie: bool) -> Difference:
    return Difference(index=3, tokens=(1, 2), logprobs=(-1.0, -1.0), gap=0.0, is_near_tie=is_near_tie)


def test_accepted_tokens_are_told_by_step() -> None:
    tally = Tally()
    assert tally.accepted_a_step == 0.0
    tally.add(trajectory(30, trees=9, nodes=40, accepted=20))
    tally.add(trajectory(10, trees=0, nodes=0, accepted=0))
    assert (tally.tokens, tally.trees, tally.nodes) == (40, 9, 40)
    assert tally.accepted_a_step == 20 / (10 + 10), "ten steps of the first, which gave 30 tokens, and ten of the other"


def test_only_near_ties_are_forgiven_and_only_of_drafters_that_drafted() -> None:
    def report(*ties: bool, trees: int = 5) -> DrafterReport:
        return DrafterReport(differences=[("x", difference(tie)) for tie in ties], drafts=Tally(trees=trees))

    assert verdict({"clover2": report(), "random": report(True)}) is None
    wrong = verdict({"clover2": report(), "random": report(True, False, False)})
    assert wrong is not None and wrong.startswith("random: 2 trajectories differ")
    idle = verdict({"sibling": report(trees=0)})
    assert idle is not None and "no tree" in idle


def test_greedy_is_asked_for_once() -> None:
    options = Options(temperatures=(0.0, 0.7), top_p=(1.0, 0.9))
    assert [(s.temperature, s.top_p) for s in options.samplings(8)] == [(0.0, 1.0), (0.7, 1.0), (0.7, 0.9)]
    assert options.sources == ("adversarial", "clover2", "random", "sibling")


def test_bad_options_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequest, match="members: got 0"):
        Options(members=0)
    with pytest.raises(InvalidRequest, match="drafters: got none"):
        Options(drafters=())
    assert main(["drafters=nobody"]) == 2 and "engine.speculation.sources" in capsys.readouterr().err
    assert main(["temperatures=warm"]) == 2 and "temperatures: got warm" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "near ties" in capsys.readouterr().out
