"""The named data sets: what each is, which files it is read from, and how it is split."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from probae.arguments import printable
from probae.data.datasets.dataset import Kind, Splits, split
from probae.data.datasets.delimited import numbers, table
from probae.data.datasets.formats import archive, idx_images

SPLIT_SEED = 1903  # of every split that no publication fixes: it decides what the test data are, so it never changes
PATCH = 12

Contents = tuple[Splits, tuple[str, ...] | None]


@dataclass(frozen=True)
class Named:
    """One named data set: facts to list, the files it needs under the root, and a reader of those files.

    ``read_gaps`` reads all of the rows of a set of which ``read`` keeps the complete ones.
    """

    kind: Kind
    rows: tuple[int, int, int]
    features: int
    description: str
    read: Callable[..., Contents]
    files: tuple[str, ...] = ()
    signature: str = ""
    origin: str = ""
    maximum: int | None = None
    image_shape: tuple[int, int] | None = None
    read_gaps: Callable[..., Contents] | None = None
    description_gaps: str = ""
    labels: Callable[[], Splits] | None = None


@dataclass(frozen=True)
class Correlations:
    """One named correlation matrix; ``prefix`` is what its columns' names have in front of the rows' names."""

    files: tuple[str]
    size: int
    observations: int
    origin: str
    prefix: str = ""
    signature: str = "row names, a header and the correlations"


def _digits() -> Contents:
    from sklearn.datasets import load_digits

    return split(load_digits().data.astype(np.uint8), SPLIT_SEED, sizes=(1_200, 200)), None


def _digit_labels() -> Splits:
    from sklearn.datasets import load_digits

    return split(load_digits().target.astype(np.int64), SPLIT_SEED, sizes=(1_200, 200))


def _mnist(train: Path, test: Path) -> Contents:
    x = idx_images(train, 60_000, 28, 28)
    return (x[:50_000], x[50_000:], idx_images(test, 10_000, 28, 28)), None


def _packed(path: Path, rows: tuple[int, int, int], features: int, shuffle_test: bool = False) -> Contents:
    width = (features + 7) // 8
    shapes = {key: (np.uint8, (n, width)) for key, n in zip(("train", "valid", "test"), rows, strict=True)}
    train, validation, test = (np.unpackbits(x, axis=1, count=features) for x in archive(path, shapes))
    # Rows sorted by digit would make every average over the first few of them an average over zeros alone.
    if shuffle_test:
        test = test[np.random.RandomState(SPLIT_SEED).permutation(len(test))]
    return (train, validation, test), None


def _newsgroups(path: Path) -> Contents:
    packed, words = archive(path, {"documents": (np.uint8, (16_242, 13)), "words": (np.str_, (100,))})
    return split(np.unpackbits(packed, axis=1, count=100), SPLIT_SEED), tuple(str(word) for word in words)


def _oil_flow(path: Path) -> Contents:
    parts = archive(path, dict.fromkeys(("train", "valid", "test"), (np.floating, (1_000, 12))))
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"{printable(path)}: expected finite numbers")
    train, validation, test = (part.astype(np.float32) for part in parts)
    return (train, validation, test), None


def _columns(path: Path, wanted: tuple[str, ...], rows: int) -> np.ndarray:
    header, frame, _ = table(path)
    names = header or []
    absent = [name for name in wanted if name not in names]
    if absent or len(frame) != rows:
        got = f"no column {', '.join(absent)}" if absent else f"{len(frame):,} rows"
        raise ValueError(f"{printable(path)}: expected {rows:,} rows with columns {', '.join(wanted)}; got {got}")
    return numbers(path, frame.iloc[:, [names.index(name) for name in wanted]])


def _holzinger_swineford(path: Path) -> Contents:
    tests = tuple(f"x{i}" for i in range(1, 10))
    x = _columns(path, tests, rows=301)
    if not np.isfinite(x).all():
        raise ValueError(f"{printable(path)}: expected a finite number in every row of x1 to x9")
    return split(x.astype(np.float32), SPLIT_SEED), tests


def _bfi(path: Path, gaps: bool = False) -> Contents:
    items = tuple(f"{trait}{i}" for trait in "ACENO" for i in range(1, 6))
    x = _columns(path, items, rows=2_800)
    whole = ~np.isnan(x).any(1)
    complete = x[whole]
    if len(complete) != 2_436 or not np.isin(complete, np.arange(1, 7)).all():
        raise ValueError(
            f"{printable(path)}: expected answers 1 to 6, complete in 2,436 rows; got {len(complete):,} complete"
        )
    parts = split((complete - 1).astype(np.uint8), SPLIT_SEED)
    if gaps:
        others = x[~whole]
        if not np.isin(others[~np.isnan(others)], np.arange(1, 7)).all():
            raise ValueError(f"{printable(path)}: expected answers 1 to 6")
        # complete cases keep their places, so that both versions of the set hold out the same people
        more = split((others - 1).astype(np.float32), SPLIT_SEED)
        parts = tuple(np.concatenate([a.astype(np.float32), b]) for a, b in zip(parts, more, strict=True))  # type: ignore[assignment]
    return parts, items


def _lsat(path: Path) -> Contents:
    items = tuple(f"Q{i}" for i in range(1, 6))
    x = _columns(path, items, rows=1_000)
    if not np.isin(x, (0, 1)).all():
        raise ValueError(f"{printable(path)}: expected answers 0 or 1")
    return split(x.astype(np.uint8), SPLIT_SEED), items


def _patches(images: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    n, (rows, columns) = len(images), (size // PATCH - 1 for size in images.shape[1:])
    # A grid of its own for each image: the JPEGs' 8x8 blocks would show in the patches of a grid common to all.
    corners = random.randint(PATCH, size=(n, 2), dtype=np.int64)
    height, width = rows * PATCH, columns * PATCH
    cut = np.stack([x[i : i + height, j : j + width] for x, (i, j) in zip(images, corners, strict=True)])
    patches = cut.reshape(n, rows, PATCH, columns, PATCH).swapaxes(2, 3).reshape(-1, PATCH * PATCH)
    return patches[random.permutation(len(patches))[:count]]


def _bsds300(path: Path) -> Contents:
    images, test = archive(path, {"train": (np.uint8, (80, 321, 481)), "test": (np.uint8, (40, 321, 481))})
    random = np.random.RandomState(SPLIT_SEED)
    order = random.permutation(len(images))
    train = _patches(images[order[:70]], 20_000, random)
    validation = _patches(images[order[70:]], 4_000, random)
    return (train, validation, _patches(test, 4_000, random)), None


def _grey_images(folder: str, description: str, origin: str) -> Named:
    return Named(
        "counts", (50_000, 10_000, 10_000), 784, description, _mnist,
        files=tuple(f"{folder}/{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")),
        signature="the original gzipped idx files, 60,000 and 10,000 images 28x28", origin=origin,
        maximum=255, image_shape=(28, 28),
    )  # fmt: skip


def _debd(name: str, rows: tuple[int, int, int], features: int, what: str) -> Named:
    return Named(
        "binary", rows, features, f"{what}, published splits (Lowd & Davis 2010; Van Haaren & Davis 2012)",
        partial(_packed, rows=rows, features=features), files=(f"debd/{name}.npz",),
        signature=f"train, valid, test: np.packbits(x, axis=1) of {name}.{{train,valid,test}}.data",
        origin=f"the density estimation benchmark, github.com/arranger1044/DEBD, datasets/{name}",
    )  # fmt: skip


def _section(number: int) -> Named:
    return Named(
        "binary", (600, 200, 200), 5,
        f"Law School Admission Test, section {number}: five answers of 1,000 people, right or wrong (Bock & Lieberman 1970); "
        "fixed split 60/20/20",
        _lsat, files=(f"item_response/lsat{number}.csv",), signature="1,000 rows with columns Q1 to Q5",
        origin=f"lsat{number} of the R package psych; github.com/vincentarelbundock/Rdatasets, csv/psych",
    )  # fmt: skip


_BINARIZED = (50_000, 10_000, 10_000)
SETS: dict[str, Named] = {
    "digits": Named(
        "counts", (1_200, 200, 397), 64, "8x8 handwritten digits of scikit-learn (Alpaydin & Kaynak 1998); fixed split",
        _digits, maximum=16, image_shape=(8, 8), labels=_digit_labels,
    ),
    "mnist": _grey_images(
        "mnist", "MNIST, grey; the last 10,000 training images are validation (LeCun et al. 1998)",
        "yann.lecun.com/exdb/mnist (LeCun, Cortes & Burges), or any mirror of its files",
    ),
    "fashion_mnist": _grey_images(
        "fashion_mnist", "Fashion-MNIST, grey; the last 10,000 training images are validation (Xiao et al. 2017)",
        "github.com/zalandoresearch/fashion-mnist, data/fashion",
    ),
    "binarized_mnist": Named(
        "binary", _BINARIZED, 784,
        "MNIST, fixed binarization and splits (Salakhutdinov & Murray 2008; Larochelle); test rows shuffled",
        partial(_packed, rows=_BINARIZED, features=784, shuffle_test=True), image_shape=(28, 28),
        files=("binarized_mnist/binarized_mnist_fixed.npz",),
        signature="train, valid, test: np.packbits(x, axis=1) of binarized_mnist_{train,valid,test}.amat",
        origin="Salakhutdinov & Murray 2008; github.com/riannevdberg/sylvester-flows, data/MNIST_static",
    ),
    "nltcs": _debd("nltcs", (16_181, 2_157, 3_236), 16, "Disabilities of the elderly"),
    "plants": _debd("plants", (17_412, 2_321, 3_482), 69, "Where plants grow"),
    "dna": _debd("dna", (1_600, 400, 1_186), 180, "DNA splice junctions"),
    "mushrooms": _debd("mushrooms", (2_000, 500, 5_624), 112, "Mushrooms' attributes"),
    "newsgroups20_w100": Named(
        "binary", (9_745, 3_248, 3_249), 100, "20 newsgroups, presence of 100 words (Roweis); fixed split 60/20/20",
        _newsgroups, files=("newsgroups20_w100/newsgroups20_w100.npz",),
        signature="documents: np.packbits(x, axis=1) of the 16,242 documents; words: the 100 words",
        origin="20news_w100.mat, Sam Roweis; github.com/probml/probml-data, data/20news_w100.mat",
    ),
    "oil_flow": Named(
        "real", (1_000, 1_000, 1_000), 12, "Three-phase oil flow, splits as published (Bishop & James 1993)",
        _oil_flow, files=("oil_flow/oil_flow.npz",), signature="train, valid, test: (1000, 12) numbers",
        origin="Bishop & James 1993, the GTM distribution's DataTrn.txt, DataVdn.txt, DataTst.txt",
    ),
    "holzinger_swineford": Named(
        "real", (180, 60, 61), 9, "Nine mental tests of 301 pupils (Holzinger & Swineford 1939); fixed split 60/20/20",
        _holzinger_swineford, files=("psychometrics/HolzingerSwineford1939.csv",),
        signature="301 rows with columns x1 to x9", origin="HolzingerSwineford1939 of the R package lavaan, as CSV",
    ),
    "bfi": Named(
        "counts", (1_461, 487, 488), 25,
        "25 Big Five items, the 2,436 complete cases of 2,800, answers 1..6 as 0..5 (Revelle et al. 2010); "
        "fixed split 60/20/20",
        _bfi, files=("psychometrics/bfi.csv",), signature="2,800 rows with columns A1 to O5",
        origin="bfi of the R package psych; github.com/vincentarelbundock/Rdatasets, csv/psych/bfi.csv", maximum=5,
        read_gaps=partial(_bfi, gaps=True),
        description_gaps="25 Big Five items of 2,800 people, answers 1..6 as 0..5, NaN where there is none (Revelle et al. "
        "2010); fixed split 60/20/20 of the complete cases and of the others",
    ),
    "lsat6": _section(6),
    "lsat7": _section(7),
    "bsds300": Named(
        "counts", (20_000, 4_000, 4_000), PATCH**2,
        "12x12 patches of natural grey images, split by image 70/10/40, no two overlapping (Martin et al. 2001)",
        _bsds300, files=("bsds300/bsds300_grey.npz",),
        signature="train (80, 321, 481), test (40, 321, 481): uint8 luminance of every second image of each split",
        origin="Berkeley segmentation data set BSDS300, Martin, Fowlkes, Tal & Malik 2001", maximum=255,
        image_shape=(PATCH, PATCH),
    ),
}  # fmt: skip

CORRELATIONS: dict[str, Correlations] = {
    "harman74": Correlations(
        ("psychometrics/Harman74.cor.csv",), 24, 145, prefix="cov.",
        origin="Harman 1976, table 7.4: R's Harman74.cor; github.com/vincentarelbundock/Rdatasets, csv/datasets",
    ),
    "holzinger_correlations": Correlations(
        ("psychometrics/Holzinger.csv",), 14, 355,
        origin="Holzinger & Swineford 1937: Holzinger of the R package psych; github.com/vincentarelbundock/Rdatasets, "
        "csv/psych",
    ),
}  # fmt: skip


def read_correlations(path: Path, entry: Correlations) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a correlation matrix (p, p) and its variables' names from a table with row names."""
    header, frame, _ = table(path)
    expected = f"expected a {entry.size}x{entry.size} correlation matrix with row names and a header"
    names = tuple(str(name) for name in frame.iloc[:, 0])
    columns = slice(1, entry.size + 1)
    if len(names) != entry.size or (header or [])[columns] != [entry.prefix + name for name in names]:
        raise ValueError(f"{printable(path)}: {expected}")
    matrix = numbers(path, frame.iloc[:, columns])
    if not (np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1) and (np.abs(matrix) <= 1).all()):
        raise ValueError(f"{printable(path)}: {expected}: symmetric, with ones on its diagonal and no entry beyond 1")
    return matrix, names
