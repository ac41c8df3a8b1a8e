"""Named data sets and users' files, against files that the tests write and, where PROBAE_DATA is set, the real ones."""

import doctest
import gzip
import importlib
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from probae.data.datasets import Dataset, correlation_matrix, describe, load, named, names
from probae.data.datasets.dataset import split
from probae.data.datasets.formats import idx_images

real_files = pytest.mark.skipif(not os.environ.get("PROBAE_DATA"), reason="PROBAE_DATA is not set")
DEBD = {"nltcs": (16_181, 2_157, 3_236, 16), "plants": (17_412, 2_321, 3_482, 69)}
DEBD |= {"dna": (1_600, 400, 1_186, 180), "mushrooms": (2_000, 500, 5_624, 112)}


def numbered(rows, features):
    """Binary rows of which each spells its own number, so that a reader which drops or mixes rows is found out."""
    return (np.arange(rows)[:, None] >> np.arange(features) % 16 & 1).astype(np.uint8)


def row_numbers(x):
    return x[:, :16].astype(np.int64) @ (1 << np.arange(min(16, x.shape[1])))


def write_idx(path, images, magic=0x803, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">4I", magic, *(header or images.shape)) + images.tobytes())


def write_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def write_csv(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- what a data set is, and the list of them


def test_names_and_descriptions_agree_and_find_the_files(tmp_path):
    rows = describe(root=tmp_path)
    assert tuple(row.name for row in rows) == names()
    assert [row.name for row in rows if row.present] == ["digits"]
    assert all(row.description and "\n" not in row.description and len(row.description) < 160 for row in rows)
    write_npz(tmp_path / "debd/dna.npz", train=np.zeros(1))
    assert [row.name for row in describe(root=tmp_path) if row.present] == ["digits", "dna"]
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").touch()
    assert "mnist" not in [row.name for row in describe(root=tmp_path) if row.present]


def test_digits_are_scikit_learns_in_a_split_that_no_seed_moves():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert (data.kind, data.maximum, data.image_shape, data.features) == ("counts", 16, (8, 8), 64)
    parts = (data.train, data.validation, data.test)
    assert [part.shape for part in parts] == [(1_200, 64), (200, 64), (397, 64)]
    together = np.concatenate(parts)
    original = load_digits().data
    assert np.array_equal(together[np.lexsort(together.T)], original[np.lexsort(original.T)])
    assert np.array_equal(load("digits", seed=5).test, data.test)
    assert zlib.crc32(data.test.tobytes()) == 1812892328


def test_split_is_a_partition_that_the_seed_fixes():
    x = np.arange(23)
    parts = split(x, seed=3)
    assert [len(part) for part in parts] == [13, 4, 6]
    assert sorted(np.concatenate(parts)) == list(x)
    assert not np.array_equal(split(x, seed=4)[0], parts[0])
    assert split(np.arange(6), seed=1903, sizes=(3, 2))[0].tolist() == [4, 1, 3]
    with pytest.raises(TypeError):
        split(x, seed=None)


def test_loading_leaves_the_callers_random_stream_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    load("digits")
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_repr_says_what_the_data_are():
    assert repr(load("digits")) == (
        "Dataset('digits': 1,200 / 200 / 397 rows x 64 features, counts 0..16 (uint8), images 8x8)"
    )
    x = np.zeros((1_000, 3), np.float32)
    assert (
        repr(Dataset("a", x, x, x, "real")) == "Dataset('a': 1,000 / 1,000 / 1,000 rows x 3 features, real (float32))"
    )


def test_import_is_light():
    code = "import sys, probae.datasets; print([m for m in ('sklearn', 'pandas', 'matplotlib') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["probae.data.datasets.loading", "probae.data.datasets.dataset"])
def test_examples_run(module, monkeypatch):
    monkeypatch.delenv("PROBAE_DATA", raising=False)
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


# --- names and missing files


def test_unknown_name_suggests_a_close_one():
    with pytest.raises(ValueError, match=r"unknown data set 'MINST'.*did you mean 'mnist'.*fashion_mnist"):
        load("MINST")
    with pytest.raises(ValueError, match="did you mean 'harman74'"):
        correlation_matrix("harman")


@pytest.mark.parametrize("name", ["harman74", "holzinger_correlations"])
def test_correlations_are_no_rows(name):
    with pytest.raises(ValueError, match=re.escape(f"correlation_matrix({name!r})")):
        load(name)
    assert name not in names()


@pytest.mark.parametrize("name", [*(name for name in names() if name != "digits"), *named.CORRELATIONS])
@pytest.mark.parametrize("variable", [None, "", "a folder"])
def test_missing_file_says_what_to_put_where(name, variable, tmp_path, monkeypatch):
    if variable is None:
        monkeypatch.delenv("PROBAE_DATA", raising=False)
    else:
        monkeypatch.setenv("PROBAE_DATA", variable and str(tmp_path))
    read = correlation_matrix if name in named.CORRELATIONS else load
    with pytest.raises(FileNotFoundError) as error:
        read(name)
    entry, message = (named.SETS | named.CORRELATIONS)[name], str(error.value)
    assert all(f"$PROBAE_DATA/{file}" in message for file in entry.files)
    assert entry.files
    assert entry.origin
    assert entry.origin in message
    assert entry.signature
    assert entry.signature in message
    assert (str(tmp_path) if variable else "PROBAE_DATA is not set") in message


def test_only_the_missing_file_is_named(tmp_path):
    write_idx(tmp_path / "mnist/train-images-idx3-ubyte.gz", np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"needs \$PROBAE_DATA/mnist/t10k-images-idx3-ubyte\.gz \(not found"):
        load("mnist", root=tmp_path)


def test_root_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBAE_DATA", str(tmp_path / "elsewhere"))
    splits = {key: np.zeros((1_000, 12)) for key in ("train", "valid", "test")}
    write_npz(tmp_path / "here/oil_flow/oil_flow.npz", **splits)
    assert load("oil_flow", root=tmp_path / "here").features == 12
    monkeypatch.setenv("PROBAE_DATA", str(tmp_path / "here"))
    assert load("oil_flow").features == 12


# --- the readers of the named sets


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_grey_images(name, tmp_path):
    images = np.zeros((60_000, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(60_000), 256)
    images[:, 27, 26] = 255
    write_idx(tmp_path / name / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / name / "t10k-images-idx3-ubyte.gz", images[::6])
    data = load(name, root=tmp_path)
    assert (data.kind, data.maximum, data.image_shape) == ("counts", 255, (28, 28))
    for part, expected in (
        (data.train, range(50_000)), (data.validation, range(50_000, 60_000)), (data.test, range(0, 60_000, 6))
    ):  # fmt: skip
        assert part.shape == (len(expected), 784)
        assert part.dtype == np.uint8
        assert part.flags.writeable
        assert np.array_equal(part[:, :2] @ np.array([256, 1]), expected)
        assert (part[:, 27 * 28 + 26] == 255).all()


IMAGES = np.arange(3 * 28 * 28).astype(np.uint8).reshape(3, 28, 28)


def test_idx_images_reads_what_was_written(tmp_path):
    write_idx(tmp_path / "i.gz", IMAGES)
    assert np.array_equal(idx_images(tmp_path / "i.gz", 3, 28, 28), IMAGES.reshape(3, 784))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: write_idx(path, IMAGES, magic=0x801),
        lambda path: write_idx(path, IMAGES[:2]),
        lambda path: write_idx(path, IMAGES[:2], header=(3, 28, 28)),
        lambda path: write_idx(path, IMAGES, header=(3, 14, 56)),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(path.read_bytes()[:12]),
        lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8),
        lambda path: path.write_bytes(path.read_bytes()[:40] + b"\xff" * 99 + path.read_bytes()[139:]),
        lambda path: path.write_bytes(path.read_bytes()[:17] + b"\xff" * 20 + path.read_bytes()[37:]),
        lambda path: path.write_bytes(b"not gzip at all, an error page perhaps"),
        lambda path: path.write_bytes(gzip.compress(b"short")),
        lambda path: path.write_bytes(b""),
    ],
)
def test_damaged_idx_file_is_named(damage, tmp_path):
    path = tmp_path / "images.gz"
    write_idx(path, IMAGES)
    damage(path)
    with pytest.raises(ValueError, match=r"images\.gz.*expected 3 images 28x28 in gzipped idx format.*0x00000803"):
        idx_images(path, 3, 28, 28)


