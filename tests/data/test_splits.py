"""Reading data: the sample, IDX files, .npz; every kind of damage is one clear error."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.scripts import benchmark

from kdistill.data import mnist
from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.recipe import Data

RNG = np.random.default_rng(0)
FILES = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (60, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": np.arange(60, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (20, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
}
NPZ = dict(zip(("x_train", "y_train", "x_test", "y_test"), FILES.values(), strict=True))


@pytest.fixture
def folder(tmp_path):
    for name, array in FILES.items():
        mnist.write_idx(tmp_path / name, array)
    return tmp_path


def test_the_sample_is_real_balanced_and_split_without_loss():
    splits = load(Data(validation=0.1))
    assert "sample of MNIST" in splits.source and splits.class_names == tuple("0123456789")
    assert len(splits.train) + len(splits.validation) == 10_000 and len(splits.test) == 2_000
    assert splits.train.images.shape[1:] == (28, 28, 1) and splits.train.images.dtype == np.uint8
    # The shares of the 60,000: most ones (11.2 %), fewest fives (9.0 %).
    counts = np.bincount(np.concatenate([splits.train.labels, splits.validation.labels]))
    assert counts.tolist() == [987, 1124, 993, 1022, 974, 904, 986, 1044, 975, 991]
    assert np.abs(np.bincount(splits.validation.labels) - counts / 10).max() <= 0.5
    assert splits.fingerprint == load(Data()).fingerprint == "88b56b69f60d3fa6"


def test_source_license_and_checksum_of_the_sample_are_stated_beside_it():
    note = (mnist.SAMPLE.parent / "README.md").read_text()
    for stated in ("Y. LeCun, C. Cortes, C. J. C. Burges", "CC BY-SA 3.0", mnist.SAMPLE_SHA256, mnist.SAMPLE.name):
        assert stated in note
    assert sum(path.stat().st_size for path in mnist.SAMPLE.parent.iterdir()) < 3_000_000


def test_the_sample_maker_keeps_the_shares_of_the_classes():
    maker = benchmark("make_mnist_sample")
    labels = np.repeat(np.arange(10), np.arange(110, 10, -10))
    indexes = maker.chosen(labels, 55)
    assert len(set(indexes)) == 55 and np.all(np.diff(indexes) > 0)
    assert np.abs(np.bincount(labels[indexes]) - np.bincount(labels) * 55 / len(labels)).max() < 1
    np.testing.assert_array_equal(indexes, maker.chosen(labels, 55))


def test_validation_is_the_same_images_every_time_and_none_of_training(folder):
    first, second = load(Data(validation=0.2), folder), load(Data(validation=0.2), folder)
    np.testing.assert_array_equal(first.validation.images, second.validation.images)
    together = np.concatenate([first.train.images, first.validation.images])[..., 0]
    given = FILES["train-images-idx3-ubyte"]
    assert sorted(map(bytes, together)) == sorted(map(bytes, given))


def test_the_fingerprint_is_of_every_byte(folder):
    before = load(Data(), folder).fingerprint
    damage(folder, "t10k-images-idx3-ubyte", lambda c: c[:-1] + bytes([c[-1] ^ 1]))
    after = load(Data(), folder).fingerprint
    assert len(before) == len(after) == 16 and before != after


def test_a_damaged_sample_is_named(tmp_path, monkeypatch):
    broken = bytearray(mnist.SAMPLE.read_bytes())
    broken[1000] ^= 1
    (tmp_path / "sample.npz").write_bytes(broken)
    monkeypatch.setattr(mnist, "SAMPLE", tmp_path / "sample.npz")
    with pytest.raises(InputError, match="checksum"):
        load(Data())
    (tmp_path / "sample.npz").unlink()
    with pytest.raises(InputError, match="is missing. Install kdistill again"):
        load(Data())


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx_files_with_their_two_names_and_gzipped(folder, gzipped):
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        new = name.replace("-idx", ".idx") if gzipped else name
        (folder / (new + (".gz" if gzipped else ""))).write_bytes(gzip.compress(content) if gzipped else content)
    splits = load(Data(validation=0.2), folder)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 10, 20)  # one of each six by class
    np.testing.assert_array_equal(splits.test.images[..., 0], FILES["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(splits.test.labels, FILES["t10k-labels-idx1-ubyte"])
    assert str(folder) in splits.source


def test_npz_gives_the_same_as_idx(folder, tmp_path):
    np.savez(tmp_path / "digits.npz", **NPZ)
    first, second = (
        load(Data(), folder / "digits.npz"),
        load(Data(name="npz"), folder / "digits.npz"),
    )
    (folder / "digits.npz").unlink()
    assert load(Data(), folder).fingerprint == first.fingerprint == second.fingerprint


def test_images_of_another_size_go_by_the_name_npz(tmp_path):
    images = RNG.integers(0, 256, (30, 12, 10, 3), np.uint8)
    labels = np.arange(30) % 3
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    splits = load(Data(name="npz"), tmp_path / "own.npz")
    assert splits.train.images.shape[1:] == (12, 10, 3) and splits.class_names == ("0", "1", "2")
    with pytest.raises(InputError, match="MNIST images are 28x28"):
        load(Data(), tmp_path / "own.npz")


def test_limits():
    splits = load(Data(train_limit=100))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [100, 100, 100]


def damage(folder, name, change):
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(change(content))


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("train-images-idx3-ubyte", lambda c: c[:-1], "holds 47039 bytes where its header promises 47040"),
        ("train-images-idx3-ubyte", lambda c: c + b"x", "something is appended"),
        ("train-images-idx3-ubyte", lambda c: c[:9], "its header of 16 bytes is incomplete"),
        ("train-images-idx3-ubyte", lambda c: b"", "received nothing"),
        ("t10k-labels-idx1-ubyte", lambda c: b"\x00\x00\x0d" + c[3:], "magic number 0x00000801, received 0x00000d01"),
        ("t10k-images-idx3-ubyte", lambda c: gzip.compress(c)[:-30], "damaged or truncated"),
        ("train-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0a", r"labels 0\.\.9, received uint8 from 0 to 10"),
        (
            "train-labels-idx1-ubyte",
            lambda c: c[:4] + (59).to_bytes(4, "big") + c[8:-1],
            r"60 images, but labels of shape \(59,\)",
        ),
    ],
)
def test_damaged_idx_files(folder, name, change, message):
    damage(folder, name, change)
    with pytest.raises(InputError, match=message):
        load(Data(), folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\[\.gz\] "):
        load(Data(), folder)
    with pytest.raises(InputError, match="no folder or .npz file"):
        load(Data(), tmp_path / "nowhere")
    with pytest.raises(InputError, match="Unknown data set 'mnits'. Did you mean 'mnist'"):
        load(Data(name="mnits"))
    with pytest.raises(InputError, match="expects --data-dir"):
        load(Data(name="npz"))
    with pytest.raises(InputError, match="exclude each other"):
        load(Data(), folder, download=True)


def test_a_folder_with_several_files(folder):
    np.savez(folder / "one.npz", **NPZ)
    assert load(Data(), folder).source == f"the IDX files in {folder}"
    assert load(Data("npz"), folder).source == f"the file {folder / 'one.npz'}"
    for name in FILES:
        (folder / name).unlink()
    assert load(Data(), folder).source == f"the file {folder / 'one.npz'}"
    np.savez(folder / "two.npz", **NPZ)
    for name in ("mnist", "npz"):
        with pytest.raises(InputError, match=r"holds 2 .npz files \(one.npz, two.npz\)"):
            load(Data(name), folder)
    with pytest.raises(InputError, match="no .npz file at"):
        load(Data("npz"), folder / "three.npz")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x_train": np.full((60, 28, 28), np.nan)}, "47040 pixels are NaN"),
        ({"x_train": NPZ["x_train"] / 255}, "expected whole pixel values"),
        ({"x_train": NPZ["x_train"] * 2.0}, "received numbers from 0 to 510"),
        ({"x_train": NPZ["x_train"].astype("int16") - 1}, "received int16 from -1 to 254"),
        ({"x_train": NPZ["x_train"].astype(str)}, "expected pixels 0..255"),
        ({"x_train": np.repeat(NPZ["x_train"][..., None], 3, -1)}, "28x28, received shape"),
        ({"x_train": NPZ["x_train"][:, :27]}, "28x28, received shape"),
        ({"x_train": NPZ["x_train"][0]}, "28x28|expected images"),
        ({"y_train": NPZ["y_train"] + 0.5}, r"expected labels 0\.\.9, received float64"),
        ({"y_train": NPZ["y_train"].astype(int) - 1}, "from -1 to 8"),
        ({"y_test": np.array(["a"] * 20, dtype=object)}, "no readable .npz file of plain arrays"),
        ({"y_test": None}, "lacks y_test"),
    ],
)
def test_wrong_arrays(tmp_path, change, message):
    arrays = {name: array for name, array in {**NPZ, **change}.items() if array is not None}
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load(Data(), tmp_path / "own.npz")


def test_whole_float_pixels_are_fine_and_a_file_that_is_no_npz_is_not(tmp_path):
    np.savez(tmp_path / "own.npz", **{**NPZ, "x_train": NPZ["x_train"].astype("float32")})
    whole = load(Data(), tmp_path / "own.npz")
    np.savez(tmp_path / "own.npz", **NPZ)
    assert load(Data(), tmp_path / "own.npz").fingerprint == whole.fingerprint


def test_a_file_that_is_no_npz(tmp_path):
    np.savez(tmp_path / "own.npz", **NPZ)
    content = (tmp_path / "own.npz").read_bytes()
    np.save(tmp_path / "one.npy", NPZ["x_train"])
    for broken in (b"", b"hello", content[: len(content) // 2], (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "own.npz").write_bytes(broken)
        with pytest.raises(InputError, match="no readable .npz"):
            load(Data(), tmp_path / "own.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_random_damage_is_never_a_traceback(tmp_path, save):
    random, refused = np.random.default_rng(3), 0
    save(tmp_path / "own.npz", **{**NPZ, "x_train": np.zeros_like(NPZ["x_train"])})
    content = (tmp_path / "own.npz").read_bytes()
    for _ in range(300):
        broken = bytearray(content)
        broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        (tmp_path / "own.npz").write_bytes(broken)
        try:
            load(Data(), tmp_path / "own.npz")  # bytes that nobody reads may be any: dates, say
        except InputError:
            refused += 1
    assert refused > 100


def test_a_label_beyond_the_number_of_images_is_refused(tmp_path):
    labels = NPZ["y_train"].astype("int64")
    labels[0] = 10**12
    np.savez(tmp_path / "own.npz", **{**NPZ, "y_train": labels})
    with pytest.raises(InputError, match="has the label 1000000000000, but only 60 labels"):
        load(Data("npz"), tmp_path / "own.npz")


@pytest.fixture
def tfds_copy(tmp_path, monkeypatch):
    """A copy of tiny MNIST that TFDS itself has prepared."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def rows(part):
        images, labels = FILES[f"{part}-images-idx3-ubyte"][..., None], FILES[f"{part}-labels-idx1-ubyte"]
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": labels.astype("int64")})

    image, label = tfds.features.Image(shape=(28, 28, 1)), tfds.features.ClassLabel(num_classes=10)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version="3.0.1",
        data_dir=tmp_path,
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        split_datasets={"train": rows("train"), "test": rows("t10k")},
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path / "mnist" / "3.0.1"


