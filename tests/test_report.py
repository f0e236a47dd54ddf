"""The page of a run says what the package computes, also where a real browser shows it."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import Browser, chromium
from helpers.models import SMALL, setup

import train
from rt_scratch import model as rt
from rt_scratch import report
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.data.dataset import byte_dataset
from rt_scratch.errors import UserError
from rt_scratch.layers import layer_norm, linear, shift_right
from rt_scratch.run import log
from rt_scratch.run.attention_maps import attention_maps, strongest
from rt_scratch.run.checkpoint import Progress, load_model, save_state
from rt_scratch.run.folder import describe
from rt_scratch.run.samples import keep_sample, read_samples
from rt_scratch.step import new_state

ROOT = Path(__file__).parent.parent
KINDS = {
    "causal": [], "topk": ["--routing", "topk"], "random": ["--routing", "random"],
    "own keys": ["--no-share-qk", "--n-probes", "2"], "shifted": ["--shift-keys"],
    "local": ["--attention", "local"], "full": ["--attention", "full"],
}
TINY = ("--device cpu --seq-len 60 --n-layers 2 --width 16 --ffn-width 8 --window 6 --block 4 "
        "--n-clusters 3 --local-max-distance 3 --routing-max-distance 3 --batch 2 --warmup 2 "
        "--routing causal --no-shift-keys "
        "--eval-windows 3 --log-every 1 --steps 6 --eval-every 3").split()
LINES = "".join(f"line {i}: the <b>quick</b> fox, caf\xe9 {i * i % 97}\n" for i in range(120))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run folder for each kind of head."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text(LINES, encoding="utf-8")
    for kind, flags in KINDS.items():
        train.main([str(root / "text.txt"), "--out", str(root / kind), *TINY, *flags])
    return root


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """An untrained model of pictures with classes, and a picture."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("image")
    cfg = ModelConfig(kind="image", image_size=8, seq_len=192, n_classes=3, n_layers=2, width=16,
                      ffn_width=8, window=8, block=8, n_clusters=4, ffn="relu").validate()
    config = describe("cifar10", str(root / "absent"), byte_dataset("cifar10", {}, ""), cfg,
                      TrainConfig())
    save_state(root / "last.npz", new_state(cfg, TrainConfig(), np), Progress(), config)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    image.fromarray(pixels).save(root / "own.png")
    image.fromarray(pixels).save(root / "sample-7.png")
    return root, pixels


def page(folder, *flags):
    """The data of the page that the command writes."""
    report.main([str(folder), *map(str, flags), "--out", str(folder / "page.html")])
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000
    return json.loads(re.search(r'id="run">(.*?)</script>', text, re.S)[1])


def numbers(text):
    return np.frombuffer(base64.b64decode(text), "<u2").astype(int)


def rows(head, t):
    """Weights (T, T) of a head of the page, and what each row leaves to keys it does not list."""
    n = numbers(head["n"])
    query = np.repeat(np.arange(t), n)
    weights = np.zeros((t, t))
    weights[query, numbers(head["positions"])] = numbers(head["weights"]) / report.UNIT
    assert len(query) == len(numbers(head["weights"]))
    return weights, 1 - weights.sum(1), n


def maps_of(folder, ids, label=None):
    """{(layer, head): (kind, weights (T, T), Route or None, its head in the route)}."""
    loaded, found = load_model(folder, np), {}
    for layer, maps in enumerate(attention_maps(loaded.state.params, loaded.state.centroids,
                                                loaded.model, ids, label)):
        for m in maps:
            for h, weights in enumerate(m.columns(0, ids.shape[1])):
                found[layer, m.group.heads.start + h] = (
                    m.name, weights, m.routed and m.routed.route, h)
    return found


