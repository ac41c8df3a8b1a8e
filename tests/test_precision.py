"""No digit is lost in silence: data keep theirs until they are centred, and densities are as exact as their result's dtype."""

import copy
import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import codes_by_site
from scipy import special, stats
from torch.utils.data import DataLoader, TensorDataset

import probae
from probae.batches import as_batch, checksums, same_data
from probae.heads import likelihoods
from probae.heads.distributions import Binomial, DiscretisedNormal, Poisson

EPS = 2.0**-23
D, L = 4, 2


def data(n=300, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, L)) @ np.random.default_rng(9).normal(size=(L, D)) + 0.4 * rng.normal(size=(n, D))


X = data()


# -- data --------------------------------------------------------------------------------------------------------------


def test_data_stay_in_float64_where_float32_would_lose_digits_that_matter():
    fine = X + np.array([0.0, 1e6, 0.0, 0.0])
    for ordinary in (X, X * 1e-9, X * 1e9, np.round(X) + 2015, np.full((50, 2), 2015.0), np.float32(fine)):
        assert as_batch(ordinary, torch.float32, keeps=True).dtype is torch.float32
    for kept in (fine, fine[:1], pd.DataFrame(fine), np.ma.masked_array(fine, fine > 1e6 + 1)):
        assert as_batch(kept, torch.float32, keeps=True).dtype is torch.float64
    assert as_batch(fine, torch.float32).dtype is torch.float32  # asked to cast, it casts
    with_outlier = fine.copy()
    with_outlier[3, 1] = 1e12
    assert as_batch(with_outlier, torch.float32, keeps=True).dtype is torch.float64


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_whole_numbers_are_not_rounded(dtype):
    x = np.array([[2**24 + 1, 3], [5, 7]], dtype=dtype)
    assert as_batch(x, torch.float32, keeps=True)[0, 0] == 2**24 + 1
    assert as_batch(x)[0, 0] == 2**24 + 1
    assert as_batch((X[:2], x), torch.float32, keeps=False)[1].dtype == as_batch((x,))[0].dtype
    assert as_batch(x - 1, torch.float32, keeps=False).dtype is torch.float32
    with pytest.raises(ValueError, match=r"column 0 .*16777217.*model\.double"):
        as_batch(x, torch.float32, keeps=False)


def test_checksums_tell_data_apart_beyond_float32_and_know_them_again_in_it():
    x = X + 1e8
    rows, other = checksums(as_batch(x)), checksums(as_batch(np.nextafter(x, np.inf)))
    assert not same_data(rows, other).any()
    assert same_data(rows, checksums(as_batch(x.copy()))).all()
    assert same_data(rows, checksums(as_batch(x.astype(np.float32)))).all()
    whole = np.arange(12).reshape(4, 3)
    assert torch.equal(checksums(as_batch(whole)), checksums(as_batch(whole.astype(np.float64))))
    assert torch.equal(checksums(as_batch((whole,))), checksums(as_batch((whole.astype(np.uint8),))))


