import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, output: figures.append(figure))
    return figures


def test_experiments_have_the_names_that_they_were_given(drawn, tmp_path):
    names = ["null", "NA", "1"]
    rows = [
        {"experiment": name, "dataset": "007", "variant": "pruned", "stage": stage, "ppl": 20.0, "ppl_se": None}
        for name in names
        for stage in ("A", "AB", "FULL")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "summary.csv", index=False)
    plots.plot_perplexity(tmp_path / "summary.csv", tmp_path / "perplexity.svg")
    assert [axis.get_title() for axis in drawn[0].axes] == [f"{name} on 007" for name in names]


@pytest.mark.parametrize(
    ("content", "told"), [("", "cannot be read"), ("start,end\n0,1\n", "has no column angular_distance")]
)
def test_what_is_no_ranking_is_refused(drawn, tmp_path, content, told):
    (tmp_path / "importance.csv").write_text(content)
    with pytest.raises(DataError, match=told):
        plots.plot_importance(tmp_path / "importance.csv", tmp_path / "importance.svg")
    assert not drawn
