"""Files: parsed as their formats say, or refused; published files are the published ones to the bit."""

import gzip
import hashlib
import http.server
import io
import itertools
import struct
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from gdjax.problems import _formats as formats
from gdjax.problems import _sources as sources


def to_idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def to_libsvm(features, labels):
    file = io.BytesIO()
    dump_svmlight_file(features, labels, file, zero_based=False)
    return file.getvalue()


SMALL = arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, max_side=5))
TABLE = np.asarray([[0.0, -2.5, 0.0], [1e-3, 0.0, 7.0], [0.0, 0.0, 0.0], [3.0, 4.0, 1e20]])


@given(SMALL)
def test_idx_is_read_as_it_was_written(array):
    np.testing.assert_array_equal(formats.idx(to_idx(array)), array, strict=True)


@given(SMALL, st.data())
def test_idx_with_a_changed_header_or_length_is_refused(array, data):
    content = to_idx(array)
    header = 4 + 4 * array.ndim
    changed = bytearray(content)
    changed[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="IDX"):
        formats.idx(bytes(changed))
    with pytest.raises(ValueError, match="IDX"):
        formats.idx(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="IDX"):
        formats.idx(content + b"\0")


@pytest.mark.parametrize("shape", [(0,), (4, 0)])
def test_an_empty_idx_is_refused(shape):
    """The header of no rows of 4 is, but for its number of axes, a file of 4 zeros."""
    with pytest.raises(ValueError, match="at least one byte, but 0 bytes follow"):
        formats.idx(to_idx(np.zeros(shape, np.uint8)))


def test_a_hostile_idx_header_allocates_nothing():
    tracemalloc.start()
    for num_axes in (1, 4, 255):
        with pytest.raises(ValueError, match="IDX header"):
            formats.idx(struct.pack(f">HBB{num_axes}I", 0, 8, num_axes, *[2**31] * num_axes) + b"data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_other_idx_types_are_named():
    with pytest.raises(ValueError, match=r"element type 0x0D is not 0x08, unsigned byte"):
        formats.idx(bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0]))


def test_cifar_pixels_are_where_the_format_puts_them():
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (3, 3073), np.uint8)
    records[:, 0] = [9, 0, 5]
    images, labels = formats.cifar10(records.tobytes())
    np.testing.assert_array_equal(labels, [9, 0, 5])
    for i, row, column, colour in [(0, 0, 0, 0), (1, 3, 31, 1), (2, 31, 30, 2)]:
        assert images[i, row, column, colour] == records[i, 1 + 1024 * colour + 32 * row + column]
    with pytest.raises(ValueError, match="CIFAR-10 content of 9218 bytes"):
        formats.cifar10(records.tobytes()[:-1])
    with pytest.raises(ValueError, match="CIFAR-10 content of 0 bytes"):
        formats.cifar10(b"")
    records[1, 0] = 10
    with pytest.raises(ValueError, match="record 1 has the label 10"):
        formats.cifar10(records.tobytes())


def test_libsvm_is_read_as_scikit_learn_wrote_it():
    labels = np.asarray([1.0, -1.0, 0.5, -2.0])
    features, found = formats.libsvm(to_libsvm(TABLE, labels), num_features=3)
    np.testing.assert_array_equal(features, TABLE)
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no lines"),
        (b"+1 1:2\n\n-1 1:3\n", "line 2"),
        (b"+1 0:2\n", "line 1: indices must rise from 1"),
        (b"+1 2:2 2:3\n", "line 1: indices"),
        (b"+1 3:2 2:3\n", "line 1: indices"),
        (b"+1 4:2\n", "at most 3"),
        (b"+1 99999999999:2\n", "line 1 is not"),
        (b"1:2 2:3\n", "line 1 is not"),
        (b"+1 1:\n", "line 1 is not"),
        (b"+1 1:1_0\n", "line 1 is not"),
        (b"+1 1:nan\n", "line 1 is not"),
        (b"+1 1:1e999\n", "row 1 holds a number that is NaN or infinite"),
        (b"+1 1:2\n\xff\n", "line 2 is not ASCII text: byte 0xFF"),
        (b"+1 " + b"1" * 100_000, "line 1 is not"),
    ],
)
def test_libsvm_that_is_not_of_its_form_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        formats.libsvm(content, num_features=3)


