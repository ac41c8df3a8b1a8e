"""Tables as people have them: how they are written, which part each column plays, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from probae.datasets import Columns, load

RNG = np.random.default_rng(5)
FRAME = pd.DataFrame({
    "size": RNG.normal(10, 2, 20).round(2), "weight": RNG.normal(size=20).round(3), "score": RNG.integers(1, 6, 20),
    "sex": RNG.choice(["männlich", "weiblich"], 20), "age": RNG.integers(18, 90, 20), "who": [f"P{i}" for i in range(20)],
})  # fmt: skip
PARTS = Columns(labels="sex", covariates=("age",), index="who")
NUMBERS = FRAME[["size", "weight", "score"]].to_numpy(np.float64)


def whole(data):
    """The rows of a data set in the order of their names' numbers."""
    names = np.concatenate(data.index)
    order = np.argsort([int(name[1:]) for name in names])
    return tuple(np.concatenate(part)[order] for part in ((data.train, data.validation, data.test), data.given))


@pytest.mark.parametrize(
    ("written", "encoding", "said"),
    [
        ({}, "utf-8", ""),
        ({"sep": ";", "decimal": ","}, "utf-8", "semicolons, decimal commas"),
        ({"sep": ";", "decimal": ","}, "utf-8-sig", "semicolons, decimal commas"),
        ({"sep": ";"}, "latin-1", "semicolons, Latin-1"),
        ({"sep": "\t", "decimal": ","}, "latin-1", "tabs, decimal commas, Latin-1"),
        ({"sep": "\t"}, "utf-16", "tabs, UTF-16"),
        ({"sep": "|"}, "utf-8", "bars"),
        ({"quoting": 1}, "utf-8", ""),
        ({"quoting": 1, "decimal": ","}, "utf-8", "commas, decimal commas"),
        ({"lineterminator": "\r\n", "sep": ";", "decimal": ","}, "utf-8", "semicolons, decimal commas"),
    ],
)
def test_a_table_is_read_however_it_is_written(written, encoding, said, tmp_path):
    FRAME.to_csv(tmp_path / "mine.csv", index=False, encoding=encoding, **written)
    data = load(tmp_path / "mine.csv", columns=PARTS)
    x, given = whole(data)
    np.testing.assert_allclose(x, NUMBERS, rtol=1e-6)
    assert given[:, :2].argmax(1).tolist() == (FRAME["sex"] == "weiblich").astype(int).tolist()
    assert given[:, 2].tolist() == FRAME["age"].tolist()
    assert data.feature_names == ("size", "weight", "score")
    assert said in data.description


def test_a_header_that_is_one_field_short_as_r_writes_it_names_the_other_columns(tmp_path):
    rows = [f'"row {i}" {i / 7} {i % 3}'.replace("row ", "row") for i in range(12)]
    (tmp_path / "mine.txt").write_text("\n".join(['"a"\t"b"', *rows]).replace(" ", "\t"))
    data = load(tmp_path / "mine.txt")
    assert data.feature_names == ("a", "b")
    assert data.index[0][0].startswith("row")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "h5ad"])
