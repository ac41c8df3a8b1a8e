"""A run of each model of the catalogue on real data that need no download."""

from __future__ import annotations

from choices import built, choices, shared_kind

from probae.comparison.fits import has_maximum_likelihood
from probae.datasets import Schema
from probae.models import CATALOGUE

_DIGITS = Schema((64,), "counts", 16, varies=False, spread=6.0, classes=10)


def example(name: str, steps: int = 1500) -> str:
    """A program: data, model, fit and evidence."""
    line = CATALOGUE[name]
    imports, data, made = _data(name)
    kind = shared_kind(name, name)
    assert kind is not None
    if has_maximum_likelihood(built(name, kind)):
        fit = "model.maximum_likelihood(train)"
    else:
        options = "".join(f", {key}={value!r}" for key, value in line.fit.items())
        fit = f"probae.fit(model, train, steps={steps}{options})"
    prior = choices(name, kind).get("prior") == "Flat"
    proper = "model = probae.expost_prior(model, train)  # a flat prior has no log p(x)\n" if prior else ""
    return f"{imports}import probae\n\n{data}\nmodel = {made}\n{fit}\n{proper}print(probae.log_evidence(model, test))\n"


def _data(name: str) -> tuple[str, str, str]:
    """Imports, data, and how the model is made for them."""
    line = CATALOGUE[name]
    digits = 'digits = probae.datasets.load("digits")\n'
    if line.suits(_DIGITS):
        rows = "train, test = digits.train, digits.test[:100]"
        if line.labels:
            rows = "train = digits.train, digits.labels[0]\ntest = digits.test[:100], digits.labels[2][:100]"
        return "", f"{digits}{rows}", f'probae.models.make("{name}", digits.schema, latents=16)'
    if line.sequences:  # the rows of an image, one after another
        rows = "train, test = digits.train.reshape(-1, 8, 8), digits.test[:100].reshape(-1, 8, 8)"
        schema = 'probae.datasets.Schema(shape=(8, 8), kind="counts", maximum=16)'
        return "", f"{digits}{rows}", f'probae.models.make("{name}", {schema}, latents=8)'
    if "binary" in line.kinds:
        rows = "train, test = (1.0 * (part > 7) for part in (digits.train, digits.test[:100]))"
        return "", f"{digits}{rows}", f'probae.models.make("{name}", 64, latents=4, kind="binary")'
    rows = "x = load_breast_cancer().data\nx = (x - x.mean(0)) / x.std(0)\ntrain, test = x[:469], x[469:]"
    return "from sklearn.datasets import load_breast_cancer\n\n", rows, f'probae.models.make("{name}", 30, latents=10)'
