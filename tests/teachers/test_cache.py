"""Teacher outputs on disk: whole or absent, named by their checksum, and never those of something else."""

import hashlib
import io
import os

import numpy as np
import pytest
from support.scripts import call

from kdistill import files
from kdistill.errors import CheckFailed, InputError
from kdistill.teachers import cache
from kdistill.teachers.cache import Cache

ABOUT = {"teacher": "t1", "data": "d1", "split": "train"}
FACTS = {"teacher_name": "lenet", "source": "files"}


def logits(rows, classes=7, seed=0):
    return np.random.default_rng(seed).normal(0, 4, (rows, classes)).astype("float32")


def filled(root, rows=10, part_rows=4, top_k=None, views=1):
    store = Cache(root, ABOUT, rows, part_rows, 7, top_k)
    store.create()
    for view in range(views):
        values = logits(rows, seed=view)
        for part in range(store.parts):
            store.write_part(view, part, values[slice(*store.row_range(part))])
    return store


def test_rows_come_back_in_any_order_rounded_to_float16(tmp_path):
    store, values = filled(tmp_path, views=2), logits(10, seed=1).astype(np.float16)
    assert store.parts == 3 and store.missing_parts(2) == []
    for rows in (slice(0, 10), slice(3, 9), slice(4, 8)):
        np.testing.assert_array_equal(store.read_rows(1, rows), values[rows])
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_array_equal(store.read_rows(1, order), values[order])
    assert store.view_bytes == values.nbytes == 140
    parts = store.read_rows(1, slice(0, 4)).base
    assert any(isinstance(part, np.memmap) for part in store._open[1]), parts


def test_whatever_decides_the_numbers_names_the_cache(tmp_path):
    store = Cache(tmp_path, ABOUT, 10, 4, 7)
    others = [
        Cache(tmp_path, {**ABOUT, "teacher": "t2"}, 10, 4, 7),
        Cache(tmp_path, {**ABOUT, "seed": 1}, 10, 4, 7),
        Cache(tmp_path, ABOUT, 11, 4, 7),
        Cache(tmp_path, ABOUT, 10, 4, 7, 2),
    ]
    assert len({store.key, *(other.key for other in others)}) == 5
    assert Cache(tmp_path, ABOUT, 10, 4, 7, description={"source": "elsewhere"}).key == store.key


def test_damaged_and_missing_parts_are_detected_and_reported(tmp_path):
    store = filled(tmp_path)
    first, second, third = sorted(store.path.glob("view-*.npy"))
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:-5])
    messages = []
    assert [row["damaged"] for row in cache.verify_caches(tmp_path)] == [[second.name, third.name]]
    assert store.missing_parts(1, messages.append) == [(0, 1), (0, 2)]
    assert len(messages) == 2 and second.name in messages[0] and not second.exists() and first.exists()
    store.write_part(0, 1, logits(10)[4:8])
    store.write_part(0, 2, logits(10)[8:])
    assert store.missing_parts(1) == [] and sorted(store.path.glob("view-*.npy")) == [first, second, third]


def test_a_part_is_computed_by_one_process_at_a_time(tmp_path):
    store = Cache(tmp_path, ABOUT, 10, 4, 7)
    store.create()
    with store.claim(0, 0) as mine:
        assert mine
        with store.claim(0, 0) as again, store.claim(0, 1) as other:
            assert not again and other
        store.write_part(0, 0, logits(4))
    with store.claim(0, 0) as done:
        assert not done, "it is there already"


