"""What a model writes and draws."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np

from rt_scratch.config import ModelConfig
from rt_scratch.data import Codec, Dataset
from rt_scratch.decode import generate
from rt_scratch.dispatch import array_module
from rt_scratch.errors import UserError
from rt_scratch.run.pictures import pillow, save_images
from rt_scratch.step import State


class Text:
    """One sample as it grows, up to and including the stop text or the id that ends a text.

    Bytes that are not UTF-8, also those cut at the end, show as a replacement sign. prompt: the ids
    that it goes on from.
    """

    def __init__(self, codec: Codec, stop: str = "", prompt=()):
        self._codec, self._stop = codec, stop
        self._ids = list(prompt) if codec.joins else []
        self._shown = len(codec.decode(self._ids))
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.stopped = "", False

    def add(self, tokens) -> str:
        """What the tokens add to the text."""
        new = self._grow(self._utf8.decode(self._new(tokens)))
        self.stopped |= self._codec.end in tokens
        return new

    def _new(self, tokens):
        if not self._codec.joins:
            return self._codec.decode(tokens)
        self._ids += np.asarray(tokens).tolist()
        new = self._codec.decode(self._ids)[self._shown :]
        self._shown += len(new)
        return new

    def end(self) -> str:
        """What is left of a character that was cut."""
        return self._grow(self._utf8.decode(b"", True))

    def _grow(self, new):
        if self.stopped:
            return ""
        start, self.text = len(self.text), self.text + new
        if self._stop and self._stop in self.text:
            self.stopped = True
            self.text = self.text[: self.text.index(self._stop) + len(self._stop)]
        return self.text[start:]


def draw(state: State, model: ModelConfig, given, label: int | None = None, **settings):
    """Images (n, P, P, 3), uint8, that begin with the values `given` (n, k), k >= 0.

    Of class `label`, or with a model that knows classes of each in turn; UserError for a class that
    it lacks. settings: as `generate` takes them.
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
    """What the model draws now: a few lines of text, or a PNG in the run folder."""
    rng = np.random.default_rng([seed, state.step])
    if model.kind == "image":
        try:
            pillow()
        except UserError as error:
            return f"no picture: {error}"
        path = folder / f"sample-{state.step}.png"
        save_images(draw(state, model, np.zeros((n_images, 0), np.int64), rng=rng), path)
        return f"sample: {path}"
    text = Text(dataset.codec)
    for token in generate(state.params, state.centroids, model, n_tokens, rng=rng,
                          temperature=0.8):
        text.add(token)
        if text.stopped:
            break
    text.end()
    return f"--- sample\n{text.text}\n---"
