"""Keys, quotas and bounds: who may ask, how much, and when to come back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar.errors import FileError
from nearfar_cloud.gateway.limits import Key, Keys, Limits
from nearfar_cloud.gateway.refusal import Refusal
from tests.cloud.gateway import Client, Gate, check_quiet, serving, text_of, tiny, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key_file(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": list(entries)}))
    return path


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(limits: Limits, key: Key, n_seqs: int, n_tokens: int) -> Refusal:
    with pytest.raises(Refusal) as caught:
        limits.admit(key, n_seqs, n_tokens)
    return caught.value


def test_a_quota_fills_up_again_and_says_when() -> None:
    clock = Clock()
    limits, key = Limits(clock=clock), Key("a", requests_per_minute=2, tokens_per_minute=600)
    for _ in range(2):
        limits.close(limits.admit(key, 1, 100), used=100)
    said = refusal(limits, key, 1, 100)
    assert (said.status, said.code, said.headers()["retry-after"]) == (429, "rate_limit_exceeded", "30")
    clock.now += 30
    limits.admit(key, 1, 100)
    limits.admit(Key("b", requests_per_minute=2), 1, 100)  # another tenant has a quota of its own


def test_tokens_that_were_not_used_are_given_back() -> None:
    limits, key = Limits(clock=Clock()), Key("a", tokens_per_minute=600)
    ticket = limits.admit(key, 1, 600)
    assert refusal(limits, key, 1, 1).headers()["retry-after"] == "1"
    limits.close(ticket, used=50)
    limits.close(ticket, used=50)  # once is enough
    limits.admit(key, 1, 550)
    assert refusal(limits, key, 1, 50).status == 429


def test_what_a_quota_can_never_hold_is_not_worth_a_second_try() -> None:
    said = refusal(Limits(clock=Clock()), Key("a", tokens_per_minute=600), 1, 601)
    assert said.status == 429
    assert "retry-after" not in said.headers()


def test_a_key_has_so_many_answers_at_a_time() -> None:
    limits, key = Limits(clock=Clock()), Key("a", concurrent=3)
    ticket = limits.admit(key, 2, 10)
    assert refusal(limits, key, 2, 10).status == 429
    limits.close(ticket, 10)
    limits.admit(key, 3, 10)


def test_ten_thousand_requests_are_bounded_by_number_and_by_tokens() -> None:
    limits = Limits(max_queued=100, max_tokens=5000, tokens_per_s=lambda: 10.0, clock=Clock())
    said = []
    for _ in range(10_000):
        try:
            limits.check()
            limits.admit(Key(), 1, 40)
        except Refusal as refused:
            said.append(refused)
    assert limits.n_seqs == 100
    assert len(said) == 9_900
    assert {(r.status, r.code) for r in said} == {(503, "overloaded")}
    assert {r.headers()["retry-after"] for r in said} == {"60"}  # 4000 tokens at 10 a second
    full = Limits(max_queued=100, max_tokens=100, clock=Clock())
    full.admit(Key(), 1, 90)
    assert refusal(full, Key(), 1, 40).code == "overloaded"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tenant": "a"}, "sha256"),
        ({"tenant": "a", "sha256": "abc"}, "64 hexadecimal"),
        ({"sha256": "0" * 64}, "tenant"),
        ({"tenant": "a", "sha256": "0" * 64, "concurrent": 0}, "concurrent"),
        ({"tenant": "a", "sha256": "0" * 64, "key": "secret"}, "does not know"),
    ],
)
def test_a_wrong_entry_of_the_key_file_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message) as caught:
        Keys.read(key_file(tmp_path, {"tenant": "first", "sha256": "1" * 64}, entry))
    assert "keys[1]" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_key_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        Keys.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileError, match="not JSON"):
        Keys.read(tmp_path / "bad.json")
    with pytest.raises(FileError, match="at least one key"):
        Keys.read(key_file(tmp_path))
    with pytest.raises(FileError, match="other limits"):
        Keys.read(
            key_file(
                tmp_path, {"tenant": "a", "sha256": "0" * 64}, {"tenant": "a", "sha256": "1" * 64, "concurrent": 1}
            )
        )
    same = {"tenant": "a", "sha256": "0" * 64}
    with pytest.raises(FileError, match="twice"):
        Keys.read(key_file(tmp_path, same, same))


def test_keys_tell_tenants_apart(tmp_path: Path) -> None:
    path = key_file(
        tmp_path,
        {"tenant": "alice", "sha256": digest("alice's"), "requests_per_minute": 4, "priority": 5, "metrics": True},
        {"tenant": "bob", "sha256": digest("bob's")},
    )
    served = tiny(64)
    gate = Gate(served)
    with serving(served, keys=Keys.read(path)) as (nobody, gateway, _):
        alice, bob = Client(nobody.port, "alice's"), Client(nobody.port, "bob's")
        for client in (nobody, Client(nobody.port, "wrong"), Client(nobody.port, "")):
            for reply in (client.post("completions", prompt="x"), client.get("/v1/models"), client.get("/metrics")):
                assert (reply.status, reply.code) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        assert nobody.get("/health").status == 200
        assert alice.get("/metrics").status == 200
        assert bob.get("/metrics").code == "not_allowed"
        # A prefix that one tenant had computed is no hit for another one.
        prompt = "the " * 90
        alice.ok("completions", prompt=prompt, max_tokens=1)
        assert bob.ok("completions", prompt=prompt, max_tokens=1)["nearfar"]["cached_tokens"] == 0
        assert alice.ok("completions", prompt=prompt, max_tokens=1)["nearfar"]["cached_tokens"] > 0
        # Nobody ends the answer of somebody else.
        gate.close()
        stream = bob.open_stream("chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=50)
        answer_id = stream.next()["id"]
        high = [c.open_stream("completions", prompt="x", nearfar={"priority": 9}) for c in (alice, bob)]
        wait_until(lambda: gateway.service.n_open == 3)
        assert alice.send("DELETE", f"/v1/chat/completions/{answer_id}").code == "not_found"
        assert bob.send("DELETE", f"/v1/chat/completions/{answer_id}").json == {"id": answer_id, "deleted": True}
        assert stream.rest()[-1]["error"]["code"] == "cancelled"
        # Nobody asks for more than the key allows.
        gate.step(2)
        wait_until(lambda: len(served.engine.seqs) == 2)
        objectives = {s.req.objective.tenant: s.req.objective.priority for s in served.engine.seqs.values()}
        assert objectives == {"alice": 5, "bob": 0}
        gate.open()
        assert [len(text_of(stream.rest())) > 0 for stream in high] == [True, True]
        check_quiet(gateway)
        # The quota of one is not the other's.
        assert alice.post("completions", prompt="x", max_tokens=1).status == 200
        reply = alice.post("completions", prompt="x", max_tokens=1)
        assert (reply.status, reply.code) == (429, "rate_limit_exceeded")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert bob.post("completions", prompt="x", max_tokens=1).status == 200
