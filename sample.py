"""Sample from a trained Routing Transformer.

    python sample.py                                  from the newest run
    python sample.py runs/stdlib --prompt "def main(" --tokens 400 --temperature 0.8
    python sample.py runs/cifar10 --num 16 --out images.png
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from rt_scratch.console import Parser, script
from rt_scratch.data import saved_codec
from rt_scratch.decode import generate
from rt_scratch.device import select_device
from rt_scratch.errors import UserError
from rt_scratch.run.checkpoint import load_model
from rt_scratch.run.folder import newest_run
from rt_scratch.run.pictures import pillow, save_images
from rt_scratch.run.samples import Text, draw


def main(argv=None):
    args = parse(argv)
    folder = args.run or newest_run(Path("runs"))
    xp, _ = select_device(args.device)
    loaded = load_model(folder, xp)
    settings = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                    rng=np.random.default_rng(args.seed))
    if loaded.model.kind == "image":
        draw_images(args, loaded, settings)
    else:
        write_text(args, loaded, saved_codec(loaded.config, folder), settings)


def write_text(args, loaded, codec, settings):
    """Stream the first sample to the terminal as it is drawn; the others follow at the end."""
    if args.out or args.complete or args.label is not None:
        raise UserError("--out, --complete and --label are for images; this run is text")
    state, model = loaded.state, loaded.model
    text = args.prompt_file.read_bytes() if args.prompt_file else os.fsencode(args.prompt)
    prompt = np.asarray(codec.encode(text), dtype=np.int64)[None]
    shown = codec.decode(prompt[0]).decode("utf-8", "replace")  # as the model reads it
    if "full" in model.kinds():
        room = max(0, model.seq_len - args.tokens)  # full attention has seen no longer text
        prompt = prompt[:, -room:] if room else prompt[:, :0]
    texts = [Text(codec, args.stop, prompt[0]) for _ in range(args.num)]
    drawn, started = 0, time.monotonic()
    print(shown, end="", flush=True)
    for tokens in generate(state.params, state.centroids, model, args.tokens,
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
    print(f"{drawn / max(time.monotonic() - started, 1e-9):.0f} tokens/s", file=sys.stderr)


def draw_images(args, loaded, settings):
    """Write a PNG grid of samples, or of completions of the top half of an image."""
    if args.prompt or args.prompt_file or args.stop:
        raise UserError("--prompt, --prompt-file and --stop are for text; this run is images")
    if args.out is None:
        raise UserError("this run is images: give --out FILE.png")
    Image, size = pillow(), loaded.model.image_size
    given = np.zeros((args.num, 0), np.int64)
    if args.complete:
        try:
            picture = Image.open(args.complete).convert("RGB").resize((size, size))
        except OSError:
            raise UserError(f"--complete {args.complete}: not an image that Pillow reads") from None
        top = np.asarray(picture).reshape(-1)[: 3 * size * (size // 2)]
        given = np.tile(top.astype(np.int64), (args.num, 1))
    save_images(draw(loaded.state, loaded.model, given, args.label, **settings), args.out)
    print(f"{args.num} images: {args.out}")


def parse(argv=None):
    parser = Parser(prog="sample.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="run folder (default: the newest)")
    add("--prompt", default="", help="text to continue")
    add("--prompt-file", type=Path, help="file with the text to continue")
    add("--tokens", type=int, default=400, help="tokens to draw (default 400)")
    add("--temperature", type=float, default=0.8,
        help="0: always the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, help="only the k likeliest; 0: all")
    add("--top-p", type=float, default=0.0,
        help="only the likeliest that reach this probability; 0: all")
    add("--stop", default="", help="stop after this text")
    add("--num", type=int, default=1, help="samples (default 1)")
    add("--seed", type=int, default=0, help="seed of the draws (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, help="PNG file, for images")
    add("--complete", type=Path, help="image whose top half to complete")
    add("--label", type=int, help="class of the images to draw")
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
