"""The pages of the documentation: their programs run and print what is shown, their links lead somewhere, their names exist.

The Python blocks of a page run in order, in one namespace, in an empty folder. A text block right after one is its output:
words have to be the same, numbers may differ (machines round differently), and a line ``...`` stands for anything. A page
that says ``<!-- slow -->`` is a slow test; one that says ``<!-- needs PROBAE_DATA -->`` is skipped without that folder.
``python tests/test_documentation.py PAGE`` writes the outputs of a page anew.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = ("models", "api", "notebooks", "gallery")  # by the build of the site, which checks them itself
PAGES = sorted(p for p in DOCS.rglob("*.md") if not p.relative_to(DOCS).parts[0].startswith(("_", *MADE)))
SOURCE = "https://github.com/probae/probae/blob/main/"
PROGRAM = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
FENCED = re.compile(r"^```.*?^```\n", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\bNaN\b")


def name_of(page):
    return str(page.relative_to(DOCS))


def programs():
    for page in PAGES:
        # the program of the front page is the README's, which has a test of its own
        if "```python" in (text := page.read_text()) and page != DOCS / "index.md":
            yield pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if "<!-- slow -->" in text else [])


def run(page):
    """Yields each block of a page, with what it prints, as it is run."""
    scope = {"__name__": "__main__"}
    text = page.read_text()
    for block in PROGRAM.finditer(text):
        line = text[: block.start()].count("\n") + 1  # so that a traceback shows the page's own line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block["code"], str(page), "exec"), scope)
        yield block, printed.getvalue()


def pattern_of(shown):
    """A regular expression for what is shown, in which numbers and the width of columns do not matter."""
    words = NUMBER.sub("0", shown).split()
    return r"\s+".join(".*" if word == "..." else re.escape(word) for word in words)


@pytest.mark.parametrize("page", programs())
def test_the_programs_of_a_page_print_what_it_shows(page, tmp_path, monkeypatch):
    if "<!-- needs PROBAE_DATA -->" in page.read_text() and "PROBAE_DATA" not in os.environ:
        pytest.skip("PROBAE_DATA is not set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for block, printed in run(page):
        if block["output"] is not None:
            found = NUMBER.sub("0", printed).strip()
            assert re.fullmatch(pattern_of(block["output"]), found, re.DOTALL), f"{block['code']}\nprinted\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        where, _, anchor = unquote("".join(target)).partition("#")
        if where.startswith(SOURCE):
            assert (ROOT / where.removeprefix(SOURCE)).exists(), where
        elif "://" not in where:
            there = (page.parent / where).resolve() if where else page
            if there.is_relative_to(DOCS) and there.relative_to(DOCS).parts[0] in MADE:
                continue
            assert there.is_file(), f"{where}: no such page"
            assert not anchor or anchor in anchors(there), f"{where}#{anchor}: no such heading"


def anchors(page):
    """Those of its headings, as MyST makes them, and its own."""
    text = FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_names_in_a_page_exist(page):
    text = page.read_text()
    for name in set(re.findall(r"\bprobae(?:\.[A-Za-z_]\w*)+(?![\w/-])", text)):
        assert resolves(name), f"{name}: no such name"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, f"{name}: no such test"


def resolves(name):
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    for i, part in enumerate(rest):
        if not hasattr(found, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(".".join([first, *rest[: i + 1]]))
        if not hasattr(found, part):
            return part in getattr(found, "__annotations__", {}) or part in getattr(found, "__dataclass_fields__", {})
        found = getattr(found, part)
    return True


def rewrite(page):
    """Put what the programs of a page print where it shows their outputs; outputs with a line ``...`` stay as they are."""
    text, end, parts = page.read_text(), 0, []
    for block, printed in run(page):
        if block["output"] is not None and not re.search(r"^\.\.\.$", block["output"], re.MULTILINE):
            lines = "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())
            parts += [text[end : block.start("output")], lines]
            end = block.end("output")
    page.write_text("".join([*parts, text[end:]]))


if __name__ == "__main__":
    for given in sys.argv[1:]:
        rewrite(Path(given).resolve())
