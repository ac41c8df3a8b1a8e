"""Where the files of the named sets come from: addresses that stay, SHA-256 sums, and the form in which they are stored."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from probae.arguments import printable

_GITHUB = "https://raw.githubusercontent.com"
_RDATASETS = f"{_GITHUB}/vincentarelbundock/Rdatasets/1dcc2bf5f955cc1224a3e1307256e1fe86b68dae/csv"
_DEBD = f"{_GITHUB}/arranger1044/DEBD/850908666388f1b1c766a304b37dae14613f1e51/datasets"
_STATIC = f"{_GITHUB}/riannevdberg/sylvester-flows/32dde9b7d696fee94f946a338182e542779eecfe/data/MNIST_static"
_OIL = f"{_GITHUB}/renero/class_notebooks/ff3bee426101f00530d62fc769310730f2436e1b/data"
_FASHION = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_NEWSGROUPS = f"{_GITHUB}/probml/probml-data/f74e6f00ef1570f5b3843c49818d0bfa6b473069/data/20news_w100.mat"
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Published:
    """A published file: its address, and its SHA-256."""

    url: str
    sha256: str


@dataclass(frozen=True)
class Download:
    """How a stored file comes about.

    Arguments:
        published: The files to fetch.
        convert: Makes the stored file, its second argument, of them, where it has another form; None where it is the same.
        form: What the conversion does, in words.
    """

    published: tuple[Published, ...]
    convert: Callable[[Sequence[Path], Path], None] | None = None
    form: str = "stored as published"


def _packed(features: int, paths: Sequence[Path], out: Path) -> None:
    """Rows of 0 and 1 with one sign between them."""
    parts: dict[str, Any] = {}
    for name, path in zip(("train", "valid", "test"), paths, strict=True):
        digits = np.fromfile(path, np.uint8).reshape(-1, 2 * features)[:, ::2] - ord("0")
        parts[name] = np.packbits(digits, axis=1)
    np.savez_compressed(out, **parts)


def _newsgroups(paths: Sequence[Path], out: Path) -> None:
    from scipy.io import loadmat

    found = loadmat(str(paths[0]))
    documents = np.packbits(found["documents"].T.toarray().astype(np.uint8), axis=1)
    words = np.array([str(word[0]) for word in found["wordlist"].ravel()])
    np.savez_compressed(out, documents=documents, words=words)


def _oil_flow(paths: Sequence[Path], out: Path) -> None:
    names = ("train", "valid", "test")
    parts: dict[str, Any] = {name: np.loadtxt(path) for name, path in zip(names, paths, strict=True)}
    np.savez_compressed(out, **parts)


def _text_to_bits(urls: Sequence[str], sums: Sequence[str], features: int) -> Download:
    published = tuple(Published(url, total) for url, total in zip(urls, sums, strict=True))
    form = "published as three files of text, stored as one .npz of bits (numpy.packbits)"
    return Download(published, partial(_packed, features), form)


def _debd(name: str, features: int, *sums: str) -> Download:
    return _text_to_bits([f"{_DEBD}/{name}/{name}.{part}.data" for part in ("train", "valid", "test")], sums, features)


#: stored file, under the root -> where it comes from
DOWNLOADS: dict[str, Download] = {
    "mnist/train-images-idx3-ubyte.gz": Download((Published(
        f"{_MNIST}/train-images-idx3-ubyte.gz",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),)),
    "mnist/t10k-images-idx3-ubyte.gz": Download((Published(
        f"{_MNIST}/t10k-images-idx3-ubyte.gz",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),)),
    "fashion_mnist/train-images-idx3-ubyte.gz": Download((Published(
        f"{_FASHION}/train-images-idx3-ubyte.gz",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),)),
    "fashion_mnist/t10k-images-idx3-ubyte.gz": Download((Published(
        f"{_FASHION}/t10k-images-idx3-ubyte.gz",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),)),
    "binarized_mnist/binarized_mnist_fixed.npz": _text_to_bits(
        [f"{_STATIC}/binarized_mnist_{part}.amat" for part in ("train", "valid", "test")],
        (
            "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
        ),
        784,
    ),
    "debd/nltcs.npz": _debd(
        "nltcs", 16,
        "e547a7aedad1dd2f7177030881ab1b92c7e24ae5464c71a0f1f89daecaf52b30",
        "93bbbf5c6febdc9bc6e5b5bfab636f4dc0685ab2896d24b23dd267794c3bfcf6",
        "f9ffa6b74b27dc03bee3203d157ee31079e80b13be40d0c0093d635c25aed523",
    ),
    "debd/plants.npz": _debd(
        "plants", 69,
        "1fb1219ff94068d12a563f9e81f8889a1885f41e867884cff608669300c6848f",
        "47834ed318b2d74f48e4b083226ef47fd446d41986012ceae19d230574821b34",
        "95f53c033cd1d86467aec2610dc5bfe014534206c2da4919f73bcab246ab8755",
    ),
    "debd/dna.npz": _debd(
        "dna", 180,
        "bb8de0ca4b6ad9b610036b7a302962ebecd4b504354b14c02c7d0bee48d207d9",
        "4b0fc89cda5eaf5c75926e281afb6af99de194a546070d5b81b524ba251f4f3f",
        "fec3ae7b26804020a9c43c99828441c5e08bb76b23719368a74ad2b09af99100",
    ),
    "debd/mushrooms.npz": _debd(
        "mushrooms", 112,
        "465c712c066bbbee3ccceded24bbe42b4c379df67b524e28cce9bf3a8b83f27b",
        "5a067e6854df71623415e6adc8e913cbff766637a324788882ba800907aa5385",
        "313c5f04b5d0a18bee2f2ffa264be265d09f5362aad6f714637acd9552f81aa0",
    ),
    "newsgroups20_w100/newsgroups20_w100.npz": Download(
        (Published(_NEWSGROUPS, "6667c5459e22eb544a854bff1443edaaea71735cf1af7b12cc5d986e74af7064"),),
        _newsgroups, "published as a MATLAB file, stored as one .npz of bits (numpy.packbits) and the words",
    ),
    "oil_flow/oil_flow.npz": Download(
        (
            Published(f"{_OIL}/DataTrn.txt", "d93847ad0dbeef61c883aff0362ee980f3a50981c9bb40bcb0fb5ce04a2563ee"),
            Published(f"{_OIL}/DataVdn.txt", "07a26f6525578e98d200411c9b4f0f764ac4fc2f341b6aa6b6e48999909250fd"),
            Published(f"{_OIL}/DataTst.txt", "e0ef016b5cac7f026ffd96b2deefc9d16480cd9b64e76e13b7a9978709be991d"),
        ),
        _oil_flow, "published as three files of text, stored as one .npz",
    ),
    "psychometrics/bfi.csv": Download((Published(
        f"{_RDATASETS}/psych/bfi.csv",
        "68ae71a96c2157b0c49b8d8f8ccaee1292f5e92adce9a3f202fdc7efac883dc9",
    ),)),
    "item_response/lsat6.csv": Download((Published(
        f"{_RDATASETS}/psych/lsat6.csv",
        "2912afd22a32770c3eebd55172f508c187aac0b728ac60adcf175d63c3e4c445",
    ),)),
    "item_response/lsat7.csv": Download((Published(
        f"{_RDATASETS}/psych/lsat7.csv",
        "ad98d4048d5a119e82e77a9b8dbe91580e9606596afe625d9fdb438e310f6330",
    ),)),
    "psychometrics/Harman74.cor.csv": Download((Published(
        f"{_RDATASETS}/datasets/Harman74.cor.csv",
        "d60daf81e5581d4feb86ad171ca746c34bec2627e68e1c0cf250b134bb39f94e",
    ),)),
    "psychometrics/Holzinger.csv": Download((Published(
        f"{_RDATASETS}/psych/Holzinger.csv",
        "dd80aefa9381e226910f5de6db220cab800ba4ef6e2ea678cba6edd78aef8763",
    ),)),
}  # fmt: skip


def fetch(file: str, root: Path) -> Path:
    """Fetch one stored file, whole and with the right checksum, or leave nothing.

    Args:
        file: a key of `DOWNLOADS`.
        root: the folder under which it is stored.

    Raises:
        ConnectionError: if the server cannot be reached, or the connection is cut.
        FileNotFoundError: if the server does not have the file.
        ValueError: if a checksum differs.
        OSError: if the folder cannot be written to.
    """
    source, goal = DOWNLOADS[file], root / file
    new = [folder for folder in (goal.parent, root) if not folder.exists()]
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".download-", dir=goal.parent))
    except OSError as error:
        raise OSError(f"{printable(goal.parent)}: cannot write there ({error.strerror})") from error
    try:
        parts = [_fetched(published, place / f"{i}") for i, published in enumerate(source.published)]
        made = parts[0]
        if source.convert is not None:
            made = place / goal.name
            source.convert(parts, made)
        os.replace(made, goal)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for folder in new:
            if not any(folder.iterdir()):
                folder.rmdir()
    return goal


def _fetched(published: Published, path: Path) -> Path:
    """Fetch one published file into a place of its own."""
    import requests
    from pooch import HTTPDownloader

    download: Any = HTTPDownloader(timeout=_TIMEOUT)
    try:
        download(published.url, str(path), None)
    except requests.HTTPError as error:
        answer = "" if error.response is None else f" {error.response.status_code} {error.response.reason}"
        raise FileNotFoundError(f"{published.url}: the server answered{answer}. Nothing was kept") from error
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise ConnectionError(
            f"{published.url}: cannot be reached, or the connection was cut; is there a network? Nothing was kept"
        ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != published.sha256:
        raise ValueError(
            f"{published.url}: expected a file with the SHA-256 {published.sha256}, got {found}: it is damaged, or was "
            "replaced. Nothing was kept"
        )
    return path
