"""Data sets, real and drawn: each returns `Split(train, test)` of arrays with the examples along axis 0.

>>> split = digits()
>>> features, labels = split.train
>>> features.shape, labels.shape, split.test[1].shape
((1440, 64), (1440,), (357,))

Data that is published as files is read from a folder and checked to the bit, see `sources`; the arguments of these
functions are those of `sources.contents`. `formats` parses files of your own, and `memory_mapped` opens examples that
are larger than memory.
"""

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import _files, problem
from gdjax.problem import Batch
from gdjax.problems import _formats as formats
from gdjax.problems import _sources as sources

Folder = str | os.PathLike | None

NUM_DIGITS = 1797
NUM_DIGITS_TEST = 357  # leaves 1440 = 2^5 * 3^2 * 5 for training, which most batch sizes divide
NUM_A9A_FEATURES = 123
NUM_POWER_PLANT_TEST = 1376  # of 9568, which leaves 2^13 for training
NUM_SHAKESPEARE_CHARACTERS = 65
TEXT_TEST_FRACTION = 0.1


class Split(NamedTuple):
    """Training and test examples, two pytrees of arrays with leading axes N and N_test; `test` may be None."""

    train: Batch
    test: Batch | None


def digits(key: jax.Array | None = None) -> Split:
    """Return scikit-learn's 1797 real handwritten digits (8 x 8 pixels; Alpaydin & Kaynak 1998) as (features, labels).

    Features are float[N, 64], each pixel standardised by its mean and deviation over the training part alone; labels
    are int32[N], 0 to 9. There are 1440 training and 357 test examples, chosen by `key` (default `jax.random.key(0)`).

    Raises:
        ModuleNotFoundError: without scikit-learn, which holds the data.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "datasets.digits reads the copy inside scikit-learn: pip install 'gdjax[experiments]'"
        ) from error
    features, labels = load_digits(return_X_y=True)
    order = np.asarray(jax.random.permutation(jax.random.key(0) if key is None else key, NUM_DIGITS))
    test, train = np.split(order, [NUM_DIGITS_TEST])
    train_features, test_features = standardised(features[train], features[test])
    return Split(
        (jnp.asarray(train_features, float), jnp.asarray(labels[train], jnp.int32)),
        (jnp.asarray(test_features, float), jnp.asarray(labels[test], jnp.int32)),
    )


def mnist(folder: Folder = None, *, download: bool = False) -> Split:
    """Return MNIST (LeCun et al. 1998) as (images float[N, 28, 28, 1], labels int32[N]): 60,000 and 10,000 examples.

    Pixels are shifted and scaled by the mean and deviation of all training pixels. Each pixel by its own, as in
    `digits`, would blow up those that are almost always black.
    """
    return _images(*map(formats.idx, sources.contents("mnist", folder, download=download)))


def fashion_mnist(folder: Folder = None, *, download: bool = False) -> Split:
    """Return Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), ten kinds of clothes, in the form of `mnist`."""
    return _images(*map(formats.idx, sources.contents("fashion-mnist", folder, download=download)))


def cifar10(folder: Folder = None, *, download: bool = False) -> Split:
    """Return CIFAR-10 (Krizhevsky 2009) as (images float[N, 32, 32, 3], labels int32[N]): 50,000 and 10,000 examples.

    It is read out of the archive cifar-10-binary.tar.gz as published. Each colour is shifted and scaled by its mean
    and deviation over the training images.
    """
    [archive] = sources.contents("cifar10", folder, download=download)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = [tar.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
        *batches, test = [formats.cifar10(file.read()) for file in files if file]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return _images(images, labels, *test)


def a9a(folder: Folder = None, *, download: bool = False) -> Split:
    """Return LIBSVM's a9a as (features float[N, 123], labels int32[N]): 32,561 and 16,281 examples.

    Features are 0 or 1; the label is 1 for the quarter who earn more than 50,000 dollars a year (UCI Adult, Becker &
    Kohavi 1996; in this form, Platt 1998).
    """
    parts = [
        formats.libsvm(content, num_features=NUM_A9A_FEATURES)
        for content in sources.contents("a9a", folder, download=download)
    ]
    return Split(*((jnp.asarray(features, float), jnp.asarray(labels > 0, jnp.int32)) for features, labels in parts))


def power_plant(folder: Folder = None, *, key: jax.Array | None = None, download: bool = False) -> Split:
    """Return UCI's combined cycle power plant (Tufekci 2014) as (features float[N, 4], output float[N]).

    Temperature, vacuum, pressure and humidity of an hour, and the electrical output. There are 8192 training and 1376
    test examples, chosen by `key` (default `jax.random.key(0)`); every column, the output too, is standardised by its
    mean and deviation over the training part alone.
    """
    [content] = sources.contents("power-plant", folder, download=download)
    rows = formats.delimited(content)
    order = np.asarray(jax.random.permutation(jax.random.key(0) if key is None else key, len(rows)))
    test, train = np.split(order, [NUM_POWER_PLANT_TEST])
    parts = standardised(rows[train], rows[test])
    return Split(*((jnp.asarray(part[:, :-1], float), jnp.asarray(part[:, -1], float)) for part in parts))


def tiny_shakespeare(folder: Folder = None, *, num_tokens: int = 64, download: bool = False) -> Split:
    """Return 1.1 million characters of Shakespeare (Karpathy 2015) as `windows`, tokens 0 to 64."""
    [content] = sources.contents("tiny-shakespeare", folder, download=download)
    tokens, _ = formats.characters(content)
    return windows(tokens, num_tokens=num_tokens)


def windows(tokens: np.ndarray, *, num_tokens: int) -> Split:
    """Cut a text into examples for a language model, int32[N, num_tokens + 1], the last tenth of it for testing.

    Consecutive examples share one token, so that every token but the first is predicted once an epoch. What is left
    over at the end of either part is dropped: fewer than `num_tokens` tokens.

    Args:
        tokens: int[S], the text in its order.
        num_tokens: T, predictions an example asks for.

    Raises:
        ValueError: for T < 1 and a text too short for one example in each part.
    """
    split = len(tokens) - int(TEXT_TEST_FRACTION * len(tokens))
    counts = [(len(part) - 1) // num_tokens if num_tokens > 0 else 0 for part in np.split(tokens, [split])]
    if min(counts) < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1, and {len(tokens)} tokens hold too few such rows")
    starts = (begin + num_tokens * np.arange(count) for begin, count in zip((0, split), counts, strict=True))
    offsets = np.arange(num_tokens + 1)
    return Split(*(jnp.asarray(tokens[start[:, None] + offsets[None]], jnp.int32) for start in starts))


def gaussian_regression(
    key: jax.Array,
    *,
    num_examples: int = 1024,
    dimension: int = 16,
    condition_number: float = 30.0,
    noise: float = 0.1,
) -> Split:
    """Draw (x, y) with x ~ N(0, H) and y = x.w + noise: linear regression with a spectrum that is known.

    H is diagonal, its eigenvalues spaced evenly in the logarithm from 1 to 1 / condition_number; w ~ N(0, I). The test
    part is as large as the training part.
    """
    features_key, weights_key, noise_key = jax.random.split(key, 3)
    eigenvalues = jnp.geomspace(1.0, 1 / condition_number, dimension)
    features = jax.random.normal(features_key, (2 * num_examples, dimension)) * jnp.sqrt(eigenvalues)[None]
    targets = features @ jax.random.normal(weights_key, (dimension,))
    targets += noise * jax.random.normal(noise_key, targets.shape)
    return _halves(features, targets)


def gaussian_classification(key: jax.Array, *, num_examples: int = 1024, dimension: int = 16) -> Split:
    """Draw (x, y) with x ~ N(0, I) and P(y = 1) = sigmoid(x.w), w ~ N(0, I): labels int32 in {0, 1}.

    The test part is as large as the training part.
    """
    features_key, weights_key, labels_key = jax.random.split(key, 3)
    features = jax.random.normal(features_key, (2 * num_examples, dimension))
    logits = features @ jax.random.normal(weights_key, (dimension,))
    return _halves(features, jax.random.bernoulli(labels_key, jax.nn.sigmoid(logits)).astype(jnp.int32))


def memory_mapped(folder: str | os.PathLike, data: Batch | None = None) -> Batch:
    """Return examples that stay on the disk and are read as they are used: what `training.run` feeds from the host.

    The leaves are read-only `np.memmap`s of NumPy's own files `0.npy`, `1.npy`, ..., which may be larger than memory.

    Args:
        folder: of the files, made where there is none.
        data: a pytree of arrays [N, ...] to write there first. Without it, what the folder holds is opened: its leaves
            as a tuple, in the order of the tree.

    Raises:
        ValueError: with `data`, for a folder that has such files, and for what NumPy's files cannot hold (bfloat16,
            keys, objects); without, for a folder that has none, or not all, or where one is cut short.
    """
    place = Path(folder).expanduser()
    there = len(list(place.glob("*.npy")))
    if bool(there) == (data is not None):
        advice = "leave data out to open them" if there else "give data to be written there"
        raise ValueError(f"folder={str(folder)!r} holds {there} .npy files: {advice}, or name another folder")
    if data is not None:
        problem.num_examples(data)
        for path, leaf in jax.tree_util.tree_leaves_with_path(data):
            if getattr(leaf.dtype, "isbuiltin", 0) != 1:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"data{name} is {leaf.dtype}, which NumPy's files cannot hold: convert it first")
        place.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree.leaves(data)
        for i in reversed(range(len(leaves))):
            with _files.atomic(place / f"{i}.npy") as file:
                np.save(file, leaves[i], allow_pickle=False)
        there = len(leaves)
    try:
        arrays = tuple(np.load(place / f"{i}.npy", mmap_mode="r", allow_pickle=False) for i in range(there))
    except Exception as error:  # of a damaged header NumPy raises what its parser of Python raises
        raise ValueError(f"folder={str(folder)!r} cannot be opened ({error}): write it again") from error
    return arrays if data is None else jax.tree.unflatten(jax.tree.structure(data), arrays)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale both parts, [N, D] and [N_test, D], to mean 0 and deviation 1 of each feature in `train`.

    A feature that is constant in `train` is shifted only.
    """
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (test - mean) / deviation


def _images(images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray) -> Split:
    """Standardise each channel of uint8 images [N, H, W] or [N, H, W, C] by its training pixels; labels to int32."""
    images, test_images = (x.reshape(*x.shape[:3], -1) for x in (images, test_images))
    # A pixel takes 256 values, so that statistics are exact from their counts.
    values = np.arange(256)
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(images.shape[-1])])
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    deviation = np.sqrt((shares * (values[None] - mean[:, None]) ** 2).sum(1))

    def part(images, labels):
        scaled = images.astype(jax.dtypes.canonicalize_dtype(float))
        scaled -= mean
        scaled /= deviation
        return jnp.asarray(scaled), jnp.asarray(labels, jnp.int32)

    return Split(part(images, labels), part(test_images, test_labels))


def _halves(*arrays: jax.Array) -> Split:
    half = len(arrays[0]) // 2
    return Split(tuple(array[:half] for array in arrays), tuple(array[half:] for array in arrays))