def test_logits_that_float16_cannot_hold_are_refused(tmp_path):
    store = Cache(tmp_path, ABOUT, 4, 4, 7)
    store.create()
    values = logits(4)
    values[2, 3] = 70_000
    with pytest.raises(CheckFailed, match=r"outputs reach 70000; float16 ends at 65504"):
        store.write_part(0, 0, values)
    values[2, 3] = np.nan
    with pytest.raises(CheckFailed, match="nan"):
        store.write_part(0, 0, values)
    assert [path.name for path in store.path.glob("*.npy")] == []


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(tmp_path):
    store, values = filled(tmp_path, top_k=3), logits(10).astype(np.float64)
    received = store.read_rows(0, slice(0, 10))
    assert received.dtype == np.float32 and received.shape == (10, 7)
    # rest: float16; three class numbers: uint16; three logits: float16
    assert cache.bytes_per_row(7, 3) == 2 + 3 * 2 + 3 * 2 and store.view_bytes == 140
    assert cache.bytes_per_row(100_000, 3) == 2 + 3 * 4 + 3 * 2
    for row, true in zip(received.astype(np.float64), values, strict=True):
        top = np.argsort(-true)[:3]
        np.testing.assert_allclose(row[top], true[top], rtol=1e-3)
        rest = np.setdiff1d(np.arange(7), top)
        assert np.ptp(row[rest]) == 0
        mass = np.exp(true[rest]).sum() / np.exp(true).sum()
        assert np.exp(row[rest]).sum() / np.exp(row).sum() == pytest.approx(mass, rel=5e-3)


def test_list_verify_and_prune(tmp_path, monkeypatch):
    store = filled(tmp_path, views=2)
    other = Cache(tmp_path, {**ABOUT, "teacher": "t2"}, 10, 4, 7, description=FACTS)
    other.create()
    other.write_part(0, 0, logits(4))
    (tmp_path / "something of the user").mkdir()
    rows = {row["key"]: row for row in cache.list_caches(tmp_path)}
    assert rows.keys() == {store.key, other.key}
    assert (rows[store.key]["views"], rows[store.key]["parts"], rows[other.key]["views"]) == (2, 6, 0)
    assert rows[other.key]["teacher"] == "lenet" and rows[other.key]["data"] == "files"
    assert rows[store.key]["bytes"] == 2 * 140 + 6 * 128
    assert [row["damaged"] for row in cache.verify_caches(tmp_path, store.key[:6])] == [[]]
    with pytest.raises(InputError, match=f"'x' names 0 caches.*{store.key}"):
        cache.verify_caches(tmp_path, "x")
    assert cache.prune_caches(tmp_path, days=1) == [] and store.path.exists()
    assert [row["key"] for row in cache.prune_caches(tmp_path, key=other.key)] == [other.key]
    assert not other.path.exists() and store.path.exists()
    assert [row["key"] for row in cache.prune_caches(tmp_path, days=0)] == [store.key]
    assert (tmp_path / "something of the user").exists() and cache.list_caches(tmp_path / "nowhere") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot write to the teacher cache"):
        Cache(tmp_path / "file", ABOUT, 4, 4, 7).create()


def test_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path))
    assert files.cache_root() == tmp_path
    monkeypatch.delenv("KDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / "kdistill"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": 0, "part_rows": 1}', '{"rows": 1, "part_rows": "x"}', "[" * 9999]
)
def test_a_damaged_about_file_is_named_and_can_be_deleted(tmp_path, content):
    folder = tmp_path / ("0" * 16)
    folder.mkdir()
    (folder / "about.json").write_text(content)
    (row,) = cache.list_caches(tmp_path)
    assert row["views"] == 0 and "about.json" in row["damaged_about"]
    assert cache.verify_caches(tmp_path)[0]["damaged"] == ["about.json"]
    assert len(cache.prune_caches(tmp_path, "0")) == 1 and not folder.exists()


def test_links_and_pipes_in_a_cache_folder_lead_nowhere(tmp_path):
    own = cache.Cache(tmp_path / "caches", {"teacher": "a"}, rows=4, part_rows=2, classes=3)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "view-0000-part-0000-0123456789abcdef.npy").write_text("precious")
    (tmp_path / "caches").mkdir()
    own.path.symlink_to(victim)
    with pytest.raises(InputError, match="is a link, which is not followed"):
        own.create()
    assert own.missing_parts(1) == [(0, 0), (0, 1)] and cache.list_caches(tmp_path / "caches") == []
    own.path.unlink()
    own.create()
    (own.path / "view-0000-part-0000-0123456789abcdef.npy").symlink_to(
        victim / "view-0000-part-0000-0123456789abcdef.npy"
    )
    os.mkfifo(own.path / "view-0000-part-0001-0123456789abcdef.npy")
    assert own.missing_parts(1) == [(0, 0), (0, 1)]
    (own.path / ".lock-0000-0000").symlink_to(victim / "view-0000-part-0000-0123456789abcdef.npy")
    with own.claim(0, 0) as claimed:
        assert not claimed
    assert [path.read_text() for path in victim.iterdir()] == ["precious"]