@pytest.mark.parametrize("name", DEBD)
def test_packed_binary_sets(name, tmp_path):
    *rows, features = DEBD[name]
    parts = [numbered(n, features) for n in rows]
    packed = dict(zip(("train", "valid", "test"), (np.packbits(x, axis=1) for x in parts), strict=True))
    write_npz(tmp_path / f"debd/{name}.npz", n_vars=features, **packed)
    data = load(name, root=tmp_path)
    assert (data.kind, data.maximum, data.image_shape) == ("binary", None, None)
    for got, expected in zip((data.train, data.validation, data.test), parts, strict=True):
        assert got.dtype == np.uint8
        assert np.array_equal(got, expected)


def test_binarized_mnist_shuffles_its_sorted_test_rows(tmp_path):
    parts = [numbered(n, 784) for n in (50_000, 10_000, 10_000)]
    packed = [np.asfortranarray(np.packbits(x, axis=1)) for x in parts]
    path = tmp_path / "binarized_mnist/binarized_mnist_fixed.npz"
    write_npz(path, **dict(zip(("train", "valid", "test"), packed, strict=True)))
    data = load("binarized_mnist", root=tmp_path)
    assert data.kind == "binary"
    assert data.image_shape == (28, 28)
    assert np.array_equal(data.train, parts[0])
    assert np.array_equal(data.validation, parts[1])
    order = row_numbers(data.test)
    assert np.array_equal(np.sort(order), np.arange(10_000))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 4 / 100  # 4 standard errors of no correlation
    assert all(part.flags.c_contiguous and part.flags.writeable for part in (data.train, data.validation, data.test))


