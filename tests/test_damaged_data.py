"""Data files that lie, explode, hang or hide something: one clear error that names the file, in little memory."""

import gzip
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_datasets import GRID, ROWS, lines, write_csv, write_npz

from probae.data.datasets import load
from probae.data.datasets.formats import idx_images


def npy(shape, descr="<f8", content=b"", version=1):
    """A .npy file with a header of one's own."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode().ljust(117) + b"\n"
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + content
    )


REALS = np.random.default_rng(0).normal(size=(20, 3))
LIES = {
    "terabytes": npy((10**9, 1000), content=b"\0" * 100),
    "fewer rows than follow": npy((15, 3), content=REALS.tobytes()),
    "more rows than follow": npy((25, 3), content=REALS.tobytes()),
    "negative sizes": npy((-20, -3), content=REALS.tobytes()),
    "text without length": npy((10**15, 3), "<U0"),
    "nothing, often": npy((10**15, 3), "|V0"),
    "no columns, often": npy((10**15, 0)),
    "beyond all integers": npy((10**50, 3)),
    "bytes behind the end": npy((20, 3), content=REALS.tobytes() + b"x"),
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 100,
    "brackets": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
}


@pytest.mark.parametrize("packed", [False, True], ids=["npy", "npz"])
@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_in_little_memory(content, packed, tmp_path):
    path = tmp_path / ("mine.npz" if packed else "mine.npy")
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    else:
        path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"mine\.np"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def bomb(path, member, **others):
    """An archive of half a megabyte with a member of 300, and others beside it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(f"{member}.npy", "w") as file:
            file.write(npy((300, 125_000)))
            for _ in range(300):
                file.write(bytes(1_000_000))
        for name, content in others.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_unread(tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"mine\.npz: [\d,]+ bytes that unpack to 300,000,128"):
            load(bomb(tmp_path / "mine.npz", "x"))
        parts = dict.fromkeys(("train", "valid", "test"), npy((20, 3), content=REALS.tobytes()))
        assert load(bomb(tmp_path / "other.npz", "extra", **parts)).train.shape == (20, 3), (
            "what is not asked for is not read"
        )
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_gzipped_images_are_unpacked_no_further_than_expected(tmp_path):
    with gzip.open(tmp_path / "bomb.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x803, 2, 28, 28))
        for _ in range(300):
            file.write(bytes(1_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb\.gz: expected 2 images .* got more than 1,584 bytes"):
            idx_images(tmp_path / "bomb.gz", 2, 28, 28)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damage_to_a_packed_archive_is_a_value_error_however_it_is_packed(method, tmp_path):
    path, random, refused = tmp_path / "mine.npz", np.random.default_rng(0), 0
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", npy((20, 3), content=REALS.tobytes()))
    whole = path.read_bytes()
    assert load(path).kind == "real"
    for _ in range(200):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 2):
            content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            load(path)
        except ValueError as error:
            refused += "mine.npz" in str(error)
    assert refused > 150


def test_two_arrays_of_one_name_are_refused(tmp_path):
    array = npy((20, 3), content=REALS.tobytes())
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("x.npy", array)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", array)
    with pytest.raises(ValueError, match=r"mine\.npz: two arrays have the name 'x'"):
        load(tmp_path / "mine.npz")


@pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links of Unix")
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a pipe", "loop", "link to nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, suffix, tmp_path):
    path = tmp_path / f"mine{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        goals = {"device": "/dev/zero", "link to a pipe": tmp_path / "pipe", "loop": path, "link to nothing": "nowhere"}
        path.symlink_to(goals[kind])
    with pytest.raises((ValueError, FileNotFoundError), match=rf"mine\{suffix}"):
        load(path)


MARKS = "\ufeff\ufeff"


def test_byte_order_marks_cost_no_row(tmp_path):
    for text, names in ((MARKS + "\n".join(lines()), None), (MARKS + "\n".join(["a,b,c", *lines()]), ("a", "b", "c"))):
        data = load(write_csv(tmp_path / "mine.csv", text))
        assert data.feature_names == names
        assert sum(map(len, (data.train, data.validation, data.test))) == len(GRID)


def test_truth_values_in_the_first_row_are_data(tmp_path):
    data = load(write_csv(tmp_path / "mine.csv", "\n".join(["True,False", "false,TRUE"] * 6)))
    assert (data.kind, data.feature_names) == ("binary", None)
    assert sum(map(len, (data.train, data.validation, data.test))) == 12


@pytest.mark.parametrize(
    "first", ["1,oops,3", "?,1,2", "-,1,2", '"0,5",1,2', "1,2020-01-01,2", "1,$3,0", "1,True story,2", "\ufeff1,2,x"]
)
def test_a_first_row_that_may_be_data_is_not_taken_for_a_header(first, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.csv: its first row has numbers beside"):
        load(write_csv(tmp_path / "mine.csv", "\n".join([first, *lines()])))


@pytest.mark.parametrize("first", ["country,1990,1991", "total,0.25,0.75", "a,b2,c"])
def test_names_that_are_numbers_no_value_can_be_are_a_header(first, tmp_path):
    data = load(write_csv(tmp_path / "mine.csv", "\n".join([first, *lines()])))
    assert data.feature_names == tuple(first.split(","))


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1, 2**63 + 1, 10**30 + 1])
@pytest.mark.parametrize("gap", [False, True])
def test_whole_numbers_that_would_lose_digits_are_refused_in_a_table(number, gap, tmp_path):
    text = "\n".join(["id,x", *[f"{number},1"] * 12, *[",1"] * gap])
    with pytest.raises(ValueError, match=r"mine\.csv: column 'id' \(-?\d+\): whole numbers beyond 2\^53"):
        load(write_csv(tmp_path / "mine.csv", text))


@pytest.mark.parametrize(("number", "dtype"), [(2**53 + 1, np.int64), (-(2**53) - 1, np.int64), (2**64 - 1, np.uint64)])
def test_whole_numbers_that_would_lose_digits_are_refused_in_an_array(number, dtype, tmp_path):
    np.save(tmp_path / "mine.npy", np.full((12, 2), number, dtype))
    with pytest.raises(ValueError, match=rf"mine\.npy: {number}: whole numbers beyond"):
        load(tmp_path / "mine.npy")


def test_large_numbers_that_keep_their_digits_are_taken(tmp_path):
    data = load(write_csv(tmp_path / "mine.csv", "\n".join([f"{2**60},1", f"{2**53},2"] * 6)))
    assert data.maximum == 2**60
    assert load(write_csv(tmp_path / "mine.csv", "\n".join(["1e17,1", "2.5,2"] * 6))).kind == "real"


def test_a_table_of_too_many_columns_is_refused_at_its_first_row(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.csv: .*more than 131,072 columns"):
        load(write_csv(tmp_path / "mine.csv", "," * 200_000))


def test_escape_sequences_of_names_and_cells_are_quoted_in_messages(tmp_path):
    odd = tmp_path / "a\x1b[31m.csv"
    members = {"p\x1b[2J": ROWS, "q": ROWS}
    for path in (
        write_csv(odd, "x\x1b[2J,b\n" + "\x1b[31mred,1\n" * 12),
        write_csv(odd, "1,2\n"),
        write_npz(tmp_path / "b\x1b[31m.npz", **members),
        tmp_path / "none\x1b[31m.npy",
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load(path)
        assert "\x1b" not in str(error.value)
        assert r"\x1b[31m" in str(error.value)
