"""Settings chosen by held-out log p(x): the numbers are those of fits by hand, and the rule is that of one standard error."""

import numpy as np
import pytest
import torch

import probae
from probae.comparison.entry import Entry
from probae.comparison.folds import parts
from probae.comparison.selection import Selection
from probae.evidence import Evidence


def drawn(n=200, latents=2, features=6):
    draw = torch.Generator().manual_seed(0)
    mix = 1.5 * torch.randn(latents, features, generator=draw, dtype=torch.float64)
    z, noise = (torch.randn(n, size, generator=draw, dtype=torch.float64) for size in (latents, features))
    return z @ mix + noise


def ppca(latents):
    return probae.PPCA(6, latents).double()


def test_the_number_of_latents_is_found_and_the_values_are_those_of_fits_by_hand():
    x = drawn()
    result = probae.select(ppca, {"latents": range(1, 5)}, x, folds=4, seed=3)
    assert result.chosen == {"latents": 2}
    table = result.table.set_index("latents")
    values = torch.empty(len(x), dtype=torch.float64)
    for held in parts(len(x), 4, 3):
        seen = torch.ones(len(x), dtype=torch.bool)
        seen[held] = False
        values[held] = ppca(1).maximum_likelihood(x[seen]).log_marginal(x[held]).detach()
    assert table.loc[1, "log_evidence"] == pytest.approx(float(values.mean()), abs=1e-10)
    assert table.loc[1, "stderr"] == pytest.approx(float(values.std()) / len(x) ** 0.5, abs=1e-10)
    difference = values - result.entries[result.table["log_evidence"].argmax()].values
    assert table.loc[1, "difference"] == pytest.approx(float(difference.mean()), abs=1e-10)
    assert table.loc[1, "difference_stderr"] == pytest.approx(float(difference.std()) / len(x) ** 0.5, abs=1e-10)
    assert "within one standard error" in repr(result)


def given(values, parameters):
    values = torch.as_tensor(values, dtype=torch.float64)
    evidence = Evidence(values, torch.zeros_like(values), "exact", "exact", "density")
    model = torch.nn.Linear(parameters, 1, bias=False)
    model.model = model.guide = lambda x: None
    return Entry(str(parameters), [model], [evidence], None, np.nan, np.nan, "density", 0.0, False)


def test_the_rule_of_one_standard_error_is_on_paired_differences():
    torch.manual_seed(0)
    datum = 50 * torch.randn(100)  # what all share does not count
    noise = torch.randn(100)
    noise = (noise - noise.mean()) / noise.std()  # a standard error of 0.1
    entries = [given(datum, 3), given(datum - 0.09 + noise, 2), given(datum - 0.11 + noise, 1)]
    result = Selection({entry.name: {"k": int(entry.name)} for entry in entries}, entries)
    assert (result.best, result.chosen) == ({"k": 3}, {"k": 2})
    assert result.table["chosen"].tolist() == [False, True, False]


def test_classes_of_the_answers_are_found_over_several_starts():
    truth = probae.LatentClass(6, 2).double()
    with torch.no_grad():
        truth.outputs.copy_(torch.tensor([[2.0] * 6, [-2.0] * 6]))
    x = truth.sample(300, seed=1)
    result = probae.select(
        lambda classes: probae.LatentClass(6, classes).double(),
        {"classes": (1, 2, 3)}, x, folds=3, seeds=2, fit={"restarts": 2, "smoothing": 1.0, "tolerance": 1e-6},
    )  # fmt: skip
    assert result.chosen == {"classes": 2}
    table = result.table.set_index("classes")
    assert table.loc[1, "starts_at_best"] == 1
    assert (table["fit_stderr"] >= 0).all()
    assert (table["bound"] == "exact").all()


def test_models_that_are_trained_by_steps_are_selected_too_and_the_callers_stream_stays():
    x = drawn(40)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit = {"steps": 3, "compile": False}
    runs = [
        probae.select(lambda h: probae.VAE(6, 1, h), {"h": ((), (4,))}, x.float(), folds=2, fit=fit, particles=20,
                      method="iwae").table for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].drop(columns="h").equals(runs[1].drop(columns="h"))
    assert (runs[0]["bound"] == "lower").all()


def test_what_cannot_be_selected_is_refused():
    x = drawn(20).float()
    with pytest.raises(ValueError, match="at least one value"):
        probae.select(ppca, {"latents": ()}, x)
    with pytest.raises(TypeError, match="factory"):
        probae.select(ppca(1).weight, {"latents": (1,)}, x)
    with pytest.raises(ValueError, match=r"no log p\(x\)"):
        probae.select(lambda n: probae.Autoencoder(6, n), {"n": (1,)}, x, folds=2, fit={"steps": 1, "compile": False})
