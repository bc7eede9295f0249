"""Keys are accepted as their file is now, and callers use what they may."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from services.gateway import keys
from services.gateway.keys import Caller, KeyFileError, Keys, Limits, Scope, read_keys
from services.runtime.errors import StartError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, key: str, *lines: str) -> str:
    return "\n".join(["[[keys]]", f'name = "{name}"', f'sha256 = "{digest(key)}"', *(lines or ('scopes = ["score"]',))])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(entry("search", "one") + "\n" + entry("ops", "two", 'scopes = ["admin", "generate"]'))
    return path


def test_a_key_is_its_callers_and_no_other_text_is(file: Path) -> None:
    known = Keys(file)
    found = known.caller_of("one")
    assert found is not None
    assert (found.name, found.scopes) == ("search", {Scope.SCORE})
    assert known.caller_of("two").scopes == {Scope.ADMIN, Scope.GENERATE}  # type: ignore[union-attr]
    for other in ("", "One", "one ", digest("one"), "\udce4", "x" * 100_000):
        assert known.caller_of(other) is None


def test_a_key_is_rotated_and_revoked_by_the_file_and_a_broken_file_changes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now_s)
    known = Keys(file)
    file.write_text(entry("search", "one") + "\n" + entry("search", "new"))
    assert known.caller_of("new") is None  # Nobody looks so often.
    now_s += 2
    assert known.caller_of("new") is not None
    assert known.caller_of("new") == known.caller_of("one")
    assert known.caller_of("two") is None
    file.write_text("[[keys]\n")
    now_s += 2
    assert known.caller_of("new") is not None
    file.unlink()
    now_s += 2
    assert known.caller_of("new") is not None
    file.write_text(entry("search", "new"))
    now_s += 2
    assert known.caller_of("one") is None
    assert known.caller_of("new") is not None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "keys: Field required"),
        ("keys = []", "has no keys: make one with quartet-gateway new-key"),
        ("[[keys]", "not valid TOML"),
        ('[[keys]]\nname = "a"\nsha256 = "my-secret-key"\nscopes = ["score"]', r"keys\.0\.sha256: String should match"),
        (entry("a", "k", 'scopes = ["all"]'), r"keys\.0\.scopes"),
        (entry("a", "k", "scopes = []"), r"keys\.0\.scopes"),
        (entry("a b", "k"), r"keys\.0\.name"),
        (
            entry("a", "k", 'scopes = ["score"]', "tokens_per_minute = 0"),
            r"tokens_per_minute: .* greater than or equal",
        ),
        (entry("a", "k", 'scopes = ["score"]', "rate = 1"), r"rate: Extra inputs"),
        (entry("a", "k") + "\n" + entry("a", "l", 'scopes = ["admin"]'), "'a' differ in scopes or limits"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_entry_and_field_and_never_quoted(
    tmp_path: Path, content: str, told: str
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(KeyFileError, match=told) as error:
        read_keys(path)
    assert "my-secret-key" not in str(error.value)
    with pytest.raises(StartError, match=r"^--keys: "):
        Keys(path)


def test_new_keys_are_printed_once_kept_as_hashes_and_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    keys.main(["--keys", str(path), "--name", "search", "--scopes", "score,generate", "--tokens-per-minute", "500"])
    first = capsys.readouterr().out.strip()
    keys.main(["--keys", str(path), "--name", "ops", "--scopes", "admin"])
    second = capsys.readouterr().out.strip()
    assert first.startswith("qk_")
    assert len(first) > 40
    assert first != second
    content = path.read_text()
    assert first not in content
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    known = Keys(path)
    assert known.caller_of(first) == Caller(
        name="search", scopes=frozenset({Scope.SCORE, Scope.GENERATE}), tokens_per_minute=500
    )
    assert known.caller_of(second).name == "ops"  # type: ignore[union-attr]
    with pytest.raises(SystemExit, match="differ in scopes or limits"):
        keys.main(["--keys", str(path), "--name", "ops", "--scopes", "score"])
    assert path.read_text().startswith(content)
    assert [*tmp_path.iterdir()] == [path]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of both clocks, which tests move; a midnight at 0."""
    now = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keys.time, "time", lambda: now[0])
    return now


def test_requests_a_minute_come_back_as_time_goes(clock: list[float]) -> None:
    limits, caller = Limits(), Caller(name="a", requests_per_minute=6)
    assert [limits.admit(caller, 0) for _ in range(6)] == [None] * 6
    refused = limits.admit(caller, 0)
    assert refused is not None
    assert refused.detail == "key 'a' may send 6 requests a minute"
    assert refused.retry_after_s == pytest.approx(10.0)
    clock[0] += 9.99
    assert limits.admit(caller, 0) is not None
    clock[0] += 0.02
    assert limits.admit(caller, 0) is None
    assert limits.admit(Caller(name="b", requests_per_minute=6), 0) is None
    assert limits.usage["a"].requests == 7


def test_tokens_are_taken_by_estimate_settled_and_owed(clock: list[float]) -> None:
    limits, caller = Limits(), Caller(name="a", tokens_per_minute=600)
    assert limits.admit(caller, 100) is None
    limits.settle(caller, 400)  # It took 500.
    refused = limits.admit(caller, 200)  # 100 are there.
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(10.0)
    clock[0] += 10
    assert limits.admit(caller, 200) is None
    limits.settle(caller, -200)  # It took none.
    assert limits.admit(caller, 200) is None
    clock[0] += 60
    # More than a minute's worth is let in when a whole minute's is there, and owed.
    assert limits.admit(caller, 1800) is None
    refused = limits.admit(caller, 1)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(120.1)
    assert limits.usage["a"].tokens == 500 + 200 + 1800


def test_a_day_ends_at_midnight_utc(clock: list[float]) -> None:
    limits, caller = Limits(), Caller(name="a", tokens_per_day=1000)
    clock[0] = 86_400 * 3 - 60.0
    assert limits.admit(caller, 900) is None
    refused = limits.admit(caller, 200)
    assert refused is not None
    assert "may use 1000 tokens a day (UTC), and 100 are left: this request takes about 200" in refused.detail
    assert refused.retry_after_s == pytest.approx(60.0)
    clock[0] += 61
    assert limits.admit(caller, 200) is None
    assert limits.usage["a"].tokens_today == 200
