"""Adding a model is one file and one line: a model from outside goes wherever those of the catalogue go."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import probae
from probae.cli import main
from probae.comparison import lineup, own_models
from probae.data.datasets import Schema
from probae.models import CATALOGUE, Model, make, register

FILE = Path(__file__).parent / "outside.py"
SHAPE, CLASSES, L, N = (1, 4, 4), 3, 2, 30


@pytest.fixture(autouse=True)
def line():
    """The line of the outside model, for as long as a test takes."""
    runpy.run_path(str(FILE))
    yield CATALOGUE["clustered_images"]
    CATALOGUE.pop("clustered_images", None)


@pytest.fixture
def trained():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 17, (N, *SHAPE), generator=generator).float()
    y = torch.randint(0, CLASSES, (N,), generator=generator)
    torch.manual_seed(0)
    model = make("clustered_images", Schema(SHAPE, "counts", 16, classes=CLASSES), L)
    return model, (x, y), probae.fit(model, (x, y), validation=(x, y), steps=5, progress=False)


def test_it_is_trained_evaluated_and_diagnosed(trained):
    model, data, run = trained
    assert run.monitor == "elbo"
    signature = probae.adapter.as_pair(model).remembered
    assert (signature.latents, signature.observed, signature.given) == (("cluster", "code"), ("image",), ("y",))
    assert [signature.variable(name).discrete for name in ("cluster", "code", "image")] == [True, False, True]
    assert (signature.leaves[0].shape, signature.variable("image").leaf) == (SHAPE, "x")
    evidence = probae.log_evidence(model, data, particles=50, refined={"steps": 20}, ais={"distributions": 50})
    assert (evidence.bound, evidence.given, evidence.measure) == ("lower", ("y",), "mass")
    assert "log p(x | y)" in repr(evidence)
    assert probae.diagnose(model, data, particles=50).active_units.keys() == {"cluster", "code"}


@pytest.mark.sample(1)
def test_evidence_is_the_sum_over_clusters_of_integrals_over_codes(trained):
    """Against quadrature on a grid, within 4 standard errors where these are reliable."""
    model, (x, y), _ = trained
    probae.fit(model, (x, y), steps=150, lr=0.02, progress=False)
    found = probae.log_evidence(model, (x, y), "iwae", particles=20_000, seed=1)
    axis = torch.linspace(-6, 6, 121)
    offsets = torch.cartesian_prod(axis, axis)[:, None]  # (G, 1, L) around a centre
    cell = 2 * (axis[1] - axis[0]).log()
    terms = []
    with torch.no_grad():
        for centre, log_weight in zip(model.centres, model.log_weights.log_softmax(0), strict=True):
            code = centre + offsets
            logits = model.decoder(torch.cat([code.expand(-1, N, -1), model.labels(y, code.expand(-1, N, -1))], -1))
            likelihood = torch.distributions.Binomial(16, logits=logits).log_prob(x.flatten(1)).sum(-1)
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(offsets).sum(-1)
            terms.append(torch.logsumexp(likelihood.double() + prior.double(), 0) + cell + log_weight)
    expected = torch.logsumexp(torch.stack(terms), 0)
    assert found.reliable.sum() >= 5
    assert ((found.values - expected).abs() < 4 * found.mc_stderr + 1e-3)[found.reliable].all()


def test_it_is_sampled_decoded_and_reconstructed(trained):
    model, data, _ = trained
    assert probae.sample(model, 6, given=1).shape == (6, *SHAPE)
    assert probae.sample(model, 3, given=torch.arange(3)).shape == (3, *SHAPE)
    codes = probae.encode(model, data)
    assert {name: tuple(code.shape) for name, code in codes.items()} == {"cluster": (N, 3), "code": (N, L)}
    assert probae.reconstruct(model, data).shape == (N, *SHAPE)
    whole = probae.decode(model, codes, given=data[1])
    assert torch.allclose(whole, probae.reconstruct(model, data))
    assert probae.decode(model, {"cluster": codes["cluster"]}, given=data[1]).shape == (N, *SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: probae.sample(m, 3), "conditions on 'y'"),
        (lambda m, d: probae.sample(m, 3, given={"z": 1}), "conditions on"),
        (lambda m, d: probae.sample(m, 3, given=torch.zeros(2).long()), "one row or 3"),
        (lambda m, d: probae.decode(m, torch.zeros(3, L), given=1), "by the names of their sites"),
        (lambda m, d: probae.decode(m, {"code": torch.zeros(3, L + 1)}, given=1), "site 'code'"),
        (lambda m, d: probae.decode(m, {"other": torch.zeros(3, L)}, given=1), "of \\['cluster', 'code'\\]"),
    ],
)
def test_what_is_missing_is_said(trained, call, message):
    model, data, _ = trained
    with pytest.raises(ValueError, match=message):
        call(model, data)


def test_it_is_saved_and_loaded_with_its_signature(trained, tmp_path):
    model, data, _ = trained
    other = probae.load(probae.save(model, tmp_path))
    assert type(other).__name__ == "ClusteredImages"
    assert torch.equal(probae.sample(other, 3, given=1), probae.sample(model, 3, given=1))
    values = [probae.log_evidence(m, data, "iwae", particles=10).values for m in (model, other)]
    assert torch.equal(*values)


@pytest.mark.slow
def test_it_is_bounded_from_both_sides(trained):
    model, data, _ = trained
    bounds = probae.sandwich(model, n=4, like=data, chains=4, distributions=100)
    assert (bounds.gap > -4 * torch.hypot(bounds.lower.mc_stderr, bounds.upper.mc_stderr)).all()


def test_it_stands_in_a_table_on_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    CATALOGUE.pop("clustered_images")
    monkeypatch.chdir(tmp_path)
    options = [
        "--steps",
        "3",
        "--particles",
        "20",
        "--test-rows",
        "10",
        "--compile",
        "eager",
        "--latents",
        "2",
        "--out",
        "out",
    ]
    monkeypatch.setattr("sys.argv", ["probae", "compare", "--models", f"ppca,{FILE}:clustered_images", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    table = json.loads((tmp_path / "out/table.json").read_text())
    rows = {row["model"]: row for row in table["models"]}
    assert rows["clustered_images"]["log_evidence"] < 0
    assert any("clustered_images: its value is log p(x | y)" in note for note in table["notes"])
    assert rows["clustered_images"]["difference"] is None
    assert rows["ppca"]["difference"] is not None
    assert type(probae.load(tmp_path / "out/models/clustered_images")).__name__ == "ClusteredImages"


def test_a_line_is_checked(line):
    with pytest.raises(ValueError, match="that no model has"):
        register("ppca", line)
    with pytest.raises(ValueError, match="that no model has"):
        register("not a name", line)
    with pytest.raises(TypeError, match=r"expected a probae\.models\.Model"):
        register("other", ClusteredLine)


class ClusteredLine:
    """No line of the catalogue."""


def test_a_file_that_defines_no_such_model_is_told(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="register a model 'x'"):
        own_models.named(f"{tmp_path}/a.py:x")
    with pytest.raises(FileNotFoundError, match="no file"):
        own_models.named(f"{tmp_path}/b.py:x")


def test_a_file_runs_once_whatever_is_named_in_it_and_imports_from_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lies_beside.py").write_text("NAMES = 'first_beside', 'second_beside'\n")
    (tmp_path / "a.py").write_text(
        "import lies_beside\nfrom probae.models import CATALOGUE, register\n"
        "for name in lies_beside.NAMES:\n    register(name, CATALOGUE['ppca'])\n"
    )
    names = ["first_beside", "second_beside"]
    assert own_models.named(",".join(f"{tmp_path}/a.py:{name}" for name in names)) == names
    for name in names:
        CATALOGUE.pop(name)


@pytest.mark.parametrize("code", ["1 / 0", "import no_such_package"])
def test_a_module_that_fails_is_told_with_its_line(code, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails_itself.py").write_text(f"import math\n{code}\n")
    with pytest.raises(ValueError, match=r"fails_itself: line 2: \w+Error: "):
        own_models.named("fails_itself:A")


def test_what_a_model_is_for_follows_from_its_line():
    for name, model in CATALOGUE.items():
        assert isinstance(model, Model), name
        shape = (4, 1) if model.sequences else (4,)
        assert model.suits(Schema(shape, model.kinds[0], 3, classes=2)), name
    assert not CATALOGUE["categorical_vae"].suits(Schema((4,), "counts", 1000))
    assert not CATALOGUE["factor_analysis"].suits(Schema((4,), varies=False))
    assert not CATALOGUE["conditional_vae"].suits(Schema((4,)))


def test_a_model_without_gaps_says_so_and_is_not_for_data_that_have_some():
    for name in ("sparse_coding", "predictive_sparse_decomposition", "mixture_of_trees"):
        kind = CATALOGUE[name].kinds[0]
        assert not CATALOGUE[name].suits(Schema((4,), kind, missing="mask"))
        for given in (
            {"features": Schema((4,), kind, missing="mask")},
            {"features": 4, "kind": kind, "missing": "mask"},
        ):
            with pytest.raises(ValueError, match=f"{name!r} takes no missing values; these do: .*latent_class"):
                make(name, latents=2, **given)


def test_all_are_those_that_suit_the_data():
    pytest.importorskip("sklearn")
    digits = probae.datasets.load("digits")
    chosen = lineup.choose(digits, ["all"])
    assert chosen == [name for name, model in CATALOGUE.items() if model.suits(digits.schema)]
    assert set(lineup.choose(digits, None)) < set(chosen)
