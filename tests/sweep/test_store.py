import subprocess
import sys

import numpy as np
import pytest

from gdjax import _files
from gdjax.sweep import _store as store

IDENTITY = {"jax": "0.10.2", "chunk_size": 8}
ARRAYS = [np.arange(12.0).reshape(3, 4), np.asarray([True, False, True]), np.arange(3, dtype=np.int8)]


@pytest.fixture
def folder(tmp_path):
    with store.locked(tmp_path / "a" / "store") as folder:
        yield folder


@pytest.fixture
def key(folder):
    return store.claim(folder, IDENTITY)


def read(folder, key, index):
    return store.read(key, index, store.listed(folder))


def equal(chunk, arrays=ARRAYS):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(chunk, arrays, strict=True))


def test_a_chunk_is_read_as_it_was_written(folder, key):
    many = [np.full(2, i) for i in range(12)]
    store.write(folder, key, 0, ARRAYS)
    store.write(folder, key, 1, many)
    assert equal(read(folder, key, 0))
    assert equal(read(folder, key, 1), many)
    assert read(folder, key, 2) is None


def test_every_changed_byte_and_every_truncation_is_noticed_and_the_file_dropped(folder, key):
    store.write(folder, key, 0, ARRAYS)
    [path] = folder.glob("chunk-*")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [content[:0], content[:1], content[:-1], content[: len(content) // 2], content + b"\0"]
    for place in rng.integers(len(content), size=200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="is damaged, or of another store: it is removed and computed again"):
            assert read(folder, key, 0) is None
        assert not path.exists()
    path.write_bytes(content)
    assert equal(read(folder, key, 0))


@pytest.mark.parametrize("elsewhere", ["another position", "another store"])
def test_a_chunk_that_was_carried_here_is_dropped(folder, key, elsewhere):
    store.write(folder, key, 0, ARRAYS)
    [path] = folder.glob("chunk-*")
    index = 7 if elsewhere == "another position" else 0
    path.rename(folder / path.name.replace("00000", f"{index:05d}"))
    with pytest.warns(UserWarning, match="of another store"):
        assert read(folder, key if index else _files.digest(b"other"), index) is None


def test_a_store_made_otherwise_is_refused_naming_only_what_differs(folder, key):
    assert store.claim(folder, IDENTITY) == key
    with pytest.raises(ValueError, match=r"another sweep: jax was '0.10.2' and is '0.12.0'\. Use a folder"):
        store.claim(folder, {"jax": "0.12.0", "chunk_size": 8})
    with pytest.raises(ValueError, match=r"another sweep: seed was None and is 3\."):
        store.check(folder, {"seed": 3})
    store.check(folder, {"chunk_size": 8})


def test_what_a_dead_process_was_writing_is_removed_and_nothing_else(tmp_path):
    with store.locked(tmp_path) as folder:
        store.write(folder, store.claim(folder, IDENTITY), 0, ARRAYS)
        before = sorted(folder.iterdir())
        for name in (".chunk-00001-abc.npz.x7", ".chunk-00002-abc.npz.x7", ".store.json.y8", "chunk-00001.lock"):
            (folder / name).write_bytes(b"half")
    with store.locked(tmp_path) as folder:
        assert not list(folder.glob(".store.json.*"))
        assert len(list(folder.glob(".chunk-*"))) == 2  # somebody may be writing them
        with store.claimed(folder, 1) as mine:
            assert mine
            assert [path.name for path in folder.glob(".chunk-*")] == [".chunk-00002-abc.npz.x7"]
            with store.claimed(folder, 1) as twice, store.claimed(folder, 3) as other:
                assert (twice, other) == (False, True)
        store.tidied(folder)
        assert sorted(folder.iterdir()) == before


HOLDER = """
import sys, time
from pathlib import Path
from gdjax.sweep import _store as store
with store.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "store"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on \S+, begun 2"):
            store.locked(tmp_path / "store", wait=0).__enter__()
        holder.kill()
    with (
        pytest.warns(UserWarning, match=rf"taken over from process {holder.pid} on .* ended without finishing"),
        store.locked(tmp_path / "store") as folder,
        pytest.raises(ValueError, match="is in use by process"),
        store.locked(folder, wait=0),
    ):
        pass
    with store.locked(tmp_path / "store"):  # and no warning after one that ended well
        pass


def test_the_name_of_a_holder_that_is_not_text_is_taken_over_all_the_same(tmp_path):
    (tmp_path / "lock.holder").write_bytes(b"process \xff")
    with pytest.warns(UserWarning, match="taken over from process \ufffd, which ended"), store.locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["lock", "lock.holder"])
def test_a_lock_that_is_a_symbolic_link_leaves_what_it_names_as_it_is(tmp_path, name):
    """Whoever can write into the folder could empty any file of ours by it."""
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(tmp_path / "precious")
    if name == "lock":
        with pytest.raises(ValueError, match=r"store='.*' cannot be locked by its file 'lock' \(.*symbolic links"):
            store.locked(tmp_path / "store").__enter__()
    else:
        with pytest.warns(UserWarning, match="taken over from kept"), store.locked(tmp_path / "store"):
            pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_nothing_of_the_lock_is_left_where_it_was_released(tmp_path):
    with store.locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "lock.holder"]
    assert list(tmp_path.iterdir()) == []


def test_without_filelock_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(ModuleNotFoundError, match=r"filelock: pip install 'gdjax\[experiments\]'"):
        store.locked(tmp_path).__enter__()


def test_folders_that_cannot_be_a_store_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"store='.*' cannot be written: (File exists|Not a directory)"):
            store.locked(path).__enter__()
    with pytest.raises(ValueError, match="store='' names no folder"):
        store.locked("").__enter__()
    with pytest.raises(ValueError, match=r"is no store, but a folder with other files \(file\)"):
        store.locked(tmp_path).__enter__()


@pytest.mark.parametrize(
    "content", ['{"identity', "[]", '{"identity": []}', "[" * 100_000, '{"identity": {}, "checksum": ""}']
)
def test_an_identity_that_cannot_be_read_is_refused_and_not_written_over(content, tmp_path):
    (tmp_path / "store.json").write_text(content)
    with (
        store.locked(tmp_path) as folder,
        pytest.raises(ValueError, match=r"store\.json cannot be read .*: use another"),
    ):
        store.claim(folder, IDENTITY)
    assert (tmp_path / "store.json").read_text() == content


def test_every_changed_byte_of_an_identity_is_noticed(folder, key):
    """For a chunk size that is read back and not the one written would make other chunks of the same lanes."""
    path = folder / "store.json"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content), size=200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert store.recorded(folder) == IDENTITY  # what changed was white space
        except ValueError as error:
            assert "store.json cannot be read" in str(error)  # noqa: PT017
    for length in range(len(content) - 2):  # but for the brace and the newline at the end
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"store\.json cannot be read"):
            store.recorded(folder)


def test_a_folder_that_is_read_only_is_refused(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_files.tempfile, "TemporaryFile", refused)  # root may write where nobody may
    with pytest.raises(ValueError, match=r"store='.*' cannot be written: Permission denied"):
        store.locked(tmp_path).__enter__()


def test_a_full_disk_is_named_and_leaves_the_chunks_before_it_intact(folder, key):
    resource = pytest.importorskip("resource")
    store.write(folder, key, 0, ARRAYS)
    before = sorted(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"chunk 1, 80,\d+ bytes, could not be written into store=.*: make room"):
            store.write(folder, key, 1, [np.zeros(10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(folder.iterdir()) == before
    assert equal(read(folder, key, 0))
