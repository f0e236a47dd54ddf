"""Figures that the benchmarks derive from what they measure, worked out again by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import race  # noqa: E402


def test_share_of_sgemm(monkeypatch):
    """FLOPs of a step / its median seconds / the rate of sgemm; for our own model alone."""
    monkeypatch.setattr(race, "flops_per_token", lambda cfg: 5e6)
    measured = {
        "sgemm": {"seconds": [1.0], "gflops": 80.0, "peak_mib": 0},
        "port": {"seconds": [4.0, 9.0, 3.0], "peak_mib": 2.2, "parameters": 1000},
        "ours, topk": {"seconds": [0.9, 0.5, 0.4], "peak_mib": 1.2, "parameters": 1000}}
    monkeypatch.setattr(race, "rounds", lambda n, jobs: measured)
    text = race.race_steps(["1.1M"], 3, 5, {})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| 1.1M")]
    row = {r[1]: r[2:] for r in rows}
    # 8 windows of 512 tokens, 4096: 4096 x 5 MFLOP = 20.48 GFLOP in 0.5 s are 40.96 of 80 GFLOP/s
    assert row["ours, topk"] == ["1,000", "500", "8,192", "8.00", "1", "51%"]
    assert row["port"] == ["1,000", "4000", "1,024", "1.00", "2", ""]
    assert row["ours, causal + Shaw"][0] == "failed"
    assert row["sgemm: 80 GFLOP/s"][-1] == "100%"
    del measured["sgemm"]
    assert "51%" not in race.race_steps(["1.1M"], 3, 5, {})


def test_rate_of_sgemm(monkeypatch):
    """Ten products of 2 x 1024^3 FLOP on each of two threads, in the shortest of the times."""
    monkeypatch.setattr(race, "start_ours", lambda: None)
    monkeypatch.setattr(race, "timed", lambda function, n: {"seconds": [3.0, 2.0, 4.0]})
    assert race.sgemm()["gflops"] == pytest.approx(2 * 10 * 2 * 1.073741824 / 2)
