"""The commands around the gateway, as far as they need none: keys, names, figures, malformed requests."""

from __future__ import annotations

import random
from itertools import islice

import httpx
import pytest

from launch import bench_gateway, fuzz_gateway, keys
from launch.bench_gateway import Round, cost_of
from launch.compose import compose
from launch.serve import first_key, names_of
from rollout.errors import InvalidRequest
from rollout.gateway.keys import KeyFile, Role


def test_keys_are_made_listed_and_revoked(tmp_path, capsys):
    file = f"file={tmp_path / 'keys.json'}"
    assert keys.main(["add", "trainer", "alice", file]) == 0
    key = capsys.readouterr().out.strip().rsplit(" ", 1)[1]
    kept = KeyFile(tmp_path / "keys.json").ring().find(key)
    assert kept is not None and (kept.role, kept.name) == (Role.TRAINER, "alice")
    assert keys.main(["list", file]) == 0
    listed = capsys.readouterr().out
    assert kept.key_id in listed and key not in listed and kept.sha256 not in listed
    assert keys.main(["revoke", kept.key_id, file]) == 0
    assert KeyFile(tmp_path / "keys.json").ring().find(key) is None


@pytest.mark.parametrize("words", [["add", "emperor", "x"], ["add"], ["revoke", "nobody"], [], ["list", "all"]])
def test_a_mistake_in_keys_is_named(tmp_path, words, capsys):
    assert keys.main([*words, f"file={tmp_path / 'keys.json'}"]) == 2
    assert "expected" in capsys.readouterr().err
    assert keys.main(words) == 2, "and so is a missing file"


def test_the_first_key_is_an_operators_and_made_once(tmp_path):
    key = first_key(tmp_path / "keys.json")
    assert key is not None
    kept = KeyFile(tmp_path / "keys.json").ring().find(key)
    assert kept is not None and kept.role is Role.OPERATOR
    assert first_key(tmp_path / "keys.json") is None


def test_clients_know_the_model_by_its_configured_name(tmp_path):
    names = names_of(compose([f"run_dir={tmp_path}"]))
    assert (names.model, names.keys_file) == ("models/tiny", tmp_path / "keys.json")
    given = names_of(compose([f"run_dir={tmp_path}", "gateway.model_name=m", f"gateway.keys_file={tmp_path}/k.json"]))
    assert (given.model, given.keys_file) == ("m", tmp_path / "k.json")


@pytest.mark.parametrize(
    "override", ["gateway.coalesce_ms=51", "gateway.port=70000", "gateway.max_wait_s=0", "gateway.num_replicas=0"]
)
def test_options_that_cannot_be_are_refused(override):
    with pytest.raises(InvalidRequest, match="gateway"):
        compose([override])


def test_cost_is_taken_between_neighbouring_rounds():
    direct = [Round(tokens_per_s=rate, ttft_ms=ms) for rate, ms in ((100, 10), (200, 20), (100, 10))]
    http = [Round(tokens_per_s=rate, ttft_ms=ms) for rate, ms in ((150, 18), (120, 22))]
    cost = cost_of(direct, http)
    assert cost.gateway_ratio == pytest.approx((1.0 + 0.8) / 2)
    assert cost.added_ttft_ms == pytest.approx((3 + 7) / 2)
    assert not cost_of(direct, [Round(tokens_per_s=150, ttft_ms=30)] * 2).is_within_limits
    with pytest.raises(InvalidRequest, match="rounds"):
        cost_of(direct, http[:1])
    assert bench_gateway.main(["streams=0"]) == 2


def test_malformed_bodies_differ_and_faults_are_seen():
    draw = random.Random(0)
    bodies = [next(fuzz_gateway._bodies(draw)) for _ in range(200)]
    assert len(set(bodies)) > 150
    assert list(islice(fuzz_gateway._bodies(random.Random(1)), 3)) == list(
        islice(fuzz_gateway._bodies(random.Random(1)), 3)
    )
    report = fuzz_gateway.FuzzReport()
    request = httpx.Request("GET", "http://gateway/")
    good = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
    named = {"x-request-id": "1"}
    report.take("good", httpx.Response(400, json=good, request=request, headers=named), ())
    assert not report.faults
    report.take("bare", httpx.Response(400, json={"detail": "m"}, request=request, headers=named), ())
    report.take("broken", httpx.Response(500, json=good, request=request, headers=named), ())
    report.take("leak", httpx.Response(200, text="a secret", request=request), ("secret",))
    assert [fault.split(":")[0] for fault in report.faults] == ["bare", "broken", "leak"]
    assert report.num_requests == 4