def content_of(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


GOOD = logits(4).astype(np.float16)
TOP = cache.pack(logits(4), 3)
OTHER_PARTS = {
    "NaN or infinite": (None, content_of(changed(GOOD, (1, 2), np.nan))),
    "NaN or infinite numbers": (None, content_of(changed(GOOD, (3, 6), -np.inf))),
    "float32 of the shape (4, 7), expected float16": (None, content_of(GOOD.astype(np.float32))),
    "of the shape (3, 7)": (None, content_of(GOOD[:3])),
    "of the shape (28,)": (None, content_of(GOOD.ravel())),
    "of the shape (7, 4)": (None, content_of(np.ascontiguousarray(GOOD.T))),
    "it is no array": (None, content_of(np.array([[{}] * 7] * 4), allow_pickle=True)),
    "it is no array: ": (None, b"PK\x03\x04" + bytes(100)),
    "it is no array:": (None, content_of(GOOD)[:-5]),
    "NaN": (3, content_of(changed(TOP, 1, np.array((np.nan, [0, 1, 2], [1, 2, 3]), TOP.dtype)))),
    "infinite": (3, content_of(changed(TOP, 1, np.array((0, [0, 1, 2], [1, np.inf, 3]), TOP.dtype)))),
    "the class 7 of 7 classes": (3, content_of(changed(TOP, 1, np.array((0, [0, 7, 2], [1, 2, 3]), TOP.dtype)))),
    "expected [": (3, content_of(GOOD)),
}


@pytest.mark.parametrize("reason", OTHER_PARTS)
def test_a_part_with_other_content_and_a_right_checksum_is_rebuilt_and_named(tmp_path, reason):
    top_k, content = OTHER_PARTS[reason]
    store, messages = filled(tmp_path, rows=8, top_k=top_k), []
    first = next(store.path.glob("view-0000-part-0000-*.npy"))
    first.unlink()
    part = store.path / f"view-0000-part-0000-{hashlib.sha256(content).hexdigest()[:16]}.npy"
    part.write_bytes(content)
    (row,) = cache.verify_caches(tmp_path)
    assert row["damaged"] == [part.name] and reason in row["reasons"][part.name]
    ended = call("cache", "verify", "--cache", tmp_path)
    assert ended.exit_code == 1 and part.name in ended.stderr and reason in ended.stderr
    assert store.missing_parts(1, messages.append) == [(0, 0)] and not part.exists()
    assert part.name in messages[0] and reason in messages[0]
    store.write_part(0, 0, logits(8)[:4])
    assert store.missing_parts(1) == [] and first.exists()


def test_a_part_beyond_the_rows_and_a_huge_claim_are_named(tmp_path):
    store, messages = filled(tmp_path, rows=8), []
    for place, content in (("0000", b"\x93NUMPY\x01\x00"), ("0009", content_of(GOOD))):
        (store.path / f"view-0001-part-{place}-{hashlib.sha256(content).hexdigest()[:16]}.npy").write_bytes(content)
    with open(store.path / f"view-0001-part-0001-{'0' * 16}.npy", "wb") as file:  # a sparse file, which is not read
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (1 << 38, 7)})
        file.truncate((1 << 38) * 14 + 128)
    (row,) = cache.verify_caches(tmp_path)
    assert len(row["damaged"]) == 3 and "no array" in row["reasons"][row["damaged"][0]]
    assert store.missing_parts(2, messages.append) == [(1, 0), (1, 1)] and len(messages) == 2


def test_a_cache_states_the_file_of_its_teacher(tmp_path):
    origin = {"file": "runs/a/teacher\x1b.keras", "fingerprint": "0" * 16}
    Cache(tmp_path, ABOUT, 10, 4, 7, description={**FACTS, "teacher_files": [origin]}).create()
    (row,) = cache.list_caches(tmp_path)
    assert row["teacher_files"] == [origin]
    ended = call("cache", "list", "--cache", tmp_path)
    assert r"teacher lenet from runs/a/teacher\x1b.keras" in ended.stdout and "\x1b" not in ended.stdout
