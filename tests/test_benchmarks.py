"""Figures that the benchmarks derive from what they measure, worked out again by hand; flags."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

import race  # noqa: E402
import recall  # noqa: E402


@pytest.mark.parametrize("script", sorted(
    path.stem for path in SCRIPTS.glob("*.py") if "Parser(" in path.read_text()))
def test_wrong_flag_is_one_line(script, monkeypatch, capsys):
    """What is missing or unknown among the arguments, and no usage."""
    if script == "figures":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert err.endswith(f"; see {script}.py --help\n")


@pytest.mark.parametrize("script, flags, line", [
    ("profile_step", ["--steps", "0"], "argument --steps: 0: must be a number of at least 1"),
    ("learning", ["--minutes", "nan"], "argument --minutes: nan: must be a number of at least 0"),
    ("race", ["--rounds", "x"], "argument --rounds: x: must be a number of at least 1"),
    ("recall", ["--only", "nothing"], "--only nothing: no piece begins so; there are "),
])
def test_wrong_values_are_one_line(script, flags, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1


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


# --------------------------------------------------------------------------- associative recall

@pytest.mark.parametrize("t, pairs", [(64, 8), (64, 16), (256, 3)])
def test_recall_sequences(t, pairs):
    """Pairs, then filler without their keys; each key once more, its value next, nothing before."""
    ids, answers, distance = recall.sequences(np.random.default_rng(0), 20, t, pairs)
    for row, at, far in zip(ids, answers, distance, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and keys.max() < 16 <= values.min()
        assert (row[at - 1] == keys).all() and (row[at] == values).all()
        assert sorted(np.flatnonzero(np.isin(row, keys))) == sorted(
            [*range(0, 2 * pairs, 2), *(at - 1)])
        # inputs are shifted by one: token 2 i + 1, the value, is the input of position 2 i + 2
        assert list(at - far) == [2 * i + 2 for i in range(pairs)] and far.min() >= 0


def test_recall_pieces(tmp_path, monkeypatch, capsys):
    """A second call finds a piece done, another seed does not."""
    monkeypatch.setattr(recall, "PIECES", {
        "multiprobe, small": (dict(n_probes=2, seq_len=32, window=8), 4, 2, 2),
        "full": (dict(attention="full"), 4, 1, 2)})
    monkeypatch.setattr(recall, "limit", lambda n: None)
    monkeypatch.setattr(recall, "select_device", lambda name: None)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["recall.py", "--out", str(tmp_path), "--only", "multi"])
        recall.main()
        (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["K"] == 4 and 0 <= told["accuracy"] <= 1 and set(told["other T"]) == {
        "64", "256", "1024"}
    monkeypatch.setattr(sys, "argv", ["recall.py", "--out", str(tmp_path), "--only", "multi",
                                      "--seed", "1"])
    recall.main()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
