"""Plant one bug after another and see that the tests notice.

    python tests/mutate.py            all bugs, in a copy of the project; a few minutes

Run it by hand after changing a backward pass or a test. Each entry is a file of rt_scratch, a piece
of its text that occurs there once, and what to put in its place. Exits with 1 if a bug survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {
    "backend": "test_layers.py", "layers": "test_layers.py", "attention": "test_attention.py",
    "routing": "test_routing.py", "model": "test_model.py test_golden.py", "optim": "test_optim.py",
    "step": "test_step.py", "decode": "test_decode.py", "released": "test_golden.py",
    "kernels/cpu": "test_cpu_kernels.py",
}
BUGS = [
    # backward passes
    ("layers", "dx = (rows @ w.T)", "dx = 1.001 * (rows @ w.T)"),
    ("layers", "rows.sum(0) if biased", "rows.mean(0) if biased"),
    ("layers", "- n * (dn * n).mean(-1, keepdims=True))", "- n * dn.mean(-1, keepdims=True))"),
    ("layers", "(dy * gain, (x, mean, rstd))", "(dy, (x, mean, rstd))"),
    ("layers", "(dy * n).sum(rows), dy.sum(rows)", "(dy * x).sum(rows), dy.sum(rows)"),
    ("layers", "(1 + 3 * GELU_CUBE * a * a)", "(1 + 2 * GELU_CUBE * a * a)"),
    ("layers", "da, dy * (0.5 * a * (1 + t))", "da, dy * (0.5 * b * (1 + t))"),
    ("layers", "return dx_a + dx_b, dw_gate, dw_value, dw_out",
     "return dx_a + dx_b, dw_value, dw_gate, dw_out"),
    ("layers", "dh = dropout_backward(dh, dropped)\n    da, db", "da, db"),
    ("layers", "dropout_backward(dh, cache_d) * positive", "dropout_backward(dh, cache_d)"),
    ("layers", "math.sqrt(width) * dtable, drows", "dtable, drows"),
    ("layers", "dposition = math.sqrt(3 * width)", "dposition = math.sqrt(width)"),
    ("layers", "segment_sum(dposition, column,", "segment_sum(dposition, row,"),
    ("layers", "segment_sum(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), table.shape[0])",
     "segment_sum(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1) * 0, table.shape[0])"),
    ("layers", "return dropout(dy, cache)[0]", "return dy"),
    ("layers", "targets[rows]] -= 1", "targets[rows]] -= 0.999"),
    ("layers", "dz *= (dloss * weights[rows])", "dz *= (dloss * weights[rows] ** 2)"),
    ("layers", "        db += dz.sum(0)\n", ""),
    ("backend", "* (bounds[1:] > bounds[:-1])[:, None]", ""),
    ("attention", "segment_sum(drows, _distance_index(table, first, last)",
     "segment_sum(drows, _distance_index(table, first + 1, last + 1)"),
    ("attention", "flat[..., s - 1 : s - 1 + s * p].reshape(*lead, s, p)[..., :n] = y",
     "flat[..., s : s + s * p].reshape(*lead, s, p)[..., :n] = y"),
    ("attention", "dv = used.swapaxes(-1, -2) @ do ", "dv = p.swapaxes(-1, -2) @ do "),
    ("attention", "drel_v = _outer(unskew(used, n_distances), do)",
     "drel_v = _outer(unskew(p, n_distances), do)"),
    ("attention", "        dp += skew(_rows_times(do, rel_v.T), k.shape[-2])\n", ""),
    ("attention", "        dp *= keep\n", "        pass\n"),
    ("attention", "dz = p * (dp - (p * dp).sum(-1, keepdims=True))",
     "dz = p * (dp - (p * dp).mean(-1, keepdims=True))"),
    ("attention", "    dz *= scale\n", ""),
    ("attention", "dk = dz.swapaxes(-1, -2) @ q",
     "dk = dz.swapaxes(-1, -2) @ k[..., -q.shape[-2]:, :]"),
    ("attention", "dq += _rows_times(by_distance, rel_k)", "dq -= _rows_times(by_distance, rel_k)"),
    ("attention", "drel_k = _outer(by_distance, q)", "drel_k = scale * _outer(by_distance, q)"),
    ("attention", "padded[:, :, i : i + n] += dx", "padded[:, :, i : i + n] = dx"),
    ("attention", "return _join(dq, t), dk, dv", "return _join(dq, t), dv, dk"),
    ("routing", "return cache * (2 * dloss / cache.size)", "return cache * (dloss / cache.size)"),
    ("routing", "gather((dout / (times + MEAN_FLOOR)).astype", "gather(dout.astype"),
    ("routing", "        dqn = dqn + dkn\n", ""),
    ("routing", "dqn += (2 * commitment_backward(dloss, apart))",
     "dqn += (commitment_backward(dloss, apart))"),
    ("routing", "dkn = dkn + commitment_backward(dloss, apart_k)",
     "dkn = dkn + commitment_backward(dloss, apart)"),
    ("routing", "normalize_backward(dkn, cache_n), dv, drel_k", "dkn, dv, drel_k"),
    ("routing", "scatter_sum(dv, path.key_index, n_tokens), drel_k",
     "scatter_sum(dv, path.index, n_tokens), drel_k"),
    ("routing", "return gather(dq, back), gather(dk, back)",
     "return gather(dq, order), gather(dk, back)"),
    ("model", "dx = dx + (_norm_backward(dn, cache_n2, g[\"norm_ffn\"]) if pre else dn)",
     "dx = _norm_backward(dn, cache_n2, g[\"norm_ffn\"]) if pre else dn"),
    ("model", "    df = dropout_backward(dx, cache_d2)\n    dn = _ffn_backward(df,",
     "    dn = _ffn_backward(dx,"),
    ("model", "da = dropout_backward(dx, cache_d1)", "da = dx"),
    ("model", "    g[\"bias\"] += dbias\n", ""),
    ("model", "    dq *= cfg.head_width ** -0.5\n", ""),
    ("model", "        dx += dx_k\n", ""),
    ("model", "        _add_tables(g, \"local\", drel)\n", ""),
    ("model", "    dx = dropout_backward(dx, cache_drop)\n    _embed_backward",
     "    _embed_backward"),
    ("model", "embedding_backward(dropout_backward(de, cache_drop), cache)",
     "embedding_backward(de, cache)"),
    ("model", "g[\"classes\"] += embedding_backward(dx.sum(1), cache_class)",
     "g[\"classes\"] += embedding_backward(dx[:, 0], cache_class)"),
    ("model", "    grads[\"output\"][\"b\"] += db\n", ""),
    ("model", "grads[\"embed\"][\"table\"] += dw.T", "grads[\"embed\"][\"table\"] += 2 * dw.T"),
    ("model", "        grads[\"output\"][\"b_embed\"] += db\n", ""),
    ("model", "dx = _norm_backward(dx, cache_norm, grads[\"norm\"])", "pass"),
    # what must not be seen, and what must be
    ("attention", "mask = (distance <= 0)", "mask = (distance <= 1)"),
    ("attention", "mask &= distance > -window", "mask &= distance >= -window"),
    ("routing", "winner = nearest(q, mu, equal_length=True)\n    key_winner",
     "winner = nearest(q - q.mean(2, keepdims=True), mu, equal_length=True)\n    key_winner"),
    ("routing", "mask = path.key_index[..., None, :] <= path.index[..., :, None]",
     "mask = path.key_index[..., None, :] <= path.index[..., :, None] + 1"),
    ("routing", "best = xp.argsort(-scores, axis=-1, kind=\"stable\")[..., :window]",
     "best = xp.argsort(scores, axis=-1, kind=\"stable\")[..., -window:]"),
    ("routing", "return Centroids(xp.where((counts > 0)[..., None], mu, state.mu), count, total)",
     "return Centroids(mu, count, total)"),
    ("routing", "smooth = (count + SMOOTHING) * n / (n + SMOOTHING * count.shape[-1])",
     "smooth = count"),
    ("layers", "[xp.zeros_like(ids[:, :1]), ids[:, :-1]]", "[ids[:, :1], ids[:, :-1]]"),
    ("model", "scale = 1.0 if cfg.routing == \"topk\" else",
     "scale = 2.0 if cfg.routing == \"topk\" else"),
    ("decode", "rank % w)], store.v", "rank % (w - 1 or 1))], store.v"),
    ("decode", "back <= place - first", "back < place - first"),
    ("optim", "g = g + weight_decay * w", "g = g - weight_decay * w"),
    ("optim", "change /= unbias2", "change *= unbias2"),
    ("step", "weights[part] / total", "weights[part] / weights[part].sum()"),
    ("step", "grads += spare[part % together]\n", "pass\n"),
    ("released", "np.matmul(shared, w_o.reshape", "np.matmul(shared.T, w_o.reshape"),
    ("optim", "        m *= MOMENTUM\n", ""),
    ("optim", "newton_schulz(g + MOMENTUM * m)", "newton_schulz(m)"),
    ("optim", "for _ in range(5):", "for _ in range(4):"),
    ("optim", "0.2 * math.sqrt(max(leaf.shape))", "0.2 * math.sqrt(min(leaf.shape))"),
    ("optim", '            and "_rel_" not in leaf.name)', "            )"),
    ("optim", "        done += last - first\n", ""),
    ("kernels/cpu", "b *= NEWTON_SCHULZ[2]", "b *= NEWTON_SCHULZ[0]"),
    ("kernels/cpu", "            w *= 1 - lr * weight_decay\n", ""),
    ("kernels/cpu", "one[...] = _wide(change)", "one[...] = change.reshape(one.shape)"),
    # faster twins
    ("kernels/cpu", "np.ones(len(rows), dy.dtype) @ rows if", "rows.mean(0) if"),
    ("kernels/cpu", "    n *= along\n", "    n *= 1.01 * along\n"),
    ("kernels/cpu", "da += 2 * GELU_SCALE ", "da += GELU_SCALE "),
    ("kernels/cpu", "z[own, here[own]] -= 1\n", "z[own, here[own]] -= 0.99\n"),
    ("kernels/cpu", "drel[0] += _outer(by_distance, q)[:-1]",
     "drel[0] += _outer(by_distance, q)[1:]"),
    ("kernels/cpu", "rows += grads[:, i * self.block", "rows -= grads[:, i * self.block"),
    ("kernels/cpu", "left[count[left] > done]", "left[count[left] > done + 1]"),
]


def main():
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".ci", "runs", "data", "__pycache__", ".hypothesis"))
        shutil.copytree(ROOT / "rt_scratch" / "data", copy / "rt_scratch" / "data",
                        dirs_exist_ok=True)
        survived = sum(not noticed(copy, *bug) for bug in BUGS)
    print(f"{len(BUGS) - survived} of {len(BUGS)} bugs noticed")
    sys.exit(survived > 0)


def noticed(copy, module, old, new):
    """Whether the module's tests fail with the bug in place."""
    path = copy / "rt_scratch" / f"{module}.py"
    text = path.read_text()
    assert text.count(old) == 1, f"{module}.py has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
    tests = [f"tests/{name}" for name in TESTS[module].split()]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider",
         "--hypothesis-profile=ci", *tests],
        cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy)})
    path.write_text(text)
    failed = result.returncode == 1  # 1: tests failed; anything else is a broken plant
    assert result.returncode in (0, 1), result.stdout[-2000:]
    first = next((x for x in result.stdout.splitlines() if x.startswith("FAILED")), "")
    print("noticed " if failed else "SURVIVED", module, "|", old.strip()[:60].replace("\n", " "),
          "|", first[7:70], flush=True)
    return failed


if __name__ == "__main__":
    main()
