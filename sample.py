"""Sample from a trained Routing Transformer.

    python sample.py                                  from the newest run
    python sample.py runs/stdlib --prompt "def main(" --tokens 400 --temperature 0.8
    python sample.py runs/cifar10 --num 16 --out images.png
"""

import argparse
import codecs
import os
import sys
import time
from pathlib import Path

import numpy as np

from rt_scratch import data, run
from rt_scratch.backend import select_device
from rt_scratch.checkpoint import newest_run
from rt_scratch.console import Parser, script
from rt_scratch.decode import generate
from rt_scratch.errors import UserError
from rt_scratch.model import views


def main(argv=None):
    args = parse(argv)
    folder = args.run or newest_run("runs")
    xp, _ = select_device(args.device)
    state, config, model = run.load_model(folder, xp)
    params = views(state.flat, state.table)
    settings = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                    rng=np.random.default_rng(args.seed))
    if model.kind == "image":
        draw_images(args, params, state.centroids, model, settings, xp)
    else:
        file = folder / config["codec"] if config["codec"] else None
        write_text(args, params, state.centroids, model, settings, *data.codec(file))


def write_text(args, params, centroids, model, settings, encode, decode):
    """Stream the first sample to the terminal as it is drawn; the others follow at the end."""
    if args.out or args.complete or args.label is not None:
        raise UserError("--out, --complete and --label are for images; this run is text")
    text = args.prompt_file.read_bytes() if args.prompt_file else os.fsencode(args.prompt)
    prompt = np.asarray(encode(text), dtype=np.int64)[None]
    shown = decode(prompt[0]).decode("utf-8", "replace")  # as the model reads it
    if model.attention == "full":
        room = max(0, model.seq_len - args.tokens)  # full attention has seen no longer text
        prompt = prompt[:, -room:] if room else prompt[:, :0]
    texts = [Text(decode, args.stop) for _ in range(args.num)]
    drawn, started = 0, time.time()
    print(shown, end="", flush=True)
    for tokens in generate(params, centroids, model, args.tokens,
                           prompt=np.repeat(prompt, args.num, axis=0), **settings):
        for i, row in enumerate(texts):
            new = row.add(tokens[i : i + 1])
            if i == 0:
                print(new, end="", flush=True)
        drawn += len(texts)
        if all(row.stopped for row in texts):
            break
    print(texts[0].end())
    for row in texts[1:]:
        row.end()
        print(f"\n--- next sample\n{shown}{row.text}")
    print(f"{drawn / (time.time() - started):.0f} tokens/s", file=sys.stderr)


class Text:
    """One sample as it grows, up to and including the stop text.

    Bytes that are not UTF-8, also those cut at the end, show as a replacement sign.
    """

    def __init__(self, decode, stop):
        self.decode, self.stop = decode, stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.stopped = "", False

    def add(self, token):
        """What the token adds to the text."""
        return self._grow(self.utf8.decode(self.decode(token)))

    def end(self):
        """What is left of a character that was cut."""
        return self._grow(self.utf8.decode(b"", True))

    def _grow(self, new):
        if self.stopped:
            return ""
        start, self.text = len(self.text), self.text + new
        if self.stop and self.stop in self.text:
            self.stopped = True
            self.text = self.text[: self.text.index(self.stop) + len(self.stop)]
        return self.text[start:]


def draw_images(args, params, centroids, model, settings, xp):
    """Write a PNG grid of samples, or of completions of the top half of an image."""
    if args.prompt or args.prompt_file or args.stop:
        raise UserError("--prompt, --prompt-file and --stop are for text; this run is images")
    if args.out is None:
        raise UserError("this run is images: give --out FILE.png")
    Image = run.pillow()
    size, given = model.image_size, np.zeros((args.num, 0), np.int64)
    if args.complete:
        try:
            picture = Image.open(args.complete).convert("RGB").resize((size, size))
        except OSError:
            raise UserError(f"--complete {args.complete}: not an image that Pillow reads") from None
        top = np.asarray(picture).reshape(-1)[: 3 * size * (size // 2)]
        given = np.tile(top.astype(np.int64), (args.num, 1))
    labels = None
    if model.n_classes:
        if args.label is not None and not 0 <= args.label < model.n_classes:
            raise UserError(f"--label {args.label}: the classes are 0 to {model.n_classes - 1}")
        chosen = np.arange(args.num) % model.n_classes if args.label is None else np.full(
            args.num, args.label)
        labels = xp.asarray(chosen)
    elif args.label is not None:
        raise UserError("--label: this run was trained without classes")
    rest = list(generate(params, centroids, model, model.seq_len - given.shape[1], prompt=given,
                         labels=labels, **settings))
    pixels = np.concatenate([given, np.stack(rest, axis=1)], axis=1)
    pixels = pixels.reshape(args.num, size, size, 3).astype(np.uint8)
    run.save_images(pixels, args.out)
    print(f"{args.num} images: {args.out}")


def parse(argv):
    parser = Parser(
        prog="sample.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest)")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--tokens", type=int, default=400, help="tokens to draw (default 400)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=0.0,
                        help="only the likeliest that reach this probability; 0: all")
    parser.add_argument("--stop", default="", help="stop after this text")
    parser.add_argument("--num", type=int, default=1, help="samples (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="PNG file, for images")
    parser.add_argument("--complete", type=Path, help="image whose top half to complete")
    parser.add_argument("--label", type=int, help="class of the images to draw")
    args = parser.parse_args(argv)
    if args.prompt and args.prompt_file:
        raise UserError("--prompt and --prompt-file: give one of them")
    for path in (args.prompt_file, args.complete):
        if path and (path.is_dir() or not path.exists()):
            raise UserError(f"{path}: no such file")
    for name, least in (("tokens", 1), ("num", 1), ("temperature", 0), ("top_k", 0),
                        ("top_p", 0), ("seed", 0)):
        if not least <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number "
                            f"of at least {least}")
    if args.top_p > 1:
        raise UserError(f"--top-p {args.top_p}: a probability is at most 1")
    return args


if __name__ == "__main__":
    script(main)