class Own(torch.nn.Module):
    """A user's programs, which mix data and float32 parameters."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = torch.nn.Parameter(torch.zeros(D)), torch.nn.Parameter(torch.zeros(D))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x):
        pass


def test_programs_of_ones_own_refuse_data_that_their_parameters_cannot_hold_and_the_advice_works():
    x = X.copy()
    x[:, 2] += 1.7e9
    for call in (
        lambda m: probae.fit(m, x, steps=1, progress=False),
        lambda m: probae.fit(m, DataLoader(TensorDataset(torch.as_tensor(x)), batch_size=50), steps=1, progress=False),
        lambda m: probae.log_evidence(m, x, "elbo"),
        lambda m: probae.compare({"own": m}, x),
    ):
        with pytest.raises(ValueError, match=r"column 2 has digits that matter.*model\.double\(\).*Transformed"):
            call(Own())
    expected = stats.norm(0, 1).logpdf((x - x.mean(0)) / x.std(0)).sum(1) - np.log(x.std(0)).sum()
    wide = probae.Transformed(Own(), probae.transforms.Affine.standardising(x))
    np.testing.assert_allclose(probae.log_evidence(wide, x, "elbo").values, expected, atol=1e-5)
    double = Own().double()
    with torch.no_grad():
        double.loc.copy_(torch.as_tensor(x.mean(0))), double.log_scale.copy_(torch.as_tensor(x.std(0)).log())
    np.testing.assert_allclose(probae.log_evidence(double, x, "elbo").values, expected, atol=1e-5)


def test_a_file_keeps_its_digits(tmp_path):
    times = 1.7e9 + np.arange(500.0)
    pd.DataFrame({"time": times, "y": data(500)[:, 0]}).to_csv(tmp_path / "t.csv", index=False)
    found = probae.datasets.load(tmp_path / "t.csv")
    assert sorted(np.r_[found.train, found.validation, found.test][:, 0]) == list(times)
    pd.DataFrame(X).to_csv(tmp_path / "x.csv", index=False)
    assert probae.datasets.load(tmp_path / "x.csv").train.dtype == np.float32


# -- count heads -------------------------------------------------------------------------------------------------------


def around(mean, deviation, most=2**24):
    return np.unique(np.clip(np.round(mean + deviation * np.array([-6, -2, -0.5, 0, 0.5, 2, 6])), 0, most))


@pytest.mark.parametrize("rate", [1e-3, 0.3, 1.0, 9.0, 31.0, 33.0, 1e3, 65535.0, 1e5, 1e6, 2.0**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_poisson_mass_is_exact_at_any_size(rate, dtype):
    eta = torch.tensor(rate, dtype=dtype).log().requires_grad_()
    rate = float(eta.detach().double().exp())
    k = around(rate, math.sqrt(rate))
    values = Poisson(eta.double(), dtype).log_prob(torch.as_tensor(k, dtype=dtype))
    assert values.dtype is dtype
    truth = stats.poisson(rate).logpmf(k)
    # scipy's own form, k log rate − rate − log k!, rounds terms of the size of the largest
    terms = 4 * np.finfo(np.float64).eps * (k * np.log(np.maximum(k, 2)) + rate) + 1e-14
    tolerance = terms + (dtype is torch.float32) * EPS * abs(truth)
    assert (np.abs(values.detach().numpy() - truth) <= tolerance).all()
    (slope,) = torch.autograd.grad(values.sum(), eta)
    assert float(slope) == pytest.approx((k - rate).sum(), rel=4 * EPS, abs=4 * EPS * rate)


@pytest.mark.parametrize("total", [1, 2, 16, 64, 65, 255, 4097, 65535, 2**20, 2**24])
@pytest.mark.parametrize("logit", [-14.0, -0.7, 0.0, 3.0, 25.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_binomial_mass_is_exact_at_any_size(total, logit, dtype):
    eta = torch.tensor(logit, dtype=dtype, requires_grad=True)
    p, q = (float(torch.sigmoid(s * eta.detach().double())) for s in (1, -1))
    k = around(total * p, math.sqrt(total * p * q), total)
    values = Binomial(total, eta).log_prob(torch.as_tensor(k, dtype=dtype))
    choose = special.gammaln(total + 1) - special.gammaln(k + 1) - special.gammaln(total - k + 1)
    truth = choose + special.xlogy(k, p) + special.xlogy(total - k, q)
    size = total * math.log(total + 1) + total * abs(logit)
    terms = (total <= 64) * EPS * 2 * (k * abs(logit) + total * np.logaddexp(0, logit) + abs(choose))
    tolerance = 8e-16 * size + 1e-15 + (dtype is torch.float32) * (EPS * abs(truth) + terms)
    assert (np.abs(values.detach().numpy() - truth) <= tolerance).all()
    (slope,) = torch.autograd.grad(values.sum(), eta)
    rounding = 2 * EPS if dtype is torch.float32 and total <= 64 else 1e-15  # of terms of the size of the counts
    assert float(slope) == pytest.approx((k - total * p).sum(), rel=2 * EPS, abs=rounding * len(k) * total)


@pytest.mark.parametrize("high", [16, 255, 4095, 65535, 2**24])
@pytest.mark.parametrize("scale", [0.05, 0.8, 900.0])
def test_a_rounded_normal_head_is_exact_at_any_size(high, scale):
    head = likelihoods.DiscretisedNormal(high, scale=scale).bind(1)
    centre = 0.7 * high + 0.3
    x = np.unique(np.clip(np.round(centre + scale * np.linspace(-4, 4, 9)), 0, high))[:, None]
    head.start(torch.as_tensor(np.r_[x, 2 * centre - x]))
    loc = float(head.origin.double() + head.origin_low)
    values = head(torch.zeros(1)).log_prob(torch.as_tensor(x, dtype=torch.float32)).numpy()
    wide = DiscretisedNormal(torch.tensor(loc, dtype=torch.float64), float(np.float32(scale)), 0, high)
    truth = wide.log_prob(torch.as_tensor(x[:, 0])).numpy()
    # up to 255 the distance from the centre is rounded, by 2⁻¹⁶ of a count
    distance = 4 * EPS * high / scale * (np.abs(x[:, 0] - loc) / scale + 1 / scale) if high <= 255 else 0.0
    assert (np.abs(values - truth) <= 4 * EPS * (1 + np.abs(truth)) + distance).all()


def ignoring(head, features):
    """A VAE whose decoder ignores z: its log p(x) is the head's own."""
    model = probae.VAE(features, 1, (), likelihood=head)
    for p in model.parameters():
        p.data.zero_()
    return model


