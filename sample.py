"""Sample from a trained Routing Transformer.

    python sample.py                                  from the newest run
    python sample.py runs/stdlib --prompt "def main(" --tokens 400 --temperature 0.8
    python sample.py runs/cifar10 --num 16 --out images.png
"""

try:
    import math
    import os
    import time
    from pathlib import Path

    import numpy as np

    from rt_scratch.config import ModelConfig
    from rt_scratch.console import Parser, a_path, number, script, show, warn
    from rt_scratch.decode import generate
    from rt_scratch.device import select_device
    from rt_scratch.errors import UserError
    from rt_scratch.run.checkpoint import best_checkpoint, load_model
    from rt_scratch.run.costs import check_fits, decode_bytes
    from rt_scratch.run.evaluate import caveat
    from rt_scratch.run.folder import newest_run, run_codec
    from rt_scratch.run.pictures import picture, read_picture
    from rt_scratch.run.samples import Text, draw
except (KeyboardInterrupt, ModuleNotFoundError) as error:  # it takes a second
    raise SystemExit(f"error: {error}: pip install -e ." if str(error) else "interrupted") from None


def main(argv=None):
    args = parse(argv)
    args.run = args.run or newest_run(Path("runs"))
    xp, _ = select_device(args.device)
    name = f"{args.checkpoint}.npz" if args.checkpoint else best_checkpoint(args.run).name
    loaded = load_model(args.run, xp, name)
    if loaded.progress.valid < math.inf and (line := caveat(loaded.progress.valid, loaded.model)):
        warn(line.strip())
    (draw_images if loaded.model.kind == "image" else write_text)(args, loaded, xp)
    warn(f"from {args.run / name}, step {loaded.state.step}")


def write_text(args, loaded, xp):
    """Stream the first sample to the terminal as it is drawn; the others follow at the end."""
    if args.out or args.complete or args.label is not None:
        raise UserError("--out, --complete and --label are for images; this run is text")
    state, model = loaded.state, loaded.model
    codec = run_codec(loaded.config, args.run, model.vocab_size)
    text = args.prompt_file.read_bytes() if args.prompt_file else os.fsencode(args.prompt)
    prompt = np.asarray(codec.encode(text), dtype=np.int64)
    if prompt.size and prompt.max() >= model.vocab_size:
        raise UserError(f"the prompt has token {prompt.max()}, the model knows {model.vocab_size}")
    n_tokens = 400 if args.tokens is None else args.tokens
    settings = drawing(args, model, len(prompt), n_tokens, xp)
    texts = [Text(codec, args.stop, prompt, args.raw) for _ in range(args.num)]
    drawn, started = 0, time.monotonic()
    show(texts[0].text, args.raw)
    for tokens in generate(state.params, state.centroids, model, n_tokens,
                           prompt=np.tile(prompt, (args.num, 1)), **settings):
        for i, row in enumerate(texts):
            new = row.add(tokens[i : i + 1])
            if i == 0:
                show(new, args.raw)
        drawn += len(texts)
        if all(row.stopped for row in texts):
            break
    show(texts[0].end() + "\n", args.raw)
    for row in texts[1:]:
        row.end()
        show(f"\n--- next sample\n{row.text}\n", args.raw)
    warn(f"{drawn / max(time.monotonic() - started, 1e-9):.0f} tokens/s")


def draw_images(args, loaded, xp):
    """Write a PNG grid of samples, or of completions of the top half of an image."""
    if args.prompt or args.prompt_file or args.tokens is not None or args.stop or args.raw:
        raise UserError("--prompt, --prompt-file, --tokens, --stop and --raw are for text; this "
                        "run is images")
    if args.out is None:
        raise UserError("this run is images: give --out FILE.png")
    model, size = loaded.model, loaded.model.image_size
    settings = drawing(args, model, 0, model.seq_len, xp)
    given = np.zeros((args.num, 0), np.int64)
    if args.complete:
        top = read_picture(args.complete, size).reshape(-1)[: 3 * size * (size // 2)]
        given = np.tile(top.astype(np.int64), (args.num, 1))
    with picture(args.out) as write:
        write(draw(loaded.state, model, given, args.label, **settings))
    print(f"{args.num} images: {args.out}")


def drawing(args, model: ModelConfig, prompt: int, tokens: int, xp) -> dict:
    """Settings of `generate`, once it is known to fit: sample i depends on --seed and i alone."""
    capacity = prompt + tokens + 1
    if "full" in model.kinds():
        capacity = min(capacity, model.seq_len)
    check_fits(decode_bytes(model, args.num, min(prompt, capacity), capacity),
               f"--num {args.num} of {tokens} tokens does not fit in memory", "ask for less", xp)
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                rng=[np.random.default_rng([args.seed, i]) for i in range(args.num)])


def parse(argv=None):
    parser = Parser(__doc__, prog="sample.py")
    add = parser.add_argument
    add("run", nargs="?", type=a_path, help="run folder (default: the newest)")
    add("--checkpoint", choices=("last", "best"), help="(default: best)")
    add("--prompt", default="", help="text to continue")
    add("--prompt-file", type=a_path, help="file with the text to continue")
    add("--tokens", type=number(int, 1), help="tokens of text to draw (default 400)")
    add("--temperature", type=number(float, 0), default=0.8,
        help="0: always the likeliest token (default 0.8)")
    add("--top-k", type=number(int, 0), default=0, help="only the k likeliest; 0: all")
    add("--top-p", type=number(float, 0), default=0.0,
        help="only the likeliest that reach this probability; 0: all")
    add("--stop", default="", help="stop after this text")
    add("--raw", action="store_true", help="write the bytes as they are drawn")
    add("--num", type=number(int, 1), default=1, help="samples (default 1)")
    add("--seed", type=number(int, 0), default=0, help="seed of the draws (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=a_path, help="PNG file, for images")
    add("--complete", type=a_path, help="image whose top half to complete")
    add("--label", type=int, help="class of the images to draw")
    args = parser.parse_args(argv)
    if args.prompt and args.prompt_file:
        raise UserError("--prompt and --prompt-file: give one of them")
    for path in (args.prompt_file, args.complete):
        if path and (path.is_dir() or not path.exists()):
            raise UserError(f"{path}: no such file")
    if args.top_p > 1:
        raise UserError(f"--top-p {args.top_p}: a probability is at most 1")
    return args


if __name__ == "__main__":
    script(main)
