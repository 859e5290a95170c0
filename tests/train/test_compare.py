"""Several methods share what they may share, and one page shows them side by side."""

from __future__ import annotations

from fishertune.train.compare import compare
from fishertune.train.config import load_config
from fishertune.train.report import write_comparison
from fishertune.train.tables import metrics_table


def test_methods_share_warm_up_and_estimates(small_config, tmp_path, quiet, monkeypatch):
    results = compare(
        small_config, ["freeze", "fishertune"], tmp_path / "out", learning_rates={"fishertune": 5e-4}, reporter=quiet
    )
    assert [result["method"] for result in results] == ["freeze", "fishertune"]
    assert load_config(tmp_path / "out" / "fishertune" / "config.yaml").tune.lr == 5e-4
    # one warm-up for both: the same losses, from one file
    assert results[0]["curves"]["warm-up"] == results[1]["curves"]["warm-up"]
    assert len(list((tmp_path / "out" / "shared").glob("warmup-*"))) == 1
    # the decoder starts where the warm-up left it, so both methods see the same first batch with the same loss
    first = [result["curves"]["tuning"]["loss"][0] for result in results]
    assert first[0] == first[1]

    page = write_comparison(tmp_path / "out", results).read_text(encoding="utf-8")
    assert 'href="fishertune/report.html"' in page
    assert page.count("data:image/png;base64,") == 1 + 2 * (2 + 2)  # bars, and per domain image, truth, two predictions
    assert metrics_table(results).row_count == 2
    again = compare(
        small_config,
        ["freeze", "fishertune"],
        tmp_path / "out",
        learning_rates={"fishertune": 5e-4},
        resume=True,
        reporter=quiet,
    )
    assert again == results
