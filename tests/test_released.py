"""The authors' checkpoint -> a run folder: what shapes tell, what is refused, golden logits.

The tests that read a checkpoint need TensorFlow (pip install -e '.[released]'), and are run with it
in continuous integration; the others need none.
"""

import functools
import json
import shutil
import sys
import threading
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from rt_scratch import data, model, released
from rt_scratch.config import ModelConfig
from rt_scratch.data.batches import training_batch
from rt_scratch.data.dataset import words_scored
from rt_scratch.data.released_subwords import read_vocabulary
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint, log
from rt_scratch.run.evaluate import evaluate
from rt_scratch.run.samples import Text
from rt_scratch.tf_checkpoint import Checkpoint

GOLDEN = Path(__file__).parent / "golden"
E1 = GOLDEN / "E1_checkpoint"
NAME = "ckpt-3530000"
HPARAMS = json.loads((E1 / "hparams.json").read_text())
CONFIG = ModelConfig(
    vocab_size=80, seq_len=8192, pad_id=0, n_layers=2, width=32, ffn_width=48, n_local_heads=2,
    n_routing_heads=2, routing="topk", n_clusters=4, window=16, block=16, lookback=1,
    local_max_distance=17, routing_max_distance=17, centroid_decay=0.9, norm="post", init_gain=0.2)


