"""Locks, and files that are complete or absent."""

import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kdistill import files
from kdistill.errors import InputError
from kdistill.schema import Whole


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
        assert re.fullmatch(r"\.part-\w+-report\.json", part.name)
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))  # as other files, not the owner's alone
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


def test_an_unfinished_file_is_never_one_that_was_there(tmp_path, monkeypatch):
    """Neither a link nor a file in the place of the unfinished one is written to, even if its name is guessed."""
    import tempfile

    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["guessed", "taken", "free"])
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
    (tmp_path / ".part-guessed-a.json").symlink_to(victim)
    (tmp_path / ".part-taken-a.json").write_text("another's")
    (tmp_path / "a.json").symlink_to(victim)
    files.write_text(tmp_path / "a.json", "{}")
    assert victim.read_text() == "precious" and not (tmp_path / "a.json").is_symlink()
    assert (tmp_path / ".part-taken-a.json").read_text() == "another's" and next(names, None) is None


@pytest.mark.parametrize("kind", ["link", "hard link", "content", "pipe"])
def test_a_lock_empties_and_follows_nothing(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = tmp_path / ".lock"
    {
        "link": lambda: lock.symlink_to(victim),
        "hard link": lambda: os.link(victim, lock),
        "content": lambda: lock.write_text("notes"),
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(InputError, match="is no lock file"):
        files.exclusive_lock(lock)
    assert victim.read_text() == "precious"


def test_names_from_files_stay_in_their_folder(tmp_path):
    (tmp_path / "run/in").mkdir(parents=True)
    (tmp_path / "run/in/to_itself").symlink_to(tmp_path / "run/in")
    (tmp_path / "run/up").symlink_to(tmp_path)
    run = tmp_path / "run"
    for name in ("in/a.png", "a", "./in/../a", "in/to_itself/a.png"):
        assert run in files.inside(run, name).parents
    for name in ("", ".", "..", "../a", "in/../../a", "/etc/passwd", "up/a", "a\0", "in/../..", "x" * 5000 + "/.."):
        with pytest.raises(InputError, match="is no file inside of the folder"):
            files.inside(run, name)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "pipe", "deep"])
def test_a_folder_with_links_is_refused(tmp_path, kind):
    (tmp_path / "run/deep/er").mkdir(parents=True)
    (tmp_path / "run/deep/er/a").write_text("a")
    files.check_no_links(tmp_path / "run")
    path = tmp_path / ("run/deep/er/x" if kind == "deep" else "run/x")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"file": __file__, "folder": tmp_path, "deep": tmp_path}.get(kind, "nowhere"))
    with pytest.raises(InputError, match="x' is (a link|no plain file)"):
        files.check_no_links(tmp_path / "run")


def test_a_json_file_fits_its_schema_or_is_one_message(tmp_path):
    path, shape = tmp_path / "a.json", {"count": Whole(1, 9), "names": [str], "rate?": (float, None)}
    for text in ('{"count": 3, "names": [], "more": 1}', '{"count": 3, "names": ["a"], "rate": null}'):
        path.write_text(text)
        assert files.read_json(path, shape)["count"] == 3
    for text, message in (
        ("[]", "it expects an object, received list of 0 values"),
        ('{"count": 3}', "it lacks names"),
        ('{"count": true, "names": []}', "'count' expects a whole number from 1 to 9, received True"),
        ('{"count": 3.0, "names": []}', "'count' expects a whole number"),
        ('{"count": 10, "names": []}', "'count' expects a whole number"),
        ('{"count": 3, "names": ["a", 1]}', "'names.1' expects a text, received 1"),
        ('{"count": 3, "names": [], "rate": NaN}', "'rate' expects a finite number or null, received nan"),
        ('{"count": 3, "names": [], "rate": "\\u001b[31m"}', r"received '\\x1b\[31m'"),
        ("[" * 5000, "too deep inside of each other"),
        ("1" + "0" * 5000, "is damaged"),
        ('{"count": 3, "names": [], "x": ' + "[" * 200 + "]" * 200 + "}", "too deep inside of each other"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            files.read_json(path, shape, "Delete it.")
    with pytest.raises(InputError, match="has 5,001 bytes, of at most 5,000"):
        files.read_json(path, most=5000) if path.write_text("1" * 5001) else None
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is no plain file"):
        files.read_json(path)


def raised(*errors):
    """The last of these errors, each following from the one before."""
    for before, error in zip((None, *errors), errors, strict=False):
        error.__cause__ = before
    return errors[-1]


FULL = {
    "the system": lambda: OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
    "a quota": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "numpy": lambda: OSError("160000 requested and 4096 written"),
    "TensorFlow": lambda: RuntimeError("{{node}} /tmp/part-0.tempstate; No space left on device [Op:SaveV2]"),
    "one that follows": lambda: raised(OSError(errno.ENOSPC, "x"), ValueError("a"), InputError("cannot be converted")),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_temporary_folder_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="set TMPDIR to another folder") as error, files.temporary_folder() as folder:
        assert Path(folder).is_dir()
        raise FULL[kind]()
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_in_a_temporary_folder_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for error in (ValueError("damaged"), OSError(errno.EACCES, "denied"), KeyboardInterrupt(), InputError("bad")):
        with pytest.raises(type(error)) as received, files.temporary_folder():
            raise error
        assert received.value is error and list(tmp_path.iterdir()) == []
