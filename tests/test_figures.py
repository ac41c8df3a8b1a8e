"""Each figure draws the numbers that it was given, in units that it names, and leaves no figure open where it refuses."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

import probae
from probae.diagnostics.gaps import Gaps
from probae.evidence import Evidence
from probae.evidence.tradeoff import RateDistortion
from probae.export.figures.bands import simultaneous_band
from probae.export.figures.style import PALETTE, label

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
figures = probae.figures

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def closed():
    """The figures of one test alone, in the style of a user's own."""
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before, "a figure changed the style of those after it"


def evidence(mean, error=0.1, bound="exact"):
    return SimpleNamespace(mean=mean, mean_stderr=error, bound=bound)


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def segments(ax):
    """(left, right) of each horizontal interval."""
    (collections) = [c for c in ax.collections if hasattr(c, "get_segments")]
    return np.array([segment[:, 0] for c in collections for segment in c.get_segments()])


def drawn(ax):
    """The images of a strip, as they were before they were made dark on light."""
    return 1 - ax.images[0].get_array()


# -- training ----------------------------------------------------------------------------------------------------------


def run(monitor="elbo", best=20):
    history = pd.DataFrame({"step": [10, 20, 30], "loss": [9.0, 5.0, 4.0], "validation": [-8.0, -5.5, np.nan]})
    return SimpleNamespace(history=history, monitor=monitor, best_step=best)


def test_training_curves_are_minus_the_loss_and_what_was_watched_with_bounds_as_bands():
    ax = figures.training_curves(run(), {"log p(x)": evidence(-4.5, 0.25)})
    train, watched, bound, kept = ax.get_lines()
    assert train.get_xydata().tolist() == [[10, -9], [20, -5], [30, -4]]
    assert watched.get_xydata().tolist() == [[10, -8], [20, -5.5]]
    assert set(bound.get_ydata()) == {-4.5}
    assert set(kept.get_xdata()) == {20}
    band = ax.patches[0].get_bbox()
    assert (band.y0, band.y1) == (-5.0, -4.0)
    assert ax.get_ylabel() == "nats per datum"


def test_a_function_that_is_watched_has_an_axis_of_its_own_units():
    ax = figures.training_curves(run("accuracy"))
    (other,) = [a for a in ax.figure.axes if a is not ax]
    assert other.get_lines()[0].get_ydata().tolist() == [-8.0, -5.5]
    assert "accuracy" in other.get_ylabel()


def test_a_run_plots_itself_and_one_without_steps_says_so():
    records = [{"step": step, "loss": 9.0 / step, "validation": -9.5 / step, "seconds": 0.1} for step in (1, 2)]
    found = probae.Run(None, probae.objectives.ELBO(), records, monitor="elbo", best_step=2)
    assert [line.get_ydata().tolist() for line in found.plot().get_lines()[:2]] == [[-9.0, -4.5], [-9.5, -4.75]]
    with pytest.raises(ValueError, match="no step was recorded"):
        probae.Run(None, probae.objectives.ELBO()).plot()


# -- evidence ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    models = {n: probae.PPCA(6, k).double().maximum_likelihood(X) for n, k in (("$a$ one", 1), ("two", 2))}
    return probae.compare(models | {"flat": probae.Autoencoder(6, 2).double()}, X)


@pytest.mark.parametrize(
    ("differences", "value", "error"), [(False, "log_evidence", "stderr"), (True, "difference", "difference_stderr")]
)
def test_a_comparison_draws_its_numbers_with_two_errors_the_best_on_top(comparison, differences, value, error):
    table = comparison.table
    table = table[table[value].notna()]
    ax = comparison.plot(differences=differences)
    ends = segments(ax)[::-1]
    np.testing.assert_allclose(ends[:, 0], table[value] - 2 * table[error], atol=1e-10)
    np.testing.assert_allclose(ends[:, 1], table[value] + 2 * table[error], atol=1e-10)
    assert ticks(ax.yaxis)[::-1] == [label(name) for name in table.index]
    assert "nats per datum" in ax.get_xlabel()
    assert ("paired" in ax.get_xlabel()) is differences