PACKED = {key: np.zeros((n, 23), np.uint8) for key, n in (("train", 1_600), ("valid", 400), ("test", 1_186))}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train": PACKED["train"], "test": PACKED["test"]},
            "expected an array 'valid' of uint8 .400, 23., got only test",
        ),
        (PACKED | {"test": np.zeros((1_186, 22), np.uint8)}, "'test' of uint8 .1186, 23., got uint8 .1186, 22."),
        (PACKED | {"train": np.zeros((1_500, 23), np.uint8)}, "'train' of uint8 .1600, 23., got uint8 .1500, 23."),
        (PACKED | {"train": np.zeros((1_600, 23))}, "'train' of uint8 .1600, 23., got float64"),
        (PACKED | {"train": np.array([{}], object)}, "damaged or holds objects"),
    ],
)
def test_wrong_archive_is_named_with_what_was_expected(arrays, message, tmp_path):
    write_npz(tmp_path / "debd/dna.npz", **arrays)
    with pytest.raises(ValueError, match=r"dna\.npz.*" + message):
        load("dna", root=tmp_path)


def test_newsgroups(tmp_path):
    documents, words = numbered(16_242, 100), np.array([f"word{i}" for i in range(100)])
    path = tmp_path / "newsgroups20_w100/newsgroups20_w100.npz"
    write_npz(path, documents=np.packbits(documents, axis=1), words=words)
    data = load("newsgroups20_w100", root=tmp_path)
    parts = (data.train, data.validation, data.test)
    assert (data.kind, [len(part) for part in parts]) == ("binary", [9_745, 3_248, 3_249])
    assert data.feature_names == tuple(words)
    assert type(data.feature_names[0]) is str
    together = np.concatenate(parts)
    assert np.array_equal(together[np.argsort(row_numbers(together))], documents)


def test_oil_flow(tmp_path):
    random = np.random.default_rng(0)
    splits = {key: random.normal(size=(1_000, 12)) for key in ("train", "valid", "test")}
    path = write_npz(tmp_path / "oil_flow/oil_flow.npz", train_class=np.zeros((1_000, 3)), **splits)
    data = load("oil_flow", root=tmp_path)
    assert (data.kind, data.maximum) == ("real", None)
    for got, key in ((data.train, "train"), (data.validation, "valid"), (data.test, "test")):
        assert got.dtype == np.float32
        assert np.array_equal(got, splits[key].astype(np.float32))
    splits["valid"][3, 4] = np.nan
    write_npz(path, **splits)
    with pytest.raises(ValueError, match=r"oil_flow\.npz: expected finite numbers"):
        load("oil_flow", root=tmp_path)


