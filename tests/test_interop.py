"""What others read: exported networks, a pair's graph, and the card beside a saved model."""

import re

import pytest
import torch
from pyro.infer.inspect import generate_graph_specification, get_model_relations, render_graph
from torch.distributions import Distribution

import probae
from probae.nn import ConvDecoder, ConvEncoder

X = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))


def convolutional():
    shape = (1, 8, 8)
    return probae.VAE(shape, 2, encoder=ConvEncoder(shape, 4), decoder=ConvDecoder(2, shape), seed=0)


MODELS = {
    "vae": lambda: probae.VAE(64, 2, hidden=(5,), seed=0),
    "autoencoder": lambda: probae.Autoencoder(64, 2, seed=0),
    "tied": lambda: probae.Autoencoder(64, 2, tied=True, seed=0),
    "images": convolutional,
}


@pytest.mark.parametrize("name", MODELS)
def test_exported_encoders_and_decoders_give_the_same_for_batches_of_any_size(name):
    model = MODELS[name]()
    x = X.reshape(-1, 1, 8, 8) if name == "images" else X
    probae.fit(model, x, steps=2, compile=False, progress=False)
    for network, example in ((model.encoder, X), (model.decoder, X[:, :2])):  # which take flat rows
        exported = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
        for rows in (example, example[:4], example.repeat(3, 1)):
            with torch.no_grad():
                # the same operations; a batch of another size may be cut into other blocks
                torch.testing.assert_close(exported(rows), network(rows), rtol=1e-6, atol=1e-6)


def test_pyro_draws_a_pairs_graph():
    model = probae.VAE(64, 2, hidden=(5,), seed=0)
    validates = Distribution._validate_args
    try:
        relations = get_model_relations(model.model, model_args=(X,))
    finally:
        Distribution.set_default_validate_args(validates)  # Pyro puts its own back, which zuko may have overruled
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}
    specification = generate_graph_specification(relations)
    assert specification["edge_list"] == [("z", "x")]
    assert specification["plate_groups"]["data"] == ["z", "x"]
    pytest.importorskip("graphviz")
    assert "z -> x" in render_graph(specification).source


def test_a_card_tells_what_is_known(tmp_path):
    model = probae.PPCA(64, 2).maximum_likelihood(X)
    evidence = probae.log_evidence(model, X)
    text = (probae.save(model, tmp_path, evidence=evidence, data=X) / "card.md").read_text()
    assert f"{evidence.mean:.4f} ± {evidence.mean_stderr:.4f} nats per datum" in text
    assert "9 rows; x: [64], torch.float32, crc32 " in text
    assert f"probae {probae.__version__}" in text
    assert "exact, by exact, of a density" in text
    other = X.clone()
    other[3, 5] += 1e-6
    crc = [re.search(r"crc32 (\w+)", _card(tmp_path / str(i), data=x)).group(1) for i, x in enumerate((X, other))]
    assert crc[0] in text
    assert crc[0] != crc[1]
    assert _card(tmp_path / "bare").count("not given") == 2


def _card(folder, **options):
    return (probae.save(probae.PPCA(64, 2, seed=0), folder, **options) / "card.md").read_text()


def test_a_card_is_replaced_with_the_model_and_one_that_was_changed_stays(tmp_path):
    first = _card(tmp_path)
    probae.save(probae.PPCA(64, 3, seed=0), tmp_path)
    path = tmp_path / "card.md"
    assert path.read_text() != first
    for content in (path.read_text() + "My notes.\n", "My notes.\n"):
        path.write_text(content)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=r"card\.md"):
            probae.save(probae.PPCA(64, 1, seed=0), tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert probae.load(tmp_path).latents == 3


def test_evidence_that_is_none_is_refused(tmp_path):
    with pytest.raises(TypeError, match="evidence: expected an Evidence"):
        probae.save(probae.PPCA(4, 1), tmp_path / "new", evidence=-3.0)
    assert not (tmp_path / "new").exists()
