"""Early stopping: noise alone neither stops a run too early nor keeps it going, and a warm-up does not count."""

import pytest
import torch

import probae
from probae.objectives import ELBO, IWAE, Warmup
from probae.training.patience import Patience, warming

N, PATIENCE, RECORDS, RUNS = 100, 10, 100, 20


def stopped_at(trend, seed, noise=1.0, records=RECORDS):
    """The record at which a run ends whose values are a trend plus noise, on data that differ by far more than both."""
    draw = torch.Generator().manual_seed(seed)
    datum = 50 * torch.randn(N, generator=draw, dtype=torch.float64)
    patience = Patience()
    for record in range(records):
        patience.see(datum + trend(record) + noise * torch.randn(N, generator=draw, dtype=torch.float64))
        if patience.since >= PATIENCE:
            return record
    return None


def test_noise_alone_ends_a_run_and_soon():
    """A record beats the reference by chance where the difference of two values, √2/√N of noise, is over its error.

    A reference that was beaten is a high one, and the next is harder to beat: after the first, chances are below 1/12 a
    record. Two in a row of ten records each have a chance below (10/12)².
    """
    ends = torch.tensor([stopped_at(lambda record: 0.0, seed) or RECORDS for seed in range(RUNS)])
    assert (ends >= PATIENCE).all()
    assert (ends < RECORDS).all()
    assert ends.float().mean() < 5 * PATIENCE


def test_a_rise_that_one_record_cannot_show_keeps_a_run_going():
    """It is one error of a record's mean: over the ten of patience 10/√2 = 7 errors of a difference, and 4 of them would do
    even for a reference that was lucky by four errors."""
    step = 1 / N**0.5
    assert [stopped_at(lambda record: step * record, seed) for seed in range(RUNS)] == [None] * RUNS


def test_after_the_rise_it_ends():
    ends = [stopped_at(lambda record: min(record, 50) / N**0.5, seed) for seed in range(RUNS)]
    assert all(50 <= end < RECORDS for end in ends)


def test_values_known_as_a_whole_stop_at_the_first_that_are_no_better():
    patience = Patience()
    since = []
    for value in (1.0, 2.0, 2.0, 1.9, 2.1):
        patience.see(torch.tensor([value], dtype=torch.float64))
        since.append(patience.since)
    assert since == [0, 0, 1, 2, 0]


def test_a_warm_up_ends_where_its_schedule_does():
    objective = IWAE(2) + 0.5 * ELBO(beta=Warmup(100, end=2.0))
    assert [warming(objective, step, 1000) for step in (1, 98, 100, 1000)] == [True, True, False, False]
    assert not warming(ELBO(beta=0.5), 1, 1000)
    assert [warming(ELBO(beta=lambda step: step / 50), step, 50) for step in (10, 50)] == [True, False]


@pytest.mark.parametrize(("warmup", "end"), [(1, 16), (20, 28)])
def test_patience_counts_from_the_end_of_the_warm_up(warmup, end):
    """Of a run in which nothing changes, the first record is at step 4."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    still = {"lr": 1e-30, "optimizer": "sgd", "objective": ELBO(beta=Warmup(warmup))}
    options = {"every": 4, "patience": 3, "steps": 60, "compile": False, "progress": False}
    run = probae.fit(probae.VAE(3, 1, hidden=(), seed=0), x, validation=x, **still, **options)
    assert (run.stopped, run.records[-1]["step"]) == ("patience", end)
