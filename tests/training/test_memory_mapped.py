import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdjax.problems import datasets


def test_examples_stay_on_the_disk_and_come_back_as_they_were(tmp_path):
    data = {"y": np.arange(5, dtype=np.int8), "x": np.linspace(0, 1, 15, dtype=np.float32).reshape(5, 3)}
    written = datasets.memory_mapped(tmp_path / "set", data)
    opened = datasets.memory_mapped(tmp_path / "set")
    assert isinstance(opened, tuple)
    for leaf, *found in zip(jax.tree.leaves(data), jax.tree.leaves(written), opened, strict=True):
        for array in found:
            assert isinstance(array, np.memmap)
            assert array.dtype == leaf.dtype
            np.testing.assert_array_equal(array, leaf)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
    assert jax.tree.structure(written) == jax.tree.structure(data)


def test_a_folder_is_neither_overwritten_nor_opened_empty(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 \.npy files: give data"):
        datasets.memory_mapped(tmp_path)
    datasets.memory_mapped(tmp_path, np.ones(3))
    with pytest.raises(ValueError, match=r"holds 1 \.npy files: leave data out"):
        datasets.memory_mapped(tmp_path, np.zeros(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"x": jnp.ones(3, jnp.bfloat16)},
            r"data\['x'\] is bfloat16, which NumPy's files cannot hold",
        ),  # read as bytes
        (jax.random.split(jax.random.key(0), 3), "data is key<fry>, which NumPy's files cannot hold"),
        (np.asarray(["a", None], object), "Object arrays cannot be saved"),  # not without pickle
        ((np.ones(3), np.ones(2)), r"same leading axis, one entry an example: data\[0\]: 3, data\[1\]: 2"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused_and_leaves_nothing(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        datasets.memory_mapped(tmp_path, data)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_cut_short_missing_or_pickled_are_refused(tmp_path):
    datasets.memory_mapped(tmp_path, (np.arange(5.0), np.arange(5)))
    whole = (tmp_path / "1.npy").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "1.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"folder='.*' cannot be opened .*: write it again"):
            datasets.memory_mapped(tmp_path)
    (tmp_path / "1.npy").write_bytes(whole.replace(b"}", b"{", 1))
    with pytest.raises(ValueError, match="cannot be opened"):
        datasets.memory_mapped(tmp_path)
    np.save(tmp_path / "1.npy", np.asarray([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        datasets.memory_mapped(tmp_path)
    (tmp_path / "1.npy").rename(tmp_path / "2.npy")
    with pytest.raises(ValueError, match=r"No such file or directory: .*/1\.npy"):
        datasets.memory_mapped(tmp_path)
