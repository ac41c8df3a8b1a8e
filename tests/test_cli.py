"""The `probae` command: what it prints and writes, and one line for each mistake."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import probae
from probae.cli import main
from probae.models import CATALOGUE

pytestmark = pytest.mark.xdist_group("cli")  # one process makes the fixtures for all

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib").use("Agg")

ROOT = Path(__file__).parent.parent
BASELINES = ["independent features", "full Gaussian", "mixture of 10 Gaussians"]
OPTIONS = [
    "--data",
    "--models",
    "--latents",
    "--steps",
    "--test-rows",
    "--particles",
    "--seed",
    "--processes",
    "--out",
    "--help",
]
QUICK = ["--steps", "20", "--particles", "10", "--latents", "2"]


def command(*arguments, columns=80, **environment):
    """(exit code, stdout, stderr) of ``probae`` in this process, in a terminal of so many columns."""
    out, err = io.StringIO(), io.StringIO()
    variables = {k: v for k, v in os.environ.items() if k != "PROBAE_DATA"}
    variables |= {"COLUMNS": str(columns), **environment}
    with (
        mock.patch.object(sys, "argv", ["probae", *map(str, arguments)]),
        mock.patch.dict(os.environ, variables, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
    return code, out.getvalue(), err.getvalue()


def write(folder, kind, n=60, features=5):
    """A small file of the user's own."""
    rng = np.random.default_rng(7)
    z = rng.normal(size=(n, 2)) @ rng.normal(size=(2, features))
    if kind == "real":
        x = pd.DataFrame(z + rng.normal(size=z.shape), columns=[f"f{i}" for i in range(features)])
        x.to_csv(folder / "real.csv", index=False)
    elif kind == "binary":
        np.savetxt(folder / "binary.csv", (z > 0).astype(int), fmt="%d", delimiter=",")
    else:
        x = rng.binomial(6, 1 / (1 + np.exp(-z)))
        x[:, :] = np.where(rng.random(x.shape) < 0.3, 0, x)
        x[rng.permutation(n)[: n // 2], 0] = 6  # the maximum is in each part
        np.save(folder / "counts.npy", x.reshape(n, 1, features))
    return folder / {"real": "real.csv", "binary": "binary.csv", "counts": "counts.npy"}[kind]


@pytest.fixture(scope="module", params=["real", "binary", "counts"])
def job(request, tmp_path_factory):
    """A finished run: (kind, file, folder of results, what was printed)."""
    folder = tmp_path_factory.mktemp(request.param)
    file = write(folder, request.param)
    code, out, err = command("compare", "--data", file, *QUICK, "--out", folder / "out")
    assert (code, err) == (0, "")
    return request.param, file, folder / "out", out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The default data, hardly trained."""
    folder = tmp_path_factory.mktemp("digits") / "out"
    arguments = ["--steps", "5", "--particles", "5", "--test-rows", "40", "--out", folder]
    code, out, err = command("compare", *arguments, columns=160)
    assert (code, err) == (0, "")
    return folder, out


# -- help and lists ----------------------------------------------------------------------------------------------------


def fits(text, columns=80):
    return max(map(len, text.splitlines())) <= columns


def test_help_lists_the_commands_in_80_columns():
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert re.search(r"\bcompare\b", out)
    assert re.search(r"\blist\b", out)
    assert fits(out)


def test_the_help_of_compare_explains_every_option_with_its_default_in_80_columns():
    code, out, err = command("compare", "--help")
    assert (code, err) == (0, "")
    assert fits(out)
    for option in OPTIONS:
        assert re.search(rf"{option}\b", out)
    text = "".join(out.split())
    for default in ("digits", "16;", "4000;", "1000;", "0]", "(those that suit the data)", "(probae-compare/DATA)"):
        assert f"[default:{default.replace(' ', '')}" in text


def test_the_text_of_the_help_is_filled_to_the_width():
    lines = [line.strip() for line in command("compare", "--help")[1].splitlines()]
    (first,) = [i for i, line in enumerate(lines) if line.startswith("The table, the figures")]
    paragraph = lines[first : lines.index("", first)]
    pairs = itertools.pairwise(paragraph)
    short = [line for line, following in pairs if len(line) + 1 + len(following.split()[0]) < 76]
    assert not short, "a line of the docstring was broken in its middle"


def test_without_a_command_the_help_is_shown():
    _, out, err = command()
    assert "Usage" in out + err
    assert "compare" in out + err


def test_list_names_every_model_and_data_set_in_80_columns():
    code, out, err = command("list")
    assert (code, err) == (0, "")
    assert fits(out)
    words = out.split()
    for name in [*CATALOGUE, *probae.datasets.names()]:
        assert name in words
    assert "PROBAE_DATA" in out


def test_list_tells_which_data_sets_are_there(tmp_path):
    assert re.search(r"^nltcs .* no *$", command("list")[1], re.MULTILINE)
    (tmp_path / "debd").mkdir()
    (tmp_path / "debd" / "nltcs.npz").touch()
    assert re.search(r"^nltcs .* yes *$", command("list", PROBAE_DATA=str(tmp_path))[1], re.MULTILINE)


def test_the_console_script_is_declared_and_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"probae": "probae.cli:main"}


@pytest.mark.slow
def test_python_m_probae_cli_ends_a_mistake_with_code_2_and_one_line():
    run = subprocess.run(
        [sys.executable, "-m", "probae.cli", "compare", "--data", "no-such-set"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"probae: [^\n]*no-such-set[^\n]*\n", run.stderr)


# -- what a run writes -------------------------------------------------------------------------------------------------


def read(folder):
    return pd.read_csv(folder / "table.csv", index_col="model")


@pytest.mark.slow
def test_the_table_holds_the_line_up_and_the_baselines_best_first(job):
    kind, _, folder, _ = job
    table = read(folder)
    suited = {name for name, model in CATALOGUE.items() if kind in model.standard}
    assert set(table.index) == suited | set(BASELINES)
    numbers = table["log_evidence"].dropna()
    assert numbers.is_monotonic_decreasing
    assert set(table.index) - set(numbers.index) == {"autoencoder", "stochastic_autoencoder"}
    assert table["reconstruction"][["autoencoder", "stochastic_autoencoder"]].notna().all()
    assert table.loc[numbers.index, "difference"].equals(numbers - numbers.max()) or np.allclose(
        table.loc[numbers.index, "difference"], numbers - numbers.max()
    )


@pytest.mark.slow
def test_json_and_csv_hold_the_same_table_and_the_settings(job):
    _, file, folder, _ = job
    content = json.loads((folder / "table.json").read_text())
    rows = pd.DataFrame(content["models"]).set_index("model")
    table = read(folder)
    assert rows.index.tolist() == table.index.tolist()
    assert rows.columns.tolist() == table.columns.tolist()
    for column in table:
        if table[column].dtype.kind in "if":
            np.testing.assert_allclose(rows[column].astype(float), table[column], rtol=1e-9, atol=1e-9, equal_nan=True)
        else:
            assert rows[column].tolist() == table[column].tolist()
    assert content["data"] == file.stem
    assert content["settings"].items() >= {"latents": 2, "steps": 20, "seed": 0}.items()
    assert content["notes"]


@pytest.mark.slow
def test_the_evidence_by_datum_belongs_to_the_table(job):
    _, _, folder, _ = job
    evidence, table = pd.read_csv(folder / "evidence.csv", index_col="datum"), read(folder)
    assert len(evidence) == 12
    means = table["log_evidence"].dropna()
    np.testing.assert_allclose(evidence.mean()[means.index], means, rtol=1e-12)
    errors = evidence.std(ddof=1) / len(evidence) ** 0.5
    np.testing.assert_allclose(errors[means.index], table["stderr"][means.index], rtol=1e-9)


@pytest.mark.slow
def test_every_row_has_its_fitted_model_which_gives_the_same_evidence(job):
    _, file, folder, _ = job
    table, evidence = read(folder), pd.read_csv(folder / "evidence.csv", index_col="datum")
    test = probae.datasets.load(file, seed=0).test
    assert {p.name.replace("_", " ") for p in (folder / "models").iterdir()} == {
        n.replace("_", " ") for n in table.index
    }
    for name in table.index:
        model = probae.load(folder / "models" / name.replace(" ", "_"))
        if name in evidence:
            values = probae.log_evidence(model, test, particles=10, seed=0).values
            np.testing.assert_allclose(values, evidence[name], rtol=1e-12)
        else:
            assert torch.isfinite(model.reconstruct(test)).all()


def png_size(path):
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    assert raw.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


@pytest.mark.slow
def test_figures_are_drawn_of_images_only_where_rows_are_images(job):
    kind, _, folder, out = job
    figures = {p.name for p in folder.glob("*.png")}
    assert figures == {"evidence.png"} | ({"reconstructions.png", "samples.png"} if kind == "counts" else set())
    for name in figures:
        assert min(png_size(folder / name)) > 100
        assert name in out


@pytest.mark.slow
def test_the_end_of_the_output_says_where_the_results_lie(job):
    _, _, folder, out = job
    said = "".join(out.split())
    assert f"writtento{folder}:" in said
    for name in ("table.csv", "table.json", "evidence.csv", "models/"):
        assert name in out
        assert (folder / name).exists()


@pytest.mark.slow
def test_in_80_columns_every_name_and_number_of_the_table_is_whole(job):
    _, _, folder, out = job
    assert fits(out)
    drawn = out[out.index("held-out log p(x)") : out.index("one standard error")]
    assert "…" not in drawn
    for name, row in read(folder).iterrows():
        for word in name.split():
            assert word in drawn
        if not math.isnan(row["log_evidence"]):
            assert f"{row['log_evidence']:.2f}" in drawn


@pytest.mark.sample(1)
@pytest.mark.slow
def test_the_notes_are_printed(job):
    _, _, folder, out = job
    said = " ".join(out.split())
    for note in json.loads((folder / "table.json").read_text())["notes"]:
        assert note in said


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_and_another_seed_another(job, tmp_path):
    kind, file, folder, _ = job
    names = "ppca,autoencoder," + {"real": "normal_vae", "binary": "vae", "counts": "binomial_vae"}[kind]
    tables = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        torch.manual_seed(number)
        code, _, err = command("compare", "--data", file, *QUICK, "--models", names, "--seed", seed, "--out", out)
        assert (code, err) == (0, "")
        tables.append(read(out).drop(columns=["seconds", "fit_seconds"]))
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert not tables[0]["log_evidence"].equals(tables[2]["log_evidence"])
    assert set(tables[0].index) == {*names.split(","), *BASELINES}
    # a model's row does not hang on which others are in the line-up
    assert tables[0]["log_evidence"]["ppca"] == read(folder)["log_evidence"]["ppca"]


@pytest.mark.slow
def test_a_flat_prior_is_evaluated_with_one_fitted_to_its_codes_if_asked(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 3)) @ np.random.default_rng(1).normal(size=(3, 5))
    np.save(tmp_path / "x.npy", x + 0.3 * np.random.default_rng(2).normal(size=x.shape))
    given = ["--data", tmp_path / "x.npy", "--models", "ppca,linear_autoencoder", *QUICK, "--out", tmp_path / "out"]
    code, _, err = command("compare", *given, "--expost-prior", "normal")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col="model")
    name = "linear_autoencoder with ex-post prior"
    assert math.isnan(table["log_evidence"]["linear_autoencoder"])
    assert math.isfinite(table["log_evidence"][name])
    assert "ppca with ex-post prior" not in table.index
    loaded = probae.load(tmp_path / "out" / "models" / name.replace(" ", "_"))
    assert loaded.label == "decoder + ex-post prior"


def test_by_default_results_go_to_a_folder_named_after_the_data(tmp_path, monkeypatch):
    file = write(tmp_path, "real")
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("compare", "--data", file, *QUICK, "--models", "autoencoder", "--test-rows", 5)
    assert code == 0
    assert len(pd.read_csv(tmp_path / "probae-compare" / file.stem / "evidence.csv")) == 5
    assert (tmp_path / "probae-compare" / file.stem / "table.csv").is_file()
    assert f"probae-compare/{file.stem}" in "".join(out.split())


# -- the main job ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_digits_independent_features_stand_above_every_gaussian_model(digits):
    folder, out = digits
    rows = re.findall(r"^│\s*([\w ]*\w)\s*│", out, re.MULTILINE)
    table = read(folder)
    assert rows == table.index.tolist(), "the printed order is the table's"
    for name in ("ppca", "factor_analysis", "full Gaussian", "mixture of 10 Gaussians", "normal_vae"):
        assert rows.index("independent features") < rows.index(name)
        assert table["over_independent"][name] < -2 * table["over_independent_stderr"][name]
    said = " ".join(out.split())
    assert "worse than independent features" in said
    assert "0 or 16" in said


@pytest.mark.slow
def test_the_digits_line_up_and_figures_are_complete(digits):
    folder, out = digits
    wanted = {"ppca", "factor_analysis", "sparse_vae", "normal_vae", "binomial_vae", "autoencoder",
              "stochastic_autoencoder", *BASELINES}  # fmt: skip
    assert wanted <= set(read(folder).index)
    assert "nats per image of the original counts" in out
    for name in ("evidence", "reconstructions", "samples"):
        assert min(png_size(folder / f"{name}.png")) > 300


@pytest.mark.slow
def test_models_without_evidence_have_a_dash_and_a_reconstruction(digits):
    folder, out = digits
    for name in ("autoencoder", "stochastic_autoencoder"):
        (line,) = re.findall(rf"^│\s*{name}\s*│.*$", out, re.MULTILINE)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:3] == ["–"] * 2
        assert f"{read(folder)['reconstruction'][name]:.2f}" in cells


# -- mistakes ----------------------------------------------------------------------------------------------------------


def bad_files(folder):
    (folder / "text.csv").write_text("a,b\n" + "1,two\n" * 20)
    (folder / "ragged.csv").write_text("1,2\n" * 10 + "1,2,3\n" * 10)
    (folder / "empty.csv").write_text("")
    (folder / "missing.csv").write_text("a,b\n" + "1.5,\n" * 20)
    (folder / "few.csv").write_text("1.5,2\n" * 3)
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (folder / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (folder / "table.xlsx").write_text("")
    np.save(folder / "pickled.npy", np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)
    np.save(folder / "flat.npy", np.arange(50.0))
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.save(folder / "huge.npy", x * 1e300)
    np.save(folder / "good.npy", x)
    np.save(folder / "bits.npy", (x > 0).astype(np.uint8))
    return folder


MISTAKES = {
    "an unknown data set": (["--data", "digit"], "digits"),
    "no data set": (["--data", ""], "expected"),
    "a missing file": (["--data", "nowhere.csv"], "nowhere.csv"),
    "a missing folder": (["--data", "no/where.npy"], "where.npy"),
    "a folder": (["--data", "."], "."),
    "a named set without PROBAE_DATA": (["--data", "mnist"], r"PROBAE_DATA.*train-images-idx3-ubyte\.gz"),
    "a correlation matrix": (["--data", "harman74"], "harman74"),
    "an unknown kind of file": (["--data", "table.xlsx"], r"\.csv"),
    "text in a csv": (["--data", "text.csv"], "two"),
    "rows of different lengths": (["--data", "ragged.csv"], "ragged.csv"),
    "an empty csv": (["--data", "empty.csv"], "empty.csv"),
    "missing values": (["--data", "missing.csv"], "missing values"),
    "too few rows": (["--data", "few.csv"], "at least 10"),
    "no text at all": (["--data", "binary.csv"], "binary.csv"),
    "a truncated npy": (["--data", "cut.npy"], "damaged"),
    "a pickle": (["--data", "pickled.npy"], "pickle"),
    "one dimension": (["--data", "flat.npy"], "flat.npy"),
    "numbers beyond float32": (["--data", "huge.npy"], "too large"),
    "an unknown model": (["--data", "good.npy", "--models", "ppca,pca"], "pca.*|expected.*factor_analysis"),
    "no model": (["--data", "good.npy", "--models", ","], "expected"),
    "a model of counts for bits": (["--data", "bits.npy", "--models", "binomial_vae"], "binomial_vae.*binary"),
    "a model of counts for reals": (["--data", "good.npy", "--models", "categorical_vae"], "categorical_vae.*real"),
    "too many latents": (["--data", "good.npy", "--latents", 9], "latents.*9"),
    "as many latents as features": (["--data", "good.npy", "--models", "autoencoder", "--latents", 3], "latents"),
    "a file for a folder": (["--data", "good.npy", "--out", "good.npy"], "good.npy"),
    "a file above the folder": (["--data", "good.npy", "--out", "good.npy/out"], "good.npy"),
    "a folder that cannot be made": (["--data", "good.npy", "--out", "/dev/null/out"], "/dev/null"),
    "an unknown ex-post prior": (["--data", "good.npy", "--expost-prior", "flat"], "--expost-prior: expected one of"),
    "a negative seed": (["--data", "good.npy", "--seed", -1], "[Ss]eed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path, monkeypatch):
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(bad_files(tmp_path))
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    code, _, err = command("compare", *arguments, "--steps", 2, "--particles", 2, *out)
    assert code == 2
    assert re.fullmatch(r"probae: [^\n]+\n", err), "one line, and no traceback"
    assert re.search(message, err)
    assert not (tmp_path / "out" / "table.csv").exists()


def test_a_named_set_that_is_not_in_the_folder_says_which_file_to_put_there(tmp_path):
    code, _, err = command("compare", "--data", "nltcs", PROBAE_DATA=str(tmp_path))
    assert code == 2
    assert re.fullmatch(r"probae: [^\n]+\n", err)
    assert "debd/nltcs.npz" in err
    assert str(tmp_path) in err


def test_a_damaged_named_set_gets_one_line(tmp_path):
    (tmp_path / "debd").mkdir()
    (tmp_path / "debd" / "nltcs.npz").write_bytes(b"PK\x03\x04 and no more")
    code, _, err = command("compare", "--data", "nltcs", PROBAE_DATA=str(tmp_path))
    assert code == 2
    assert re.fullmatch(r"probae: [^\n]*nltcs.npz[^\n]*\n", err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"], ["--steps", "many"], ["--latents", "0"], ["--particles", "-1"], ["--test-rows", "1"],
        ["--seed", "x"], ["--stpes", "5"], ["--out"], ["digits"],
    ],
)  # fmt: skip
def test_a_wrong_option_gets_the_usage_and_exit_code_2(arguments):
    code, out, err = command("compare", *arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert arguments[0] in err
    assert "Traceback" not in err


def test_an_unknown_command_gets_the_usage_and_exit_code_2():
    code, _, err = command("compere")
    assert code == 2
    assert "compere" in err
    assert "Traceback" not in err


def test_ctrl_c_during_training_ends_the_command_with_code_130(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    file = write(tmp_path, "real")
    code, _, err = command("compare", "--data", file, *QUICK, "--models", "normal_vae", "--out", tmp_path / "out")
    assert code == 130, "and not a table of a model that was hardly trained"
    assert err == "probae: interrupted\n"


# -- data that are odd, and no mistake ---------------------------------------------------------------------------------


def runs(file, folder, *arguments):
    code, _, err = command("compare", "--data", file, *QUICK, *arguments, "--out", folder / "out")
    assert (code, err) == (0, "")
    return read(folder / "out")


@pytest.mark.slow
def test_counts_whose_largest_is_in_the_test_rows_alone_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.poisson(3.0, (60, 4))
    test = np.random.RandomState(0).permutation(60)[-1]
    x[test, 2] = 25
    np.save(tmp_path / "heavy.npy", x)
    assert 25 in probae.datasets.load(tmp_path / "heavy.npy").test
    assert "independent features" in runs(tmp_path / "heavy.npy", tmp_path, "--models", "binomial_vae").index


@pytest.mark.parametrize("kind", ["real", "binary", "counts"])
@pytest.mark.sample(2)
def test_a_dozen_rows_are_compared(kind, tmp_path):
    file = write(tmp_path, kind, n=14)
    assert "independent features" in runs(file, tmp_path, "--models", "ppca").index


@pytest.mark.parametrize(("kind", "model"), [("real", "linear_vae"), ("counts", "binomial_vae")])
@pytest.mark.slow
def test_a_single_feature_is_compared(kind, model, tmp_path):
    file = write(tmp_path, kind, features=1)
    assert "full Gaussian" in runs(file, tmp_path, "--models", model).index


@pytest.mark.slow
def test_columns_that_never_vary_are_no_trouble_for_bits_and_counts(tmp_path):
    x = np.random.default_rng(0).integers(0, 2, (60, 4))
    x[:, 1], x[:, 2] = 0, 1
    np.save(tmp_path / "bits.npy", x)
    assert np.isfinite(runs(tmp_path / "bits.npy", tmp_path)["log_evidence"].dropna()).all()


def test_spaces_between_the_models_names_are_no_trouble(tmp_path):
    table = runs(write(tmp_path, "real"), tmp_path, "--models", "ppca, factor_analysis")
    assert {"ppca", "factor_analysis"} <= set(table.index)


@pytest.mark.slow
def test_large_whole_numbers_are_compared_without_a_class_for_each(tmp_path):
    rng = np.random.default_rng(0)
    x = np.c_[rng.poisson(5, (60, 2)), rng.integers(200_000, 250_000, 60)]
    x[:40, 2] = 250_000
    np.savetxt(tmp_path / "salaries.csv", x, fmt="%d", delimiter=",")
    table = runs(tmp_path / "salaries.csv", tmp_path, "--models", "binomial_vae")
    assert table["parameters"]["independent features"] < 100_000


def test_brackets_in_names_are_printed_as_they_are(tmp_path):
    file = write(tmp_path, "real").rename(tmp_path / "scores[final].csv")
    code, out, _ = command("compare", "--data", file, *QUICK, "--models", "autoencoder", "--out", tmp_path / "a[b]")
    assert code == 0
    assert "scores[final]" in out
    assert f"{tmp_path}/a[b]" in "".join(out.split())


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fits_spread_over_processes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spread_models.py").write_text("import probae\n\n\nclass Own(probae.PPCA):\n    pass\n")
    file = write(tmp_path, "real")
    models = "ppca,vae,autoencoder,spread_models:Own"
    tables = []
    for count in (1, 2):
        out = tmp_path / str(count)
        code, _, err = command(
            "compare", "--data", file, *QUICK, "--models", models, "--processes", count, "--out", out
        )
        assert (code, err) == (0, "")
        tables.append(pd.read_csv(out / "table.csv").drop(columns=["seconds", "fit_seconds"]))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    CATALOGUE.pop("Own")


@pytest.mark.slow
def test_a_process_that_dies_is_one_line(tmp_path):
    dying = "import os\n\n\nclass Dying:\n    def __init__(self, features, latents):\n        os._exit(9)\n"
    (tmp_path / "dying.py").write_text(dying)
    models = f"{tmp_path}/dying.py:Dying,autoencoder"
    options = [*QUICK, "--models", models, "--processes", 2, "--out", tmp_path / "out"]
    code, _, err = command("compare", "--data", write(tmp_path, "real"), *options)
    assert code == 2
    assert err.strip() == (
        "probae: a process that fits a model has died (killed, or out of memory): ask for fewer processes"
    )


#: also where the tests themselves run in the background, and Ctrl-C is ignored
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from probae.cli import main; main()"
LONG = ["--models", "autoencoder,stochastic_autoencoder", "--steps", 10**7, "--compile", "eager", "--processes", 2]
SIGNALS = [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT))]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.slow
def test_a_signal_to_the_main_process_alone_ends_all(tmp_path, number):
    arguments = ["compare", "--data", write(tmp_path, "real"), *LONG, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    started = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, start_new_session=True)
    try:
        _until(lambda: _busy(started.pid) >= 2)  # the fits are under way
        os.kill(started.pid, number)
        _, err = started.communicate(timeout=60)  # every process that is left would hold its end
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == (130 if number == signal.SIGINT else -number)
    assert b"Traceback" not in err


def _busy(parent):
    """How many children of a process have computed for five seconds, longer than imports take them."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            found += int(fields[1]) == parent and int(fields[11]) > 5 * os.sysconf("SC_CLK_TCK")
    return found


def _until(holds):
    end = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
