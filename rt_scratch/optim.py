"""Optimizers on one flat buffer, clipping by global norm, learning rates, loss scaling.

An optimizer is a pair, a row of `OPTIMIZERS`: init(flat, table) -> state, a dict of flat arrays,
and update(flat, grads, state, table, lr, step, weight_decay). It is the one part that changes what
it was given: parameters and state are updated in place. `table` lists the leaves of the buffer
(name, shape, start, stop). The twins on a GPU take lr and step as numbers or as 0-d arrays, float32
and uint32, that they read there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from rt_scratch.dispatch import accelerated, array_module


@accelerated
def global_norm(grads):
    """sqrt of the sum of squares, a 0-d array; not finite if any gradient is not."""
    return array_module(grads).sqrt(grads @ grads)


def clip_by_global_norm(grads, limit: float):
    """g <- g min(1, limit / norm), in place; returns the norm from before (Pascanu et al. 2013).

    docs/derivations.md (57).
    """
    xp = array_module(grads)
    norm = global_norm(grads)
    grads *= xp.minimum(1, limit / xp.maximum(norm, xp.finfo(grads.dtype).tiny))
    return norm


# ------------------------------------------------------------------------------- learning rates

def rsqrt(step: int, lr: float, warmup: int, total: int) -> float:
    """lr sqrt(w) / sqrt(max(step, w)): flat for w steps, no linear warm-up (released code).

    docs/derivations.md (66).
    """
    return lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, warmup, 1))


def constant(step: int, lr: float, warmup: int, total: int) -> float:
    """Linear warm-up over w steps, then lr."""
    return lr * (step + 1) / warmup if step < warmup else lr


def _progress(step, warmup, total):
    """x from 0 at the end of the warm-up to 1 at the end of the run."""
    return min(1.0, max(step - warmup, 0) / max(1, total - warmup))


def cosine(step: int, lr: float, warmup: int, total: int) -> float:
    """Linear warm-up over w steps, then lr (0.1 + 0.45 (1 + cos(pi x))), x from 0 to 1."""
    x = _progress(step, warmup, total)
    return constant(step, lr, warmup, total) * (0.1 + 0.45 * (1 + math.cos(math.pi * x)))


def linear(step: int, lr: float, warmup: int, total: int) -> float:
    """Linear warm-up over w steps, then lr (1 - x), x as in `cosine`, below 1."""
    return constant(step, lr, warmup, total) * (1 - _progress(step, warmup, total))


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant, "rsqrt": rsqrt}


def learning_rate(step: int, schedule: str, lr: float, warmup: int, total: int) -> float:
    """Learning rate of step 0, 1, ... of `total` under a schedule of the table above."""
    return SCHEDULES[schedule](step, lr, warmup, total)


# --------------------------------------------------------------------------------- loss scaling

class LossScale(NamedTuple):
    """Factor of the loss that keeps half-precision gradients above the smallest fp16 number.

    Halved when a gradient overflows (that step is left out), doubled after 2,000 steps without that
    (Micikevicius et al. 2018). A power of two: it changes no bit of what does not underflow.
    """

    value: float
    steady: int  # steps since it last changed

    @property
    def can_fall(self) -> bool:
        """False where so small a scale says that the gradient itself is not finite."""
        return self.value >= 1e-3

    def after(self, finite: bool) -> LossScale:
        """The scale of the next step."""
        if not finite:
            return LossScale(self.value / 2, 0)
        if self.steady + 1 >= 2000:
            return LossScale(self.value * 2, 0)
        return LossScale(self.value, self.steady + 1)


FIRST_SCALE = LossScale(2.0**16, 0)


# -------------------------------------------------------------------------------------- AdamW

def adamw_init(flat, table) -> dict:
    """First and second moments, zero."""
    xp = array_module(flat)
    return {name: xp.zeros(flat.shape, flat.dtype) for name in "mv"}


@accelerated
def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), step = 0, 1, ...

    w <- w - lr weight_decay w                  (leaves of rank 2 and more)
    m <- m + (1 - beta1) (g - m),   v <- v + (1 - beta2) (g^2 - v)
    w <- w - lr m' / (sqrt(v') + eps),   m' = m / (1 - beta1^(step + 1)),  v' likewise.
    docs/derivations.md (58), (59).
    """
    if weight_decay:
        for leaf in table:
            if len(leaf.shape) >= 2:
                flat[leaf.start : leaf.stop] *= 1 - lr * weight_decay
    m, v = state["m"], state["v"]
    m += (1 - beta1) * (grads - m)
    v += (1 - beta2) * (grads * grads - v)
    unbiased = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
    flat -= lr * unbiased[0] / (array_module(flat).sqrt(unbiased[1]) + eps)