def first_window(model):
    valid = LINES.encode()[len(LINES.encode()) * 9 // 10:]
    return np.frombuffer(valid[: model.seq_len], np.uint8).astype(int)[None]


# ------------------------------------------------------------------------------------ the weights

@pytest.mark.parametrize("options", [
    {}, {"routing": "topk"}, {"routing": "random"}, {"attention": "local"}, {"attention": "full"},
    {"share_qk": False}, {"shift_keys": True}, {"routing": "topk", "share_qk": False},
    {"norm": "post"}, {"routing_layers": (1,)},
    {"kind": "image", "image_size": 3, "seq_len": 27, "n_classes": 2, "vocab_size": 256}])
def test_maps_are_those_of_the_forward_pass(options):
    """Weights times values, and the output matrix, is what the model's own attention returns."""
    m = setup(dataclasses.replace(SMALL, **options).validate(), batch=1)
    params, cfg = m.params, m.cfg
    for p in params["layers"].values():
        for name in p["attention"]:
            if name.endswith("rel_v"):
                p["attention"][name][:] = 0  # what they add is no weight of a value
    x, _ = rt.embed(params, cfg, shift_right(m.ids), 0, m.labels)
    for layer, maps in enumerate(attention_maps(params, m.centroids, cfg, m.ids, m.labels)):
        p, mu = params["layers"][layer], rt.mu_of(m.centroids, layer)
        n = layer_norm(x, **p["norm_attention"])[0] if cfg.norm == "pre" else x
        want, _, _ = rt.attention(n, p["attention"], cfg, layer, mu)
        v = rt.project(n, p["attention"], cfg)[0][2][0]                  # (H, T, D)
        weights = np.concatenate([np.append(found.columns(0, 10), found.columns(10, cfg.seq_len),
                                            -1) for found in maps])
        assert [found.name for found in maps] == [kind for kind, _ in cfg.layer_heads(layer)]
        assert (weights >= 0).all() and (np.triu(weights, 1) == 0).all()
        o = (weights @ v).swapaxes(0, 1).reshape(1, cfg.seq_len, -1)
        np.testing.assert_allclose(linear(o, p["attention"]["w_o"])[0], want, atol=1e-12)
        x, _, _ = rt.block(x, p, cfg, layer, mu)


@pytest.mark.parametrize("n", [1, 3, 8, 40])
def test_strongest(n, monkeypatch):
    """By sorting whole rows, whatever the keys are cut into."""
    monkeypatch.setattr("rt_scratch.run.attention_maps.CHUNK", 7)
    m = setup(dataclasses.replace(SMALL, routing="topk", window=8), batch=1)
    for found in next(attention_maps(m.params, m.centroids, m.cfg, m.ids)):
        positions, weights, seen, total = strongest(found, n)
        dense = found.columns(0, m.cfg.seq_len)
        np.testing.assert_array_equal(seen, (dense > 0).sum(-1))
        np.testing.assert_allclose(total, dense.sum(-1), atol=1e-15)
        for at in np.ndindex(dense.shape[:2]):
            kept = positions[at] >= 0
            assert kept.sum() == min(n, seen[at]) and (np.diff(positions[at][kept]) > 0).all()
            np.testing.assert_array_equal(weights[at][kept], dense[at][positions[at][kept]])
            assert (weights[at][~kept] == 0).all()
            np.testing.assert_allclose(np.sort(weights[at][kept]),
                                       np.sort(dense[at][dense[at] > 0])[-n:])


# ----------------------------------------------------------------------------------- the explorer

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_head(runs, kind):
    """Weights to half a unit (one entry of a row takes what rounding leaves), sums, clusters."""
    shown = page(runs / kind)["window"]
    cfg = load_model(runs / kind, np).model
    ids = first_window(cfg)
    assert shown["source"].startswith("window 0 of the ")
    assert shown["labels"][0] == "start" and len(shown["labels"]) == 61
    assert "".join(shown["labels"][1:]).startswith("".join(map(chr, ids[0, :15])))
    want = maps_of(runs / kind, ids)
    assert [(h["layer"], h["head"]) for h in shown["heads"]] == list(want)
    for head in shown["heads"]:
        name, weights, route, h = want[head["layer"], head["head"]]
        total = weights.sum(1, keepdims=True)
        share = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        got, left, n = rows(head, 60)
        assert head["kind"] == name
        np.testing.assert_allclose(left[n > 0], 0, atol=1e-12)
        np.testing.assert_array_equal(n, (weights > 0).sum(1))
        np.testing.assert_array_equal(numbers(head["seen"]), n)
        assert np.abs(got - share).max() < 61 / 2 / report.UNIT
        assert (np.abs(got - share) > .51 / report.UNIT).sum(1).max() <= 1
        if route is None:
            assert "winner" not in head and (n > 0).all()
            continue
        assert head["apart"] == (kind in ("own keys", "shifted"))
        np.testing.assert_array_equal(numbers(head["winner"]), route.winner[0, h])
        if kind == "topk":
            members = numbers(head["members"]).reshape(head["clusters"], -1)
            np.testing.assert_array_equal(members, route.members[0, h])
            assert set(np.flatnonzero(n)) == set(members.flat)
    health = {(h["layer"], h["head"]): h for h in shown["health"]}
    assert set(health) == {at for at, (_, _, route, _) in want.items() if route is not None}
    for at, told in health.items():
        _, weights, route, h = want[at]
        shares = [np.mean(route.winner[0, h] == c) for c in range(3)]
        np.testing.assert_allclose(told["shares"], shares, atol=1e-4)
        assert told["largest"] == max(told["shares"]) and told["dead"] == shares.count(0)
        if kind == "topk":
            times = [(route.members[0, h] == t).any(-1).sum() for t in range(60)]
            assert told["uncovered"] == pytest.approx(times.count(0) / 60)
            assert told["several"] == pytest.approx(np.mean(np.array(times) > 1))


def test_pictures(image_run):
    folder, pixels = image_run
    told = page(folder, "--image", folder / "own.png", "--label", "2")
    shown = told["window"]
    assert shown["values"] == pixels.reshape(-1).tolist() and shown["size"] == 8
    want = maps_of(folder, pixels.reshape(1, -1).astype(int), np.array([2]))
    for head in shown["heads"]:
        got, left, _ = rows(head, 192)
        np.testing.assert_allclose(got, want[head["layer"], head["head"]][1], atol=1e-3)
        np.testing.assert_allclose(left, 0, atol=1e-12)
    assert [s["step"] for s in told["samples"]] == [7]
    assert base64.b64decode(told["samples"][0]["png"]) == (folder / "sample-7.png").read_bytes()
    other = page(folder, "--image", folder / "own.png")["window"]["heads"]
    assert other != shown["heads"]  # the class is told to the model


def test_a_validation_picture(tmp_path):
    """CIFAR-10's own format and size: picture 1 of its validation split."""
    pytest.importorskip("PIL.Image")
    records = np.frombuffer(np.random.default_rng(1).bytes(10_000 * 3073), np.uint8).reshape(
        10_000, 3073).copy()
    records[:, 0] %= 10
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records.tofile(tmp_path / name)
    cfg = ModelConfig(kind="image", image_size=32, seq_len=3072, n_layers=1, width=8, ffn_width=4,
                      window=96, block=96, n_clusters=32, ffn="relu").validate()
    run = tmp_path / "run"
    run.mkdir()
    config = describe("cifar10", str(tmp_path), byte_dataset("cifar10", {}, ""), cfg, TrainConfig())
    save_state(run / "last.npz", new_state(cfg, TrainConfig(), np), Progress(), config)
    shown = page(run, "--window", "1")["window"]
    values = np.array(shown["values"]).reshape(1024, 3).T.reshape(3072)
    assert (records[:, 1:] == values).all(1).sum() == 1 and len(shown["heads"]) == 4
    assert shown["source"] == "picture 1 of the 1,000 of the validation split"
    for head in shown["heads"]:  # cut to what fits
        n, units = numbers(head["n"]), numbers(head["weights"])
        assert n.max() < numbers(head["seen"]).max() and n.min() == 1
        sums = np.add.reduceat(units, np.append(0, np.cumsum(n)[:-1]))
        assert (sums <= report.UNIT).all() and (sums[n == numbers(head["seen"])] == report.UNIT
                                                ).all()


def test_what_does_not_fit_is_added_up(runs, monkeypatch):
    """Fewer weights of a row, the largest ones; then fewer layers; then a line."""
    whole = page(runs / "full")["window"]
    monkeypatch.setattr(report, "LIMIT", len((runs / "full" / "page.html").read_bytes()))
    small = page(runs / "full")["window"]
    assert small["layers"] == whole["layers"] == [0, 1]
    kept = numbers(small["heads"][0]["n"]).max()
    assert report.FEWEST <= kept < 60
    for a, b in zip(whole["heads"], small["heads"], strict=True):
        (every, _, seen), (_, left, n) = rows(a, 60), rows(b, 60)
        np.testing.assert_array_equal(numbers(b["seen"]), seen)
        np.testing.assert_array_equal(n, np.minimum(seen, kept))
        cut = seen > n
        assert cut.any() and (left[cut] >= 0).all() and np.abs(left[~cut]).max() < 1e-12
        np.testing.assert_allclose(left, 1 - np.sort(every)[:, -kept:].sum(1), atol=1e-3)


def test_plan():
    """Fewer weights, fewer layers, fewer heads, in that order; what is asked for is never left out.
    """
    cfg = ModelConfig(n_layers=8, width=64, n_local_heads=2, n_routing_heads=2)
    row = 100 * (32 / 3 + 8 * 16 / 3) + 1  # bytes of a head of 100 tokens with 8 weights
    assert report.plan(cfg, 100, None, 10 ** 9) == ([*range(8)], 4, 256)
    assert report.plan(cfg, 100, None, 32 * row) == ([*range(8)], 4, 8)
    assert report.plan(cfg, 100, None, 31 * row) == ([0, 1, 2, 4, 5, 6, 7], 4, 9)
    assert report.plan(cfg, 100, None, 12 * row)[:2] == ([0, 4, 7], 4)
    assert report.plan(cfg, 100, None, 11 * row)[:2] == ([0, 2, 4, 5, 7], 1)
    assert report.plan(cfg, 100, None, 5 * row)[:2] == ([0], 4)
    assert report.plan(cfg, 100, None, 2 * row)[:2] == ([0], 1)
    assert report.plan(cfg, 100, (-1, 2), 5 * row)[:2] == ([2, 7], 1)
    for layers, room in ((None, 1.9 * row), ((1, 2), 3.9 * row)):
        with pytest.raises(UserError, match="layers of 100 tokens do not fit"):
            report.plan(cfg, 100, layers, room)
    for t, heads, n in ((12288, 16, 24), (8192, 8, 22), (4096, 16, 14)):  # released sizes
        cfg = ModelConfig(n_layers=n, width=16 * heads, n_local_heads=heads // 2,
                          n_routing_heads=heads // 2, seq_len=t)
        assert len(report.plan(cfg, t, None, 4_800_000)[0]) >= 3


def test_layers_are_chosen(runs):
    assert page(runs / "causal", "--layers=-1")["window"]["layers"] == [1]
    assert {h["layer"] for h in page(runs / "causal", "--layers=-1")["window"]["heads"]} == {1}


def test_own_text(runs, tmp_path):
    """--prompt, cut to the window of the model; bytes that are no text are shown as such."""
    shown = page(runs / "causal", "--prompt", "ab\n<c")["window"]
    assert shown["labels"] == ["start", "a", "b", "\n", "<", "c"]
    assert shown["source"] == "a text of your own"
    (tmp_path / "long.txt").write_bytes(b"\xff" + b"x" * 99)
    shown = page(runs / "causal", "--prompt-file", tmp_path / "long.txt")["window"]
    assert shown["labels"][1] == "\\xff" and len(shown["labels"]) == 61
    assert shown["source"].endswith("its first 60 of 100 tokens")


# ---------------------------------------------------------------------------------- curves, samples

def test_curves_and_samples_of_a_run(runs):
    told = page(runs / "causal")
    found, written = told["log"], log.read_log(runs / "causal")
    train_rows = [r for r in written if r["split"] == "train"]
    assert found["steps"] == [1, 2, 3, 4, 5, 6] and found["valid_steps"] == [3, 6]
    for name in ("nats", "score", "lr", "grad_norm", "largest", "dead"):
        assert found[name] == [float(r[name]) for r in train_rows]
    assert found["smooth_nats"] == pytest.approx(found["nats"])  # too few to smooth
    assert [(h["layer"], h["head"]) for h in found["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for i in range(6):  # the parts are those of the whole
        assert max(h["largest"][i] for h in found["heads"]) == pytest.approx(
            found["largest"][i], abs=1e-4)
        assert sum(h["dead"][i] for h in found["heads"]) == found["dead"][i]
    assert [s["step"] for s in told["samples"]] == [3, 6]
    assert all(len(s["text"]) > 20 for s in told["samples"])
    facts = dict(told["facts"])
    assert "routing causal" in facts["model"] and "bits/byte" in facts["best validation score"]
    assert "window of 60" in facts["protocol"] and "warning" not in facts
    assert "leaks" in dict(page(runs / "topk")["facts"])["warning"]
    settings = {row[0]: row[1] for table in told["tables"] for row in table["rows"]}
    assert settings["seq-len"] == "60" and float(settings["lr"]) == TrainConfig().lr
    assert page(runs / "local")["log"]["heads"] == []


def test_smooth_by_hand():
    assert report.smooth([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3, 11 / 3, 4.5])
    assert report.smooth([], 1) == []


def test_a_long_log_is_thinned_and_numbers_that_are_none_are_gaps(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.npz").write_bytes((runs / "causal" / "last.npz").read_bytes())
    row = dict.fromkeys(log.COLUMNS, 1) | {"unit": "ppl/token", "split": "train"}
    for step in range(1001):
        log.append_log(folder, row | {"step": step, "score": "inf" if step == 0 else step,
                                      "largest": "", "grad_norm": "nan"})
    found = page(folder, "--prompt", "some text")["log"]
    assert len(found["steps"]) == 334 and found["steps"][1] == 3 and found["score"][:2] == [None, 3]
    assert set(found["largest"]) == set(found["grad_norm"]) == {None} and found["heads"] == []


def test_clusters_of_a_run_that_went_back(tmp_path):
    """The last line of a step counts, a line that was cut off does not."""
    (tmp_path / "clusters.csv").write_text(
        "step,layer,head,largest,dead\n1,0,1,0.5,2\n2,0,1,0.9,1\n1,0,1,0.25,3\n2,0,1\n")
    assert log.read_clusters(tmp_path) == {(0, 1): {1: (0.25, 3), 2: (0.9, 1)}}


def test_samples_survive_whatever_they_say(runs, tmp_path):
    texts = {1: "--- step 9, 3 characters\nabc", 2: "</script><script>alert(1)</script>\r\n\u2028",
             3: "", 5: "old"}
    for step, text in texts.items():
        keep_sample(tmp_path, step, text)
    keep_sample(tmp_path, 5, "new\n")
    assert read_samples(tmp_path) == texts | {5: "new\n"}
    for name in ("last.npz", "best.npz"):
        (tmp_path / name).write_bytes((runs / "causal" / name).read_bytes())
    shown = page(tmp_path, "--prompt", "</script><!--")
    assert [s["text"] for s in shown["samples"]] == list((texts | {5: "new\n"}).values())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<!--" not in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)|url\(|@import|fetch\(""", text)


# ---------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, line", [
    (["--window", "999"], "--window 999: the validation split has 0 to"),
    (["--window", "-1"], "--window -1: must not be negative"),
    (["--layers", "2"], "--layers 2: the layers are 0 to 1"),
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", "x"], "fewer than 2 tokens"),
    (["--prompt", "xy", "--window", "1"], "--window: not used with --prompt"),
    (["--prompt", "xy", "--prompt-file", "a"], "give one of them"),
    (["--prompt-file", "missing"], "missing: no such file"),
    (["--image", "tests/conftest.py"], "--image: this run is text"),
    (["--label", "1"], "--label: this run is text"),
    (["--layers", "x"], "--layers"),
    (["--out", "missing/page.html"], "missing"),
])
def test_mistakes(runs, flags, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, OSError)) as error:
        report.main([str(runs / "causal"), *flags])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_mistakes_with_pictures(image_run, tmp_path):
    folder, _ = image_run
    for flags, line in ((["--prompt", "x"], "--prompt: this run is images"),
                        ([], "explore your own with --image FILE"),
                        (["--image", str(ROOT / "train.py")], "not an image"),
                        (["--label", "1"], "--label: needs --image"),
                        (["--image", str(folder / "own.png"), "--label", "3"],
                         "the classes are 0 to 2")):
        with pytest.raises(UserError, match=re.escape(line)):
            report.main([str(folder), *flags])


def test_a_text_that_is_gone(runs, tmp_path):
    """One line that says what to do, from the command line."""
    for name in ("last.npz", "best.npz"):
        (tmp_path / name).write_bytes((runs / "causal" / name).read_bytes())
    (runs / "text.txt").rename(runs / "moved.txt")
    try:
        result = subprocess.run([sys.executable, "-m", "rt_scratch.report", str(tmp_path)],
                                cwd=ROOT, capture_output=True, text=True)
        assert page(tmp_path, "--prompt", "abc")["window"]["labels"] == ["start", *"abc"]
    finally:
        (runs / "moved.txt").rename(runs / "text.txt")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ") and "--prompt TEXT" in result.stderr


# --------------------------------------------------------------------------------- a real browser

needs_chromium = pytest.mark.skipif(chromium() is None, reason="no chromium with chromedriver here")
LISTED = """return [...document.querySelectorAll("#head-%s tbody tr")].map(
    tr => [tr.dataset.position, Number(tr.children[2].textContent)])"""
SELECTED = "return cells.findIndex(c => c.classList.contains('selected'))"
WIDTHS = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
LEFT, RIGHT, UP, DOWN, HOME, END = "\ue012\ue014\ue013\ue015\ue011\ue010"


def check_listed(browser, name, weights, t):
    """The list of a head: its numbers are the package's and add up to 1."""
    listed = dict(browser.run(LISTED % name))
    row, total = weights[t], weights[t].sum()
    if total == 0:
        assert listed == {} and "in no cluster" in browser.run(
            f"return document.getElementById('head-{name}').textContent")
        return
    assert sum(listed.values()) == pytest.approx(1, abs=.0005 * (len(listed) + 1))
    assert browser.run(f"return document.querySelector('#head-{name} .sum').textContent"
                       ) == "sum1.000"
    more = listed.pop("more", 0)
    for key, weight in listed.items():
        assert weight == pytest.approx(row[int(key)] / total, abs=.00053)
    assert set(map(int, listed)) >= set(np.flatnonzero(row / total > .00052))
    assert more == pytest.approx(1 - sum(row[int(k)] for k in listed) / total, abs=.00055)


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
def test_browser(runs, kind, tmp_path):
    """A phone: it opens without a complaint, a tap selects, keys move, the numbers are right."""
    page(runs / kind)
    model = load_model(runs / kind, np).model
    want = {at: found[1] for at, found in maps_of(runs / kind, first_window(model)).items()}
    routes = kind not in ("local", "full")
    first, second = (2, 0) if routes else (0, 1)
    with Browser(tmp_path, 400, 800) as browser:
        browser.open(runs / kind / "page.html")
        scroll, client = browser.run(WIDTHS)
        assert scroll <= client
        browser.run("page('controls').scrollIntoView()")
        browser.click(".token:nth-of-type(31)")
        assert browser.run(SELECTED) == 30
        for name, head in (("a", first), ("b", second)):
            check_listed(browser, name, want[0, head], 30)
        for key, t in ((LEFT, 29), (RIGHT, 30), (HOME, 0), (END, 59), (RIGHT, 59)):
            browser.press(key)
            assert browser.run(SELECTED) == t
        check_listed(browser, "b", want[0, second], 59)
        browser.press(UP)
        assert browser.run(SELECTED) < 59
        browser.press(DOWN)
        assert browser.run("return document.activeElement === cells[state.t]")
        browser.run("pick.layer.value = '1'; pick.layer.onchange()")
        browser.run(f"pick.b.value = '{first + 1 - (not routes)}'; pick.b.onchange()")
        for t in range(0, 60, 7):
            browser.run(f"cells[{t}].focus()")
            check_listed(browser, "a", want[1, first], t)
            check_listed(browser, "b", want[1, first + 1 - (not routes)], t)
        if routes:  # numbers, not colours alone
            browser.run("pick.b.value = '1'; pick.b.onchange()")
            route = maps_of(runs / kind, first_window(model))[1, 1][2]
            assert browser.run("return cells.map(c => Number(c.lastChild.textContent))") == \
                route.winner[0, 1].tolist()
        assert browser.run("return document.querySelectorAll('#curve-charts svg path').length") > 5
        browser.emulate(prefers_color_scheme="dark")
        paper, ink = browser.run("const s = getComputedStyle(document.body);"
                                 "return [s.backgroundColor, s.color]")
        assert sum(map(int, re.findall(r"\d+", paper))) < 150 < 600 < sum(
            map(int, re.findall(r"\d+", ink)))
        assert browser.console() == []


@needs_chromium
def test_browser_with_a_picture(image_run, tmp_path):
    folder, pixels = image_run
    page(folder, "--image", folder / "own.png", "--label", "2")
    found = maps_of(folder, pixels.reshape(1, -1).astype(int), np.array([2]))
    with Browser(tmp_path, 1200, 900) as browser:
        browser.open(folder / "page.html")
        browser.click(".pixel:nth-of-type(20)")  # 19: the fourth in the third row
        assert browser.run(SELECTED) == 19 and browser.run("return state.t") == 58
        for name, head in (("a", 2), ("b", 0)):
            check_listed(browser, name, found[0, head][1], 58)
        browser.press(DOWN)
        browser.press(LEFT)
        assert browser.run(SELECTED) == 26
        browser.run("pick.channel.value = '2'; pick.channel.onchange()")
        assert browser.run("return state.t") == 3 * 26 + 3
        check_listed(browser, "b", found[0, 0][1], 81)
        assert browser.run("return clusterCells.slice(0, 63).map(c => Number(c.textContent))") == \
            found[0, 0][2].winner[0, 0][3::3].tolist()
        browser.press(END)
        assert "read by nothing" in browser.run("return page('told').textContent")
        assert browser.console() == []