def test_a_table_without_evidence_is_refused(comparison):
    with pytest.raises(ValueError, match="has an evidence"):
        figures.evidence_forest(comparison.table.loc[["flat"]])


def test_the_waterfall_goes_from_the_elbo_to_log_p():
    elbo, best, top = (
        Evidence(torch.tensor([mean - 1, mean + 1], dtype=torch.float64), torch.zeros(2), bound, "iwae", "density")
        for mean, bound in ((-10.0, "lower"), (-9.0, "lower"), (-8.5, "lower"))
    )
    ax = Gaps(torch.arange(2), elbo, best, top).plot()
    assert [(bar.get_y(), bar.get_height()) for bar in ax.patches] == [(-10.0, 1.0), (-9.0, 0.5)]
    assert ticks(ax.xaxis) == ["ELBO", "amortisation", "approximation", "log p(x),\nlower bound"]
    (bar,) = Gaps(torch.arange(2), elbo, None, top).plot().patches
    assert (bar.get_y(), bar.get_height()) == (-10.0, 1.5)


def test_rate_distortion_is_drawn_with_its_point_at_beta_one():
    numbers = ([0.0, 1.0, 2.0], [0.0, 3.0, 4.0], [9.0, 5.0, 4.5])
    line, dot = RateDistortion(*map(torch.tensor, numbers), *[torch.zeros(3)] * 4).plot().get_lines()
    assert line.get_xydata().tolist() == [[0.0, 9.0], [3.0, 5.0], [4.0, 4.5]]
    assert dot.get_xydata().tolist() == [[3.0, 5.0]]


def test_a_selection_draws_a_line_for_each_combination_with_one_paired_error():
    table = pd.DataFrame({
        "kind": ["a", "a", "b", "b"], "latents": [1, 2, 1, 2], "difference": [-3.0, -1.0, -2.0, 0.0],
        "difference_stderr": [0.3, 0.1, 0.2, 0.0], "chosen": [False, False, False, True],
    })  # fmt: skip
    ax = figures.selection_curve(table, ["kind", "latents"])
    lines = [c.lines[0] for c in ax.containers]
    assert [line.get_xydata().tolist() for line in lines] == [[[1, -3], [2, -1]], [[1, -2], [2, 0]]]
    ends = np.concatenate([c.lines[2][0].get_segments() for c in ax.containers])[:, :, 1]
    np.testing.assert_allclose(np.diff(ends)[:, 0] / 2, table["difference_stderr"])
    found = probae.select(lambda latents: probae.PPCA(6, latents).double(), {"latents": (1, 2)}, X, folds=2)
    np.testing.assert_array_equal(found.plot().containers[0].lines[0].get_ydata(), found.table["difference"])


# -- images ------------------------------------------------------------------------------------------------------------

PIXELS = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))


class Doubling:
    """Codes are the first two pixels; a decoded image holds its code thrice."""

    latents = 2

    def encode(self, x):
        return x[:, :2]

    def decode(self, z):
        return z.repeat(1, 3)

    def reconstruct(self, x):
        return x / 2

    def sample(self, n, seed=0, given=None):
        return torch.full((n, 6), float(seed))


def strip(images):
    """Images side by side with a white pixel between them."""
    return torch.nn.functional.pad(images.reshape(-1, 2, 3), (0, 1)).permute(1, 0, 2).flatten(1)[:, :-1]


def test_reconstructions_are_below_the_data_on_the_scale_of_the_data():
    rows = figures.reconstructions({"half": Doubling()}, PIXELS, (2, 3), limits=(0, 1)).axes
    for ax, wanted in zip(rows, (PIXELS, PIXELS / 2), strict=True):
        np.testing.assert_allclose(drawn(ax), strip(wanted), atol=1e-6)
    assert [ax.get_ylabel() for ax in rows] == ["data", "half"]