def pupils(rows=301, columns=9, cell=None):
    lines = ["id,school," + ",".join(f"x{i + 1}" for i in range(columns))]
    lines += [f"{n},Pasteur," + ",".join(str(n + i / 10) for i in range(columns)) for n in range(rows)]
    return "\n".join(lines if cell is None else [*lines[:-1], lines[-1].rsplit(",", 1)[0] + "," + cell])


def test_holzinger_swineford(tmp_path):
    write_csv(tmp_path / "psychometrics/HolzingerSwineford1939.csv", pupils())
    data = load("holzinger_swineford", root=tmp_path)
    parts = (data.train, data.validation, data.test)
    assert (data.kind, [len(part) for part in parts]) == ("real", [180, 60, 61])
    assert data.feature_names == ("x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9")
    together = np.concatenate(parts)
    expected = (np.arange(301)[:, None] + np.arange(9) / 10).astype(np.float32)
    assert together.dtype == np.float32
    assert np.array_equal(together[np.argsort(together[:, 0])], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pupils(rows=300), "expected 301 rows with columns x1, .*; got 300 rows"),
        (pupils(columns=8), "got no column x9"),
        (pupils(cell="NA"), "a finite number in every row"),
        (pupils(cell="many"), "not numeric: column 'x9' .'many'."),
        ("", "expected a header and rows"),
    ],
)
def test_wrong_holzinger_swineford_is_named(text, message, tmp_path):
    write_csv(tmp_path / "psychometrics/HolzingerSwineford1939.csv", text)
    with pytest.raises(ValueError, match=r"HolzingerSwineford1939\.csv: .*" + message):
        load("holzinger_swineford", root=tmp_path)


