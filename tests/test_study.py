"""The study: what it derives from its measurements, worked out by hand; parts, tiny; resumption."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import common  # noqa: E402
import heads  # noqa: E402
import studies  # noqa: E402
import study  # noqa: E402
from studies import crossover, images, lookahead, throughput, worth  # noqa: E402

import train  # noqa: E402
from rt_scratch import select_device  # noqa: E402
from rt_scratch.data import cifar10  # noqa: E402
from rt_scratch.errors import UserError  # noqa: E402
from rt_scratch.heads import KINDS  # noqa: E402
from rt_scratch.presets import PRESETS  # noqa: E402

# ----------------------------------------------------------------------- exponents and crossings


def test_exponent():
    """Of 3 T^1.5, whatever shorter windows cost; none from one point."""
    points = [(t, 3 * t ** 1.5) for t in (4096, 8192, 65536)]
    assert common.exponent([(256, 1e9), *points], 4096) == pytest.approx(1.5)
    assert math.isnan(common.exponent([(256, 1.0), points[0]], 4096))


def test_crossing():
    """8 T^0.5 falls below T at T = 64; between measured points on straight lines in log-log."""
    lengths = (4, 16, 256, 4096)
    ours, theirs = [(t, 8 * t ** 0.5) for t in lengths], [(t, float(t)) for t in lengths]
    assert crossover.crossing(ours, theirs) == pytest.approx(64)
    assert crossover.crossing(theirs, ours) is None           # the slower from there on
    assert crossover.crossing(ours[2:], theirs) == 256        # faster wherever both were measured
    once_more = [*ours[:3], (1024, 2048.0), ours[3]]          # slower again at 1,024
    theirs.insert(3, (1024, 1024.0))
    assert 1024 < crossover.crossing(once_more, theirs) < 4096


def test_what_is_measured():
    """K W = T and W a power of two near sqrt(T); half of the heads local; no relative positions."""
    for t, w in ((256, 16), (512, 32), (1024, 32), (65536, 256)):
        cfg, batch = crossover.configuration("layer", 512, "ours, causal", t)
        assert (cfg.window, cfg.block, cfg.n_clusters * w, cfg.width) == (w, w, t, 512)
        assert batch * t == max(t, 8192) and cfg.n_layers == 1
        assert cfg.layer_heads(0) == (("causal", 4), ("local", 4))
        assert cfg.local_max_distance == cfg.routing_max_distance == 0
    for contender, kinds in (("ours, full", {"full"}), ("ours, local", {"local"}),
                             ("ours, topk", {"topk", "local"})):
        cfg, _ = crossover.configuration("model", 128, contender, 1024)
        assert cfg.kinds() == kinds and cfg.n_layers == 4


# ------------------------------------------------------------------------ Jensen-Shannon divergence

def head_maps(*weights):
    """Stand-ins for attention maps of (H, T, T) weights each."""
    return [SimpleNamespace(queries=w, columns=lambda first, last, w=w: w[..., first:last])
            for w in weights]


def test_divergence_of_known_heads():
    """The same: 0. No key in common: ln 2. (1, 0) and (1/2, 1/2): H(3/4) - ln 2 / 2."""
    a = np.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    b = np.array([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    found = heads.divergences(head_maps(a, b))
    third = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - math.log(2) / 2
    np.testing.assert_allclose(found[0, 1], [0, math.log(2), third], atol=1e-12)


def test_divergence_against_loops(monkeypatch):
    """Heads of two kinds, rows that do not add up to 1, an empty row, keys some at a time."""
    monkeypatch.setattr(heads, "CHUNK", 3)
    rng = np.random.default_rng(0)
    w = np.tril(rng.random((3, 8, 8)) * (rng.random((3, 8, 8)) < 0.6)) + 0.01 * np.eye(8)
    w[1, 4] = 0
    found = heads.divergences(head_maps(w[:1], w[1:]))
    assert set(found) == {(0, 1), (0, 2), (1, 2)}
    for (i, j), nats in found.items():
        for t in range(8):
            p, q = (w[h, t] / w[h, t].sum() if w[h, t].sum() else w[h, t] * np.nan for h in (i, j))
            if 4 == t and 1 in (i, j):
                assert np.isnan(nats[t])
                continue
            want = 0.0
            for x, y in zip(p, q, strict=True):
                m = (x + y) / 2
                want += sum(z * math.log(z / m) / 2 for z in (x, y) if z)
            assert nats[t] == pytest.approx(want, abs=1e-12)


# ------------------------------------------------------------------------------ spreads and logs

def test_differences():
    assert studies.mean_spread([1.0, 2.0, 4.5]) == (2.5, 3.5)
    assert studies.differs([1.0, 1.2], [1.5, 1.6]) is True       # 0.45 apart, spread 0.2
    assert studies.differs([1.0, 1.2], [1.1, 1.6]) is False      # 0.25 apart, spread 0.5
    assert studies.differs([1.0], [9.0, 9.0]) is None
    assert studies.verdict([1.0, 1.2], [1.5, 1.6]) == "-0.4500 (a difference)"
    assert studies.verdict([1.0], [9.0]) == "-8.0000 (one seed: open)"


def test_finished_pieces_are_not_measured_again(tmp_path):
    path, columns = tmp_path / "part.csv", ("run", "kind", "score", "steps")
    measured = []

    def measure(name):
        def one():
            measured.append(name)
            if name == "c":
                raise KeyboardInterrupt
            return {"kind": 'a, "b"', "score": 1.25, "steps": 7}
        return one

    for name in "aab":
        studies.Log(path, columns).row(name, measure(name))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        studies.Log(path, columns).row("c", measure("c"))
    assert path.read_bytes() == before and measured == ["a", "b", "c"]
    row = studies.Log(path, columns).row("b", measure("b"))
    assert row == {"run": "b", "kind": 'a, "b"', "score": 1.25, "steps": 7}
    with pytest.raises(UserError, match="columns"):
        studies.Log(path, (*columns, "more"))


def test_groups():
    """Token by token is one pass and what looking ahead was worth; BASE stands in both tables."""
    rows = [dict(kind=kind, recipe="default", time=time, score=score, ahead=ahead)
            for kind, time, score, ahead in (
                (worth.BASE, "steps", 1.5, ""), ("topk", "steps", 1.25, 0.5),
                ("topk", "time", 1.75, 0.25), ("local", "time", 2.0, ""))]
    one, token = "topk, one pass (sees ahead)", "topk, token by token"
    assert worth.groups(rows, "default", "steps") == {
        worth.BASE: [1.5], one: [1.25], token: [1.75]}
    assert worth.groups(rows, "default", "time") == {
        worth.BASE: [1.5], one: [1.75], token: [2.0], "local": [2.0]}
    assert worth.groups(rows, "adamw", "steps") == {}


def test_what_looking_ahead_is_worth():
    """Mean and standard error over windows, not over their tokens."""
    whole, alone = np.zeros((2, 3)), np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert lookahead.difference(whole, alone) == (2.0, pytest.approx(1.0))


# ---------------------------------------------------------------------------------- parts, tiny

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(f"line {i}: the quick brown fox, {i * i % 97}\n" for i in range(400)))
    return path


@pytest.fixture
def part(tmp_path, text, monkeypatch):
    """Runs a part of the study in seconds and returns the text of its csv."""
    monkeypatch.setattr(throughput, "KINDS", {k: KINDS[k] for k in ("local", "causal", "topk")})
    monkeypatch.setattr(lookahead, "CAPACITIES", (1,))
    # It takes cores away from the process, which would not come back for the tests after these.
    monkeypatch.setattr(study, "start_ours", lambda n_threads: select_device("cpu"))

    def one(name, *flags):
        study.main([name, "--quick", "--text", str(text), "--steps", "2", "--threads", "1",
                    "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"),
                    *map(str, flags)])
        assert (tmp_path / "out" / f"{name}.md").read_text().startswith("# ")
        return (tmp_path / "out" / f"{name}.csv").read_text()

    return one


def test_crossover(part, monkeypatch, capsys):
    """Without torch, said in one line; longer windows are not tried after a failure, and without
    patience until there is some.
    """
    names = ("ours, causal", "ours, full")
    monkeypatch.setattr(crossover, "CONTENDERS", {
        c: crossover.CONTENDERS[c] for c in names} | {"port": ("port", {})})
    monkeypatch.setattr(crossover, "RIVAL", "ours, full")
    monkeypatch.setattr(crossover.importlib.util, "find_spec", lambda name: None)
    crossover.has_torch.cache_clear()
    rows = list(csv.DictReader(part("crossover", "--patience", 0).splitlines()))
    assert [(r["T"], r["note"][:9]) for r in rows] == 2 * (
        2 * [("64", "")] + 2 * [("128", "not tried")])
    crossover.has_torch.cache_clear()
    capsys.readouterr()
    table = part("crossover")
    assert capsys.readouterr().err.count("torch and routing-transformer are missing") == 1
    crossover.has_torch.cache_clear()
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 8 and all(float(r["us_per_token"]) > 0 for r in rows)

    def fails(*_):
        raise RuntimeError("MemoryError: too much")

    log = studies.Log(Path("nowhere.csv"), crossover.COLUMNS)
    for t in (64, 128):
        told = SimpleNamespace(apart=fails, threads=1, cpu_time=True)
        row = crossover.one(told, log, "layer", 128,
                            "ours, full", t, 64, 0.1, 0)
        log.rows.append(dict.fromkeys(crossover.COLUMNS, "") | row)
    assert "out of memory" in log.rows[0]["note"] and "not tried" in log.rows[1]["note"]


def test_worth_and_throughput(part):
    """Five runs at equal steps, two of them with shifted keys, AdamW's five, four at equal time;
    nothing twice.
    """
    table = part("worth", "--seeds", 1, "--cpu-time")
    rows = list(csv.DictReader(table.splitlines()))
    assert [sum(r["time"] == "steps" and r["recipe"] == recipe for r in rows)
            for recipe in ("default", "adamw")] == [5, 5]
    assert sum(r["time"] == "time" for r in rows) == 4
    speed = part("throughput")  # measured by `worth`, read here
    assert len(speed.splitlines()) == 6
    assert part("worth", "--seeds", 1) == table
    with pytest.raises(UserError, match="--threads 1"):
        study.main(["throughput", "--cpu-time", "--threads", "2"])


def test_an_interrupted_run_goes_on(part, tmp_path, text, monkeypatch):
    whole, main = part("divergence"), train.main
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, "--stop-after", "1"]))
    studied = SimpleNamespace(runs=tmp_path / "again", out=tmp_path / "out-again")
    flags = [text, *studies.Study.flags(SimpleNamespace(quick=True, seq_len=64)), "--routing",
             "causal", "--steps", 2, "--eval-every", 0, "--eval-windows", 16]
    studies.trained(studied, "run", flags)
    monkeypatch.setattr(train, "main", main)
    folder = studies.trained(studied, "run", flags)
    rows = list(csv.DictReader((studied.out / "logs" / "run.csv").open()))
    assert [r["step"] for r in rows if r["split"] == "train"][-1] == "2"
    again = heads.by_pair(folder, n_windows=2)
    for r in csv.DictReader(whole.splitlines()):
        if r["run"] == "some-64-causal-2":
            assert np.mean(list(again[r["heads"]].values())) == pytest.approx(float(r["mean"]),
                                                                             rel=1e-5)


def test_lookahead(part, tmp_path):
    """A causal model cannot look ahead: both scores are the same."""
    row, = csv.DictReader(part("lookahead").splitlines())
    positions = (tmp_path / "out" / "lookahead" / f"{row['run']}.csv").read_text().splitlines()
    assert len(positions) == 65 and (row["K"], row["W"], row["T"]) == ("2", "32", "64")
    mean = np.mean([float(line.split(",")[1]) for line in positions[1:]])
    assert mean == pytest.approx(float(row["ahead"]), abs=1e-5)
    part("divergence")
    causal = studies.score, lookahead.positions(SimpleNamespace(limit=2),
                                                tmp_path / "runs" / "some-64-causal-2")
    np.testing.assert_allclose(*causal[1], atol=1e-5)


def test_ablation(part, monkeypatch):
    from studies import ablation

    monkeypatch.setattr(ablation, "CHANGES", {k: ablation.CHANGES[k] for k in ("nothing", "2 K")})
    assert len(part("ablation").splitlines()) == 3
    base = ["--seq-len", 512, "--n-clusters", 8]
    assert ablation.flags_of(base, ["--n-clusters", 1 / 4])[-2:] == ["--n-clusters", 2]
    assert ablation.flags_of(base, ["--window", 2])[-2:] == ["--window", 128]


def test_images(part, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", 20)
    monkeypatch.setattr(images, "ROWS", ["paper-local", "paper-4x8"])
    monkeypatch.setattr(train, "show_sample", lambda *_: "")  # 3,072 values of four images
    records = np.random.default_rng(0).integers(0, 10, (20, 3073), np.uint8)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(records.tobytes())
    with pytest.raises(UserError, match="--cifar10"):
        part("images")
    assert len(part("images", "--cifar10", tmp_path, "--windows", 1).splitlines()) == 3


def test_small_rows_of_the_papers_table():
    """Half of the layers and heads of the row, routing in the last layers of both."""
    assert len(images.ROWS) == 18
    assert [images.small_flags(name)[2] for name in ("paper-4x8", "paper-4x8, shifted keys")] == [
        "--no-shift-keys", "--shift-keys"]
    for row in images.ROWS:
        name = row.partition(",")[0]
        full, small = PRESETS["cifar10"][name], common.planned(
            ["cifar10", "--data-dir", "nowhere", *images.small_flags(row)])[0]
        assert (small.n_layers, small.n_heads) == (6, 4)
        big = common.planned(["cifar10", "--data-dir", "nowhere", "--preset", name])[0]
        assert small.kinds() == big.kinds() and (big.n_layers, big.n_heads) == (12, 8)
        if full.get("attention"):
            continue
        heads_of = int(name[6]) if name[6].isdigit() else 4
        layers = int(name.split("x")[-1]) if "x" in name else 8
        for cfg, part_of in ((big, 1), (small, 2)):
            assert [cfg.routing_heads(i) for i in range(cfg.n_layers)] == \
                [0] * ((12 - layers) // part_of) + [heads_of // part_of] * (layers // part_of)


def test_histogram():
    """Two values of equal frequency cost about a bit; one colour's do not count for another."""
    train_values = np.tile(np.array([[0, 7, 9, 1, 7, 9]]), (500, 1))
    bits = images.histogram_bits(train_values, train_values[:3])
    smoothed = [500 / 1256 + 1 / 1256, 1000 / 1256 + 1 / 1256]
    want = (2 * -math.log2(smoothed[1]) + -math.log2(smoothed[0])) / 3
    assert bits == pytest.approx(want)
