"""`probae fit`, and the commands about the model that it saves, on a table as people have them."""

import inspect
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import command

import probae
from probae.cli import completion
from probae.cli.program import COMMANDS
from probae.datasets import Columns, load
from probae.models import CATALOGUE, catalogue

pytestmark = pytest.mark.xdist_group("cli")

RNG = np.random.default_rng(3)
FEATURES = [f"größe {i}" for i in range(4)]
PARTS = ["--index", "who", "--drop", "sex"]


def survey(n=80):
    """Two factors in units far from one another, with gaps, a text column and names."""
    x = RNG.normal(size=(n, 2)) @ RNG.normal(size=(2, 4)) + 0.5 * RNG.normal(size=(n, 4))
    frame = pd.DataFrame(x * [1, 10, 100, 1000] + 50, columns=FEATURES).round(3)
    frame = frame.mask(RNG.random((n, 4)) < 0.05)
    frame.insert(0, "who", [f"P{i:02d}" for i in range(n)])
    return frame.assign(sex=RNG.choice(["f", "m"], n))


FRAME = survey()


def write(frame, path):
    frame.to_csv(path, sep=";", decimal=",", index=False, encoding="latin-1")
    return path


def said(*arguments, **environment):
    """The JSON document of a command that succeeds."""
    code, out, err = command(*arguments, "--json", **environment)
    assert code == 0, err
    return json.loads(out)