def answers(complete=2_436, highest=6):
    items = [f"{trait}{i}" for trait in "ACENO" for i in range(1, 6)]
    lines = ["rownames," + ",".join(items) + ",age"]
    for n in range(2_800):
        digits = [str(n // 6**k % 6 * highest // 6 + 1) for k in range(25)]
        lines.append(f"r{n}," + ",".join(digits if n < complete else [*digits[:-1], ""]) + ",")
    return "\n".join(lines)


def test_bfi_keeps_complete_cases_as_counts_from_zero(tmp_path):
    write_csv(tmp_path / "psychometrics/bfi.csv", answers())
    data = load("bfi", root=tmp_path)
    parts = (data.train, data.validation, data.test)
    assert (data.kind, data.maximum, data.features) == ("counts", 5, 25)
    assert [len(part) for part in parts] == [1_461, 487, 488]
    assert data.train.dtype == np.uint8
    assert data.feature_names[:6] == ("A1", "A2", "A3", "A4", "A5", "C1")
    assert data.feature_names[-1] == "O5"
    assert sorted(np.concatenate(parts).astype(int) @ 6 ** np.arange(25)) == list(range(2_436))
    assert "complete cases" in data.description


def test_law_school_answers_are_bits_of_named_items(tmp_path):
    rows = [f"{n},{n % 2},{n % 3 // 2},1,0,{n // 500}" for n in range(1_000)]
    write_csv(tmp_path / "item_response/lsat7.csv", "\n".join(["rownames,Q1,Q2,Q3,Q4,Q5", *rows]))
    data = load("lsat7", root=tmp_path)
    assert (data.kind, data.feature_names) == ("binary", ("Q1", "Q2", "Q3", "Q4", "Q5"))
    assert np.concatenate((data.train, data.validation, data.test)).sum(0).tolist() == [500, 333, 1_000, 0, 500]
    write_csv(tmp_path / "item_response/lsat7.csv", "\n".join(["rownames,Q1,Q2,Q3,Q4,Q5", *rows[:-1], "999,2,0,1,0,1"]))
    with pytest.raises(ValueError, match=r"lsat7\.csv: expected answers 0 or 1"):
        load("lsat7", root=tmp_path)


@pytest.mark.parametrize("wrong", [{"complete": 2_400}, {"highest": 9}])
def test_wrong_bfi_is_named(wrong, tmp_path):
    write_csv(tmp_path / "psychometrics/bfi.csv", answers(**wrong))
    with pytest.raises(ValueError, match=r"bfi\.csv: expected answers 1 to 6, complete in 2,436 rows; got 2,4"):
        load("bfi", root=tmp_path)


def test_natural_patches_are_split_by_image(tmp_path):
    train, test = (np.repeat(np.arange(n, dtype=np.uint8), 321 * 481).reshape(n, 321, 481) for n in (80, 40))
    write_npz(tmp_path / "bsds300/bsds300_grey.npz", train=train, test=test + 100)
    data = load("bsds300", root=tmp_path)
    parts = (data.train, data.validation, data.test)
    assert (data.kind, data.maximum, data.image_shape) == ("counts", 255, (12, 12))
    assert [part.shape for part in parts] == [(20_000, 144), (4_000, 144), (4_000, 144)]
    assert all((part == part[:, :1]).all() for part in parts)  # each patch is of one image
    sources = [set(np.unique(part)) for part in parts]
    assert [len(source) for source in sources] == [70, 10, 40]
    assert sources[0] | sources[1] == set(range(80))
    assert sources[2] == set(range(100, 140))


def test_patches_are_contiguous_and_do_not_overlap():
    images = np.arange(3 * 61 * 85).reshape(3, 61, 85)
    patches = named._patches(images, 60, np.random.RandomState(0)).reshape(-1, 12, 12)
    assert len(patches) == 60
    assert len(np.unique(patches)) == patches.size
    assert (np.diff(patches, axis=2) == 1).all()
    assert (np.diff(patches, axis=1) == 85).all()


def correlations(size, prefix="", extra="", value="0.5", diagonal="1"):
    cells = [[(diagonal if i == j else value) for j in range(size)] for i in range(size)]
    lines = ["rownames," + ",".join(f"{prefix}t{i}" for i in range(size)) + (extra and f",{extra}")]
    return "\n".join(lines + [f"t{i}," + ",".join(row) + (extra and ",0") for i, row in enumerate(cells)])


@pytest.mark.parametrize(
    ("name", "file", "size", "prefix", "extra", "observations"),
    [
        ("harman74", "Harman74.cor.csv", 24, "cov.", "center", 145),
        ("holzinger_correlations", "Holzinger.csv", 14, "", "", 355),
    ],
)
def test_correlation_matrices(name, file, size, prefix, extra, observations, tmp_path):
    path = write_csv(tmp_path / "psychometrics" / file, correlations(size, prefix, extra))
    matrix, tests, n = correlation_matrix(name, root=tmp_path)
    assert matrix.dtype == np.float64
    assert np.array_equal(matrix, 0.5 + 0.5 * np.eye(size))
    assert tests == tuple(f"t{i}" for i in range(size))
    assert n == observations
    good = path.read_text()
    for bad in (
        correlations(size - 1, prefix, extra),
        correlations(size, prefix, extra, value="1.5"),
        correlations(size, "other.", extra),
        good.replace("0.5", "0.4", 1),
        correlations(size, prefix, extra, diagonal="0.9"),
        good.replace("0.5", "", 1),
        "\n".join(good.splitlines()[1:]),
    ):
        write_csv(path, bad)
        with pytest.raises(ValueError, match=rf"{re.escape(file)}: expected a {size}x{size} correlation matrix"):
            correlation_matrix(name, root=tmp_path)


# --- a user's own files


def test_one_array_is_split_by_the_seed(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "mine.npy", x)
    data = load(tmp_path / "mine.npy", seed=3)
    assert (data.name, data.kind, data.maximum, data.image_shape, data.feature_names) == ("mine", "real", *[None] * 3)
    for got, expected in zip((data.train, data.validation, data.test), split(x.astype(np.float32), 3), strict=True):
        assert got.dtype == np.float32
        assert np.array_equal(got, expected)
        assert got.flags.writeable
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 4, 4]
    assert not np.array_equal(load(str(tmp_path / "mine.npy"), seed=4).train, data.train)
    assert "seed 3" in data.description


@pytest.mark.parametrize("second", ["validation", "valid"])
def test_given_splits_are_kept(second, tmp_path):
    parts = [numbered(n, 5) for n in (8, 4, 3)]
    path = write_npz(
        tmp_path / "mine.npz", labels=np.zeros(3), **dict(zip(("train", second, "test"), parts, strict=True))
    )
    data = load(path, seed=9)
    assert data.kind == "binary"
    assert data.maximum is None
    for got, expected in zip((data.train, data.validation, data.test), parts, strict=True):
        assert np.array_equal(got, expected)


def test_archive_of_one_array_is_split(tmp_path):
    x = numbered(20, 5)
    assert np.array_equal(load(write_npz(tmp_path / "mine.npz", anything=x)).test, split(x, 0)[2])


@pytest.mark.parametrize(
    ("top", "dtype", "kind", "maximum", "stored"),
    [
        (1, bool, "binary", None, np.uint8),
        (1, np.float64, "binary", None, np.uint8),
        (1, ">i4", "binary", None, np.uint8),
        (7, np.float32, "counts", 7, np.uint8),
        (255, np.int64, "counts", 255, np.uint8),
        (256, np.int64, "counts", 256, np.int16),
        (40_000, np.uint16, "counts", 40_000, np.int32),
        (2**31, ">f8", "counts", 2**31, np.int64),
        (2**63, np.uint64, "real", None, np.float32),
        (1.5, np.float64, "real", None, np.float32),
        (-1, np.int64, "real", None, np.float32),
    ],
)
def test_kind_follows_from_all_the_values(top, dtype, kind, maximum, stored, tmp_path):
    train, test = np.zeros((10, 2), dtype), np.zeros((3, 2), dtype)
    test[2, 1] = top  # in the test rows, so that a kind read off the training rows is wrong
    data = load(write_npz(tmp_path / "a.npz", train=train, valid=train, test=test))
    assert (data.kind, data.maximum, type(data.maximum)) == (kind, maximum, type(maximum))
    assert {part.dtype for part in (data.train, data.validation, data.test)} == {np.dtype(stored)}
    assert data.test[2, 1] == top


def test_images_are_flattened_and_their_shape_is_kept(tmp_path):
    x = np.arange(20 * 3 * 4).reshape(20, 3, 4)
    np.save(tmp_path / "grey.npy", x)
    np.save(tmp_path / "colour.npy", x.reshape(20, 2, 2, 3))
    grey, colour = load(tmp_path / "grey.npy"), load(tmp_path / "colour.npy")
    assert (grey.image_shape, grey.features, colour.image_shape, colour.features) == ((3, 4), 12, None, 12)
    assert np.array_equal(grey.train, split(x.reshape(20, 12), 0)[0])
    assert np.array_equal(grey.train, colour.train)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(30), r"an array \(N, D\), got shape \(30,\)"),
        (np.zeros(()), r"got shape \(\)"),
        (np.zeros((30, 0)), r"got shape \(30, 0\)"),
        (np.zeros((9, 2)), r"too few rows: expected at least 10 .*got \[9\]"),
        (np.zeros((0, 2)), "too few rows"),
        (
            np.where(np.arange(30)[:, None] < [0, 3, 1], np.nan, 1.0),
            "missing values in 3 of 30 rows and 2 of 3 columns",
        ),
        (np.full((30, 2), -np.inf), "infinite values"),
        (np.full((30, 2), -1e300) * [0, 1], "too large for float32"),
        (np.full((30, 2), "a"), "expected numbers, got an array of <U1"),
        (np.zeros((30, 2), complex), "expected numbers, got an array of complex128"),
        (np.zeros(30, [("a", float)]), "expected numbers"),
        (np.full((30, 2), {}, object), "damaged or holds objects"),
    ],
)
def test_array_that_is_no_data_is_refused(array, message, tmp_path):
    np.save(tmp_path / "mine.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"mine\.npy.*" + message):
        load(tmp_path / "mine.npy")


ROWS = np.zeros((12, 3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": ROWS, "test": ROWS}, r"expected arrays train, validation .*; got train, test"),
        ({}, "got none"),
        ({"train": ROWS, "valid": ROWS, "test": np.zeros((12, 4))}, "the splits differ in shape"),
        ({"train": ROWS, "valid": ROWS[:0], "test": ROWS}, r"too few rows: .*got \[12, 0, 12\]"),
        ({"train": ROWS, "valid": ROWS, "test": ROWS * np.nan}, "missing values in 12 of 36 rows and 3 of 3 columns"),
    ],
)
def test_archive_that_is_no_data_is_refused(arrays, message, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.npz: .*" + message):
        load(write_npz(tmp_path / "mine.npz", **arrays))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_no_damage_to_a_file_is_anything_but_a_value_error(suffix, tmp_path):
    random, path, refused = np.random.default_rng(0), tmp_path / f"mine{suffix}", 0
    write = np.save if suffix == ".npy" else np.savez_compressed
    write(path, random.normal(size=(20, 5)))
    whole = path.read_bytes()
    for trial in range(600):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: random.integers(len(data))]
        for place in random.integers(128 if suffix == ".npy" else len(whole), size=trial % 3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            load(path)
        except ValueError as error:
            refused += path.name in str(error)
    assert refused > 300


def test_archive_with_a_stranger_in_it_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"mine\.npz: expected NumPy arrays only, got the member 'readme\.txt'"):
        load(tmp_path / "mine.npz")


GRID = np.arange(1, 37).reshape(12, 3) % 5


def lines(x=GRID, labels=None):
    return [(f"{labels[n]}," if labels else "") + ",".join(map(str, row)) for n, row in enumerate(x)]


@pytest.mark.parametrize(
    ("text", "feature_names"),
    [
        ("\n".join(["a,b,c", *lines()]), ("a", "b", "c")),
        ("\ufeff" + "\n".join(["a, b ,c", *lines()]), ("a", "b", "c")),
        ("\r\n".join(["", '"a,1","b\nb",c', *lines(), ""]), ("a,1", "b\nb", "c")),
        ("\n".join(["0,1,2", *lines()]), ("0", "1", "2")),
        ("\n".join(["a,1,2.5", *lines()]), ("a", "1", "2.5")),
        ("\n".join(lines()), None),
        ("\ufeff" + "\n".join(lines()), None),
        ("\n".join([",0,1,2", *lines(labels=range(12))]), ("0", "1", "2")),
        ("\n".join(['"","a","b","c"', *lines(labels=[f'"row {n}"' for n in range(12)])]), ("a", "b", "c")),
        ("\n".join(["Unnamed: 0,a,b,c", *lines(labels=range(12))]), ("a", "b", "c")),
    ],
)
def test_csv_with_and_without_header_and_row_labels(text, feature_names, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode())
    data = load(path)
    assert (data.feature_names, data.kind, data.maximum, data.name) == (feature_names, "counts", 4, "mine")
    assert np.array_equal(data.train, split(GRID, 0)[0])
    assert np.array_equal(data.test, split(GRID, 0)[2])
    assert ("row labels" in data.description) == text.startswith((",", '"",', "Unnamed"))


def test_csv_agrees_with_pandas(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"a": np.linspace(0, 1, 20), "b": np.arange(20) % 2 == 0, "c": np.arange(20)})
    frame.to_csv(tmp_path / "mine.CSV")
    data = load(tmp_path / "mine.CSV", seed=2)
    assert data.feature_names == ("a", "b", "c")
    assert data.kind == "real"
    assert np.array_equal(data.validation, split(frame.to_numpy(np.float32), 2)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n".join(["a,b,c,school", *(line + ",Pasteur" for line in lines())]),
            r"not numeric: column 'school' .'Pasteur'.",
        ),
        ("\n".join([*lines(), "1,x,2"]), r"not numeric: column 2 .'x'."),
        ("\n".join(["a,b,c", *lines(), "NA,1,"]), "missing values in 1 of 13 rows and 2 of 3 columns"),
        ("\n".join(["NA,1,2", *lines()]), "missing values in 1 of 13 rows and 1 of 3 columns"),
        ("\n".join(["a,b,c", *lines(), "1,2"]), "missing values in 1 of 13 rows and 1 of 3 columns"),
        ("\n".join(["a,b,c", *lines(), "1,inf,2"]), "infinite values"),
        ("\n".join(["a,b", *lines()]), "the header has 2 fields, the rows have 3"),
        ("\n".join(["a,b,c", *lines(), "1,2,3,4"]), "expected a header and rows of comma-separated values"),
        ("\n".join(["a,b,c", *lines()[:9]]), "too few rows"),
        ("a,b,c", "expected a header and rows"),
        ("", "expected a header and rows"),
    ],
)
def test_csv_that_is_no_data_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.csv: .*" + message):
        load(write_csv(tmp_path / "mine.csv", text))


