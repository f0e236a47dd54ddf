"""Directional gradient checks.

For a function y = f(x_1, ..., x_n) and its hand-written backward, draw dy and directions v_i and
compare, for each argument alone,

    (L(x_i + h v_i) - L(x_i - h v_i)) / 2h   with   sum g_i v_i,      L = sum y dy,

in float64. The difference may be 1e-6 of sum |g_i v_i|, plus what rounding of L leaves.
"""

import numpy as np

STEP = 1e-4
TOLERANCE = 1e-6


def check_gradients(forward, backward, args, rng, step=STEP):
    """forward(*args) -> (y, cache); backward(dy, cache) -> one gradient per argument.

    y is an array or a tuple of arrays (dy is then passed as that many arguments). A gradient may be
    None where the argument is None. Also checks that neither function changes its inputs and that
    the backward can be called twice.
    """
    before = [None if a is None else a.copy() for a in args]
    y, cache = forward(*args)
    outputs = y if isinstance(y, tuple) else (y,)
    dy = [rng.normal(size=np.shape(o)) for o in outputs]
    dy_before = [d.copy() for d in dy]
    gradients = backward(*dy, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for a, b in zip([*args, *dy], [*before, *dy_before], strict=True):
        np.testing.assert_array_equal(a, b, "an input was changed")
    again = backward(*dy, cache)
    again = again if isinstance(again, tuple) else (again,)

    def objective(i, moved):
        y, _ = forward(*args[:i], moved, *args[i + 1:])
        outputs = y if isinstance(y, tuple) else (y,)
        return sum((o * d).sum() for o, d in zip(outputs, dy, strict=True))

    size = sum(np.abs(o * d).sum() for o, d in zip(outputs, dy, strict=True))
    assert len(gradients) == len(args)
    for i, (x, g, g2) in enumerate(zip(args, gradients, again, strict=True)):
        if x is None:
            assert g is None
            continue
        assert g.shape == x.shape and g.dtype == x.dtype
        np.testing.assert_array_equal(g, g2, "a second backward differs")
        v = rng.normal(size=x.shape)
        numeric = (objective(i, x + step * v) - objective(i, x - step * v)) / (2 * step)
        close(numeric, (g * v).sum(), np.abs(g * v).sum(), 1e-15 * (1 + size) / step, i)


def close(numeric, exact, scale, rounding, what):
    """NaN fails."""
    error = abs(numeric - exact)
    assert error <= TOLERANCE * scale + 10 * rounding, \
        f"argument {what}: difference {error:.3g} at sum |g v| {scale:.3g}"