def test_samples_are_draws_of_the_seed_and_data_come_above():
    rows = figures.samples(Doubling(), (2, 3), 4, x=PIXELS, seed=1, limits=(0, 2)).axes
    np.testing.assert_allclose(drawn(rows[0]), strip(PIXELS / 2), atol=1e-6)
    np.testing.assert_allclose(drawn(rows[1]), strip(torch.full((4, 6), 0.5)), atol=1e-6)


def test_a_traversal_moves_one_latent_alone():
    (ax,) = figures.traversals(Doubling(), (2, 3), [1], z=[0.25, 0.0], values=(0.0, 0.5, 1.0), limits=(0, 1)).axes
    codes = torch.tensor([[0.25, 0.0], [0.25, 0.5], [0.25, 1.0]])
    np.testing.assert_allclose(drawn(ax), strip(codes.repeat(1, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="expected some of 0 to 1"):
        figures.traversals(Doubling(), (2, 3), [2])


def test_an_interpolation_is_on_the_line_between_two_codes_with_the_data_at_its_ends():
    rows = figures.interpolations(Doubling(), PIXELS, (2, 3), steps=3, limits=(0, 1)).axes
    first, last = PIXELS[2:3], PIXELS[3:4]
    codes = torch.cat([first, (first + last) / 2, last])[:, :2]
    np.testing.assert_allclose(drawn(rows[1]), strip(torch.cat([first, codes.repeat(1, 3), last])), atol=1e-6)
    with pytest.raises(ValueError, match="an even number"):
        figures.interpolations(Doubling(), PIXELS[:3], (2, 3))


def test_models_of_the_library_give_images_and_what_has_no_pass_is_refused():
    model = probae.VAE(6, 2)
    assert len(figures.reconstructions(model, PIXELS, (2, 3)).axes) == 2
    assert len(figures.samples(model, (2, 3), 3).axes) == 1
    assert len(figures.traversals(model, (2, 3)).axes) == 2
    assert len(figures.interpolations(model, PIXELS, (2, 3)).axes) == 2
    with pytest.raises(TypeError, match="reconstruct"):
        figures.reconstructions(object(), PIXELS, (2, 3))
    with pytest.raises(ValueError, match="2 × 2 numbers"):
        figures.reconstructions(model, PIXELS, (2, 2))
    with pytest.raises(ValueError, match="images"):
        figures.image_rows({"flat": PIXELS.numpy()})


# -- latents -----------------------------------------------------------------------------------------------------------


def test_two_latents_are_drawn_as_they_are_by_label():
    codes, labels = X[:, :2], torch.arange(len(X)) % 10
    ax = figures.latent_map(codes, by=labels, name="digit")
    for kind, dots in enumerate(ax.collections):
        np.testing.assert_array_equal(dots.get_offsets(), codes[labels == kind])
    looks = {(mpl.colors.to_hex(d.get_facecolor()[0]), len(d.get_paths()[0].vertices)) for d in ax.collections}
    assert len(looks) == len(ax.collections) == 10


def test_more_latents_are_principal_components_and_the_axes_say_how_much_they_keep():
    codes = X * torch.tensor([5.0, 0.1, 3.0, 0.1, 0.1, 0.1])
    ax = figures.latent_map(codes, by=X[:, 0], name="first")
    places = ax.collections[0].get_offsets()
    covariance = np.cov(codes.numpy().T)
    kept = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose(np.cov(places.T), np.diag(kept[:2]), atol=1e-9)
    assert ax.get_xlabel() == f"component 1 of 6 latents ({kept[0] / kept.sum():.0%})"
    np.testing.assert_array_equal(ax.collections[0].get_array(), X[:, 0])


def test_a_number_that_is_not_finite_is_grey_and_counted():
    k = X[:, 0].clone()
    k[:3] = torch.nan
    ax = figures.latent_map(X[:, :2], by=k)
    assert [len(dots.get_offsets()) for dots in ax.collections] == [3, len(X) - 3]
    assert ax.get_legend().get_texts()[0].get_text() == "not finite (3)"
    for codes, by, match in (
        (X[:, :1], None, "two latents"),
        (X, X[:5, 0], "one for each"),
        (X * torch.nan, None, "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            figures.latent_map(codes, by=by)


# -- factors -----------------------------------------------------------------------------------------------------------


def test_heatmaps_hold_the_loadings_and_the_residuals_below_the_diagonal():
    frame = pd.DataFrame([[0.9, -0.1], [0.2, 0.7], [0.0, 0.5]], index=["p", "q", "r"], columns=["factor 1", "factor 2"])
    ax = figures.loadings_heatmap(frame)
    np.testing.assert_array_equal(ax.images[0].get_array(), frame)
    assert ax.images[0].get_clim() == (-0.9, 0.9)
    assert (ticks(ax.yaxis), [text.get_text() for text in ax.texts][1]) == (["p", "q", "r"], "−0.10")
    residuals = pd.DataFrame(
        [[9.0, 0.1, -0.2], [0.1, 9.0, 0.3], [-0.2, 0.3, 9.0]], index=list("pqr"), columns=list("pqr")
    )
    ax = figures.residual_correlations(residuals)
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), [[0.1, np.nan], [-0.2, 0.3]])
    assert (ticks(ax.xaxis), ticks(ax.yaxis)) == (["p", "q"], ["q", "r"])


def test_a_biplot_has_scores_as_dots_and_arrows_along_the_loadings():
    loadings = np.array([[0.5, 0.1], [0.0, -0.8], [0.3, 0.3]])
    ax = figures.biplot(X[:, :2], loadings, names=["p", "q", "r"])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), X[:, :2])
    arrows = [text for text in ax.texts if text.arrow_patch is not None]
    tips = np.array([arrow.xy for arrow in arrows])
    np.testing.assert_allclose(tips, loadings * np.linalg.norm(tips[0]) / np.linalg.norm(loadings[0]), atol=1e-12)
    with pytest.raises(ValueError, match="two factors"):
        figures.biplot(X[:, :2], loadings, factors=(0, 2))


