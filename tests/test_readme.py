"""What README and the pages of docs/ quote is what the committed results hold."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def result(name):
    return json.loads((ROOT / "experiments" / "results" / name / "result.json").read_text())


def test_the_table_of_coverage():
    rows = result("noise_coverage")["rows"]
    for name in {row["distribution"] for row in rows}:
        cells = [f"{row['held']:.2f} ({row['heavy']:.2f})" for row in rows if row["distribution"] == name]
        assert f"| {' | '.join([name, *cells])} |\n" in README


def test_the_table_of_compare():
    for field, shown in (("learning_rate", ".3g"), ("seconds", ".3g"), ("num_updates", "d"), ("batch_size", "d")):
        cells = [format(row[field], shown) for row in result("compare")["rows"]]
        assert any(line.split()[-3:] == cells for line in README.splitlines()), cells


def test_the_answer_of_advise():
    assert result("time_to_target")["verdict"].split("fastest. ")[1] in " ".join(README.split())


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_table_of_ways_to_compute_the_noise_scale():
    rows, page = result("noise_estimators")["rows"], (ROOT / "docs" / "noise_scale.md").read_text()
    for name in {row["way"] for row in rows}:
        cells = [f"{row['median']:.0f} ({row['low']:.0f} to {row['high']:.0f})" for row in rows if row["way"] == name]
        assert f"| {' | '.join([name, *cells])} |\n" in page


def test_the_ledger_is_what_the_results_say():
    from experiments.__ledger__ import CLAIMS, ledger

    page = ledger()
    assert len(CLAIMS) >= 25
    assert page == (ROOT / "experiments" / "LEDGER.md").read_text(), "python -m experiments ledger"
