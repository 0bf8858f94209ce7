import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from iscorrect import InputError
from iscorrect.dumps import LogProbDump
from iscorrect.report.figures import FIGURES

pytest.importorskip("matplotlib")


def some_dump(sequences=20, length=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(sequences, length, generator=g) * 4 - 0.1
    noise = 0.1 * torch.randn(sequences, length, generator=g)
    lengths = torch.randint(20, length + 1, (sequences, 1), generator=g)
    return LogProbDump(
        rollout_log_probs=rollout, old_log_probs=(rollout + noise).clamp(max=0),
        mask=torch.arange(length) < lengths, step=torch.arange(sequences) // 5,
        token_ids=torch.randint(0, 99, (sequences, length), generator=g),
    )


def log_ratios(dump):
    return (dump.old_log_probs - dump.rollout_log_probs)[dump.mask].double().numpy()


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_on_its_own_and_on_given_axes(name):
    from matplotlib.figure import Figure

    _, draw = FIGURES[name]
    axes = Figure().add_subplot()
    assert draw(some_dump(), ax=axes) is axes
    assert axes.get_title()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    draw(some_dump()).figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("change", [
    "one token", *(pytest.param(x, marks=pytest.mark.slow)
                   for x in ("no mismatch", "certain", "huge"))
])
def test_a_figure_survives_extreme_dumps(name, change):
    dump = some_dump()
    if change == "one token":
        dump = replace(dump.rows(slice(0, 1)), mask=torch.arange(60)[None] == 3)
    elif change == "no mismatch":
        dump = replace(dump, old_log_probs=dump.rollout_log_probs)
    elif change == "certain":
        zeros = torch.zeros_like(dump.old_log_probs)
        dump = replace(dump, old_log_probs=zeros, rollout_log_probs=zeros)
    else:
        dump = replace(dump, old_log_probs=dump.old_log_probs - 500)
    FIGURES[name][1](dump).figure.savefig(io.BytesIO(), format="png", dpi=50)


@pytest.mark.parametrize("name", FIGURES)
def test_a_table_has_columns_of_one_length_that_csv_can_hold(name):
    table = FIGURES[name][0](some_dump())
    assert len({len(column) for column in table.values()}) == 1
    text = io.StringIO()
    csv.writer(text).writerows(zip(*(x.tolist() for x in table.values()), strict=True))
    assert text.getvalue()


def test_tables_hold_the_numbers_of_the_dump():
    dump = some_dump()
    d = log_ratios(dump)
    table = {name: tabulate(dump) for name, (tabulate, _) in FIGURES.items()}
    totals = (dump.old_log_probs - dump.rollout_log_probs).double() * dump.mask
    np.testing.assert_allclose(table["sequences"]["log_ratio"], totals.sum(1), atol=1e-9)
    np.testing.assert_array_equal(table["sequences"]["length"], dump.mask.sum(1))
    assert table["ratios"]["tokens"].sum() == len(d)
    at = np.argmin(np.abs(table["weights"]["ratio"] - 1.1))
    above = (d > np.log(table["weights"]["ratio"][at])).mean()
    assert table["weights"]["tokens"][at] == pytest.approx(above)
    assert table["steps"]["tokens"].sum() == len(d)
    assert (table["steps"]["k1"] * table["steps"]["tokens"]).sum() == pytest.approx(-d.sum())
    spans = table["positions"]["to"] - table["positions"]["from"]
    counted = table["positions"]["sequences"] * spans
    assert counted.sum() == pytest.approx(len(d))
    assert (table["positions"]["mean"] * counted).sum() == pytest.approx(np.abs(d).sum())
    worst = int(totals.abs().amax(1).argmax())
    np.testing.assert_allclose(
        table["worst_sequence"]["log_ratio"], totals[worst][dump.mask[worst]], atol=1e-9
    )


def test_many_tokens_are_drawn_as_hexagons_and_tabulated_as_a_sample():
    from matplotlib.collections import PolyCollection

    dump = some_dump(sequences=600)
    tabulate, draw = FIGURES["probabilities"]
    assert any(type(c) is PolyCollection for c in draw(dump).collections)
    assert len(tabulate(dump)["rollout"]) <= 20_000


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    message = "pip install matplotlib, which the extra 'plots' brings"
    with pytest.raises(InputError, match=message):
        FIGURES["sequences"][1](some_dump())
