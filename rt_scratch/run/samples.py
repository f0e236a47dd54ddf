"""What a model writes and draws."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.data import Codec, Dataset
from rt_scratch.decode import generate
from rt_scratch.dispatch import array_module
from rt_scratch.errors import UserError
from rt_scratch.run.pictures import picture
from rt_scratch.step import State

_HEADING = re.compile(r"^--- step (\d{1,15}), (\d{1,15}) characters\n", re.M)


class Text:
    """One sample as it grows: a prompt, and what follows it.

    It ends with the stop text, or at the id that ends a text. Prompt and sample are decoded as one,
    so a character may begin in one and end in the other. Bytes that are not UTF-8, also those cut
    at the end, show as the replacement character. With `raw` a byte is a character of Latin-1,
    which gives the bytes back.
    """

    def __init__(self, codec: Codec, stop: str = "", prompt=(), raw: bool = False):
        self._codec, self._ids, self._shown = codec, [], 0
        self._pieces, self._recent = [], ""
        self._letters = codecs.getincrementaldecoder("latin-1" if raw else "utf-8")("replace")
        self._stop, self.stopped = "", False
        self._grow(self._letters.decode(self._decode(prompt)))
        self._stop = os.fsencode(stop).decode("latin-1") if raw else stop

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._pieces)

    def add(self, tokens) -> str:
        """What the tokens add to the text."""
        new = self._grow(self._letters.decode(self._decode(tokens)))
        self.stopped |= self._codec.end in tokens
        return new

    def _decode(self, tokens):
        if not self._codec.joins:
            return self._codec.decode(tokens)
        self._ids += np.asarray(tokens, int).tolist()
        new = self._codec.decode(self._ids)[self._shown :]
        self._shown += len(new)
        return new

    def end(self) -> str:
        """What is left of a character that was cut."""
        return self._grow(self._letters.decode(b"", True))

    def _grow(self, new):
        if self.stopped:
            return ""
        if self._stop:
            before, searched = self._recent, self._recent + new
            at = searched.find(self._stop)
            if at >= 0:
                self.stopped = True
                new = new[: at + len(self._stop) - len(before)]
            self._recent = searched[-len(self._stop) :]
        self._pieces.append(new)
        return new


def draw(state: State, model: ModelConfig, given, label: int | None = None, **settings):
    """Images (n, P, P, 3), uint8, that begin with the values `given` (n, k), k >= 0.

    They are of class `label`; without one, a model with classes draws each in turn. UserError for a
    class that it lacks. settings: as `generate` takes them.
    """
    n, labels = len(given), None
    if label is not None and not 0 <= label < model.n_classes:
        what = f"the classes are 0 to {model.n_classes - 1}" if model.n_classes \
            else "this run was trained without classes"
        raise UserError(f"--label {label}: {what}")
    if model.n_classes:
        chosen = np.arange(n) % model.n_classes if label is None else np.full(n, label)
        labels = array_module(state.flat).asarray(chosen)
    drawn = list(generate(state.params, state.centroids, model, model.seq_len - given.shape[1],
                          prompt=given, labels=labels, **settings))
    values = np.concatenate([given, np.stack(drawn, axis=1)], axis=1)
    return values.reshape(n, model.image_size, model.image_size, 3).astype(np.uint8)


def show_sample(state: State, dataset: Dataset, model: ModelConfig, seed: int, folder: Path,
                n_tokens: int = 160, n_images: int = 4) -> str:
    """What the model draws now: a few lines of text, also added to samples.txt, or a PNG.

    Both are in the run folder.
    """
    rng = np.random.default_rng([seed, state.step])
    if model.kind == "image":
        path = folder / f"sample-{state.step}.png"
        with picture(path) as write:
            write(draw(state, model, np.zeros((n_images, 0), np.int64), rng=rng))
        return f"sample: {path}"
    text = Text(dataset.codec)
    for token in generate(state.params, state.centroids, model, n_tokens, rng=rng,
                          temperature=0.8):
        text.add(token)
        if text.stopped:
            break
    text.end()
    keep_sample(folder, state.step, text.text)
    return f"--- sample\n{text.text}\n---"


def wanted(step: int, scored: int, model: ModelConfig, train: TrainConfig) -> bool:
    """Whether to draw after the evaluation at `step`, the one before having been at `scored`.

    Always at the end; before it, where a multiple of --sample-every was passed since then. By
    default text, which takes a moment, is drawn every time; pictures, which take minutes, never.
    """
    every = train.sample_every or (1 if model.kind == "text" else train.steps)
    return step == train.steps or step // every > scored // every


def keep_sample(folder: Path, step: int, text: str) -> None:
    """Add a sample to samples.txt, under a line with its step and length."""
    with (folder / "samples.txt").open("a", newline="", encoding="utf-8") as file:
        file.write(f"--- step {step}, {len(text)} characters\n{text}\n")


def read_samples(folder: Path) -> dict[int, str]:
    """{step: text} of samples.txt, the last of a step that was done twice; {} without a file."""
    path, found, at = folder / "samples.txt", {}, 0
    if not path.exists():
        return found
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        whole = file.read()
    while head := _HEADING.search(whole, at):  # the length tells where a text ends, whatever it is
        at = head.end() + int(head[2])
        found[int(head[1])] = whole[head.end() : at]
    return found
