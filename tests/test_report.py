"""The report of a comparison: one page that says in words what its table says, and needs nothing from elsewhere."""

import base64
import builtins
import html
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import command

import probae
from probae.export.verdict import verdict

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("great_tables")

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STRANGE = "wide <b onclick=alert(1)>&\"'"


@pytest.fixture(scope="module")
def comparison():
    models = {STRANGE: probae.PPCA(4, 2).double().maximum_likelihood(X), "flat": probae.Autoencoder(4, 2).double()}
    return probae.compare(models | {"far": probae.PPCA(4, 1).double()}, X, seed=7)


@pytest.fixture(scope="module")
def text(comparison, tmp_path_factory):
    figure, ax = plt.subplots()
    ax.imshow(torch.rand(3, 3))
    options = {
        "ran": {"command": "probae compare --data <x>"},
        "figures": {"a picture": figure},
        "fit_seconds": {"far": 2.0},
    }
    path = comparison.report(tmp_path_factory.mktemp("report"), unit="image", **options)
    plt.close("all")
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def words(text):
    """What a reader sees."""
    text = re.sub(r"<style>.*?</style>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_page_needs_no_network_and_runs_nothing(text):
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|url\(", re.sub(r'src="data:[^"]*"', "", text))
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_names_are_shown_as_they_are_and_are_never_html(text):
    assert "<b " not in text
    assert STRANGE in words(text)
    assert "probae compare --data <x>" in words(text)


def test_every_number_of_the_table_and_what_was_run_is_there(comparison, text):
    seen = words(text).replace("−", "-")
    for _, row in comparison.table.dropna(subset=["log_evidence"]).iterrows():
        assert f"{row['log_evidence']:.2f} ± {row['stderr']:.2f}" in seen
    for note in comparison.notes:
        assert note in words(text)
    versions = probae.__version__, torch.__version__
    for said in ("seed 7", "60 × 4, checksum", "2.0 of training", "nats per image", *versions):
        assert said in seen


def test_figures_are_inside_the_page_whole(text):
    found = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', text)
    assert [kind for kind, _ in found] == ["svg+xml", "svg+xml", "png"]
    for kind, content in found:
        raw = base64.b64decode(content, validate=True)
        assert ElementTree.fromstring(raw).tag.endswith("svg") if kind == "svg+xml" else raw.startswith(b"\x89PNG")
    assert len(re.findall(r'<img [^>]*alt="[^"]+"', text)) == 3


def test_the_same_comparison_gives_the_same_page_and_nothing_else_is_replaced(comparison, tmp_path):
    first = comparison.report(tmp_path / "new" / "page.html").read_bytes()
    assert comparison.report(tmp_path / "new" / "page.html").read_bytes() == first
    assert plt.get_fignums() == []
    (tmp_path / "report.html").write_text("<!DOCTYPE html>mine")
    with pytest.raises(FileExistsError, match="not a report"):
        comparison.report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<!DOCTYPE html>mine"


def test_a_missing_library_is_named_before_any_work(comparison, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "great_tables":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'probae\[report\]'"):
        comparison.report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_writes_a_report_that_tells_of_itself_and_of_its_data(tmp_path):
    pytest.importorskip("sklearn")
    np.save(tmp_path / "mine.npy", X.numpy())
    options = ["--data", tmp_path / "mine.npy", "--models", "ppca", "--latents", "2", "--particles", "5"]
    code, out, err = command("compare", *options, "--report", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "report.html" in out
    seen = words((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    for said in (
        "probae compare --data",
        "--report",
        "mine",
        "checksum",
        "latents 2",
        "particles 5",
        "independent features",
    ):
        assert said in seen
    assert command("compare", *options, "--report", "--out", tmp_path / "out")[0] == 0  # its own results are replaced


# -- the verdict -------------------------------------------------------------------------------------------------------


def table(*rows):
    """(name, log p(x), bound, difference, its error, role); the error of log p(x) is 1."""
    names = ["model", "log_evidence", "bound", "difference", "difference_stderr", "role"]
    frame = pd.DataFrame(rows, columns=names).set_index("model")
    return frame.assign(stderr=1.0, over_independent=float("nan"), over_independent_stderr=float("nan"))


def test_a_difference_is_clear_beyond_two_paired_errors_and_not_within():
    best = ("a", -10.0, "exact", 0.0, 0.0, "model")
    clear = verdict(table(best, ("b", -11.1, "exact", -1.1, 0.5, "model")))
    near = verdict(table(best, ("b", -10.9, "exact", -0.9, 0.5, "model"), ("c", -10.95, "exact", -0.95, 0.5, "model")))
    assert "−10.00 ± 1.00 nats per datum" in clear
    assert "Next is b, 1.10 ± 0.50 nats per datum below. That is more than two paired standard errors" in clear
    assert "That is within two paired standard errors" in near
    assert "Within two paired standard errors of the best is also c." in near
    assert "bound" not in clear


def test_the_verdict_says_what_is_a_bound_and_what_has_no_rank():
    nan = float("nan")
    rows = ("a", -10.0, "lower", 0.0, 0.0, "baseline"), ("b", -12.0, "lower", -2.0, 0.5, "model")
    said = verdict(
        table(*rows, ("c", nan, "–", nan, nan, "no evidence"), ("d", -3.0, "upper", nan, nan, "model")), "row"
    )
    assert "nats per row, a lower bound. This is a baseline" in said
    assert "All values are lower bounds" in said
    assert "a rank: c." in said
    assert "beside the others: d." in said
    assert verdict(table(("c", nan, "–", nan, nan, "no evidence"))).startswith("No model here has a log p(x)")
    unknown = verdict(table(("a", -10.0, "exact", 0.0, 0.0, "model"), ("b", -11.0, "exact", -1.0, nan, "model")))
    assert "unknown" in unknown
