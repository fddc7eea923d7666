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