# --------------------------------------------------------------------------------------- Muon

MOMENTUM = 0.95
NEWTON_SCHULZ = (  # (a, b, c) per iteration: from 0.01 to 1.02, then 0.72 to 1.28
    (7.9424, -22.2873, 15.8239), (3.6465, -2.7291, 0.5374), (2.6758, -1.9890, 0.4539))


def orthogonalized(leaf) -> bool:
    """True for the matrices of the blocks, whose update Muon makes orthogonal.

    AdamW takes the rest: vectors, tables of relative positions, embedding and output layer.
    """
    return (len(leaf.shape) == 2 and leaf.name.startswith("layers.")
            and "_rel_" not in leaf.name)


def muon_init(flat, table) -> dict:
    """m, momentum of matrices and first moment of the rest; v, second moments of the rest alone."""
    xp = array_module(flat)
    rest = sum(leaf.stop - leaf.start for leaf in table if not orthogonalized(leaf))
    return {"m": xp.zeros_like(flat), "v": xp.zeros(rest, flat.dtype)}


@accelerated
def muon_update(flat, grads, state, table, lr, step, *, weight_decay=0.0) -> None:
    """One step of Muon (Jordan et al. 2024) for the matrices of the blocks, step = 0, 1, ...

    m <- 0.95 m + g,   x = (g + 0.95 m) / |g + 0.95 m|            (Nesterov's form; Frobenius norm)
    for each (a, b, c) of NEWTON_SCHULZ:  x <- a x + (b x x^T + c (x x^T)^2) x
    w <- w - lr weight_decay w - lr 0.2 sqrt(max(rows, columns)) x

    The iterations keep the singular vectors and move every singular value near 1, into
    0.72 to 1.28. Three iterations, each with its own polynomial (after Amsel et al. 2025), do what
    five with one polynomial do (Jordan et al.). The factor of x gives the update the root mean
    square usual for AdamW, 0.2, so that one learning rate serves both (Liu et al. 2025). All other
    leaves: AdamW, see `orthogonalized`.
    docs/derivations.md (63) to (65).
    """
    adamw_of_the_rest(flat, grads, state, table, lr, step, weight_decay)
    for leaf in filter(orthogonalized, table):
        w, g, m = (z[leaf.start : leaf.stop].reshape(leaf.shape)
                   for z in (flat, grads, state["m"]))
        m *= MOMENTUM
        m += g
        x = newton_schulz(g + MOMENTUM * m)
        w *= 1 - lr * weight_decay
        w -= lr * update_scale(leaf) * x


