r"""Parsers of standard data formats: the whole content of a file, as bytes, to numpy arrays.

A file either is what its format says or is an error; nothing is guessed, executed or unpickled, and no array is
larger than the content warrants. Formats without a checksum cannot tell a changed digit: `sources` checks the
content of published files before it is parsed here. A compressed file is read with `gzip.open(path).read()`.

>>> idx(b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes(range(6)))
array([[0, 1, 2],
       [3, 4, 5]], dtype=uint8)
>>> libsvm(b"+1 2:0.5\n-1 1:3 3:1\n", num_features=3)
(array([[0. , 0.5, 0. ],
       [3. , 0. , 1. ]]), array([ 1., -1.]))
>>> delimited(b"1,2\n3,4e-1\n", delimiter=",")
array([[1. , 2. ],
       [3. , 0.4]])
>>> characters(b"to be")
(array([4, 3, 0, 1, 2], dtype=int32), ' beot')
"""

import io
import math
import re

import numpy as np

IDX_UNSIGNED_BYTE = 0x08
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_RECORD = 1 + math.prod(CIFAR10_SHAPE)  # bytes: the label, then red, green and blue pixels row by row

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?"
LIBSVM_LINE = re.compile(rf"{NUMBER}(?:[ \t]+\d{{1,9}}:{NUMBER})*[ \t]*\r?", re.ASCII)


def idx(content: bytes) -> np.ndarray:
    """Return the array in an IDX file of unsigned bytes (LeCun's format of MNIST), uint8 with one or more axes.

    The header is two zero bytes, the element type, the number of axes, and each length as a big-endian uint32.

    Raises:
        ValueError: for another magic number or element type, an empty array, and content that is longer or shorter
            than its header says.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"not an IDX file: it must begin with two zero bytes, but begins with {content[:4]!r}")
    element_type, num_axes = content[2:4]
    if element_type != IDX_UNSIGNED_BYTE:
        raise ValueError(f"IDX element type 0x{element_type:02X} is not 0x{IDX_UNSIGNED_BYTE:02X}, unsigned byte")
    start = 4 + 4 * num_axes
    if num_axes < 1 or len(content) < start:
        raise ValueError(f"IDX header of {num_axes} axes is cut short: {len(content)} bytes")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if math.prod(shape) != len(content) - start or 0 in shape:
        raise ValueError(f"IDX header says {shape}, at least one byte, but {len(content) - start} bytes follow it")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def cifar10(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8[N, 32, 32, 3], labels uint8[N]) of a CIFAR-10 binary file.

    Raises:
        ValueError: for content that is not a whole number of records, at least one, and a label above 9.
    """
    num_examples, rest = divmod(len(content), CIFAR10_RECORD)
    if rest or not num_examples:
        raise ValueError(f"CIFAR-10 content of {len(content)} bytes is not a number of {CIFAR10_RECORD}-byte records")
    records = np.frombuffer(content, np.uint8).reshape(num_examples, CIFAR10_RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ValueError(f"CIFAR-10 record {np.argmax(labels > 9)} has the label {labels.max()}, above 9")
    return np.moveaxis(records[:, 1:].reshape(num_examples, *CIFAR10_SHAPE), 1, -1), labels


def libsvm(content: bytes, *, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (features float64[N, num_features], labels float64[N]) of LIBSVM text, 'label index:value ...' a line.

    Indices begin at 1 and rise within a line; what is not listed is zero. The arrays are dense.

    Raises:
        ValueError: names the line that is not of this form, or whose indices fall or exceed `num_features`.
        ModuleNotFoundError: without scikit-learn, whose reader this is.
    """
    try:
        from sklearn.datasets import load_svmlight_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LIBSVM text is read by scikit-learn: pip install 'gdjax[experiments]'") from error
    lines = _lines(content)
    for i, line in enumerate(lines):  # of which the reader would leave out, or guess, some
        if not LIBSVM_LINE.fullmatch(line):
            raise ValueError(f"LIBSVM line {i + 1} is not 'label index:value ...': {line[:80]!r}")
    try:
        features, labels = load_svmlight_file(
            io.BytesIO(content),
            n_features=num_features,
            zero_based=False,  # pyright: ignore[reportArgumentType]
        )[:2]
    except ValueError as error:
        for i, line in enumerate(lines):
            indices = [int(index) for index in re.findall(r"(\d+):", line)]
            if any(low >= high for low, high in zip([0, *indices], [*indices, num_features + 1], strict=True)):
                limits = f"indices must rise from 1 to at most {num_features}"
                raise ValueError(f"LIBSVM line {i + 1}: {limits}: {line[:80]!r}") from error
        raise
    features, labels = features.toarray(), np.asarray(labels)
    _check_finite(features, "LIBSVM")
    _check_finite(labels[:, None], "LIBSVM")
    return features, labels


def delimited(content: bytes, *, delimiter: str | None = None) -> np.ndarray:
    """Return rows of numbers, float64[N, D], separated by `delimiter`, one character; default: by white space.

    There is no header and no comment. The columns are for the caller to split.

    Raises:
        ValueError: for rows of unequal length and for what is not a finite number, with the row.
    """
    lines = _lines(content)
    try:
        rows = np.loadtxt(lines, delimiter=delimiter, comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"not a table of numbers: {error}") from error
    if len(rows) != len(lines):
        raise ValueError(f"not a table of numbers: {len(lines) - len(rows)} of its {len(lines)} lines are blank")
    _check_finite(rows, "table")
    return rows


def characters(content: bytes) -> tuple[np.ndarray, str]:
    """Return (tokens int32[S], vocabulary) of UTF-8 text: token i stands for `vocabulary[i]`, its i-th character.

    The vocabulary is every character of the text, in the order of Unicode.

    Raises:
        ValueError: for an empty text and for bytes that are not UTF-8, with their position.
    """
    text = content.decode("utf-8")  # UnicodeDecodeError is a ValueError and gives the position
    if not text:
        raise ValueError("the text is empty")
    code_points, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    return tokens.astype(np.int32), "".join(map(chr, code_points))


def _lines(content: bytes) -> list[str]:
    """Return the lines of ASCII text, without a blank end."""
    try:
        text = content.decode("ascii").rstrip()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not ASCII text: byte 0x{content[error.start]:02X}") from error
    if not text:
        raise ValueError("the file has no lines")
    return text.split("\n")


def _check_finite(rows: np.ndarray, name: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if wrong.size:
        raise ValueError(f"{name} row {wrong[0] + 1} holds a number that is NaN or infinite")
