"""The suite of the Gram form tells what is chosen from what is not admitted."""

import torch

from benchmarks.suites import gram


def test_rows() -> None:
    rows = gram.layer_rows("minute", 0, 2, 1, torch.device("cpu"))
    assert len(rows) == len(gram.SMALL) * len(gram.OPERATORS) * len(gram.FORMS)
    for row in rows:
        assert row["chosen"] == (row["by"] == "direct")  # 4 x 4 positions are too few
        if row["by"] == "direct":
            assert row["error_over_direct"] == 1
    lost = [row for row in rows if row["by"] == "gram float32" and row["d_over_rT"] == 1e-2]
    kept = [row for row in rows if row["by"] == "gram float64"]
    assert not any(row["admitted"] for row in lost)
    assert all(row["admitted"] for row in kept)


def test_iterations() -> None:
    direct, engine = gram.iteration_rows("tiny", 2, 1, torch.device("cpu"))
    assert direct["by"] == "direct"
    assert direct["speedup_over_direct"] == 1
    assert engine["ms_median"] > 0
