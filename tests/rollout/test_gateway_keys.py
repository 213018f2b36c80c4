from __future__ import annotations

import json
import stat

import pytest

from rollout.errors import InvalidRequest
from rollout.gateway.authorization import Caller, request_id_of
from rollout.gateway.keys import KeyFile, KeyRing, Role, make_key
from rollout.gateway.limits import RateLimiter


def test_a_key_is_found_by_itself_only():
    key, kept = make_key("alice", Role.CLIENT)
    ring = KeyRing([kept])
    assert ring.find(key) == kept
    for wrong in (
        key[:-1],
        key + "x",
        key[:-1] + ("a" if key[-1] != "a" else "b"),
        key.upper(),
        "",
        kept.sha256,
        "é\ud800",
    ):
        assert ring.find(wrong) is None
    other, _ = make_key("alice", Role.CLIENT)
    assert ring.find(other) is None


def test_the_file_keeps_hashes_and_is_private(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    assert file.ring().find("lr_x") is None
    key = file.add("alice", Role.TRAINER)
    text = (tmp_path / "keys.json").read_text()
    assert key not in text and key.rsplit("_", 1)[1] not in text
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    assert [one.name for one in file.load()] == ["alice"]


def test_other_processes_see_changes(tmp_path):
    writer, reader = KeyFile(tmp_path / "keys.json"), KeyFile(tmp_path / "keys.json")
    first = writer.add("a", Role.CLIENT)
    assert reader.ring().find(first) is not None
    second = writer.add("b", Role.OPERATOR)
    found = reader.ring().find(second)
    assert found is not None and found.role is Role.OPERATOR
    writer.revoke(found.key_id)
    assert reader.ring().find(second) is None and reader.ring().find(first) is not None
    with pytest.raises(InvalidRequest, match="key id"):
        writer.revoke("nobody")


@pytest.mark.parametrize("text", ["", "{}", '{"keys": [{"key_id": "x"}]}', '{"keys": 3}'])
def test_a_damaged_file_is_no_file_of_keys(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(InvalidRequest, match="key file"):
        KeyFile(tmp_path / "keys.json").ring()


def test_a_file_of_another_role_is_refused(tmp_path):
    KeyFile(tmp_path / "keys.json").add("a", Role.CLIENT)
    record = json.loads((tmp_path / "keys.json").read_text())
    record["keys"][0]["role"] = "emperor"
    (tmp_path / "keys.json").write_text(json.dumps(record))
    with pytest.raises(InvalidRequest, match="key file"):
        KeyFile(tmp_path / "keys.json").load()


def test_roles_include_those_before_them():
    assert [role for role in Role if Role.TRAINER.includes(role)] == [Role.CLIENT, Role.TRAINER]


def test_who_owns_what():
    _, alice = make_key("alice", Role.TRAINER)
    _, boss = make_key("boss", Role.OPERATOR)
    assert Caller(key=alice, request_id="r").owns(alice.key_id)
    assert not Caller(key=alice, request_id="r").owns(boss.key_id)
    assert Caller(key=boss, request_id="r").owns(alice.key_id)


def test_request_ids_are_fit_for_a_log_line():
    assert request_id_of("mine-1") == "mine-1"
    for bad in (None, "", "two\nlines", "a b", "x" * 129, "é"):
        made = request_id_of(bad)
        assert made != bad and made.isalnum()


def test_rate_limit_is_exact():
    limiter = RateLimiter(per_second=2.0, burst=3)
    assert [limiter.take("a", 0.0) for _ in range(3)] == [None] * 3
    assert limiter.take("a", 0.0) == pytest.approx(0.5)
    assert limiter.take("b", 0.0) is None
    assert limiter.take("a", 0.25) == pytest.approx(0.25)
    assert limiter.take("a", 0.5) is None
    taken = sum(limiter.take("a", 100 + i / 100) is None for i in range(1000))
    assert taken == 3 + 19, "a full bucket, then two a second for 9.99 s"
