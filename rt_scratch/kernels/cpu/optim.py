"""Optimizers: faster twins for NumPy arrays."""

from __future__ import annotations

import math

import numpy as np

from rt_scratch.kernels.cpu import sizes
from rt_scratch.optim import (
    MOMENTUM,
    NEWTON_SCHULZ,
    adamw_of_the_rest,
    orthogonalized,
    update_scale,
)
from rt_scratch.threads import parallel, tiles


def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0):
    if weight_decay:
        for leaf in table:
            if len(leaf.shape) >= 2:
                flat[leaf.start : leaf.stop] *= 1 - lr * weight_decay
    unbias1, unbias2 = 1 - beta1 ** (step + 1), math.sqrt(1 - beta2 ** (step + 1))

    def piece(r):
        g, m, v = grads[r], state["m"][r], state["v"][r]
        change = g - m
        change *= 1 - beta1
        m += change
        np.multiply(g, g, out=change)
        change -= v
        change *= 1 - beta2
        v += change
        np.sqrt(v, out=change)
        change /= unbias2
        change += eps
        np.divide(m, change, out=change)
        change *= lr / unbias1
        flat[r] -= change

    parallel(piece, tiles(flat.size, sizes.PIECE))


def muon_update(flat, grads, state, table, lr, step, *, weight_decay=0.0):
    """Matrices of one shape, or of its transpose, in one stack: few calls, and each is products.

    x @ x^T of one array is a symmetric product in NumPy, half the work; a is symmetric as well.
    """
    adamw_of_the_rest(flat, grads, state, table, lr, step, weight_decay)
    alike = {}
    for leaf in filter(orthogonalized, table):
        alike.setdefault(tuple(sorted(leaf.shape)), []).append(leaf)

    def piece(group):
        shape, leaves = group
        x = np.empty((len(leaves), *shape), flat.dtype)
        for one, leaf in zip(x, leaves, strict=True):
            g, m = grads[leaf.start : leaf.stop], state["m"][leaf.start : leaf.stop]
            m *= MOMENTUM
            m += g
            change = (MOMENTUM * m).reshape(leaf.shape)
            change += g.reshape(leaf.shape)
            one[...] = _wide(change)
            one *= 1 / max(math.sqrt(np.vdot(one, one)), np.finfo(x.dtype).tiny)
        for first, third, fifth in NEWTON_SCHULZ:
            a = x @ x.swapaxes(-1, -2)
            b = a @ a.swapaxes(-1, -2)
            b *= fifth
            a *= third
            b += a
            y = b @ x
            x *= first
            x += y
        for one, leaf in zip(x, leaves, strict=True):
            w = _wide(flat[leaf.start : leaf.stop].reshape(leaf.shape))
            one *= lr * update_scale(leaf)
            w *= 1 - lr * weight_decay
            w -= one

    parallel(piece, [(shape, leaves[r]) for shape, leaves in alike.items()
                     for r in tiles(len(leaves), sizes.PIECE // math.prod(shape))])


def _wide(matrix):
    """A view with at least as many columns as rows."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
