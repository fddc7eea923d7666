"""Locks, and files that are complete or absent."""

import subprocess
import sys

import pytest

from kdistill import files
from kdistill.errors import InputError


def test_a_lock_excludes_others_until_it_is_released(tmp_path):
    lock = files.exclusive_lock(tmp_path / ".lock")
    with pytest.raises(InputError, match="is locked by another process"):
        files.exclusive_lock(tmp_path / ".lock")
    with pytest.raises(InputError, match="the folder is in use"):
        files.exclusive_lock(tmp_path / ".lock", "the folder is in use")
    lock.release()
    files.exclusive_lock(tmp_path / ".lock").release()
    assert (tmp_path / ".lock").exists()


def test_a_lock_ends_with_its_process_even_if_it_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from kdistill import files\n"
        f"lock = files.exclusive_lock(Path({str(tmp_path / '.lock')!r})); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="is locked by another process"):
            files.exclusive_lock(tmp_path / ".lock")
        process.kill()
        process.wait()
    files.exclusive_lock(tmp_path / ".lock").release()


def test_a_lock_file_that_cannot_be_created_is_an_error_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError):
        files.exclusive_lock(tmp_path)


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    files.write_text(path, "{}\n")
    with pytest.raises(OSError, match="disk full"), files.atomic_file(path, synced=True) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "{}\n" and list(tmp_path.iterdir()) == [path]
    with files.atomic_file(path, synced=True) as part:
        part.write_text("[1]")
        assert part.name == f"{files.PART}report.json"
    assert files.read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_json_file(tmp_path, content):
    (tmp_path / "finished.json").write_bytes(content)
    with pytest.raises(InputError, match=r"finished.json' is damaged \(.+\)\. Start a new run in another folder\."):
        files.read_json(tmp_path / "finished.json")


def test_a_path_that_is_no_file(tmp_path):
    for name in ("b.keras", "a.npz", f"{files.PART}c.keras", "d.txt"):
        (tmp_path / name).touch()
    assert files.existing_file(tmp_path / "b.keras", (".keras",)) == tmp_path / "b.keras"
    with pytest.raises(InputError, match="There is no file '.*e.keras'. Check the path"):
        files.existing_file(tmp_path / "e.keras", (".keras",))
    with pytest.raises(InputError, match=r"is a folder.*\(.keras, .npz\), such as \S+/a.npz, \S+/b.keras\.$"):
        files.existing_file(tmp_path, (".keras", ".npz"))
    with pytest.raises(InputError, match=r"is a folder. Give the path of a file \(.tflite\)\.$"):
        files.existing_file(tmp_path, (".tflite",))


def test_bytes_of_a_content():
    assert files.byte_sizes(bytes(1000)) == {"bytes": 1000, "deflated": 17}
