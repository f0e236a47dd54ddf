"""Checkpoints from strangers: one line each, before anything large is read; and old ones load."""

import dataclasses
import io
import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import sample
import train
from faults.runs import ROOT, SMALL
from rt_scratch import decode
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.data.files import digest_of
from rt_scratch.data.released_subwords import RELEASED
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint

DELETED = object()
STRANGE = (None, DELETED, "64", "", -1, -1.5, 0, 10 ** 40, 2 ** 31, float("nan"), float("inf"),
           True, [], [1], [None], {}, {"a": 1}, "a\0b")
FIELDS = ([("step",), ("best",), ("seconds",), ("scale",), ("scale", 0), ("scale", 1), ("scored",),
           ("valid",), ("drawn",), ("config",), ("config", "model"), ("config", "train")]
          + [("config", key) for key in ("dataset", "data_dir", "data", "codec", "codec_file",
                                         "codec_sha256")]
          + [("config", "model", f.name) for f in dataclasses.fields(ModelConfig)]
          + [("config", "train", f.name) for f in dataclasses.fields(TrainConfig)])


def changed(meta, path, value):
    meta = json.loads(json.dumps(meta))
    node = meta
    for key in path[:-1]:
        node = node[key]
    if value is DELETED:
        if isinstance(node, dict):
            node.pop(path[-1], None)
    else:
        node[path[-1]] = value
    return meta


def use(run, *only):
    """Everything that reads a checkpoint: how each ended, None for well."""
    ways = {"sample": lambda: sample.main([str(run), "--tokens", "3", "--device", "cpu"]),
            "evaluate": lambda: train.main(["--evaluate", "test", "--out", str(run),
                                            "--device", "cpu"]),
            "resume": lambda: train.main(["--resume", "--out", str(run), "--device", "cpu"])}
    ended = {}
    for name, way in ways.items():
        if not only or name in only:
            try:
                ended[name] = way()
            except UserError as error:
                ended[name] = str(error)
                assert "\n" not in ended[name]
    return ended


@pytest.mark.parametrize("group", range(4))
def test_strange_settings(run, group, monkeypatch):
    """Every field with every kind of wrong value: one line, or it was no harm."""
    monkeypatch.setattr(train, "plot_loss", lambda folder: None)
    arrays, meta = checkpoint.load(run / "last.npz")
    (run / "best.npz").unlink()
    for path in FIELDS[group::4]:
        for value in STRANGE:
            checkpoint.save(run / "last.npz", arrays, changed(meta, path, value))
            # what the settings decide has been checked once the checkpoint is read
            try:
                saved = checkpoint.read_state(run / "last.npz")
                checkpoint.restore(saved, np, for_training=True)
            except UserError as error:
                assert str(error).startswith(str(run)) and "\n" not in str(error)
                continue
            if path[-1] in ("codec", "codec_file", "codec_sha256", "dataset", "data_dir", "data",
                            "step", "kind", "vocab_size", "pad_id", "n_classes"):
                use(run)
                (run / "best.npz").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "..", ".", "a/b", "link.txt"])
def test_the_codec_is_a_file_in_the_folder(run, tmp_path, name, capsys):
    (tmp_path / "secret.txt").write_text("<eos>\n<unk>\nsecret")
    (run / "link.txt").symlink_to(tmp_path / "secret.txt")
    arrays, meta = checkpoint.load(run / "best.npz")
    meta["config"] |= {"codec": "words", "codec_file": name}
    checkpoint.save(run / "best.npz", arrays, meta)
    line = use(run, "sample")["sample"]
    assert "the codec of a run is a file in its folder" in line or "missing" in line
    assert "secret" not in capsys.readouterr().out


def with_words(run, words, sha256=None):
    """The run, as if its tokens were words."""
    (run / "vocab.txt").write_text("\n".join(words))
    arrays, meta = checkpoint.load(run / "best.npz")
    meta["config"] |= {"codec": "words", "codec_file": "vocab.txt"}
    if sha256:
        meta["config"]["codec_sha256"] = sha256
    checkpoint.save(run / "best.npz", arrays, meta)


def test_another_codec(run):
    """A reversed vocabulary would print other words, a shorter one end in an IndexError."""
    words = ["<eos>", "<unk>", *(f"word{i}" for i in range(254))]
    with_words(run, words)
    assert use(run, "sample")["sample"] is None
    with_words(run, words[:-1])
    assert "fewer than the 256 token values" in use(run, "sample")["sample"]
    with_words(run, words)
    digest = digest_of(run / "vocab.txt")
    with_words(run, words, digest)
    assert use(run, "sample")["sample"] is None
    with_words(run, words[::-1], digest)
    assert "not the file that the checkpoint was made with" in use(run, "sample")["sample"]
    with_words(run, words + ["one", "more"], None)
    assert use(run, "sample")["sample"] is not None  # its digest is still the first one's


def test_a_codec_of_another_dataset(run):
    """One that pg19 alone can be encoded with."""
    (run / "vocab.subwords").write_bytes(
        (ROOT / "tests" / "golden" / "T_subwords.subwords").read_bytes())
    arrays, meta = checkpoint.load(run / "best.npz")
    for dataset in (meta["config"]["dataset"], "stdlib", "cifar10"):
        meta["config"] |= {"codec": RELEASED, "codec_file": "vocab.subwords", "dataset": dataset}
        checkpoint.save(run / "best.npz", arrays, meta)
        assert "cannot be prepared in the subwords" in use(run, "evaluate")["evaluate"]