@given(st.data())
def test_damaged_text_is_refused_or_says_what_others_read_in_it(data):
    labels = np.asarray([1.0, -1.0, 1.0, -1.0])
    kind = data.draw(st.sampled_from(["libsvm", "delimited"]))
    table = b"\n".join(b" ".join(b"%g" % x for x in row) for row in TABLE)
    content = bytearray(to_libsvm(TABLE, labels) if kind == "libsvm" else table)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    content = bytes(content)
    try:
        if kind == "libsvm":
            features, found = formats.libsvm(content, num_features=3)
        else:
            rows = formats.delimited(content)
    except ValueError:
        return
    if kind == "libsvm":
        expected, expected_labels = load_svmlight_file(io.BytesIO(content), n_features=3, zero_based=False)
        np.testing.assert_array_equal(features, expected.toarray())
        np.testing.assert_array_equal(found, expected_labels)
    else:
        np.testing.assert_array_equal(rows, [[float(x) for x in line.split()] for line in content.splitlines()])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "no lines"),
        (b"1 2\n3\n", "table of numbers.*row 2"),
        (b"1 2\n\n3 4\n", "1 of its 3 lines are blank"),
        (b"a b\n1 2\n", "table of numbers"),
        (b"1 nan\n", "row 1 holds"),
        (b"1 2\n-inf 2\n", "row 2 holds"),
        (b"# 1 2\n3 4\n", "table of numbers"),
    ],
)
def test_a_table_that_is_not_one_of_numbers_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        formats.delimited(content)


def test_tables_have_rows_and_columns_whatever_their_size():
    assert formats.delimited(b"1;2\r\n3;4\r\n", delimiter=";").tolist() == [[1, 2], [3, 4]]
    assert formats.delimited(b"1\n2\n").shape == (2, 1)
    assert formats.delimited(b"1 2").shape == (1, 2)


@given(st.text(min_size=1))
def test_characters_spell_the_text(text):
    tokens, vocabulary = formats.characters(text.encode())
    assert "".join(vocabulary[i] for i in tokens) == text
    assert list(vocabulary) == sorted(set(text))


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="position 2"):
        formats.characters(b"ab\xff")
    with pytest.raises(ValueError, match="empty"):
        formats.characters(b"")


CONTENT = bytes(range(256)) * 8


@pytest.fixture
def known(monkeypatch):
    """A published set of one gzip and one plain file, at an address that a test may replace."""

    def at(address):
        digest = hashlib.sha256(CONTENT).hexdigest()
        zipped = sources.Source("some/zipped", f"{address}/zipped.gz", len(CONTENT), digest)
        plain = sources.Source("some/plain", f"{address}/plain", len(CONTENT), digest)
        monkeypatch.setitem(sources.KNOWN, "known", (zipped, plain))

    at("https://example.invalid")
    return at