def test_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "mine.csv").write_bytes("größe,b,c\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.csv: .*UTF-8"):
        load(tmp_path / "mine.csv")


@pytest.mark.parametrize("missing", ["nowhere.npy", "nowhere.csv", "no/where.npz"])
def test_missing_path(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file {Path(missing)}")):
        load(missing)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "mine.pickle").touch()
    with pytest.raises(ValueError, match=r"mine\.pickle: expected a file that ends in \.npy, \.npz, \.csv"):
        load(tmp_path / "mine.pickle")


# --- the real files


PINS = {
    "mnist": (1384265727, 2524351528, 3838467927),
    "fashion_mnist": (1292998557, 2757646165, 309494841),
    "binarized_mnist": (348712471, 2362963818, 3161654483),
    "nltcs": (2646634309, 1580946398, 1023635681),
    "plants": (2165178460, 2027939382, 845207313),
    "dna": (3995004863, 1230542801, 2933408850),
    "mushrooms": (4062437320, 3566771792, 2193786259),
    "newsgroups20_w100": (188055589, 185548828, 3772249738),
    "oil_flow": (2683190104, 809285905, 1609337184),
    "holzinger_swineford": (2466860484, 796255878, 3192042693),
    "bfi": (1002899009, 1338892558, 645969280),
    "lsat6": (183011433, 3221098239, 2920276277),
    "lsat7": (1258145300, 1100984890, 201773413),
    "bsds300": (3421816722, 910301920, 300407019),
}