def rewritten(path, arrays, meta, compressed=False):
    """A checkpoint with these arrays as they are, and a checksum that agrees where it can."""
    header = {"rt_scratch": 1, "sha256": checkpoint._digest(arrays, meta), "meta": meta}
    arrays = arrays | {"__meta__": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


@pytest.mark.parametrize("name", ["params", "opt.m", "extra"])
def test_a_bomb_is_not_unpacked(run, name):
    """200 MB of zeros in 200 kB: the size is compared with that of the model first."""
    arrays, meta = checkpoint.load(run / "best.npz")
    arrays[name] = np.zeros(50_000_000, np.float32)
    rewritten(run / "best.npz", arrays, meta, compressed=True)
    assert (run / "best.npz").stat().st_size < 2 ** 20
    del arrays
    tracemalloc.start()
    for line in use(run, "sample", "evaluate").values():
        assert f"'{name}' is not an array of the model" in line
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_a_compressed_checkpoint_is_read(run):
    rewritten(run / "best.npz", *checkpoint.load(run / "best.npz"), compressed=True)
    assert use(run, "sample") == {"sample": None}


def test_shapes_that_lie(run):
    """The header of an array promises other numbers than the archive holds."""
    with zipfile.ZipFile(run / "best.npz") as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    for shape in ((2 ** 40,), (-1,), (11664, 1), (0,), ()):
        text = io.BytesIO()
        np.lib.format.write_array_header_1_0(text, {
            "descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(run / "best.npz", "w") as file:
            for name, content in members.items():
                if name == "params.npy":
                    content = text.getvalue() + content[-4 * 11664:]
                file.writestr(name, content)
        assert all(use(run, "sample", "evaluate").values())


def test_without_the_state_of_the_optimizer(run):
    """It can be scored and sampled from; resumed it cannot."""
    arrays, meta = checkpoint.load(run / "best.npz")
    for name in ("best.npz", "last.npz"):
        checkpoint.save(run / name, {k: a for k, a in arrays.items() if "opt." not in k}, meta)
    ended = use(run)
    assert ended["sample"] is None and ended["evaluate"] is None
    assert "no state of the optimizer" in ended["resume"]


def test_parameters_that_are_not_numbers(run):
    arrays, meta = checkpoint.load(run / "best.npz")
    for name in ("params", "centroids.0.mu"):
        broken = arrays[name].copy()
        broken.flat[3] = np.nan
        for file in ("best.npz", "last.npz"):
            checkpoint.save(run / file, arrays | {name: broken}, meta)
        assert all("not finite, the run diverged" in line for line in use(run).values())


def test_a_run_that_diverged_is_said_to_have(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    train.main([str(text), "--out", out, *SMALL, "--lr", "1e6", "--clip", "0"])
    worse = "nats per token are worse than guessing uniformly (5.545)"
    assert worse in capsys.readouterr().out
    for way in (lambda: train.main(["--evaluate", "valid", "--out", out, "--device", "cpu"]),
                lambda: sample.main([out, "--tokens", "3", "--device", "cpu"])):
        way()
        printed = capsys.readouterr()
        assert worse in printed.out + printed.err


def test_a_checkpoint_of_the_first_version(run):
    """Without what was added since: it is scored, sampled, and goes on where it was."""
    for name in ("last.npz", "best.npz"):
        arrays, meta = checkpoint.load(run / name)
        for key in ("scored", "valid", "drawn"):
            del meta[key]
        del meta["config"]["codec_sha256"], meta["config"]["codec_file"]
        meta["config"]["codec"] = None
        checkpoint.save(run / name, arrays, meta)
    assert checkpoint.read_state(run / "last.npz").progress.drawn == 12
    assert not any(use(run).values())
    train.main(["--resume", "--out", str(run), "--device", "cpu", "--steps", "8"])
    assert checkpoint.load(run / "last.npz")[1]["drawn"] == 16


# ----------------------------------------------------------------------------------- absurd sizes

@pytest.mark.parametrize("flags, word", [
    (["--n-layers", "2147483647"], "--n-layers 2147483647: must be at most 1024"),
    (["--vocab-size", "2147483647"], "256 token values, not 2147483647"),
    (["--width", "1073741824"], "the parameters do not fit in memory"),
    (["--ffn-width", "2147483647"], "the parameters do not fit in memory"),
    (["--local-max-distance", "2147483647"], "the parameters do not fit in memory"),
    (["--batch", "2147483647"], "does not fit in memory"),
    (["--seq-len", "2147483647"], "fewer than"),
    (["--init-gain", "-1"], "--init-gain -1.0: must be at least 0"),
    (["--n-layers", "1024", "--width", "2147483644"], "do not fit in memory"),
])
def test_absurd_trainings(text, tmp_path, flags, word):
    began = time.monotonic()
    with pytest.raises(UserError, match=word):
        train.main([str(text), "--out", str(tmp_path / "run"), "--device", "cpu", *flags])
    assert time.monotonic() - began < 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--num", "100000000"], ["--num", str(10 ** 15)], ["--num", "1000000", "--tokens", "1000000"]])
def test_absurd_samples(run, flags, monkeypatch):
    monkeypatch.setattr(decode, "prefill", None)  # refused before
    began = time.monotonic()
    with pytest.raises(UserError, match="does not fit in memory"):
        sample.main([str(run), "--device", "cpu", *flags])
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("flag", ["window", "block", "lookback", "n-clusters"])
def test_large_but_allowed(text, tmp_path, flag):
    """A window or a block beyond the text is as good as the whole text, or one line."""
    try:
        train.main([str(text), "--out", str(tmp_path / "run"), *SMALL, f"--{flag}", "1000000",
                    "--steps", "1"])
    except UserError as error:
        assert "\n" not in str(error)