@pytest.fixture
def server():
    """A server of this machine: {path: (status, headers, body)}; a test fills the dictionary."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()
        thread.join()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(folder, zipped=None, plain=None):
    (folder / "some").mkdir(exist_ok=True)
    for name, content in {"zipped.gz": zipped, "plain": plain}.items():
        if content is not None:
            (folder / "some" / name).write_bytes(content)


def test_files_are_found_zipped_or_not_by_argument_or_environment(known, tmp_path, monkeypatch):
    write(tmp_path, gzip.compress(CONTENT), CONTENT)
    assert sources.contents("known", tmp_path) == [CONTENT, CONTENT]
    for name in ("zipped.gz", "plain"):
        (tmp_path / "some" / name).unlink()
    (tmp_path / "some" / "zipped").write_bytes(CONTENT)
    (tmp_path / "some" / "plain.gz").write_bytes(gzip.compress(CONTENT))
    monkeypatch.setenv("GDJAX_DATA", "/nowhere")  # and restores it at the end
    with pytest.raises(ValueError, match=r"data='.*absent' is not a folder"):
        sources.read_from(tmp_path / "absent")
    sources.read_from(tmp_path)
    assert sources.contents("known") == [CONTENT, CONTENT]


def test_a_folder_that_is_not_given_and_a_file_that_is_missing_are_named(known, tmp_path, monkeypatch):
    monkeypatch.delenv("GDJAX_DATA", raising=False)
    with pytest.raises(ValueError, match=r"known is read from a folder: name it by --data or .* GDJAX_DATA"):
        sources.contents("known")
    write(tmp_path, gzip.compress(CONTENT))
    with pytest.raises(ValueError, match=r"some/plain\[.gz\] is missing: get it from https://example.invalid/plain"):
        sources.contents("known", tmp_path)


@given(st.data())
def test_a_damaged_file_is_refused_or_has_the_right_content(tmp_path_factory, data):
    source = sources.Source("x", "https://example.invalid/x", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    good = gzip.compress(CONTENT) if (zipped := data.draw(st.booleans())) else CONTENT
    damaged = bytearray(good)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[data.draw(st.integers(0, len(good) - 1)) :]
    path = tmp_path_factory.getbasetemp() / ("x.gz" if zipped else "x")
    path.write_bytes(damaged)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sources.KNOWN, "x", (source,))
            [content] = sources.contents("x", path.parent)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert source.url in str(error)  # noqa: PT017
    else:
        assert content == CONTENT
        assert zipped
    finally:
        path.unlink()


def test_a_file_that_unpacks_to_more_than_it_should_is_not_unpacked(known, tmp_path):
    write(tmp_path, gzip.compress(bytes(200_000_000), 1), CONTENT)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"zipped.gz holds more than 2048 bytes and not 2048\. Delete it"):
        sources.contents("known", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


def test_a_download_is_what_was_published_and_is_not_repeated(known, server, tmp_path):
    address, answers = server
    known(address)
    answers["/zipped.gz"] = 302, {"Location": "/elsewhere"}, b""
    answers["/elsewhere"] = 200, {}, gzip.compress(CONTENT)
    answers["/plain"] = 200, {}, CONTENT
    assert sources.contents("known", tmp_path / "new", download=True) == [CONTENT, CONTENT]
    assert files_below(tmp_path) == ["new/some/plain", "new/some/zipped.gz"]
    answers.clear()
    assert sources.contents("known", tmp_path / "new", download=True) == [CONTENT, CONTENT]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}, b""), "404"),
        ((200, {}, gzip.compress(CONTENT)[:-20]), "end-of-stream|Compressed"),
        ((200, {"Content-Length": "5000"}, gzip.compress(CONTENT)), "could not be fetched: .*more expected"),
        ((200, {}, CONTENT), "gzip"),
        ((200, {}, gzip.compress(CONTENT[::-1])), "SHA-256"),
        ((200, {}, gzip.compress(CONTENT + b"0")), "more than 2048 bytes"),
        ((200, {}, bytes(100_000)), "could not be fetched: it is longer than the 67584 bytes"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "could not be fetched"),
        ((302, {"Location": "file:///etc/hostname"}, b""), "could not be fetched: No connection adapters"),
        ((200, {"Transfer-Encoding": "chunked"}, b"not a length\r\n"), "could not be fetched"),
    ],
)
def test_a_download_that_fails_leaves_no_file(answer, message, known, server, tmp_path):
    address, answers = server
    known(address)
    answers["/zipped.gz"], answers["/plain"] = answer, (200, {}, CONTENT)
    with pytest.raises(ValueError, match=f"zipped.gz.*({message})"):
        sources.contents("known", tmp_path, download=True)
    assert files_below(tmp_path) == []


def test_without_pooch_it_is_said_what_to_install(known, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pooch: pip install 'gdjax\[experiments\]'"):
        sources.contents("known", tmp_path, download=True)


def test_published_files_are_described_in_full():
    described = list(itertools.chain.from_iterable(sources.KNOWN.values()))
    assert len({source.path for source in described}) == len(described) == len({s.sha256 for s in described})
    for source in described:
        assert source.url.startswith("https://")
        assert len(bytes.fromhex(source.sha256)) == 32