def test_the_same_rows_are_read_from_each_kind_of_file(suffix, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    frame, columns = FRAME.set_index("who"), Columns(labels="sex", covariates=("age",))
    if suffix == "csv":
        frame.rename_axis(None).to_csv(path)
    elif suffix == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        annotated(path, NUMBERS, frame)
    x, given = whole(load(path, columns=columns))
    np.testing.assert_allclose(x, NUMBERS, rtol=1e-6)
    assert given.shape == (20, 3)


def annotated(path, x, obs, **layers):
    anndata = pytest.importorskip("anndata")
    made = anndata.AnnData(x, obs=obs[["sex", "age"]], var=pd.DataFrame(index=["size", "weight", "score"]))
    made.layers.update(layers)
    made.write_h5ad(path)


def test_sparse_matrices_and_layers_are_read_and_some_variables_alone(tmp_path):
    from scipy import sparse

    counts = np.random.default_rng(0).poisson(1.0, (20, 3)).astype(np.float32)
    frame = FRAME.set_index("who")
    annotated(tmp_path / "cells.h5ad", sparse.csr_matrix(counts), frame, twice=sparse.csc_matrix(2 * counts))
    columns = Columns(features=("score", "size"), covariates=("age",))
    for layer, factor in ((None, 1), ("twice", 2)):
        data = load(tmp_path / "cells.h5ad", columns=columns, layer=layer)
        assert data.kind == "counts"
        assert np.array_equal(whole(data)[0], factor * counts[:, [2, 0]])
    with pytest.raises(ValueError, match="no layers/raw, and its layers are: twice"):
        load(tmp_path / "cells.h5ad", layer="raw")
    with pytest.raises(ValueError, match="no column 'batch'; beside the matrix stand: age, sex"):
        load(tmp_path / "cells.h5ad", columns=Columns(labels="batch"))


@pytest.mark.parametrize("suffix", ["parquet", "h5ad"])
def test_a_damaged_file_is_one_error_with_its_name(suffix, tmp_path):
    pytest.importorskip("pyarrow" if suffix == "parquet" else "h5py")
    (tmp_path / f"mine.{suffix}").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=rf"mine\.{suffix} is damaged, or no"):
        load(tmp_path / f"mine.{suffix}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\n"1,234",2\n"5,678",3\n' * 6, r"column 'a' \('1,234'\) has thousands separators"),
        ("a;b\n1.234,5;2\n1,5;3\n" * 6, r"column 'a' \('1.234,5'\) has thousands separators"),
        ("a\tb\n1,234.5\t2\n7.5\t3\n" * 6, r"column 'a' \('1,234.5'\) has thousands separators"),
        ("a;b\n1,5;1.234\n2,5;5.678\n" * 6, r"column 'b' \('1.234'\) has decimal points or thousands separators"),
        ("a,b\nx1,2\nx2,3\n", r"not numeric: column 'a' \('x1', different in each row: row names\?\)"),
        ("a,b\n1,2\x00\n" * 12, "which is no text"),
    ],
)
def test_what_cannot_be_a_number_is_refused_with_the_reason(text, message, tmp_path):
    body = text.split("\n", 1)
    lines = [line for line in body[1].split("\n") if line != body[0]]
    (tmp_path / "mine.csv").write_text("\n".join([body[0], *lines]))
    with pytest.raises(ValueError, match=rf"mine\.csv.*{message}"):
        load(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(labels="sexe"), r"no column 'sexe'; did you mean 'sex'\?"),
        (Columns(labels="sex", drop=("sex",)), "the column 'sex' was given two parts"),
        (Columns(features=("size",), labels="sex", levels={"sex": ("weiblich",)}), "'sex' has the level 'männlich'"),
        (Columns(features=("size", "weight"), exact=True), "'score', 'sex', 'age', 'who' is none of those"),
        (
            Columns(features=("size",), covariates=("who",), drop=("weight", "score", "sex", "age"), exact=True),
            "the covariate 'who' has the value 'P0', where the model was fitted to numbers",
        ),
        (Columns(drop=tuple(FRAME)), "no column is left as a feature"),
    ],
)
def test_parts_that_do_not_fit_the_table_are_refused(columns, message, tmp_path):
    FRAME.to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mine.csv", columns=columns)


def test_codes_of_missing_values_are_missing_only_if_they_are_named(tmp_path):
    frame = FRAME[["size", "score"]].copy()
    frame.loc[3, "score"] = -99
    frame.to_csv(tmp_path / "mine.csv", index=False)
    assert not np.isnan(load(tmp_path / "mine.csv").train).any()
    coded = load(tmp_path / "mine.csv", columns=Columns(missing_codes=(-99.0,)), missing="mask")
    gaps = np.concatenate([np.isnan(part) for part in (coded.train, coded.validation, coded.test)])
    assert gaps.sum(0).tolist() == [0, 1]
    (described,) = [column for column in coded.described if column.name == "score"]
    assert (described.missing, described.low, described.kind) == (1, frame["score"].drop(3).min(), "counts")
    with pytest.raises(ValueError, match="missing values in 1 of 20 rows"):
        load(tmp_path / "mine.csv", columns=Columns(missing_codes=(-99.0,)))


def test_text_may_stand_for_a_missing_value_and_a_separator_at_the_end_for_nothing(tmp_path):
    (tmp_path / "mine.csv").write_text("a;b;\n" + "\n".join(f"{i},5;{'.' if i == 3 else i};" for i in range(12)))
    data = load(tmp_path / "mine.csv", columns=Columns(missing_codes=(".",)), missing="mask")
    assert data.feature_names == ("a", "b")
    assert np.isnan(np.concatenate([data.train, data.validation, data.test])).sum() == 1


def test_a_gap_in_labels_or_covariates_is_refused(tmp_path):
    frame = FRAME.copy()
    frame.loc[2, "sex"], frame.loc[4, "age"] = None, np.nan
    frame.to_csv(tmp_path / "mine.csv", index=False)
    for columns in (Columns(labels="sex", drop=("who", "age")), Columns(covariates=("age",), drop=("who", "sex"))):
        with pytest.raises(ValueError, match=r"missing (or infinite )?values: fill them"):
            load(tmp_path / "mine.csv", columns=columns)


