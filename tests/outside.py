"""A model from outside: two layers of latents, one discrete and one continuous, for images given labels; with its line."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn import functional as F

import probae
from probae.models import Model, register


@probae.savable
class ClusteredImages(nn.Module):
    """Images of counts given labels: a cluster, a code around the cluster's centre, and pixels."""

    def __init__(self, shape, latents, classes, clusters=3, most=16):
        super().__init__()
        self.shape, self.classes, self.most = tuple(shape), classes, most
        pixels = torch.Size(self.shape).numel()
        self.encoder = nn.Linear(pixels + classes, clusters + 2 * latents)
        self.decoder = nn.Linear(latents + classes, pixels)
        self.centres = nn.Parameter(torch.randn(clusters, latents))
        self.log_weights = nn.Parameter(torch.zeros(clusters))

    def labels(self, y, like):
        return F.one_hot(y.long(), self.classes).to(like.dtype).expand(*like.shape[:-1], self.classes)

    def model(self, x, y):
        with pyro.plate("images", len(x), dim=-1):
            cluster = pyro.sample("cluster", dist.OneHotCategorical(logits=self.log_weights))
            centre = cluster @ self.centres
            code = pyro.sample("code", dist.Normal(centre, 1.0).to_event(1))
            logits = self.decoder(torch.cat([code, self.labels(y, code)], -1)).unflatten(-1, self.shape)
            pyro.sample("image", dist.Binomial(self.most, logits=logits).to_event(len(self.shape)), obs=x)

    def guide(self, x, y):
        with pyro.plate("images", len(x), dim=-1):
            flat = x.flatten(1).to(self.centres.dtype) / self.most
            out = self.encoder(torch.cat([flat, self.labels(y, flat)], -1))
            clusters = len(self.log_weights)
            pyro.sample("cluster", dist.OneHotCategorical(logits=out[..., :clusters]))
            loc, raw = out[..., clusters:].chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, F.softplus(raw) + 1e-3).to_event(1))


register(
    "clustered_images",
    Model(
        "two layers, one discrete and one continuous, given labels",
        "this file",
        lambda schema, latents, **options: ClusteredImages(
            schema.shape, latents, schema.classes, most=schema.maximum, **options
        ),
        kinds=("counts",),
        labels=True,
    ),
)
