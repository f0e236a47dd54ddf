"""How large the pieces are: tests make them small."""

PIECE = 1 << 18      # entries of an array that element-wise work takes at a time
ROWS = 1024          # rows per matrix product that a thread takes
COLUMNS = 256        # columns of a weight gradient that a thread takes
ATTENTION = 1 << 17  # attention weights that a thread takes at a time
TRIANGLE = 64        # queries per block where each sees every earlier token
WIDTH = 16           # keys per tile of multiprobe heads are a multiple of it
LOGITS = 1 << 21     # logits alive at a time in the output layer


def few(x) -> bool:
    """True for arrays so small that cutting them costs more than it gains: a token per text."""
    return x.size < PIECE // 8