def test_a_prepared_copy_of_tfds_is_used_before_the_sample(tfds_copy):
    for download in (False, True):  # what is there is not downloaded again
        splits = load(Data(), download=download)
        assert splits.source == f"TensorFlow Datasets, mnist 3.0.1 in {tfds_copy}"
        expected = FILES["t10k-images-idx3-ubyte"]
        assert sorted(map(bytes, splits.test.images)) == sorted(map(bytes, expected))
        assert len(splits.train) + len(splits.validation) == 60
    next(tfds_copy.glob("mnist-train*")).write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot read its copy of 'mnist'.*Remove that folder"):
        load(Data())


def test_what_a_failed_download_leaves_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist" / "3.0.1.incompleteABC").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1.incompleteABC" / "dataset_info.json").write_text("{}")
    assert "sample of MNIST" in load(Data()).source


def test_a_download_says_so_and_its_failure_is_one_message(tmp_path, monkeypatch, capsys):
    import tensorflow_datasets as tfds

    def fails(builder):
        print("Downloading and preparing dataset")
        raise ConnectionError("no network")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
    messages = []
    with pytest.raises(InputError, match="cannot download 'mnist': no network. Run without --download"):
        load(Data(), download=True, say=messages.append)
    assert len(messages) == 1 and str(tmp_path) in messages[0]
    captured = capsys.readouterr()
    assert captured.out == "" and "preparing" in captured.err


def test_the_sample_costs_no_import_of_tensorflow(tmp_path):
    code = "import sys; from kdistill.data.splits import load; from kdistill.recipe import Data\n"
    code += "load(Data())\n"
    code += "print({'tensorflow', 'tensorflow_datasets', 'keras'} & set(sys.modules))"
    env = {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(mnist.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "set()\n"