def test_whole_numbers_are_real_if_that_is_asked_for(tmp_path):
    FRAME[["score", "age"]].to_csv(tmp_path / "mine.csv", index=False)
    assert load(tmp_path / "mine.csv").kind == "counts"
    assert load(tmp_path / "mine.csv", kind="real").kind == "real"
    with pytest.raises(ValueError, match="expected binary values, got counts ones"):
        load(tmp_path / "mine.csv", kind="binary")


def test_the_columns_of_an_array_are_numbered(tmp_path):
    np.save(tmp_path / "mine.npy", FRAME[["size", "score", "age"]].to_numpy())
    data = load(tmp_path / "mine.npy", columns=Columns(covariates=("3",), drop=("2",)))
    assert data.features == 1
    assert sorted(np.concatenate(data.covariates)[:, 0]) == sorted(FRAME["age"])


def test_a_long_number_may_be_a_row_name(tmp_path):
    text = "\n".join(["id,x,y", *(f"{2**60 + i},{i / 3},{i}" for i in range(12))])
    (tmp_path / "mine.csv").write_text(text)
    assert sorted(np.concatenate(load(tmp_path / "mine.csv", columns=Columns(index="id")).index))[1] == 2**60 + 1


def test_columns_are_told_as_the_kind_that_was_asked_for(tmp_path):
    (tmp_path / "answers.csv").write_text("a,b,age\n" + "1,0,30\n2,1,41\n" * 6)
    data = load(tmp_path / "answers.csv", columns=Columns(covariates=("age",)), kind="real")
    assert [(c.name, c.kind) for c in data.described] == [("a", "real"), ("b", "real"), ("age", "counts")]


def test_columns_survive_json():
    columns = Columns(("a",), "b", ("c",), "d", ("e",), (-99.0,), {"b": ("x", "y")}, exact=True)
    assert Columns.from_json(columns.to_json()) == columns


def test_names_and_levels_keep_every_digit_and_covariates_that_would_lose_one_are_refused(tmp_path):
    rows = [f"{name};{i % 2 + 2**53};{i},5" for i, name in enumerate(["007", "NA", "1e5", *map(str, range(10, 20))])]
    (tmp_path / "mine.csv").write_text("\n".join(["id;class;a", *rows]))
    data = load(tmp_path / "mine.csv", columns=Columns(index="id", labels="class"))
    by_name = {
        name: (int(label), x[0])
        for part in zip(data.index, data.labels, (data.train, data.validation, data.test), strict=True)
        for name, label, x in zip(*part, strict=True)
    }
    assert by_name["007"] == (0, 0.5)
    assert by_name["NA"] == (1, 1.5)
    assert by_name["1e5"] == (0, 2.5)
    with pytest.raises(ValueError, match="lose digits"):
        load(tmp_path / "mine.csv", columns=Columns(index="id", covariates=("class",)))


def test_text_among_decimal_commas_may_stand_for_a_missing_value(tmp_path):
    (tmp_path / "mine.csv").write_text("a;b\n1,5;?\n2,5;3,5\n9;4\n" + "2,5;3,5\n" * 9)
    data = load(tmp_path / "mine.csv", missing="mask", columns=Columns(missing_codes=("?", "9")))
    x = np.concatenate([data.train, data.validation, data.test])
    np.testing.assert_array_equal(np.sort(x[:, 0]), [1.5, *[2.5] * 10, np.nan])
    assert np.isnan(x[:, 1]).sum() == 1
    assert np.nansum(x[:, 1]) == 10 * 3.5 + 4


def test_a_level_is_the_same_whole_number_whatever_stands_in_the_other_rows(tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n" + "0.5,1.5\n0.2,3\n" * 6)
    levels = load(tmp_path / "mine.csv", columns=Columns(labels="b")).columns.levels
    (tmp_path / "mine.csv").write_text("a,b\n" + "0.5,3\n0.2,3\n" * 6)
    assert load(tmp_path / "mine.csv", columns=Columns(labels="b", levels=levels)).labels[0].tolist() == [1] * 7


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.arange(20) % 5 + 2**53, r"column 'b' \(9007199254740993\): .*lose digits"),
        (pd.array(np.arange(20) % 5 + 2**53).astype("Int64"), "lose digits"),
        (pd.date_range("2020-01-01", periods=20), r"not numeric: column 'b' \(Timestamp\('2020-01-01"),
        (pd.timedelta_range("1D", periods=20), r"not numeric: column 'b' \(Timedelta\('1 days"),
        ([[1, 2]] * 20, "not numeric: column 'b'"),
    ],
)
def test_a_parquet_file_gives_no_dates_and_no_rounded_numbers(column, message, tmp_path):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": np.linspace(0, 1, 20), "b": column}).to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mine.parquet")
    if "lose" in message:
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "mine.parquet", columns=Columns(covariates=("b",)))