@real_files
@pytest.mark.parametrize("name", [name for name in names() if name != "digits"])
def test_real_set_is_as_described(name):
    row = next(row for row in describe() if row.name == name)
    if not row.present:
        pytest.skip(f"{name} is not there")
    data = load(name)
    parts = (data.train, data.validation, data.test)
    assert (*(len(part) for part in parts), data.features) == row.shape
    assert data.kind == row.kind
    assert {part.shape[1:] for part in parts} == {(data.features,)}
    assert all(part.flags.writeable and part.flags.c_contiguous for part in parts)
    if data.kind == "real":
        assert all(part.dtype == np.float32 and np.isfinite(part).all() for part in parts)
    else:
        top = 1 if data.kind == "binary" else data.maximum
        assert all(part.dtype == np.uint8 and part.min() == 0 and part.max() == top for part in parts)
    assert data.image_shape is None or np.prod(data.image_shape) == data.features
    assert data.feature_names is None or len(set(data.feature_names)) == data.features
    assert tuple(zlib.crc32(part.tobytes()) for part in parts) == PINS[name]


@real_files
def test_real_binarized_mnist_is_mnist():
    grey, binary = load("mnist"), load("binarized_mnist")
    # A pixel is 1 with probability grey/255, independently: 4 standard errors about the mean over all of them.
    p = np.concatenate([grey.train, grey.validation]) / np.float32(255)
    ones = np.concatenate([binary.train, binary.validation]).mean(dtype=np.float64)
    assert abs(ones - p.mean(dtype=np.float64)) < 4 * np.sqrt((p * (1 - p)).mean(dtype=np.float64) / p.size)


@real_files
def test_real_bfi_and_correlations_have_known_values():
    matrix, tests, n = correlation_matrix("harman74")
    assert matrix.shape == (24, 24)
    assert n == 145
    assert matrix[tests.index("Flags"), tests.index("Cubes")] == 0.23
    matrix, tests, n = correlation_matrix("holzinger_correlations")
    assert matrix.shape == (14, 14)
    assert n == 355
    assert matrix[tests.index("T2"), tests.index("T3.4")] == 0.662
    assert np.linalg.eigvalsh(matrix).min() > 0
    first = [1, 3, 2, 3, 3, 1, 2, 2, 3, 3, 2, 2, 2, 3, 3, 2, 3, 1, 1, 2, 2, 5, 2, 3, 2]
    data = load("bfi")
    assert (np.concatenate([data.train, data.validation, data.test]) == first).all(1).any()