def mistake(*arguments):
    code, out, err = command(*arguments, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("probae: ")
    assert len(err.splitlines()) == 1
    return err


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a table, and two factor analyses of it, of the values and standardised: what each said."""
    folder = tmp_path_factory.mktemp("fitted")
    options = ["fit", "--data", write(FRAME, folder / "mine.csv"), "--model", "factor_analysis", *PARTS]
    options += ["--missing", "mask"]
    said(*options, "--out", folder / "plain")
    code, out, err = command(*options, "--standardise", "--out", folder / "model")
    assert (code, err) == (0, "")
    return folder, out


def test_fit_prints_what_was_understood_of_each_column_before_it_says_what_it_did(fitted):
    folder, out = fitted
    lines = out.splitlines()
    for column in FRAME:
        (line,) = [line for line in lines if line.startswith(column)]
        part = {"who": "index", "sex": "left out"}.get(column, "feature")
        assert part in line
        if part == "feature":
            assert str(FRAME[column].isna().sum()) in line.split()
    text = " ".join(out.split())
    assert text.index("größe 0") < text.index("fitted factor_analysis")
    assert "decimal commas, Latin-1" in text
    assert f"probae evaluate {folder}/model --data {folder}/mine.csv" in text
    assert max(map(len, lines[: next(i for i, line in enumerate(lines) if "fitted" in line)])) <= 80


def test_evaluate_gives_log_p_of_the_original_values_whether_the_model_saw_them_standardised_or_not(fitted):
    folder, _ = fitted
    found = {name: said("evaluate", folder / name, "--data", folder / "mine.csv") for name in ("plain", "model")}
    data = load(folder / "mine.csv", columns=Columns(index="who", drop=("sex",)), missing="mask")
    expected = probae.log_evidence(probae.load(folder / "model"), data.test)
    assert found["model"]["log_evidence"] == pytest.approx(expected.mean, abs=1e-9)
    assert found["model"]["stderr"] == pytest.approx(expected.mean_stderr, abs=1e-9)
    assert found["model"]["rows"] == "the 16 test rows of mine.csv"
    # the maximum of the likelihood is the same in any units; each fit ends within some 1e-6 nats per datum of it
    assert found["model"]["log_evidence"] == pytest.approx(found["plain"]["log_evidence"], abs=1e-4)
    assert found["model"]["bound"] == "exact"


def test_columns_in_another_order_are_matched_by_name_and_other_columns_are_named(fitted, tmp_path):
    folder, _ = fitted
    ask = ["evaluate", folder / "model", "--rows", "all", "--data"]
    before = said(*ask, folder / "mine.csv")
    turned = write(FRAME[FRAME.columns[::-1]], tmp_path / "turned.csv")
    assert said(*ask, turned)["log_evidence"] == pytest.approx(before["log_evidence"], abs=1e-9)
    lost = write(FRAME.drop(columns="größe 2"), tmp_path / "lost.csv")
    assert "no column 'größe 2'" in mistake(*ask, lost)
    more = write(FRAME.assign(extra=1), tmp_path / "more.csv")
    assert "'extra' is none of those that the model was fitted to" in mistake(*ask, more)
    assert said(*ask, more, "--drop", "extra")["log_evidence"] == before["log_evidence"]
    assert "the model was fitted to the features" in mistake(*ask, turned, "--columns", "größe 1")


def test_other_rows_are_evaluated_whole_and_have_no_splits(fitted, tmp_path):
    folder, _ = fitted
    few = write(FRAME.head(3), tmp_path / "few.csv")
    found = said("evaluate", folder / "model", "--data", few, "--out", tmp_path / "each.csv")
    assert (found["count"], found["rows"]) == (3, "all 3 rows of few.csv")
    each = pd.read_csv(tmp_path / "each.csv", index_col="who")
    assert each.index.tolist() == ["P00", "P01", "P02"]
    assert each["log_evidence"].mean() == pytest.approx(found["log_evidence"])
    assert "was not fitted to" in mistake("evaluate", folder / "model", "--data", few, "--rows", "test")


@pytest.mark.parametrize("suffix", ["csv", "npy", "parquet"])
def test_encode_writes_the_codes_of_all_rows_under_their_names_gaps_and_all(suffix, fitted, tmp_path):
    folder, _ = fitted
    out = tmp_path / f"codes.{suffix}"
    assert said("encode", folder / "model", "--data", folder / "mine.csv", "--out", out)["latents"] == ["z1", "z2"]
    x = torch.tensor(FRAME[FEATURES].to_numpy(), dtype=torch.float32)
    expected = probae.load(folder / "model").encode(x).numpy()
    if suffix == "npy":
        found = np.load(out)
    else:
        frame = pd.read_parquet(out) if suffix == "parquet" else pd.read_csv(out, index_col="who")
        assert frame.index.tolist() == FRAME["who"].tolist()
        found = frame.to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_sample_draws_rows_in_the_units_of_the_data_under_their_columns_names(fitted):
    folder, _ = fitted
    _, out, _ = command("sample", folder / "model", "-n", 400)
    assert (
        out == command("sample", folder / "model", "-n", 400)[1] != command("sample", folder / "model", "--seed", 1)[1]
    )
    rows = [line.split(",") for line in out.splitlines()]
    assert rows[0] == FEATURES
    drawn = np.array(rows[1:], dtype=float)
    loc, scale = FRAME[FEATURES].mean(), FRAME[FEATURES].std()
    # four standard errors of two means, of 400 draws and of 48 training rows
    assert (abs(drawn.mean(0) - loc) < 4 * scale * (1 / 400 + 1 / 48) ** 0.5).all()
    assert said("sample", folder / "model", "-n", 2)[0].keys() == set(FEATURES)


def test_diagnose_prints_a_table_that_fits_and_what_to_do_next(fitted):
    folder, _ = fitted
    code, out, err = command("diagnose", folder / "model", "--data", folder / "mine.csv", "--particles", 50)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "2 of 2 are active" in out
    found = said("diagnose", folder / "model", "--data", folder / "mine.csv", "--particles", 50)
    assert found["summary"]["elbo"]["mean"] == pytest.approx(found["summary"]["iwae"]["mean"])
    assert found["summary"]["pareto_k"]["mean"] is None, "no number is null"


def test_a_model_of_labels_and_covariates_is_fitted_evaluated_and_drawn_from_by_their_names(tmp_path):
    frame = FRAME.assign(age=RNG.integers(20, 60, len(FRAME))).fillna(50.0)
    file = write(frame, tmp_path / "mine.csv")
    options = ["--labels", "sex", "--covariates", "age", "--index", "who"]
    fit = ["fit", "--data", file, *options, "--model", "conditional_vae", "--steps", 3, "--compile", "eager"]
    assert said(*fit, "--out", tmp_path / "out")["features"] == 4
    found = said("evaluate", tmp_path / "out", "--data", file, "--particles", 20)
    assert found["given"]
    draw = ["sample", tmp_path / "out", "-n", 3]
    one, other = (said(*draw, "--given", f"sex={sex},age=30") for sex in "fm")
    assert len(one) == 3
    assert one != other
    assert "--given sex=...,age=..." in mistake_of_sample(*draw)
    assert "'sex' has the levels f, m, got 'x'" in mistake_of_sample(*draw, "--given", "sex=x,age=30")
    for given in ("sex=f,age=30,sex=m", "sex=f,age=30,more"):
        assert "expected a value of each of sex, age" in mistake_of_sample(*draw, "--given", given)
    assert "expected a finite number for 'age'" in mistake_of_sample(*draw, "--given", "sex=f,age=nan")
    strange = write(frame.assign(sex="x"), tmp_path / "strange.csv")
    assert "the level 'x', which the model was not fitted to" in mistake(
        "evaluate", tmp_path / "out", "--data", strange
    )


def test_fit_takes_a_likelihood_by_name_and_says_which_columns_the_model_does_not_use(tmp_path):
    counts = RNG.poisson(3.0, (60, 3))
    file = write(
        pd.DataFrame(counts, columns=["a", "b", "c"]).assign(batch=RNG.choice(["u", "v"], 60)), tmp_path / "t.csv"
    )
    fit = [
        "fit",
        "--data",
        file,
        "--covariates",
        "batch",
        "--likelihood",
        "poisson",
        "--steps",
        2,
        "--compile",
        "eager",
    ]
    for name in ("vae", "conditional_vae"):
        code, out, err = command(*fit, "--model", name, "--out", tmp_path / name, "--quiet")
        assert (code, ("not used: batch" in out)) == (0, name == "vae"), err
        recipe = json.loads((tmp_path / name / "model.json").read_text())["recipe"]
        assert recipe["arguments"]["likelihood"]["build"] == "likelihood Poisson"
    code, _, err = command(*fit, "--model", "ppca", "--out", tmp_path / "ppca")
    assert code == 2
    assert "'ppca' takes no other likelihood" in err
    assert not (tmp_path / "ppca").exists()


def mistake_of_sample(*arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    return err


OWN = '''
import torch, probae

@probae.savable
class {name}(probae.PPCA):
    """A model of one's own."""

    def __init__(self, features, latents):
        super().__init__(features, latents)
'''


@pytest.mark.parametrize("source", ["OwnInFile", "OwnInModule"])
def test_a_model_of_ones_own_comes_from_a_file_or_a_module(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{source.lower()}.py").write_text(OWN.format(name=source))
    spec = f"{source.lower()}.py:{source}" if source == "OwnInFile" else f"{source.lower()}:{source}"
    frame = FRAME.fillna(50.0)
    write(frame, "mine.csv")
    fitting = "fit", "--data", "mine.csv", *PARTS, "--model", spec, "--out", "out"
    assert said(*fitting)["model"] == source
    assert f"--model {spec}" in command(*fitting, "--force", columns=200)[1]
    assert said("evaluate", "out", "--data", "mine.csv", "--model", spec)["bound"] == "exact"
    sys.modules.pop(source.lower(), None)
    CATALOGUE.pop(source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:A", "no file nowhere.py"),
        ("no_such_module:A", "no module no_such_module; a file is named with its ending"),
        ("json:NoModel", "to define a class of that name"),
        ("ppca,vae", "expected one model"),
        ("pcaa", "expected some of"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(spec, message, fitted, tmp_path):
    folder, _ = fitted
    err = mistake(
        "fit", "--data", folder / "mine.csv", *PARTS, "--missing", "mask", "--model", spec, "--out", tmp_path / "o"
    )
    assert message in err
    assert not (tmp_path / "o").exists()


def test_a_saved_model_is_replaced_only_if_that_is_said(fitted, tmp_path):
    data = write(FRAME.fillna(0.0), tmp_path / "mine.csv")
    fit = ["fit", "--data", data, *PARTS, "--model", "ppca", "--out", tmp_path / "out"]
    said(*fit)
    assert "holds a model" in mistake(*fit)
    said(*fit, "--force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere", "--data", "digits"], "no model in nowhere"),
        (["encode", "nowhere", "--data", "digits", "--out", "codes.xlsx"], "expected a file that ends in .csv"),
        (["encode", "nowhere", "--data", "digits", "--out", "no/codes.csv"], "a folder that is there"),
        (["evaluate", "nowhere", "--data", "digits", "--method", "magic"], "expected one of"),
        (["fit", "--data", "digits", "--model", "ppca", "--standardise"], "--values real"),
        (["fit", "--data", "digits", "--model", "ppca", "--labels", "a"], "for a file of your own"),
        (["fit", "--data", "x.csv", "--model", "ppca", "--values", "integers"], "--values: expected one of"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_damaged_description_of_the_data_is_one_line(fitted, tmp_path):
    folder, _ = fitted
    shutil.copytree(folder / "plain", tmp_path / "plain")
    (tmp_path / "plain" / "data.json").write_text('{"probae": "model"}')
    assert "data.json is damaged" in mistake("evaluate", tmp_path / "plain", "--data", folder / "mine.csv")


def test_ctrl_c_ends_a_fit_with_code_130_and_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    file = write(FRAME.fillna(0.0), tmp_path / "mine.csv")
    code, _, err = command("fit", "--data", file, *PARTS, "--model", "linear_vae", "--out", tmp_path / "out")
    assert (code, err) == (130, "probae: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_compare_takes_the_parts_of_columns_and_prints_json(tmp_path):
    file = write(FRAME.fillna(50.0), tmp_path / "mine.csv")
    options = ["--models", "ppca", "--latents", 1]
    parts = ["--labels", "sex", "--index", "who", "--standardise"]
    found = said("compare", "--data", file, *parts, *options, "--out", tmp_path / "out")
    assert {"ppca", "full Gaussian"} <= {row["model"] for row in found["models"]}
    assert found["settings"]["standardise"] is True
    again = said("evaluate", tmp_path / "out" / "models" / "ppca", "--data", file)
    (row,) = [row for row in found["models"] if row["model"] == "ppca"]
    assert again["log_evidence"] == pytest.approx(row["log_evidence"], abs=1e-6)


def test_the_version_and_lists_for_machines():
    assert command("--version") == (0, f"probae {probae.__version__}\n", "")
    found = said("list")
    assert [model["name"] for model in found["models"]] == list(CATALOGUE)
    assert [row["name"] for row in found["data"]] == list(probae.datasets.names())
    assert [row["name"] for row in said("data")] == list(probae.datasets.names())
    assert said("data", "nltcs")["files"][0]["published"][0]["url"].startswith("https://")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_if_asked(name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "--json" in out
    assert max(map(len, out.splitlines())) <= 80


def test_names_are_completed(tmp_path):
    written = re.findall(r'^    "(\w+)": Model\(', inspect.getsource(catalogue), re.MULTILINE)
    assert list(completion.MODELS) == written
    assert completion.models("ppca,bino") == ["ppca,binomial_vae"]
    assert "mnist" in completion.sets("mn")
    write(FRAME, tmp_path / "mine.csv")

    class Context:
        params = {"data": str(tmp_path / "mine.csv")}

    assert completion.columns_of(Context, "who,se") == ["who,sex"]
    code, out, _ = command("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert code in (0, 2), out


def test_few_features_have_half_as_many_latents_unless_a_number_is_said(tmp_path):
    file = write(FRAME.fillna(50.0), tmp_path / "mine.csv")
    compare = ["compare", "--data", file, *PARTS, "--models", "ppca"]
    assert said(*compare, "--out", tmp_path / "out")["settings"]["latents"] == 2
    code, _, err = command(*compare, "--latents", 16, "--out", tmp_path / "other")
    assert code == 2
    assert "latents: expected a whole number from 1 to 4, got 16" in err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "    def __init__(self, features, latents):\n        raise RuntimeError('not today')",
            "line 4: RuntimeError: not t",
        ),
        ("    pass\nimport sys\nsys.exit(3)", "line 5: SystemExit: 3"),
    ],
)
def test_what_a_users_own_code_raises_is_one_line_with_its_place(body, message, fitted, tmp_path):
    (tmp_path / "mine.py").write_text(f"import probae\nclass Raises(probae.PPCA):\n{body}\n")
    data = ["--data", fitted[0] / "mine.csv", *PARTS, "--missing", "mask", "--out", tmp_path / "out"]
    code, _, err = command("fit", *data, "--model", f"{tmp_path}/mine.py:Raises")
    assert code == 2
    assert f"mine.py: {message}" in err
    assert len(err.splitlines()) == 1
    CATALOGUE.pop("Raises", None)


def test_a_class_does_not_give_way_to_a_model_of_the_catalogue_with_its_name(fitted, tmp_path):
    (tmp_path / "mine.py").write_text("import probae\nclass ppca(probae.PPCA):\n    pass\n")
    data = ["--data", fitted[0] / "mine.csv", *PARTS, "--missing", "mask", "--out", tmp_path / "out"]
    assert "give the class another name" in mistake("fit", *data, "--model", f"{tmp_path}/mine.py:ppca")


def test_names_of_columns_are_not_obeyed_by_the_terminal(tmp_path):
    frame = FRAME[FEATURES].fillna(50.0).set_axis(["a\x1b[31m", "b]x[bold]", "c,d", "e\nf"], axis=1)
    frame.to_csv(tmp_path / "mine.csv", index=False)
    code, out, err = command("fit", "--data", tmp_path / "mine.csv", "--model", "ppca", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert r"a\x1b[31m" in out
    assert r"e\nf" in out
    assert list(said("sample", tmp_path / "out", "-n", "1")[0]) == list(frame)
