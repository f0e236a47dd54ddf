"""Damage at random to what a report, a picture or a conversion reads: one line, or no harm.

Nothing here has a checksum of its own but the variables of a TensorFlow checkpoint, so a changed
digit of a log draws another curve; what is asked is that nothing ends in a traceback or hangs.
"""

import random
import shutil
from collections import Counter
from io import BytesIO

import numpy as np
import pytest

from faults.runs import ROOT
from faults.test_data_faults import damage, in_time
from faults.test_loops import tell
from rt_scratch import released, report
from rt_scratch.data.released_subwords import read_vocabulary
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint, log
from rt_scratch.run.pictures import plot_loss, read_picture
from rt_scratch.run.samples import read_samples

GOLDEN = ROOT / "tests" / "golden"


def damaged(request, capsys, path, use, share=20):
    """use() on --flips / share damaged copies of the file, 20 at least: how each ended."""
    n = max(20, -(-request.config.getoption("--flips") // share))
    content, ended = path.read_bytes(), Counter()
    for i in range(n):
        path.write_bytes(damage(content, random.Random(f"{path.name} {i}")))
        try:
            with in_time():
                use()
            ended["read"] += 1
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            ended["refused"] += 1
    path.write_bytes(content)
    capsys.readouterr()
    tell(capsys, n - 10, f"{n} damaged {path.name}: {dict(ended)}")
    return ended


@pytest.mark.parametrize("name", ["log.csv", "clusters.csv", "samples.txt"])
def test_notes_of_a_run(run, request, capsys, name):
    """The page of a run shows what is left of them, and so does the curve."""
    loaded = checkpoint.load_model(run, np)

    def use():
        page = report.describe(run, loaded) | report.curves(run)
        assert len(report.html(page | {"samples": report.samples(run, loaded)})) > 10_000
        assert isinstance(log.logged_row(run, 3), dict) and isinstance(read_samples(run), dict)
        if name == "log.csv" and random.random() < 0.05:
            plot_loss(run)

    assert damaged(request, capsys, run / name, use).keys() == {"read"}


@pytest.mark.parametrize("kind", ["PNG", "PPM", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_pictures_to_complete(tmp_path, request, capsys, kind):
    image = pytest.importorskip("PIL.Image")
    path, file = tmp_path / f"own.{kind.lower()}", BytesIO()
    image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
        file, kind)
    path.write_bytes(file.getvalue())

    def use():
        pixels = read_picture(path, 8)
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8

    assert damaged(request, capsys, path, use)["refused"]


def test_vocabulary_of_the_released_model(tmp_path, request, capsys):
    path = shutil.copy(GOLDEN / "T_subwords.subwords", tmp_path / "v.subwords")

    def use():
        subwords = read_vocabulary(path)
        subwords.decode(subwords.encode(b"The whole of it,\n  caf\xc3\xa9 _x\\ 12"))

    assert damaged(request, capsys, path, use)["refused"]


@pytest.mark.parametrize("name", ["ckpt-3530000.index", "ckpt-3530000.data-00000-of-00001",
                                  "hparams.json", "checkpoint", "copy.zip"])
def test_released_checkpoint(tmp_path, request, capsys, name):
    """What is converted in spite of the damage is what was there, but for the hyperparameters."""
    pytest.importorskip("tensorflow")
    folder, vocabulary = tmp_path / "copy", tmp_path / "v.subwords"
    shutil.copytree(GOLDEN / "E1_checkpoint", folder)
    shutil.make_archive(tmp_path / "copy", "zip", folder)
    given = tmp_path / name if name == "copy.zip" else folder
    letters = [*"\\_u;0123456789", *map(chr, range(0x4e00, 0x4e00 + 64))]
    vocabulary.write_text("".join(f"'{s}'\n" for s in ["<pad>_", "<EOS>_", *letters]), "utf-8")
    released.write_run(folder, vocabulary, tmp_path / "right")
    right = checkpoint.load(tmp_path / "right" / "last.npz")[0]["params"]

    def use():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        released.write_run(given, vocabulary, tmp_path / "out")
        if name != "hparams.json":
            got = checkpoint.load(tmp_path / "out" / "last.npz")[0]["params"]
            np.testing.assert_array_equal(got, right)

    damaged(request, capsys, given if name == "copy.zip" else folder / name, use)