@pytest.mark.parametrize("total", [255, 65535, 2**20])
def test_log_p_of_large_counts_by_a_float32_model_is_scipys(total):
    x = np.random.default_rng(0).binomial(total, 0.5, (20, 300))
    found = probae.log_evidence(ignoring(likelihoods.Binomial(total), 300), x, "iwae", particles=5).values
    truth = stats.binom(total, 0.5).logpmf(x).sum(1)
    np.testing.assert_allclose(found, truth, rtol=4 * EPS, atol=0)
    model = ignoring(likelihoods.Poisson(), 300)
    model.head.origin.fill_(math.log(total / 2))
    found = probae.log_evidence(model, x, "iwae", particles=5).values
    truth = stats.poisson(math.exp(float(model.head.origin[0]))).logpmf(x).sum(1)
    np.testing.assert_allclose(found, truth, rtol=4 * EPS, atol=0)


def test_counts_beyond_float32_are_told_apart():
    x = np.random.default_rng(0).poisson(3e9, (40, 2))
    model = ignoring(likelihoods.Poisson(), 2)
    model.head.origin.fill_(math.log(3e9))
    rate = math.exp(float(model.head.origin[0]))
    found = probae.log_evidence(model, x, "iwae", particles=2).values
    # a Normal is off by about a cube of standard deviations over their number
    np.testing.assert_allclose(found, stats.norm(rate, math.sqrt(rate)).logpdf(x).sum(1), atol=3e-3)
    drawn = probae.sample(model, 200)
    assert (drawn == drawn.round()).all()
    assert len(drawn[:, 0].unique()) > 190


@pytest.mark.parametrize("count", [10, 5_000, 2**24, 2**30])
def test_noise_within_a_large_count_is_not_rounded_away(count):
    x = count + np.array([[0], [1], [2], [0], [3], [1]])
    pair = probae.Dequantised(probae.Independent(1)).maximum_likelihood(x)
    loc = float(pair.inner.loc.detach().double() + pair.inner.loc_low) - count
    normal = stats.norm(loc, float(pair.inner.log_scale.detach().double().exp()))
    assert abs(loc - 5 / 3) < 0.6
    e = probae.log_evidence(pair, x, particles=4000)
    exact = np.log(normal.cdf(x - count + 1) - normal.cdf(x - count))[:, 0]
    assert (np.abs(e.values.numpy() - exact) < 4 * e.mc_stderr.numpy() + 1e-5).all()


def test_a_density_of_ones_own_is_not_dequantised_where_noise_would_be_rounded_away():
    x = np.full((30, D), 2**20) + np.arange(30)[:, None]
    with pytest.raises(ValueError, match="few digits for the noise"):
        probae.log_evidence(probae.Dequantised(Own()), x, "iwae")


# -- far from zero -----------------------------------------------------------------------------------------------------

FAR = np.array([1.7e9, -1e8, 0.0, 3e7])


@pytest.mark.parametrize("kind", ["shared", "feature", "predicted"])
@pytest.mark.slow
def test_a_shift_changes_no_log_p_of_a_float32_vae(kind):
    found = []
    for origin in (0.0, FAR):
        torch.manual_seed(0)
        model = probae.VAE(D, L, (8,), likelihood=likelihoods.Normal(kind))
        probae.fit(model, X + origin, steps=60, lr=0.01, progress=False, validation=X[:50] + origin)
        x = X[:30] + origin
        found.append([probae.log_evidence(model, x, "iwae", particles=100).mean])
        found[-1] += [probae.log_evidence(model, x, "refined", particles=100, steps=20).mean]
        found[-1] += [float((probae.reconstruct(model, x) - torch.as_tensor(x)).abs().mean())]
        found[-1] += [float(probae.sample(model, 500).double().std(0).mean())]
    # float64 leaves 2e-7 of these data, and sixty steps of Adam and the draws of other bits spread it
    np.testing.assert_allclose(found[1][:3], found[0][:3], atol=5e-3)
    np.testing.assert_allclose(found[1][3], found[0][3], rtol=0.02)


@pytest.mark.parametrize(
    "make", [probae.GaussianMixture, probae.Independent, lambda d: probae.GaussianMixture(d, 3, True)]
)
@pytest.mark.parametrize("missing", [None, "mask"])
def test_a_shift_changes_no_log_p_of_float32_baselines(make, missing):
    pytest.importorskip("sklearn")
    x, values = X.copy(), []
    model = make(D)
    if missing:
        x[np.random.default_rng(1).random(x.shape) < 0.1] = np.nan
        model.missing = missing
    for origin in (0.0, FAR):
        values.append(probae.log_evidence(model.maximum_likelihood(x + origin), x + origin).values)
    np.testing.assert_allclose(values[1], values[0], atol=2e-4)
    by_hand = stats.multivariate_normal(X.mean(0), np.cov(X.T, ddof=0)).logpdf(X)
    if make is probae.GaussianMixture and missing is None:
        np.testing.assert_allclose(values[1], by_hand, atol=1e-4)


