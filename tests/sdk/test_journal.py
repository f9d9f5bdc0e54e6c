"""The journal of an answer: whatever happens to file or process, what is read is a beginning of what was said."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import FileError
from nearfar.journal import MAX_BYTES, RECORD_BYTES, Journal, JournalHead, pack_head, parse
from nearfar.ledger import Draft, Final, Ledger

HEAD = JournalHead(bytes(range(16)), b"s" * 16, b"fingerprint of the model", (1, 5, 70000))
IDS = [9, 8, 2**32 - 1, 7, 7]
CRCS = [11, 0, 2**32 - 1, 14, 15]


def written(path: Path, n: int = len(IDS)) -> Path:
    """A journal of `n` tokens that was kept."""
    journal = Journal.create(path, HEAD)
    for i in range(n):
        journal.append([3 + i], [IDS[i]], [CRCS[i]])
    journal.close(keep=True)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answer.journal"


# ------------------------------------------------------------ what is written is read


def test_what_is_written_is_read(path: Path) -> None:
    state = Journal.read(written(path))
    assert (state.head, state.ids, state.crcs, state.n_torn) == (HEAD, IDS, CRCS, 0)
    assert state.text == [1, 5, 70000, *IDS]


def test_tokens_written_together_are_those_written_alone(path: Path, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "together", HEAD)
    journal.append(range(3, 3 + len(IDS)), IDS, CRCS)
    journal.close(keep=True)
    assert (tmp_path / "together").read_bytes() == written(path).read_bytes()


def test_the_layout_is_the_one_that_the_module_draws(path: Path) -> None:
    data = written(path, 2).read_bytes()
    assert data[:8] == b"NFANSWER"
    assert [int.from_bytes(data[at : at + 4], "little") for at in (8, 12, 16)] == [1, len(HEAD.fingerprint), 3]
    assert data[20:52] == HEAD.session + HEAD.settings
    assert data[52:].startswith(HEAD.fingerprint + b"".join(i.to_bytes(4, "little") for i in HEAD.prompt))
    assert data[-RECORD_BYTES:].startswith(b"".join(i.to_bytes(4, "little") for i in (4, IDS[1], CRCS[1])))


def test_a_journal_in_memory_holds_the_bytes_of_a_file(path: Path) -> None:
    journal = Journal.in_memory(HEAD)
    journal.append([3, 4], IDS[:2], CRCS[:2])
    assert journal.state() == Journal.read(written(path, 2))
    journal.close()
    with pytest.raises(FileError):
        journal.state()


def test_the_state_of_an_open_file_is_what_a_reader_finds(path: Path) -> None:
    journal = Journal.create(path, HEAD)
    journal.append([3], IDS[:1], CRCS[:1])
    assert journal.state() == Journal.read(path)
    journal.close()


def test_an_answer_is_taken_up_where_it_was_left(path: Path) -> None:
    written(path, 2)
    journal, state = Journal.resume(path)
    assert state.ids == IDS[:2]
    journal.append([5, 6], IDS[2:4], CRCS[2:4])
    journal.close(keep=True)
    assert Journal.read(path).ids == IDS[:4]


def test_a_gap_is_a_bug_of_ours(path: Path) -> None:
    journal = Journal.create(path, HEAD)
    with pytest.raises(AssertionError):
        journal.append([4], [1], [1])
    journal.close()


@given(
    st.binary(max_size=64),
    st.lists(st.integers(0, 2**32 - 1), max_size=9),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=9),
)
def test_any_answer_comes_back(fingerprint: bytes, prompt: list[int], tokens: list[tuple[int, int]]) -> None:
    head = JournalHead(b"a" * 16, b"b" * 16, fingerprint, tuple(prompt))
    journal = Journal.in_memory(head)
    for i, (token, crc) in enumerate(tokens):
        journal.append([len(prompt) + i], [token], [crc])
    state = journal.state()
    assert (state.head, list(zip(state.ids, state.crcs, strict=True)), state.n_torn) == (head, tokens, 0)


# ------------------------------------------------------------ damage


def test_a_file_cut_at_any_byte_gives_the_tokens_before_the_cut(path: Path) -> None:
    data = written(path).read_bytes()
    n_head = len(pack_head(HEAD))
    for n in range(len(data)):
        path.write_bytes(data[:n])
        if n < n_head:
            with pytest.raises(FileError):
                Journal.read(path)
            continue
        n_whole, n_torn = divmod(n - n_head, RECORD_BYTES)
        state = Journal.read(path)
        assert (state.ids, state.n_torn) == (IDS[:n_whole], n_torn)


def test_a_torn_tail_is_cut_off_and_written_over(path: Path) -> None:
    data = written(path).read_bytes()
    for n in range(len(pack_head(HEAD)), len(data)):
        path.write_bytes(data[:n])
        journal, state = Journal.resume(path)
        rest = range(len(state.ids), len(IDS))
        journal.append([3 + i for i in rest], [IDS[i] for i in rest], [CRCS[i] for i in rest])
        journal.close(keep=True)
        assert path.read_bytes() == data


def test_no_flipped_bit_gives_another_token(path: Path) -> None:
    data = written(path).read_bytes()
    n_head = len(pack_head(HEAD))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit // 8 < n_head:
            with pytest.raises(FileError):
                parse(bytes(flipped))
        else:
            assert parse(bytes(flipped)).ids == IDS[: (bit // 8 - n_head) // RECORD_BYTES]


def test_records_of_another_answer_do_not_fit(path: Path, tmp_path: Path) -> None:
    other = Journal.create(tmp_path / "other", JournalHead(b"x" * 16, HEAD.settings, HEAD.fingerprint, HEAD.prompt))
    other.close(keep=True)
    records = written(path).read_bytes()[len(pack_head(HEAD)) :]
    with (tmp_path / "other").open("ab") as file:
        file.write(records)
    assert Journal.read(tmp_path / "other").ids == []


def test_a_record_in_the_wrong_place_ends_the_answer(path: Path) -> None:
    data, n_head = written(path).read_bytes(), len(pack_head(HEAD))
    records = [data[at : at + RECORD_BYTES] for at in range(n_head, len(data), RECORD_BYTES)]
    shuffled = data[:n_head] + records[0] + records[2] + records[1]
    assert parse(shuffled).ids == IDS[:1]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_journal_are_refused(data: bytes) -> None:
    with pytest.raises(FileError):
        parse(data)


@given(st.binary(max_size=200))
def test_whatever_follows_the_header_is_cut_off(tail: bytes) -> None:
    state = parse(pack_head(HEAD) + tail)
    assert (state.ids, state.n_torn) == ([], len(tail))


def test_a_header_that_promises_more_than_there_is_allocates_nothing() -> None:
    data = bytearray(pack_head(HEAD))
    data[16:20] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(FileError, match="cut short"):
        parse(bytes(data))


def test_another_version_is_refused(path: Path) -> None:
    data = bytearray(written(path).read_bytes())
    data[8] = 2
    with pytest.raises(FileError, match="version 2"):
        parse(bytes(data))


def test_what_is_no_file_or_far_too_large_is_not_read(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not a file"):
        Journal.read(tmp_path)
    os.mkfifo(path)
    with pytest.raises(FileError, match="not a file"):
        Journal.read(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(FileError, match="larger than"):
        Journal.read(path)


@pytest.mark.parametrize(
    "head",
    [
        JournalHead(b"short", HEAD.settings, b"", ()),
        JournalHead(HEAD.session, b"", b"", ()),
        JournalHead(HEAD.session, HEAD.settings, b"f" * 65, ()),
        JournalHead(HEAD.session, HEAD.settings, b"", (0,) * (MAX_BYTES // 8 + 1)),
    ],
    ids=["session", "settings", "fingerprint", "prompt"],
)
def test_a_header_that_could_not_be_read_again_is_not_written(head: JournalHead, path: Path) -> None:
    with pytest.raises(FileError, match="expected"):
        Journal.create(path, head)
    assert not path.exists()


# ------------------------------------------------------------ files and their owners


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_it(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        journal = Journal.create(path, HEAD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.close()


def test_it_is_removed_with_the_answer_unless_somebody_wants_it(path: Path) -> None:
    Journal.create(path, HEAD).close()
    assert not path.exists()
    Journal.create(path, HEAD).close(keep=True)
    assert Journal.read(path).ids == []


def test_a_kept_journal_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    size = written(path).stat().st_size
    assert synced == [size]


def test_an_answer_that_is_there_is_not_written_over(path: Path) -> None:
    data = written(path).read_bytes()
    with pytest.raises(FileError, match="already"):
        Journal.create(path, HEAD)
    assert path.read_bytes() == data


def test_a_link_that_somebody_laid_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="already"):
        Journal.create(path, HEAD)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for call in (lambda p: Journal.create(p, HEAD), Journal.read, Journal.resume):
        with pytest.raises(FileError, match="nowhere"):
            call(tmp_path / "nowhere" / "answer")


# ------------------------------------------------------------ a full disk


def fails_after(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """The disk takes so many bytes more."""
    real, left = os.write, n_bytes

    def write(fd: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = real(fd, data[:left])
        left -= n
        return n

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("room", [0, 1, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 2 * RECORD_BYTES - 1])
def test_a_full_disk_is_an_error_that_leaves_whole_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    journal = Journal.create(path, HEAD)
    journal.append([3], IDS[:1], CRCS[:1])
    with monkeypatch.context() as patch:
        fails_after(patch, room)
        with pytest.raises(FileError, match="No space left on device"):
            journal.append([4, 5], IDS[1:3], CRCS[1:3])
    assert path.stat().st_size == len(pack_head(HEAD)) + RECORD_BYTES
    with pytest.raises(FileError, match="nothing more"):  # the tokens that failed are missing before these
        journal.append([6], IDS[3:4], CRCS[3:4])
    journal.close(keep=True)
    assert Journal.read(path).ids == IDS[:1]


def test_a_disk_that_takes_bytes_one_by_one_gets_them_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1]))
    assert Journal.read(written(path)).ids == IDS


def test_a_disk_that_is_full_from_the_beginning_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_after(monkeypatch, 10)
    n_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(FileError, match="No space left"):
        Journal.create(path, HEAD)
    assert not path.exists()
    assert not n_open or len(os.listdir("/proc/self/fd")) == n_open


def test_a_limit_of_the_system_is_an_error_too(path: Path) -> None:
    """A real write that the kernel refuses in the middle of a record."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from nearfar.errors import FileError
        from nearfar.journal import Journal, JournalHead
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        journal = Journal.create(Path(sys.argv[1]), JournalHead(b"a" * 16, b"b" * 16, b"", (1,)))
        try:
            for i in range(1, 100):
                journal.append([i], [i], [0])
        except FileError as error:
            print(i, error)
        journal.close(keep=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "File too large" in said
    assert Journal.read(path).ids == list(range(1, int(said.split()[0])))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200


# ------------------------------------------------------------ with the ledger


def test_a_process_killed_at_any_time_has_written_what_it_said(path: Path) -> None:
    """It says a token only after the write, so whoever reads the journal finds every token that was said."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from nearfar.journal import Journal, JournalHead
        journal = Journal.create(Path(sys.argv[1]), JournalHead(b"a" * 16, b"b" * 16, b"", (1,)))
        for i in range(1, 1 << 30):
            journal.append([i], [1000 + i], [0])
            os.write(1, f"{1000 + i}\\n".encode())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(50)]
        process.kill()
        said += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    assert Journal.read(path).ids[: len(said)] == said == list(range(1001, 1001 + len(said)))


def test_a_kill_between_writing_and_telling_costs_no_token_and_doubles_none() -> None:
    for n_told in range(4):
        ledger = Ledger([1, 5, 70000])
        journal = Journal.in_memory(HEAD)
        told: list[int] = []
        for i, token in enumerate([9, 8, 7]):
            finals = [e for e in ledger.decide(token, Draft("exit.2", 0.9)) if isinstance(e, Final)]
            journal.append([f.index for f in finals], [f.id for f in finals], [0] * len(finals))
            if i == n_told:
                break  # killed here: written and not told
            told += [f.id for f in finals]
        state = journal.state()
        again = Ledger(state.text, n_prompt=len(state.head.prompt))
        told += state.ids[len(told) :]  # the application takes up at its own last index
        assert told == again.ids[again.n_prompt :] == [9, 8, 7][: n_told + 1]
        assert (again.final, again.asked) == (len(state.text), len(state.text) - 1)