def newton_schulz(x):
    """An (almost) orthogonal matrix with the singular vectors of x (..., R, C).

    docs/derivations.md (64).
    """
    xp = array_module(x)
    if x.shape[-2] > x.shape[-1]:  # a = x x^T as small as can be
        return newton_schulz(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    norm = xp.sqrt((x * x).sum((-2, -1), keepdims=True))
    x = x / xp.maximum(norm, xp.finfo(x.dtype).tiny)
    for a, b, c in NEWTON_SCHULZ:
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x


def update_scale(leaf) -> float:
    """0.2 sqrt(max(rows, columns)): what an orthogonal update is multiplied by."""
    return 0.2 * math.sqrt(max(leaf.shape))


def adamw_of_the_rest(flat, grads, state, table, lr, step, weight_decay) -> None:
    """AdamW for the leaves that Muon leaves out, one run of neighbours at a time."""
    done = 0
    for skipped, leaves in groupby(table, orthogonalized):
        if skipped:
            continue
        leaves = list(leaves)
        first, last = leaves[0].start, leaves[-1].stop
        own = {"m": state["m"][first:last], "v": state["v"][done : done + last - first]}
        moved = [z._replace(start=z.start - first, stop=z.stop - first) for z in leaves]
        adamw_update(flat[first:last], grads[first:last], own, moved, lr, step,
                     weight_decay=weight_decay)
        done += last - first


# ---------------------------------------------------------------------------------- Adafactor

DECAY_POWER = 0.8       # second moments decay by 1 - (step + 1)^-0.8
SQUARE_FLOOR = 1e-30    # added to squared gradients
SCALE_FLOOR = 1e-3      # smallest parameter scale
UPDATE_LIMIT = 1.0      # clipping threshold of the update's root mean square


def _factored(leaf) -> bool:
    return len(leaf.shape) >= 2


def adafactor_init(flat, table) -> dict:
    """Row means, column means and full second moments, each in one flat array, zero."""
    xp = array_module(flat)
    rows = columns = full = 0
    for leaf in table:
        if _factored(leaf):
            rows += math.prod(leaf.shape[:-1])
            columns += math.prod(leaf.shape[:-2]) * leaf.shape[-1]
        else:
            full += leaf.stop - leaf.start
    return {"row": xp.zeros(rows, flat.dtype), "column": xp.zeros(columns, flat.dtype),
            "full": xp.zeros(full, flat.dtype)}


@accelerated
def adafactor_update(flat, grads, state, table, lr, step, *, weight_decay=0.0) -> None:
    """One step of Adafactor (Shazeer and Stern 2018) as the released recipes set it, step 0, 1, ...

    decay = 1 - (step + 1)^-0.8,  s = g^2 + 1e-30
    rank >= 2:  r <- decay r + (1 - decay) mean_columns(s),  c likewise over rows
                x = g / sqrt(r / mean(r)) / sqrt(c)
    else:       v <- decay v + (1 - decay) s,   x = g / sqrt(v)
    w <- w - lr max(rms(w), 1e-3) x / max(1, rms(x))

    No first moment. Factored over the last two axes, leading axes batched; rms over a whole leaf.
    `weight_decay` is the released L2 loss: it adds weight_decay w to g, except for biases.
    docs/derivations.md (60) to (62).
    """
    xp = array_module(flat)
    decay = 1 - (step + 1) ** -DECAY_POWER
    at = {"row": 0, "column": 0, "full": 0}

    def take(name, shape):
        start = at[name]
        at[name] += math.prod(shape)
        return state[name][start : at[name]].reshape(shape)

    for leaf in table:
        w = flat[leaf.start : leaf.stop].reshape(leaf.shape)
        g = grads[leaf.start : leaf.stop].reshape(leaf.shape)
        if weight_decay and not is_bias(leaf):
            g = g + weight_decay * w
        square = g * g + SQUARE_FLOOR
        if _factored(leaf):
            r = take("row", leaf.shape[:-1])
            c = take("column", (*leaf.shape[:-2], leaf.shape[-1]))
            r += (1 - decay) * (square.mean(-1) - r)
            c += (1 - decay) * (square.mean(-2) - c)
            x = g / xp.sqrt(r / r.mean(-1, keepdims=True))[..., None]
            x /= xp.sqrt(c)[..., None, :]
        else:
            v = take("full", leaf.shape)
            v += (1 - decay) * (square - v)
            x = g / xp.sqrt(v)
        scale = xp.maximum(xp.sqrt((w * w).mean()), SCALE_FLOOR)
        x *= lr * scale / xp.maximum(1, xp.sqrt((x * x).mean()) / UPDATE_LIMIT)
        w -= x


def is_bias(leaf) -> bool:
    """Whether a leaf is a bias, which the released L2 loss leaves out."""
    last = leaf.name.rpartition(".")[2]
    return len(leaf.shape) == 1 and (last == "bias" or last.startswith("b_") or last == "b")


class Optimizer(NamedTuple):
    init: Callable
    update: Callable
    copies: int = 0  # state in buffers of the size of the parameters, for the estimate of memory


OPTIMIZERS = {
    "adamw": Optimizer(adamw_init, adamw_update, 2),
    "muon": Optimizer(muon_init, muon_update, 1),
    "adafactor": Optimizer(adafactor_init, adafactor_update, 0),
}