def test_the_scree_plot_has_both_lines():
    found = probae.parallel_analysis(X, draws=5)
    data, mean, limit = found.plot().get_lines()
    for line, values in ((data, found.eigenvalues), (mean, found.mean), (limit, found.quantile)):
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert figures.scree(found).get_xlabel() == "component"
    with pytest.raises(TypeError, match="parallel_analysis"):
        figures.scree(X)


# -- sparse codes ------------------------------------------------------------------------------------------------------


def test_sparsity_is_drawn_as_it_was_measured():
    density = torch.tensor([0.0, 0.0, 0.01, 0.5, 0.5, 1.0], dtype=torch.float64)
    fits = {n: SimpleNamespace(l0=torch.tensor([l0, l0]), density=density, explained_variance=r2)
            for n, l0, r2 in (("few", 2.0, 0.5), ("many", 8.0, 0.9))}  # fmt: skip
    ax = figures.sparsity_frontier(fits)
    assert [line.get_xydata().tolist() for line in ax.get_lines()] == [[[2.0, 0.5]], [[8.0, 0.9]]]
    assert [text.get_text() for text in ax.texts] == ["few", "many"]
    *alive, dead = figures.firing_histogram(fits["few"], bins=4).patches
    assert [bar.get_height() for bar in alive] == [1, 0, 0, 3]
    assert (alive[0].get_x(), dead.get_height()) == (-2.0, 2)


def test_tiles_are_columns_in_the_order_asked_for():
    columns = torch.stack([torch.full((6,), -1.0), torch.full((6,), 2.0)], 1)
    sheet = figures.dictionary_tiles(columns.numpy(), (2, 3), order=[0.0, 1.0], across=2).axes[0].images[0].get_array()
    assert (sheet[:, :3] == 1).all()
    assert (sheet[:, 4:] == -1).all()


# -- calibration -------------------------------------------------------------------------------------------------------


