"""The README's programs, run as they are written."""

import re
from pathlib import Path

import pytest

from probae.models.catalogue import markdown

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_ten_lines_print_evidence_a_table_and_a_diagnosis(capsys):
    pytest.importorskip("sklearn")
    (code,) = BLOCKS
    assert sum(bool(line) for line in code.splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "lower bound on log p(x)" in out
    assert "independent features" in out
    assert "Diagnosis of 397 data" in out


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (README.parent / link).exists()


def test_the_table_of_the_family_is_the_catalogue():
    assert f"<!-- catalogue -->\n{markdown()}\n<!-- /catalogue -->" in README.read_text()
