"""The documentation site: its pages follow from the catalogue, the public names and the notebooks, and it builds."""

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import catalogue_pages
import measured
import notebook_pages
import pytest
import reference
from choices import choices, neighbours
from examples import example
from writing import stacked

import probae
from probae.models import CATALOGUE

ROOT = Path(__file__).parent.parent


def test_what_a_model_is_made_of_is_read_from_it():
    assert choices("ppca", "counts") == {
        "prior": "Normal",
        "likelihood": "Normal, one scale",
        "guide": "exact",
        "objective": "maximum likelihood",
    }
    made = choices("contractive_autoencoder", "real")
    assert (made["prior"], made["guide"], made["networks"]) == ("Flat", "Sigmoid", "affine, tied weights")
    assert made["objective"] == "ELBO + 0.1 × JacobianPenalty"


def test_neighbours_differ_in_one_choice():
    assert dict(neighbours("ppca"))["factor_analysis"] == {
        "likelihood": ("Normal, one scale", "Normal, a scale per feature")
    }
    assert list(dict(neighbours("vamp_vae"))["vae"]) == ["prior"]
    assert list(dict(neighbours("denoising_autoencoder"))["autoencoder"]) == ["objective"]


def test_a_model_from_outside_gets_a_page_and_a_row():
    runpy.run_path(str(ROOT / "tests" / "outside.py"))
    try:
        page = catalogue_pages.page("clustered_images", CATALOGUE["clustered_images"])
        rows = catalogue_pages.overview()
    finally:
        CATALOGUE.pop("clustered_images")
    assert "# Two layers, one discrete and one continuous, given labels" in page
    assert "| prior | Categorical, Normal |" in page
    assert 'probae.models.make("clustered_images", digits.schema' in page
    assert "[clustered_images](clustered_images.md)" in rows


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_model_says_when_to_use_it(name):
    assert CATALOGUE[name].use.endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_the_run_on_the_page_of_a_model_runs(name, capsys):
    """With few steps and rows."""
    program = example(name, steps=2)
    for rows, fewer in (
        ("[:100]", "[:2]"),
        ("x[469:]", "x[469:471]"),
        ("digits.train", "digits.train[:100]"),
        ("digits.labels[0]", "digits.labels[0][:100]"),
    ):
        program = program.replace(rows, fewer)
    exec(compile(program, name, "exec"), {})
    assert "log p(x" in capsys.readouterr().out


def test_measured_numbers_are_those_of_the_kept_table():
    kept = measured.RESULTS.read_text(encoding="utf-8")
    value = re.search(r"^\| ppca \| ≥ -([\d.]+ ± [\d.]+) \|", kept, re.MULTILINE)[1].replace(" ", "\N{NO-BREAK SPACE}")
    assert measured.evidence("ppca") == f"≥\N{NO-BREAK SPACE}−{value}"
    assert f"| **ppca** | ≥\N{NO-BREAK SPACE}−{value} |" in catalogue_pages.measured("ppca")


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_model_has_measured_numbers(name):
    assert re.search(r"\*\*.*−\d|^<.*log p\(x\): -\d", catalogue_pages.measured(name), re.MULTILINE)


def test_each_public_name_is_documented_once():
    found = reference.documented()
    assert len({id(thing) for thing in found.values()}) == len(found)
    for room in reference.rooms():
        for name in reference.names(room):
            assert reference.first_name(getattr(sys.modules[room], name)) is not None
    assert "probae.VAE" in found
    assert "probae.models.VAE" not in found
    assert {"probae.evidence.AIS", "probae.sklearn.LatentVariableModel"} <= set(found)


def test_a_formula_of_several_parts_has_a_line_for_each():
    text = ".. math:: z \\sim p(z), \\qquad\n          x \\sim p(x)\n\nThe rest.\n"
    assert stacked(text) == ".. math:: \\begin{gathered} z \\sim p(z), \\\\ x \\sim p(x) \\end{gathered}\n\nThe rest.\n"
    assert stacked(".. math:: z = 1\n") == ".. math:: z = 1\n"


def test_every_notebook_has_a_title_and_a_first_paragraph():
    found = notebook_pages.notebooks()
    assert found
    for path in found.values():
        assert all(notebook_pages.heading(path))


class Links(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.add(found.get("id"))
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-D", "nb_execution_mode=off"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    html = tmp_path / "html"
    pages = {
        path: Links(path.read_text(encoding="utf-8")) for path in html.rglob("*.html") if "_static" not in path.parts
    }
    assert len(pages) > len(CATALOGUE) + len(probae.__all__)
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            where, _, anchor = unquote(target.partition("?")[0]).partition("#")
            if re.match(r"\w+:|//", target):
                continue
            there = (path.parent / where).resolve() if where else path
            if not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                broken.append((path.name, target))
    assert not broken
    listed = set(re.findall(r"\]\((.+?)\):?", (html / "llms.txt").read_text(encoding="utf-8")))
    made = {str(path.relative_to(html)) for path in pages} - {"genindex.html", "py-modindex.html", "search.html"}
    assert listed == made