def probability_inside(points, n, low, high):
    """That the counts of n uniform draws below each point stay in the band, exactly: step by step from point to point."""
    states, before = {0: 1.0}, 0.0
    for t, a, b in zip(points, np.round(low * n), np.round(high * n), strict=True):
        counts = np.arange(int(a), int(b) + 1)
        share = (t - before) / (1 - before)
        total = sum(p * binom.pmf(counts - c, n - c, share) for c, p in states.items())
        states, before = dict(zip(counts, total, strict=True)), t
    return sum(states.values())


@pytest.mark.parametrize(("n", "points"), [(50, 19), (400, 9)])
def test_a_band_holds_the_whole_curve_with_the_probability_that_is_said(n, points):
    at = np.arange(1, points + 1) / (points + 1)
    inside = probability_inside(at, n, *simultaneous_band(at, n, 0.9))
    assert inside > 0.9 - 4 * (0.9 * 0.1 / 4000) ** 0.5  # of 4,000 curves
    assert inside < 0.97  # counts are whole, so that a band is a little wide, but no wider than that
    pointwise = binom.ppf(0.05, n, at) / n, binom.ppf(0.95, n, at) / n
    assert probability_inside(at, n, *pointwise) < 0.8


def test_sbc_and_coverage_draw_shares_beside_their_band():
    ranks = torch.tensor([0, 1, 1, 3])
    line = figures.sbc_bands(ranks, 3).get_lines()[1]
    np.testing.assert_allclose(line.get_xydata(), [[0.25, 0.0], [0.5, 0.25], [0.75, 0.0]])
    ax = figures.coverage([0.5, 0.9], torch.tensor([[4, 6], [9, 10]]), 10, names=["a", "b"])
    assert [list(line.get_ydata()) for line in ax.get_lines()[1:]] == [[0.4, 0.9], [0.6, 1.0]]
    for bad in ([0.0, 4.0], [-1.0], [0.5], [np.nan]):
        with pytest.raises(ValueError, match="ranks"):
            figures.sbc_bands(bad, 3)
    with pytest.raises(ValueError, match="increasing"):
        figures.coverage([0.9, 0.5], [1, 2], 10)
    with pytest.raises(ValueError, match="0 to 10"):
        figures.coverage([0.5, 0.9], [1, 11], 10)
    assert plt.get_fignums() == [1, 2]


def test_a_predictive_check_says_the_share_at_or_above():
    ax = figures.predictive_check(2.0, [1.0, 2.0, 3.0, 4.0], "mean, nats")
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert set(ax.get_lines()[0].get_xdata()) == {2.0}
    assert ax.get_title().endswith("0.62")
    with pytest.raises(ValueError, match="replicated"):
        figures.predictive_check(2.0, [1.0, np.nan])


# -- style -------------------------------------------------------------------------------------------------------------


def test_axes_of_a_users_own_are_drawn_on_in_their_text_size():
    _, ax = plt.subplots()
    ax.xaxis.label.set_size(16)
    assert figures.latent_map(X[:, :2], by=X[:, 0] > 0, ax=ax) is ax
    assert ax.get_legend().get_texts()[0].get_size() == 14


@pytest.mark.parametrize("draw", [
    lambda: figures.jacobian_spectrum(X.abs(), "singular value of the encoder's Jacobian"),
    lambda: figures.training_curves(run()),
    lambda: figures.sbc_bands(np.arange(50), 99),
    lambda: figures.predictive_check(0.3, X[:, 0], "the largest absolute residual of any feature, in nats"),
    lambda: figures.latent_map(X, by=["a group with a long name"] * len(X), name="group"),
    lambda: figures.loadings_heatmap(X[:5, :3], names=["a feature with quite a long name", *"bcde"]),
], ids=["spectrum", "training", "sbc", "predictive", "map", "loadings"])  # fmt: skip
def test_at_the_width_of_a_column_text_is_legible_and_whole(draw):
    figure = draw().figure
    assert figure.get_figwidth() == pytest.approx(3.3)
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01
    assert min(text.get_size() for text in figure.findobj(mpl.text.Text) if text.get_text().strip()) >= 6


def test_the_palette_is_that_of_okabe_and_ito():
    assert set(PALETTE) == {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
