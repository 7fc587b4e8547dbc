"""Atomic writes, checkpoints that cannot be trusted, run folders, random states."""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import (
    check_output,
    copy_whole,
    load_torch,
    save_torch,
    write_json,
    write_jsonl,
    write_whole,
)
from sparselearning.process.seeding import rng_state, seed_everything, set_rng_state
from sparselearning.training.run_folder import RunFolder, find_checkpoint

CPU = torch.device("cpu")
CONTENT = {
    "state_dict": {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(3)},
    "masks": {"w": torch.arange(12).view(3, 4) % 2 == 0},
    "epoch": 7,
    "acc": None,
    "rows": [{"lr": 0.1}],
}

# --------------------------------------------------------------------------------------------- whole or not at all


def test_a_file_appears_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file"]


def test_until_it_is_whole_readers_see_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, ")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"whole")

    write_whole(path, write)
    assert path.read_bytes() == b"new, whole"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), Killed(), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise fault

    with pytest.raises((FaultError, Killed, KeyboardInterrupt)):
        write_whole(path, write)
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_torch(path, {"w": torch.zeros(100_000)}),
        lambda path: write_json(path, {"a": 1}),
        lambda path: write_jsonl(path, [{"a": 1}]),
        lambda path: copy_whole(path.with_name("source"), path),
    ],
)
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    path.with_name("file.partial").symlink_to("/dev/full")
    with pytest.raises(FaultError) as fault:
        write(path)
    assert str(fault.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]


@pytest.mark.parametrize("room", [0, 700, 100_000])
def test_a_disk_that_fills_up_while_a_network_is_saved_is_named_as_full(tmp_path, room):
    class AlmostFull(io.BytesIO):
        def write(self, content):
            if self.tell() + len(content) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    path = tmp_path / "network.pth"
    with pytest.raises(FaultError) as fault:
        write_whole(path, lambda file: torch.save({"w": torch.zeros(100_000)}, AlmostFull()))
    assert str(fault.value) == f"cannot write {path}: No space left on device"


def test_a_folder_under_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FaultError, match="cannot write"):
        write_json(tmp_path / "file" / "run" / "config.json", {})
    with pytest.raises(FaultError, match="cannot write"):
        write_json(tmp_path / "file" / "config.json", {})
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_no_folder_can_be_made_is_one_sentence():
    with pytest.raises(FaultError, match=r"cannot write /proc/nowhere/run/config\.json"):
        write_json(Path("/proc/nowhere/run/config.json"), {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FaultError, match="Permission denied"):
        write_json(tmp_path / "config.json", {})
    tmp_path.chmod(0o700)


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FaultError, match=r"cannot write .*config\.json"):
        write_json(tmp_path / "config.json", {})


def test_json_files(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, None, True], "ü": "ß"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None, True], "ü": "ß"}
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [{"a": 1}, {"a": 2}]
    write_jsonl(tmp_path / "a.jsonl", [])
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_a_command_replaces_what_it_wrote_itself(tmp_path):
    check_output(tmp_path / "new" / "file", "made by me")
    (tmp_path / "file").write_text("made by me: 1")
    check_output(tmp_path / "file", "made by me")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_a_command_replaces_nothing_else(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "folder", "link", "pipe", "file/below", "n" * 300, "/dev/null"):
        with pytest.raises(UsageError, match=name):
            check_output(tmp_path / name, "made by me")
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------- reading tensors back


def test_tensors_and_plain_values_come_back_exactly(tmp_path):
    save_torch(tmp_path / "a.pth", CONTENT)
    back = load_torch(tmp_path / "a.pth")
    assert back.keys() == CONTENT.keys()
    for group in ("state_dict", "masks"):
        for name, tensor in CONTENT[group].items():
            assert torch.equal(back[group][name], tensor)
            assert back[group][name].dtype == tensor.dtype
    assert (back["epoch"], back["acc"], back["rows"]) == (7, None, [{"lr": 0.1}])


@pytest.mark.parametrize("path", ["nothing.pth", "."])
def test_a_missing_file_is_a_wrong_call(tmp_path, path):
    with pytest.raises(UsageError, match="there is no file"):
        load_torch(tmp_path / path)


def test_a_truncated_file_is_told_at_any_length(tmp_path):
    save_torch(tmp_path / "whole.pth", CONTENT)
    whole = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "part.pth"
    for length in [*range(0, len(whole), 37), len(whole) - 1, len(whole) - 22]:
        path.write_bytes(whole[:length])
        with pytest.raises(FaultError, match=r"part\.pth is truncated or not a file"):
            load_torch(path)


@given(garbage=st.binary(max_size=60))
@example(b"")
@example(b"{}")
@example(b"\x80\x02}q\x00")
@example(b"a")  # an opcode that pops what is not there
@example(b"PK\x03\x04")
@example(b"\x80\x02cos\nsystem\nq\x00.")
@example(b"(lp0\n.")
def test_garbage_is_a_fault_and_never_a_crash(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / "garbage.pth"
    path.write_bytes(garbage)
    with pytest.raises(FaultError, match=r"garbage\.pth"):
        load_torch(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), 5])
def test_something_else_than_a_dictionary_is_a_fault(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FaultError, match="no dictionary"):
        load_torch(tmp_path / "a.pth")


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Path.cwd() / "pwned"),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_never_runs(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"state_dict": Malicious()}, tmp_path / "a.pth")
    with pytest.raises(FaultError):
        load_torch(tmp_path / "a.pth")
    assert not (tmp_path / "pwned").exists()


