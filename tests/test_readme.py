"""The README's programs, run as they are written."""

import re
from pathlib import Path

import pytest

from probae.models.catalogue import markdown

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"(?:<!-- ([\w ]+) -->\n)?```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_first_steps_print_evidence_a_table_and_a_diagnosis(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("xarray")
    scope: dict = {}
    for name, code in BLOCKS:
        if not name:
            exec(compile(code, "README.md", "exec"), scope)
    out = capsys.readouterr().out
    assert "Diagnosis of 397 data" in out
    assert "posterior" in scope["tree"].children
    assert "lower bound on log p(x)" in out
    assert "independent features" in out


def test_a_class_and_two_functions_of_ones_own_are_fitted_and_compared(capsys):
    pytest.importorskip("sklearn")
    named = {name: code for name, code in BLOCKS if name}
    assert list(named) == ["own class", "own functions", "own use"]
    scope: dict = {}
    for name, code in named.items():
        assert sum(bool(line) for line in code.splitlines()) < 20, f"{name}: the README promises under 20 lines"
        exec(compile(code, "README.md", "exec"), scope)
    out = capsys.readouterr().out
    for name in ("Student-t", "Normal", "full Gaussian"):
        assert name in out


def test_the_table_of_the_family_is_the_catalogue():
    assert f"<!-- catalogue -->\n{markdown()}\n<!-- /catalogue -->" in README.read_text()
