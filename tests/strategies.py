"""What hypothesis draws: awkward sizes, seeds, and arrays that are not always contiguous."""

from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11])
widths = st.sampled_from([2, 3, 5, 8])       # a LayerNorm of width 1 has no gradient
lengths = st.sampled_from([1, 2, 3, 7, 8, 13, 16, 23])
layouts = st.sampled_from(["plain", "strided", "swapped"])


def normal(rng, shape, layout="plain"):
    """Normal numbers; `strided` has gaps, `swapped` has its last axes in the other order."""
    shape = tuple(shape)
    if layout == "strided" and shape:
        return rng.normal(size=(*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "swapped" and len(shape) > 1:
        return rng.normal(size=(*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
    return rng.normal(size=shape)