def test_gaps_far_from_zero_are_filled_and_imputed():
    x = X.copy()
    x[np.random.default_rng(1).random(x.shape) < 0.1] = np.nan
    found = []
    for origin in (0.0, FAR):
        torch.manual_seed(0)
        model = probae.VAE(D, L, (8,), likelihood=likelihoods.Normal("feature"), missing="mask")
        probae.fit(model, x + origin, steps=60, lr=0.01, progress=False)
        imputed = probae.impute(model, x[:60] + origin, 5) - torch.as_tensor(origin + np.zeros(D))
        found.append(
            [probae.log_evidence(model, x + origin, "iwae", particles=50).mean, float(imputed.square().mean())]
        )
    np.testing.assert_allclose(found[1], found[0], atol=0.02)


def test_copies_and_files_keep_the_origin(tmp_path):
    torch.manual_seed(0)
    model = probae.VAE(D, L, (8,))
    probae.fit(model, X + FAR, steps=20, progress=False)
    value = probae.log_evidence(model, X + FAR, "elbo", seed=1).values
    probae.save(model, tmp_path / "m")
    for other in (copy.deepcopy(model), probae.load(tmp_path / "m")):
        assert torch.equal(probae.log_evidence(other, X + FAR, "elbo", seed=1).values, value)
    double = probae.log_evidence(copy.deepcopy(model).double(), X + FAR, "elbo", particles=2000).mean
    assert double == pytest.approx(probae.log_evidence(model, X + FAR, "elbo", particles=2000).mean, abs=0.05)


def test_streams_keep_the_digits_of_arrays(tmp_path):
    x = X + FAR
    np.save(tmp_path / "x.npy", x)
    mapped, pair = np.load(tmp_path / "x.npy", mmap_mode="r"), []
    for given in (x, mapped):
        torch.manual_seed(0)
        model = probae.VAE(D, L, (8,))
        probae.fit(model, given, steps=20, batch_size=64, progress=False)
        pair.append(model)
    first, second = (probae.log_evidence(model, x, "iwae", particles=20).mean for model in pair)
    assert second == pytest.approx(first, abs=1e-3)
    blocks = probae.log_evidence(pair[0], mapped, "iwae", particles=20)
    assert same_data(blocks.rows, probae.log_evidence(pair[0], x, "elbo").rows).all()
    loader = DataLoader(TensorDataset(torch.as_tensor(x)), batch_size=100)
    assert probae.log_evidence(pair[0], loader, "iwae", particles=500).mean == pytest.approx(first, abs=0.1)


# -- float32 against float64, on real data -----------------------------------------------------------------------------


def real(name):
    datasets = pytest.importorskip("sklearn.datasets")
    x = getattr(datasets, f"load_{name}")().data
    return x[:300] / 16 if name == "digits" else x


@pytest.mark.parametrize("name", [n for n in probae.models.names("real") if n not in {"ppca", "factor_analysis"}])
@pytest.mark.parametrize("of", ["digits", "breast_cancer", "wine"])
@pytest.mark.sample(4)
def test_a_float32_model_has_the_log_p_of_the_same_model_in_float64(name, of):
    x = real(of)
    torch.manual_seed(0)
    model = probae.models.make(name, x.shape[1], 2)
    probae.fit(model, x, steps=30, lr=0.01, progress=False)
    double, sizes = copy.deepcopy(model).double(), []
    with torch.no_grad():
        codes = codes_by_site(model, x)
        for one in (model, double):
            values = {site: code.to(one.dtype) for site, code in codes.items()}
            sizes.append(one.replay(one.as_batch(x), values, 1).likelihood().local[0].double())
    # a sum of D terms, each rounded, and the residuals' rounding from matrix products of so many terms
    spread = (sizes[1].abs() + x.shape[1]) * 64 * EPS * x.shape[1] ** 0.5
    assert ((sizes[0] - sizes[1]).abs() <= spread).all()


@pytest.mark.parametrize("of", ["breast_cancer", "wine"])
@pytest.mark.parametrize("components", [1, 3])
def test_a_float32_mixture_has_the_log_p_of_the_same_mixture_in_float64(of, components):
    x = real(of)
    model = probae.GaussianMixture(x.shape[1], components).maximum_likelihood(x)
    single = probae.log_evidence(model, x)
    assert single.mean == pytest.approx(probae.log_evidence(copy.deepcopy(model).double(), x).mean, abs=2e-3)
    assert single.mean == pytest.approx(
        probae.log_evidence(probae.GaussianMixture(x.shape[1], components).double().maximum_likelihood(x), x).mean,
        abs=2e-3,
    )
