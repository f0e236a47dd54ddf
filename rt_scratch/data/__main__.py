"""python -m rt_scratch.data NAME: fetch a dataset, encode it once, say what it is."""

from __future__ import annotations

from rt_scratch.console import Parser, a_text, script
from rt_scratch.data.table import DATASETS, fetch, load


def main(arguments: list[str] | None = None) -> None:
    """Run the command; UserError for everything the user can fix."""
    parser = Parser(
        "Fetch, check and encode a dataset.", prog="python -m rt_scratch.data",
        epilog="\n".join(f"  {name:12} {row.about}" for name, row in DATASETS.items()))
    parser.add_argument("name", nargs="+", type=a_text,
                        help="a dataset of the list below, or text files and folders of them")
    parser.add_argument("--data-dir", metavar="DIR", type=a_text,
                        help="folder of the official files (default: data/NAME)")
    parser.add_argument("--download", action="store_true",
                        help="fetch the official files into that folder first")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="V",
                        help="subwords to train, where that can be chosen (pg19)")
    flags = parser.parse_args(arguments)
    if flags.download:
        fetch(" ".join(flags.name), flags.data_dir)
    data = load(flags.name, flags.data_dir, flags.vocab_size)
    print(f"{data.name}: {data.protocol}")
    for split, tokens in data.splits.items():
        print(f"{split:6} {tokens.size:,} tokens, {tokens.dtype}{list(tokens.shape)}")


if __name__ == "__main__":
    script(main)