def golden(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {k.removeprefix("w/"): file[k] for k in file.files if k.startswith("w/")}


def made(config):
    """Zeros under the released names and in the released shapes of a configuration."""
    return {name: np.zeros(shape, "float32")
            for name, shape in released.released_shapes(config).items()}


# ---------------------------------------------------------------------------- the configuration

@pytest.mark.parametrize("case, change, hparams", [
    ("E1", {}, {}),
    ("E2", {"norm": "pre"}, {"layer_preprocess_sequence": "n", "layer_postprocess_sequence": "da"}),
    ("E1", {"seq_len": 64}, {"max_length": 128, "max_target_length": 64}),
    ("E1", {"share_qk": False, "timing_signal": True, "lookback": 2, "window": 8, "block": 8,
            "residual_dropout": 0.1},
     {"share_qk": False, "add_timing_signal": True, "memory_flange": [16], "query_shape": [8],
      "sparsity_cluster_attention_window": 8, "layer_prepostprocess_dropout": 0.1})])
def test_golden_configurations(case, change, hparams):
    found, _ = released.model_config(golden(case), HPARAMS | hparams)
    assert found == replace(CONFIG, **change)


def test_without_hyperparameters():
    found, notes = released.model_config(golden("E1"))
    assert found == replace(CONFIG, window=512, block=256, residual_dropout=0.1,
                            centroid_decay=0.999)
    assert notes[0].startswith("from the shapes: vocab_size 80, n_layers 2, width 32, ")
    assert "told by neither" in notes[-1] and "block 256" in notes[-1]


@given(st.data())
def test_shapes_tell_the_configuration(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    n_layers, n_local, n_routing = draw(1, 4), draw(0, 3), draw(0, 3)
    n_local += n_local + n_routing == 0
    some = data.draw(st.sets(st.integers(0, n_layers - 1)))
    routed = tuple(sorted(some)) if n_routing and 0 < len(some) < n_layers else ()
    width = draw(2, 5) * (n_local + n_routing)
    has_local = n_local > 0 or routed
    config = ModelConfig(
        vocab_size=draw(2, 9), pad_id=0, n_layers=n_layers, width=width,
        embed_width=data.draw(st.sampled_from([0, width + 1])), ffn=data.draw(
            st.sampled_from(["geglu", "relu"])), ffn_width=draw(1, 9),
        norm=data.draw(st.sampled_from(["pre", "post"])), n_local_heads=n_local,
        n_routing_heads=n_routing, routing_layers=routed, routing="topk",
        n_clusters=draw(1, 5) if n_routing else 8, init_gain=0.2, residual_dropout=0.1,
        seq_len=8192, window=512, block=256, share_qk=data.draw(st.booleans()),
        local_max_distance=draw(0, 4) if has_local else 0,
        routing_max_distance=draw(0, 4) if n_routing else 0)
    found, _ = released.model_config(made(config), {"share_qk": config.share_qk})
    assert found == config
    params, state = released.convert(made(found), found)
    assert set(state) == {i for i in range(n_layers) if config.routing_heads(i)}
    assert params["embed"]["table"].shape == (config.vocab_size, config.token_width)


def test_a_model_without_moving_averages():
    variables = {name: value for name, value in golden("E1").items() if "/ema_" not in name}
    _, state = released.convert(variables, CONFIG)
    np.testing.assert_array_equal(state[0].total, state[0].mu)
    assert (state[0].count == 1).all()


@pytest.mark.parametrize("hparams, message", [
    ({"hidden_size": 64, "filter_size": 9}, "hidden_size 64, not 32; filter_size 9, not 48$"),
    ({"sparsity_skip_first": 1}, "sparsity_skip_first 1, not 0"),
    ({"hash_items": True}, "hash_items True, not False"),
    ({"norm_epsilon": 1e-5}, "norm_epsilon 1e-05, not 1e-06"),
    ({"layer_postprocess_sequence": "dna"}, "LayerNorm none before and na after each sublayer"),
    ({"layer_preprocess_sequence": "n"}, "LayerNorm n before and an after"),
    ({"memory_flange": [24]}, "must be a multiple"),
    ({"query_shape": [4, 4]}, r"query_shape is \[4, 4\], where one whole number is needed"),
    ({"query_shape": [4.5]}, "query_shape is 4.5, where one whole number is needed"),
    ({"decay": "much"}, "decay is 'much', where one number is needed"),
    ({"beta": float("nan")}, "beta is nan"),
    ({"share_qk": 2}, "share_qk is 2, where true or false is needed"),
    ({"sparsity_cluster_attention_window": 10 ** 9}, "--window 1000000000: larger than"),
])
def test_hyperparameters_of_another_model(hparams, message):
    with pytest.raises(UserError, match=message):
        released.model_config(golden("E1"), HPARAMS | hparams)


@pytest.mark.parametrize("gone, message", [
    ("embeddings/embedding", "no variable embeddings/embedding"),
    ("decoder_layer_", "its layers are none"),
    ("decoder_layer_0", "its layers are 1, not 0, 1"),
    ("attention_nd/dense/kernel", "no variable self_attention/attention_nd/dense/kernel"),
    ("conv1", "no variable ffn/conv1/kernel")])
def test_variables_of_another_model(gone, message):
    config = replace(CONFIG, ffn="relu")
    variables = {name: value for name, value in made(config).items() if gone not in name}
    with pytest.raises(UserError, match=message):
        released.model_config(variables)


@pytest.mark.parametrize("scope", ["sparse_transformer/body/", "my/own/model/", "x/", ""])
def test_any_scope(scope):
    own = golden("E1")
    beside = {"global_step": np.zeros((), "int64"), "losses_avg/problem_0/total_loss": np.zeros(()),
              "beta1_power": np.zeros(())}
    for name in own:
        beside |= {f"training/{scope}{name}/Adafactor": np.zeros(3),
                   f"{scope}{name}/Adam_1": np.zeros(3)}
    found = released.own_variables({scope + name: v for name, v in own.items()} | beside)
    assert found.scope == scope
    assert found.variables == own
    assert sorted(found.left_out) == sorted(beside)


def test_all_names_without_a_counterpart():
    variables = {f"a/{name}": v for name, v in golden("E1").items()}
    variables |= {"a/decoder_layer_0/extra": np.zeros(()), "b/other": np.zeros(3)}
    del variables["a/emb_dense/bias"], variables["a/final_dense_2/bias"]
    found = released.own_variables(variables)
    with pytest.raises(UserError, match="lack emb_dense/bias, final_dense_2/bias; the model has no "
                                        "place for decoder_layer_0/extra, b/other$"):
        released.convert(found.variables, CONFIG)


@pytest.mark.parametrize("names", [[], ["w"], ["a/embeddings/embedding", "b/embeddings/embedding"]])
def test_not_one_model(names):
    with pytest.raises(UserError, match="end in embeddings/embedding, one is needed"):
        released.own_variables({name: np.zeros((2, 2)) for name in names})


# -------------------------------------------------------------------------- what is done with it

VOCABULARY = GOLDEN / "T_subwords.subwords"
SMALL = ModelConfig(
    vocab_size=1988, seq_len=64, pad_id=0, n_layers=2, width=16, ffn_width=24, n_local_heads=1,
    n_routing_heads=1, routing_layers=(1,), routing="topk", n_clusters=4, window=16, block=16,
    local_max_distance=5, routing_max_distance=5, norm="post")


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """The run folder of a small random model whose checkpoint comes from memory."""
    rng = np.random.default_rng(0)
    variables = {f"m/{name}": (0.1 * rng.standard_normal(shape) + name.endswith(
        ("scale", "ema_count"))).astype("float32")
        for name, shape in released.released_shapes(SMALL).items()}
    hparams = tmp_path / "hparams.json"
    hparams.write_text(json.dumps({
        "max_target_length": 64, "sparsity_cluster_attention_window": 16, "query_shape": [16],
        "memory_flange": [16]}))
    source = Checkpoint(tmp_path / "ckpt-9", variables, hparams, [hparams])
    monkeypatch.setattr(released, "opened", lambda path, scratch: nullcontext(source))
    monkeypatch.chdir(tmp_path)
    released.main([str(source.path), "--vocab", str(VOCABULARY), "--out", "run"])
    return Path("run")


@pytest.fixture
def books(tmp_path):
    """PG-19 in its layout, but for train, which scoring does not need."""
    text = "The whole of it,\r\n  line by line.\r\n\r\nNo more_than that: 12 times\n"
    for name, n in (("test", 20), ("validation", 10)):
        (tmp_path / "books" / name).mkdir(parents=True)
        for book in (3, 20):
            (tmp_path / "books" / name / f"{book}.txt").write_text(f"Book {book}\n" + n * text)
    return tmp_path / "books"


def test_packed_books(books):
    codec = data.open_codec("tensor2tensor", VOCABULARY)
    dataset = data.load("pg19", books, 1988, codec, 64)
    subwords = read_vocabulary(VOCABULARY)
    paths = [books / "test" / "3.txt", books / "test" / "20.txt"]
    lines = [line for path in paths for line in path.read_bytes().decode().split("\n")]
    rows = dataset.splits["test"].reshape(-1, 64)
    sequences, words = zip(*subwords.sequences(lines, 64), strict=True)
    for row, ids in zip(rows, sequences, strict=True):
        assert row.tolist() == ids + [0] * (64 - len(ids))
    assert dataset.counted["test"] == sum(map(len, sequences)) < rows.size
    trained = training_batch(dataset._replace(splits={"train": rows.ravel()}), 64, 50, 0, 0, 0)[0]
    assert {tuple(row) for row in trained.tolist()} <= {tuple(row) for row in rows.tolist()}
    assert dataset.units["test"] == 2 * (2 + 20 * 12)
    assert data.score(dataset.counted["test"], dataset.counted["test"], dataset, "test") == (
        pytest.approx(np.exp(dataset.counted["test"] / dataset.units["test"])))
    weights = np.array([np.arange(64) < len(ids) for ids in sequences])
    for take in (slice(0, 1), slice(3, 6), slice(None)):  # words of whole sequences: exact
        index = np.arange(len(sequences))[take]
        assert words_scored(dataset, "test", weights[take], index, 64) == sum(words[take])
    cuts = [0, 10, 64, 100, 127, 300, rows.size]  # elsewhere each word once
    assert sum(dataset.words("test", a, b) for a, b in pairwise(cuts)) == sum(words)
    assert 0 < dataset.words("test", 64, 74) < words[1]
    with pytest.raises(UserError, match="no books ID.txt in train/"):
        dataset.splits["train"]
    assert "valid 2 of 50 books" in dataset.protocol and "train 0 of" in dataset.protocol
    assert data.load("pg19", books, 1988, codec, 64).protocol == dataset.protocol
    before = paths[0].read_bytes()
    paths[0].write_bytes(before.replace(b"12", b"13", 1))  # other tokens, as many
    assert data.load("pg19", books, 1988, codec, 64).protocol != dataset.protocol
    paths[0].write_bytes(before)
    assert data.load("pg19", books, 1988, codec, 64).protocol == dataset.protocol
    with pytest.raises(UserError, match="has 1988 token values, not 98304"):
        data.load("pg19", books, 98304, codec, 64)
    for name in ("enwik8", str(VOCABULARY)):
        with pytest.raises(UserError, match="cannot be prepared in the subwords of"):
            data.load(name, None, 1988, codec, 64)


def test_scored_sampled_trained(converted, books, capsys):
    """Scoring needs no train split and counts no padding; training goes on and is resumed."""
    score = ["--out", str(converted), "--data-dir", str(books), "--evaluate", "test"]
    train.main([*score, "--evaluate-causally", "--eval-windows", "3"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    codec = data.saved_codec(json.loads((converted / "config.json").read_text()), converted)
    dataset = data.load("pg19", books, 1988, codec, 64)
    per_word = f"{dataset.counted['test'] / dataset.units['test']:.3f} per word"
    for line, seen in zip(lines, ("LEAKS THE FUTURE", "nothing seen ahead"), strict=True):
        assert "subwords of T_subwords.subwords" in line and per_word in line and seen in line
    loaded = checkpoint.load_model(converted, np)
    whole = evaluate(loaded.state, dataset, loaded.model, "test", 2)
    logits = model.logits(loaded.state.params, loaded.state.centroids, loaded.model,
                          (ids := dataset.splits["test"].reshape(-1, 64).astype(np.int64)))
    z = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(z, ids[..., None], -1)[..., 0][ids != 0]
    assert whole.nats == pytest.approx(nats.mean(), rel=1e-5)
    assert f"{nats.size} subwords" in whole.line

    sample.main([str(converted), "--prompt", "The  whole of\n it", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("The  whole of it")
    with pytest.raises(UserError, match="no books ID.txt in train/"):
        train.main(["--out", str(converted), "--data-dir", str(books), "--resume"])
    (books / "test").rename(books / "train")
    resume = ["--out", str(converted), "--data-dir", str(books), "--resume", "--steps"]
    train.main([*resume, "2"])
    train.main([*resume, "3"])
    config = json.loads((converted / "config.json").read_text())
    assert config["codec_file"] == VOCABULARY.name
    assert list(config["released"]["sha256"]) == [VOCABULARY.name, "hparams.json"]
    assert checkpoint.load_model(converted, np, "last.npz").state.step == 3
    assert {"train", "valid"} == {row["split"] for row in log.read_log(converted)}


def test_text_grows_as_it_is_read():
    """Shown piece by piece, also over escapes, joins and the end, it is the text of all ids."""
    codec = data.open_codec("tensor2tensor", VOCABULARY)
    text = "two words, café_\u4e2d \\x 9"
    ids = read_vocabulary(VOCABULARY).encode_line(text)
    for cut in range(len(ids)):
        grown = Text(codec, prompt=ids[:cut])
        shown = "".join(grown.add(np.array([i])) for i in ids[cut:])
        assert codec.decode(ids[:cut]).decode() + shown == text
        assert not grown.stopped
    grown.add(np.array([1]))
    assert grown.stopped and grown.add(np.array(ids)) == ""


# -------------------------------------------------------------- with TensorFlow: the golden case

@pytest.fixture
def vocabulary(tmp_path):
    """As many subwords as the golden model has ids."""
    letters = [*"\\_u;0123456789", *map(chr, range(0x4e00, 0x4e00 + 64))]
    path = tmp_path / "vocab.subwords"
    path.write_text("".join(f"'{s}'\n" for s in ["<pad>_", "<EOS>_", *letters]), "utf-8")
    return path


@pytest.fixture
def copied(tmp_path):
    """A copy of the golden checkpoint that a test may break."""
    pytest.importorskip("tensorflow")
    return Path(shutil.copytree(E1, tmp_path / "copy"))


def zipped(copied):
    path = copied.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for file in copied.iterdir():
            z.write(file, f"rt-checkpoint/{file.name}")
    return path


@pytest.mark.parametrize("given", ["folder", "path", "index", "folder above", "zip"])
def test_golden_logits(given, copied, vocabulary, capsys):
    place = {"folder": copied, "path": copied / NAME, "index": copied / f"{NAME}.index",
             "folder above": copied.parent, "zip": zipped(copied)}[given]
    folder = copied.parent / "runs" / "out"
    released.main([str(place), "--vocab", str(vocabulary), "--out", str(folder)])
    assert "64 optimizer slots, global_step" in capsys.readouterr().out
    state, _, config, cfg, _ = checkpoint.load_model(folder, np)
    assert cfg == CONFIG
    assert config["released"]["step"] == 3530000 and state.step == 0
    assert (folder / config["codec_file"]).read_bytes() == vocabulary.read_bytes()
    with np.load(GOLDEN / "E1.npz") as file:
        ids, want = file["in/targets"].reshape(2, -1), file["out/logits"]
    got = model.logits(state.params, state.centroids, cfg, ids)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    arrays, _ = checkpoint.load(folder / "last.npz")
    assert {"opt.row", "opt.column", "opt.full"} <= set(arrays)
    assert list(folder.parent.iterdir()) == [folder]  # nothing temporary is left


def damage(copied, how):
    index, data = copied / f"{NAME}.index", copied / f"{NAME}.data-00000-of-00001"
    if how == "no shard":
        data.unlink()
    elif how == "one of two shards":
        data.rename(data.with_name(f"{NAME}.data-00000-of-00002"))
    elif how == "no index":
        index.unlink()
    elif how in ("index cut", "data cut"):
        path = index if how == "index cut" else data
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "a flipped bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "two checkpoints":
        (copied / "checkpoint").unlink()
        shutil.copy(index, copied / "ckpt-9.index")
    elif how == "hparams.json":
        (copied / "hparams.json").write_text("{")
    elif how == "hparams list":
        (copied / "hparams.json").write_text("[]")
    return copied


@pytest.mark.parametrize("how, message", [
    ("no shard", "data-00000-of-...: missing"),
    ("one of two shards", f"{NAME}.data-00001-of-00002 missing"),
    ("no index", "no checkpoint in it"),
    ("index cut", "index: damaged or cut short"),
    ("data cut", "cut short: the variables take 114,344 bytes, the data files have 114,244"),
    ("a flipped bit", "cannot be read, a data file is damaged"),
    ("two checkpoints", "several checkpoints, ckpt-3530000, ckpt-9"),
    ("hparams.json", "hparams.json: not JSON"),
    ("hparams list", "hparams.json: not a table")])
def test_damaged_checkpoints(how, message, copied, vocabulary, tmp_path):
    folder = tmp_path / "runs" / "out"
    with pytest.raises(UserError, match=message) as error:
        released.write_run(damage(copied, how), vocabulary, folder)
    assert "\n" not in str(error.value)
    assert not folder.parent.exists() or not list(folder.parent.iterdir())


def test_damaged_zip(copied, vocabulary, tmp_path):
    path = zipped(copied)
    content = path.read_bytes()
    for wrong, message in ((content[:-100], "not a zip"),
                           (content[:3000] + b"??" + content[3002:], "damaged or cut short")):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            released.write_run(path, vocabulary, tmp_path / "runs" / "out")
    assert not list((tmp_path / "runs").iterdir())


def test_vocabulary_of_another_size(copied, tmp_path):
    with pytest.raises(UserError, match="has 1,988 subwords, the checkpoint 80"):
        released.write_run(copied, GOLDEN / "T_subwords.subwords", tmp_path / "runs" / "out")
    assert not (tmp_path / "runs" / "out").exists()


def test_a_run_is_never_replaced(copied, vocabulary, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        released.write_run(copied, vocabulary, tmp_path)


def test_download(tmp_path, monkeypatch, capfd):
    """Both files, the size of each before it comes; then as if they had been there."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    converted = []
    monkeypatch.setattr(released, "write_run", lambda *paths: converted.append(paths))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, size in (("CHECKPOINT", 1_500_000), ("VOCABULARY", 200_000)):
            source = getattr(released, name)
            (tmp_path / "served" / source.name).write_bytes(bytes(size))
            url = f"http://127.0.0.1:{server.server_port}/{source.name}"
            monkeypatch.setattr(released, name, source._replace(urls=(url,)))
        released.main(["--download", str(tmp_path / "here"), "--out", "out"])
        first = capfd.readouterr()
        released.main(["--download", str(tmp_path / "here"), "--vocab", "mine", "--out", "out"])
        (tmp_path / "served" / "checkpoint.zip").unlink()
        with pytest.raises(UserError, match="checkpoint.zip: the server says 404"):
            released.main(["--download", str(tmp_path / "here"), "--vocab", "mine"])
        server.shutdown()
    here = tmp_path / "here"
    assert converted == [
        (here / "checkpoint.zip", here / "vocab.pg19_length8k.32768.subwords", Path("out")),
        (here / "checkpoint.zip", Path("mine"), Path("out"))]
    assert [path.stat().st_size for path in converted[0][:2]] == [1_500_000, 200_000]
    assert "checkpoint.zip (1.5 MB) comes from http" in first.out
    assert "subwords (0.2 MB) comes from http" in first.out
    assert first.err.count("downloading") == 2


def test_what_is_missing(vocabulary, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give a CHECKPOINT and --vocab FILE, or --download"):
        released.main([])
    with pytest.raises(UserError, match="No such file"):
        released.main(["x", "--vocab", str(tmp_path / "none")])
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"needs TensorFlow, .* pip install -e '\.\[released\]'"):
        released.main([str(E1), "--vocab", str(vocabulary), "--out", str(tmp_path / "out")])