# --------------------------------------------------------------------------------------------------- run folders


def test_names_of_the_files(tmp_path):
    folder = RunFolder(tmp_path)
    names = {path.name for name, path in vars(folder).items() if name != "path"}
    assert names == {
        "config.json", "metrics.jsonl", "tickets.jsonl", "summary.json", "checkpoint.pth", "model_current.pth",
        "model_previous.pth", "model_ema.pth", "analysis.json", "wandb_id.txt", ".lock",
    }  # fmt: skip
    assert folder.ticket(3).parent == tmp_path / "tickets"


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "my-package"}')
    (tmp_path / "src.py").write_text("mine")
    with pytest.raises(UsageError, match=r"config\.json"):
        RunFolder(tmp_path).make_room()
    assert (tmp_path / "src.py").read_text() == "mine"


@pytest.mark.parametrize("path", ["run", "run/checkpoint.pth", "run/model_previous.pth", "run/checkpoints/epoch_2.pth"])
def test_the_run_that_a_file_belongs_to(tmp_path, path):
    (tmp_path / "run").mkdir()
    assert RunFolder.of(tmp_path / path).path == tmp_path / "run"


def test_a_run_may_be_called_checkpoints(tmp_path):
    assert RunFolder.of(tmp_path / "checkpoints" / "checkpoint.pth").path == tmp_path / "checkpoints"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_is_in_the_way(tmp_path, make):
    make(tmp_path / "run")
    assert RunFolder(tmp_path / "run").make_room() is None


def test_an_earlier_run_moves_aside_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for number in (1, 2, 3):
        folder.path.mkdir()
        (folder.path / "summary.json").write_text(str(number))
        aside = folder.make_room()
        assert aside is not None
        assert not folder.path.exists()
        assert (aside / "summary.json").read_text() == str(number)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises((UsageError, FaultError)):
        RunFolder(tmp_path / "run").in_use().__enter__()
    assert (tmp_path / "run").read_text() == "a file"


def test_the_present_folder_as_a_run_is_no_crash(tmp_path, monkeypatch):
    """``--save .`` with something in it: it is moved, or refused in one sentence."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    Path("notes.txt").write_text("mine")
    try:
        RunFolder(Path(".")).make_room()
    except (UsageError, FaultError):
        assert (tmp_path / "run" / "notes.txt").exists()
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["mine"]


def test_a_folder_in_use_is_refused_and_named(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.in_use():
        with pytest.raises(FaultError, match=rf"run is in use .*process {os.getpid()}\b"), folder.in_use():
            pass
        with pytest.raises(FaultError, match="in use"), RunFolder(tmp_path / "elsewhere" / ".." / "run").in_use():
            pass
    with folder.in_use():
        pass
    assert list(folder.path.iterdir()) == []


def test_a_folder_stays_in_use_while_an_earlier_run_moves_aside(tmp_path):
    """The earlier run takes the lock along: whoever comes then must find neither of the two folders free."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.summary, {})
    with contextlib.ExitStack() as held:
        held.enter_context(folder.in_use())
        aside = folder.make_room()
        held.enter_context(folder.in_use())
        with pytest.raises(FaultError, match="in use"), folder.in_use():
            pass
    assert os.listdir(aside) == ["summary.json"]
    assert os.listdir(folder.path) == []


HOLDER = """
import sys, time
from pathlib import Path
from sparselearning.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).in_use():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_free_when_the_process_that_uses_it_dies(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder.path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(FaultError, match=rf"in use .*process {holder.pid}\b"), folder.in_use():
                pass
        finally:
            holder.kill()
    with folder.in_use():
        pass


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(tmp_path / "run").in_use() as noticed:
        assert not noticed


def test_what_resume_means(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint.pth"
    assert find_checkpoint(tmp_path / "model_current.pth") == tmp_path / "model_current.pth"


# --------------------------------------------------------------------------------------------------- random states


def draws():
    return [
        random.random(), random.gauss(0, 1), random.randrange(10**9), float(np.random.standard_normal()),  # noqa: NPY002
        *np.random.permutation(5).tolist(), torch.rand(3).tolist(), torch.randperm(6).tolist(),  # noqa: NPY002
    ]  # fmt: skip


def test_random_states_come_back_through_a_file(tmp_path):
    seed_everything(7)
    # Both Gaussian generators make two values at a time and keep one: the state has to hold it.
    random.gauss(0, 1)
    np.random.standard_normal(1)  # noqa: NPY002
    save_torch(tmp_path / "rng.pth", rng_state(CPU))
    expected = draws()
    seed_everything(8)
    assert draws() != expected
    set_rng_state(load_torch(tmp_path / "rng.pth"), CPU)
    assert draws() == expected


@pytest.mark.parametrize("seed", [0, 41, 2**32, 2**63 - 1])
def test_seeds_repeat(seed):
    seed_everything(seed)
    first = draws()
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed - 1 if seed else 1)
    assert draws() != first


def test_a_run_that_has_not_ended_is_not_copied(tmp_path):
    live = RunFolder(tmp_path / "live")
    with live.in_use():
        (live.path / "config.json").write_text("{}")
        assert live.is_in_use()
        with pytest.raises(FaultError, match="live is in use by another run: resume it once"):
            RunFolder(tmp_path / "new").copy_from(live.path)
    assert not live.is_in_use()
    assert not (tmp_path / "new").exists()
