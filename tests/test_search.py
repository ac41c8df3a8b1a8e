"""A search: what wins is what a full comparison finds, and one that was killed ends as if it had not been."""

import sys

import numpy as np
import pytest
import torch

import probae

pytest.importorskip("optuna")
COLUMNS = ["latents", "log_evidence", "stderr", "bound", "state"]


def drawn(n=200, latents=2, features=6):
    draw = torch.Generator().manual_seed(0)
    mix = 1.5 * torch.randn(latents, features, generator=draw, dtype=torch.float64)
    z, noise = (torch.randn(n, size, generator=draw, dtype=torch.float64) for size in (latents, features))
    return z @ mix + noise


X = drawn()
TRAIN, HELD = X[:48], X[48:]


def ppca(latents):
    return probae.PPCA(6, latents).double()


def search(space=None, factory=ppca, trials=8, **options):
    options = {"validation": HELD, "seed": 1, **options}
    return probae.search(factory, space or {"latents": (1, 4)}, TRAIN, trials=trials, **options)


def vae(latents, width=4):
    return probae.VAE(6, latents, hidden=(width,)).double()


QUICK = {"steps": 6, "every": 2, "compile": False, "batch_size": 40}


def test_the_best_number_of_latents_is_that_of_select_and_its_score_that_of_a_fit_by_hand():
    found = search(trials=16)
    assert found.best == probae.select(ppca, {"latents": range(1, 5)}, TRAIN, folds=4).best == {"latents": 2}
    frame = found.to_frame()
    assert set(frame["latents"]) == {1, 2, 3, 4}
    for _, row in frame.iterrows():
        values = ppca(row["latents"]).maximum_likelihood(TRAIN).log_marginal(HELD).detach()
        assert row["log_evidence"] == pytest.approx(float(values.mean()), abs=1e-10)
        assert row["stderr"] == pytest.approx(float(values.std()) / len(HELD) ** 0.5, abs=1e-10)
    assert float(found.refit().log_marginal(HELD).detach().mean()) == pytest.approx(
        frame["log_evidence"].max(), abs=1e-10
    )
    assert "best latents=2" in repr(found)
    assert len(found.plot().lines[0].get_xdata()) == 16


def test_whenever_it_was_killed_the_same_call_ends_as_if_it_had_not_been(tmp_path):
    whole = tmp_path / "whole.log"
    expected = search(journal=whole).to_frame()[COLUMNS]
    content = whole.read_bytes()
    for place in (0, 5, *np.linspace(20, len(content), 12).astype(int)):  # lines that were torn, and trials under way
        cut = tmp_path / f"{place}.log"
        cut.write_bytes(content[:place])
        assert search(journal=cut).to_frame()[COLUMNS].equals(expected), place


def test_more_trials_go_further_and_fewer_are_the_first_ones(tmp_path):
    frames = [search(journal=tmp_path / "a.log", trials=trials).to_frame()[COLUMNS] for trials in (3, 8, 3)]
    assert frames[1].equals(search().to_frame()[COLUMNS])
    assert frames[0].equals(frames[1][:3])
    assert frames[2].equals(frames[0])


def test_the_journal_of_another_call_is_refused_naming_what_differs(tmp_path):
    path = tmp_path / "a.log"
    search(journal=path, trials=1)
    other = HELD.clone()
    other[3, 2] += 1e-9
    for options, name in [
        ({"space": {"latents": (1, 5)}}, "space 'latents' is"),
        ({"validation": other}, "validation 'x' is"),
        ({"seed": 2}, "seed is 1, here it is 2"),
        ({"factory": lambda latents: probae.FactorAnalysis(6, latents).double()}, "factory"),
        ({"fit": {"steps": 3}}, "fit.steps is not there, here it is 3"),
    ]:
        with pytest.raises(ValueError, match=f"is of another search: .*{name}"):
            search(journal=path, trials=1, **options)


def test_a_file_of_the_users_is_left_as_it_is(tmp_path):
    for content in ("my notes", '{"a": 1}\n', "step,loss\n1,2\n"):
        (tmp_path / "notes").write_text(content)
        with pytest.raises(ValueError, match="is not the journal of a search"):
            search(journal=tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == content


def test_a_journal_that_another_search_writes_to_is_refused(tmp_path):
    path = tmp_path / "a.log"

    def factory(latents):
        with pytest.raises(BlockingIOError, match="another search is writing"):
            search(journal=path, trials=1)
        return ppca(latents)

    search(factory=factory, journal=path, trials=1)


def test_fits_below_the_median_are_pruned_and_diverging_ones_do_not_end_the_search():
    made = []

    def factory(sound):
        if not sound:
            raise FloatingPointError("the loss became nan at step 7")
        made.append(vae(1))
        if len(made) > 6:  # the median is over five complete ones at least
            with torch.no_grad():
                for parameter in made[-1].decoder.parameters():
                    parameter.mul_(100)
        return made[-1]

    frame = search({"sound": [True, False]}, factory, trials=12, fit=QUICK, method="elbo", particles=5).to_frame()
    assert (frame["state"] == "diverged").equals(~frame["sound"])
    assert list(frame["state"][frame["sound"]]) == ["complete"] * 6 + ["pruned"] * (len(made) - 6)
    assert len(made) > 6


def test_options_of_fit_are_searched_too_and_lists_may_hold_anything():
    rates = []

    def factory(hidden):
        return probae.VAE(6, 1, hidden=hidden).double()

    fit = {**QUICK, "callbacks": [lambda run: rates.append(len(run.records))]}
    space = {"hidden": [(), (3,)], "fit.lr": (1e-4, 1e-1, "log"), "fit.batch_size": (20, 40)}
    found = search(space, factory, trials=3, fit=fit, method="elbo", particles=2, prune=False)
    assert rates == [1, 2, 3] * 3
    assert set(found.to_frame()["state"]) == {"complete"}
    assert sorted(found.best) == ["fit.batch_size", "fit.lr", "hidden"]
    assert found.best["hidden"] in [(), (3,)]
    assert found.to_frame()["fit.lr"].between(1e-4, 1e-1).all()
    assert found.to_frame()["fit.lr"].nunique() == 3


@pytest.mark.parametrize(
    ("space", "error"),
    [
        ({}, TypeError),
        ([("latents", (1, 2))], TypeError),
        ({"latents": ()}, ValueError),
        ({"latents": []}, ValueError),
        ({"latents": (1, 2, 3)}, ValueError),
        ({"latents": (2, 1)}, ValueError),
        ({"latents": (0, 2, "log")}, ValueError),
        ({"latents": (1, float("inf"))}, ValueError),
        ({"latents": "1, 2"}, ValueError),
    ],
)
def test_a_space_that_is_none_is_refused(space, error):
    with pytest.raises(error, match="space"):
        probae.search(ppca, space, TRAIN, validation=HELD)


def test_a_model_without_evidence_is_refused():
    with pytest.raises(ValueError, match=r"log p\(x\)|flat|improper"):
        search(factory=lambda latents: probae.Autoencoder(6, latents).double(), trials=1, fit=QUICK)


def test_a_missing_optuna_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'probae\[search\]'"):
        search()
