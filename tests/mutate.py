"""Plant one bug after another and see that the tests notice.

    python tests/mutate.py              all bugs, in a copy of the project; some ten minutes
    python tests/mutate.py heads run/   those of files whose names begin so

Run it by hand after changing a backward pass or a test. Each entry is a file of rt_scratch, a piece
of its text that occurs there once, and what to put in its place. Exits with 1 if a bug survives.
That every piece is there, once, is a test (test_mutate.py).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {  # where a bug of a file must be noticed
    "dispatch": "test_kernels.py", "dropout": "test_dropout.py test_model.py",
    "layers": "test_layers.py", "attention": "test_attention.py", "kmeans": "test_kmeans.py",
    "routing": "test_routing.py", "multiprobe": "test_multiprobe.py test_decode.py",
    "run/initial": "test_initial.py", "heads": "test_heads.py test_decode.py test_golden.py",
    "config": "test_config.py test_drills.py", "parameters": "test_parameters.py",
    "model": "test_model.py test_golden.py", "step": "test_step.py", "optim": "test_optim.py",
    "decode": "test_decode.py", "released": "test_golden.py test_released.py",
    "data/released_subwords": "test_released_subwords.py test_released.py",
    "run/costs": "test_costs.py",
    "run/log": "test_log.py", "kernels/cpu": "test_cpu_kernels.py",
}
BUGS = [
    # backward passes
    ("layers", "dx = (rows @ w.T)", "dx = 1.001 * (rows @ w.T)"),
    ("layers", "rows.sum(0) if biased", "rows.mean(0) if biased"),
    ("layers", "- n * (dn * n).mean(-1, keepdims=True))", "- n * dn.mean(-1, keepdims=True))"),
    ("layers", "(dy * gain, NormalizeCache", "(dy, NormalizeCache"),
    ("layers", "(dy * n).sum(rows), dy.sum(rows)", "(dy * x).sum(rows), dy.sum(rows)"),
    ("layers", "(1 + 3 * GELU_CUBE * a * a)", "(1 + 2 * GELU_CUBE * a * a)"),
    ("layers", "da, dy * (0.5 * a * (1 + t))", "da, dy * (0.5 * b * (1 + t))"),
    ("layers", "return dx_a + dx_b, dw_gate, dw_value, dw_out",
     "return dx_a + dx_b, dw_value, dw_gate, dw_out"),
    ("layers", "dh = dropout_backward(dh, dropped)\n    da, db", "da, db"),
    ("layers", "dropout_backward(dh, cache.dropped) * cache.positive",
     "dropout_backward(dh, cache.dropped)"),
    ("layers", "math.sqrt(width) * dtable, drows", "dtable, drows"),
    ("layers", "dposition = math.sqrt(3 * width)", "dposition = math.sqrt(width)"),
    ("layers", "segment_sum(dposition, column,", "segment_sum(dposition, row,"),
    ("layers", "segment_sum(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), table.shape[0])",
     "segment_sum(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1) * 0, table.shape[0])"),
    ("layers", "a * s * b, GateCache", "a * s, GateCache"),
    ("layers", "dy * b * s * (1 + a * (1 - s))", "dy * b * s * (1 + b * (1 - s))"),
    ("layers", "dy * (a * s)\n", "dy * s\n"),
    ("layers", "return _gated_backward(swiglu, swiglu_backward,",
     "return _gated_backward(geglu, geglu_backward,"),
    ("dropout", "return dropout(dy, cache)[0]", "return dy"),
    ("dropout", "keep.astype(dtype).reshape(shape)", "keep.reshape(shape)"),  # float64
    ("dropout", "(65536 / (65536 - threshold))", "1"),
    ("dropout", "halves.reshape(-1)[start - 8 * first :", "halves.reshape(-1)[:"),
    ("layers", "targets[rows]] -= 1", "targets[rows]] -= 0.999"),
    ("layers", "dz *= (dloss * weights[rows])", "dz *= (dloss * weights[rows] ** 2)"),
    ("layers", "        db += dz.sum(0)\n", ""),
    ("layers", "* (bounds[1:] > bounds[:-1])[:, None]", ""),
    ("attention", "segment_sum(drows, distance_index(table, first, last)",
     "segment_sum(drows, distance_index(table, first + 1, last + 1)"),
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
    ("attention", "return join_blocks(dq, t), dk, dv", "return join_blocks(dq, t), dv, dk"),
    ("kmeans", "cache.apart * (2 * dloss / cache.apart.size)",
     "cache.apart * (dloss / cache.apart.size)"),
    ("routing", "gather((dout / (cache.times + MEAN_FLOOR)).astype", "gather(dout.astype"),
    ("routing", "        dqn = dqn + dkn\n", ""),
    ("routing", "dqn += (2 * commitment_backward(dloss, cache.commitment))",
     "dqn += (commitment_backward(dloss, cache.commitment))"),
    ("routing", "dkn = dkn + commitment_backward(dloss, cache.key_commitment)",
     "dkn = dkn + commitment_backward(dloss, cache.commitment)"),
    ("routing", "normalize_backward(dkn, cache.key), dv, drel_k", "dkn, dv, drel_k"),
    ("routing", "scatter_sum(dv, key_members, n_tokens), drel_k",
     "scatter_sum(dv, members, n_tokens), drel_k"),
    ("routing", "return gather(dq, back), gather(dk, back)",
     "return gather(dq, order), gather(dk, back)"),
    ("multiprobe", "dz = p * (dp - gather((do * o).sum(-1,",
     "dz = p * (dp - gather((do * o).mean(-1,"),
    ("multiprobe", "dq = _of_queries(dq, tile).sum(3)", "dq = _of_queries(dq, tile).max(3)"),
    ("multiprobe", "_outer(_by_distance(used, tile, rows_v), do_rows)",
     "_outer(_by_distance(p, tile, rows_v), do_rows)"),
    ("multiprobe", "        dp += _by_key(do_rows @ _wide(rows_v).T, tile)\n", ""),
    ("multiprobe", "n * row + tile.column - p + 1 +", "n * row + n - p +"),
    ("multiprobe", "slots[:, :, i : i + n] += sums", "slots[:, :, i : i + n] = sums"),
    ("model", "dx = dx + (_norm_backward(dn, cache.norm_ffn, g[\"norm_ffn\"]) if pre else dn)",
     "dx = _norm_backward(dn, cache.norm_ffn, g[\"norm_ffn\"]) if pre else dn"),
    ("model", "df = dropout_backward(dx, cache.dropped_ffn)", "df = dx"),
    ("model", "da = dropout_backward(dx, cache.dropped_attention)", "da = dx"),
    ("model", "    g[\"bias\"] += dbias\n", ""),
    ("model", "    dq *= cfg.head_width ** -0.5\n", ""),
    ("model", "        dx += dx_k\n", ""),
    ("model", "g[\"ffn\"][name] += gradient", "g[\"ffn\"][name] += 2 * gradient"),
    ("model", "            g[name] += gradient\n", "            pass\n"),
    ("model", "(dropout_backward(dx, cache.dropped), cache.embed,", "(dx, cache.embed,"),
    ("model", "embedding_backward(dropout_backward(de, cache.dropped), cache.table)",
     "embedding_backward(de, cache.table)"),
    ("model", "g[\"classes\"] += embedding_backward(dx.sum(1), cache.classes)",
     "g[\"classes\"] += embedding_backward(dx[:, 0], cache.classes)"),
    ("model", "    grads[\"output\"][\"b\"] += db\n", ""),
    ("model", "grads[\"embed\"][\"table\"] += dw.T", "grads[\"embed\"][\"table\"] += 2 * dw.T"),
    ("model", "        grads[\"output\"][\"b_embed\"] += db\n", ""),
    ("model", "dx = _norm_backward(dx, cache.norm, grads[\"norm\"])", "pass"),
    ("heads", "return dq, dk, dv, _table_gradients(\"local\", *drel)",
     "return dq, dk, dv, _table_gradients(\"local\", *drel[::-1])"),
    ("heads", "return dq, dk, dv, _table_gradients(\"routing\", *drel)", "return dq, dk, dv, {}"),
    # what must not be seen, and what must be
    ("attention", "mask = (distance <= 0)", "mask = (distance <= 1)"),
    ("attention", "mask &= distance > -window", "mask &= distance >= -window"),
    ("routing", "winner = nearest(q, mu, equal_length=True)\n    key_winner",
     "winner = nearest(q - q.mean(2, keepdims=True), mu, equal_length=True)\n    key_winner"),
    ("routing", "mask = route.key_members[..., None, :] <= route.members[..., :, None]",
     "mask = route.key_members[..., None, :] <= route.members[..., :, None] + 1"),
    ("routing", "best = xp.argsort(-scores, axis=-1, kind=\"stable\")[..., :window]",
     "best = xp.argsort(scores, axis=-1, kind=\"stable\")[..., -window:]"),
    ("multiprobe", "(slots[..., None, :] < high[..., None])",
     "(slots[..., None, :] <= high[..., None])"),
    ("multiprobe", "xp.maximum(first, end - w)", "xp.maximum(first, end - w - 1)"),
    ("multiprobe", "n_tiles = (r * t + n_blocks * (s - 1)) // s", "n_tiles = r * t"),
    ("multiprobe", "nearest(k, mu, equal_length=True)", "nearest(k, mu)"),
    ("multiprobe", "    p *= xp.exp(top - gather(lse, tile.query))\n",
     "    p /= xp.maximum(total, 1e-30)\n"),
    ("multiprobe", "key_winner = array_module(q), routed.route.key_winner",
     "key_winner = array_module(q), routed.route.winner"),
    ("multiprobe", "(back < count).reshape", "(back <= count).reshape"),
    ("multiprobe", "store.count[at] = count + 1", "store.count[at] = count"),
    ("kmeans", "weight = xp.minimum(weight, distance) if draw", "weight = distance if draw"),
    ("run/initial", "if part.keys else [])\n", "if False else [])\n"),
    ("run/initial", "if there.get(name) != here.get(name):", "if name not in here:"),
    ("kmeans", "return Centroids(xp.where((counts > 0)[..., None], mu, state.mu), count, total)",
     "return Centroids(mu, count, total)"),
    ("kmeans", "smooth = (count + SMOOTHING) * n / (n + SMOOTHING * count.shape[-1])",
     "smooth = count"),
    ("layers", "[xp.zeros_like(ids[:, :1]), ids[:, :-1]]", "[ids[:, :1], ids[:, :-1]]"),
    ("kmeans", "state.count + (1 - decay) * (counts - state.count)",
     "state.count + decay * (counts - state.count)"),
    ("kmeans", "return hot.sum((0, 3)), (hot @ x).sum(0)",
     "return hot.sum((0, 3)), (hot @ x).mean(0)"),
    ("kmeans", "xp.sqrt(xp.maximum((mu * mu)", "(xp.maximum((mu * mu)"),
    ("kmeans", "return (apart * apart).mean()", "return (apart * apart).sum()"),
    ("heads", "Rule(TOPK, context.cfg.window, 1.0)", "Rule(TOPK, context.cfg.window, 2.0)"),
    ("heads", "Rule(CAUSAL, cfg.window, cfg.head_width ** -0.5)", "Rule(CAUSAL, cfg.window, 1.0)"),
    ("heads", "RANDOM, cfg.window, cfg.head_width ** -0.5,", "RANDOM, cfg.window, 1.0,"),
    ("heads", "own = not (kind.routes and cfg.share_qk)", "own = True"),
    ("heads", "head, key = head + n, key + n * own", "head, key = head + n, key + n"),
    ("heads", "key=[cfg.seed_random, layer]", "key=[cfg.seed_random, 0]"),
    ("heads", "guide[:, position % context.cfg.seq_len]", "guide[:, position % 7]"),
    ("heads", "(position // cfg.block - cfg.lookback) * cfg.block", "position - cfg.block"),
    ("heads", "if first and position % s == 0", "if first and position % s == s - 1"),
    ("heads", "distance_rows(table, 1 - len(rows), 0)", "distance_rows(table, 2 - len(rows), 1)"),
    ("heads", "store.rows_v[-n:]", "store.rows_v[:n]"),
    ("heads", "store.members[w:][row] =", "store.members[w - 1 :][row] ="),
    ("heads", "    store.next[cluster] = store.after[row]\n", ""),
    ("heads", "first[:, None] + (slot + 1) % w", "first[:, None] + slot % w"),
    ("heads", "first + count.reshape(-1) % w", "first + (count.reshape(-1) + 1) % w"),
    ("heads", "xp.maximum(newest - back, 0)", "xp.maximum(newest - back - 1, 0)"),
    ("heads", "back < count[..., None], 0", "back <= count[..., None], 0"),
    ("heads", "distance_rows(rel_v, 1 - w, 0)", "distance_rows(rel_v, 2 - w, 1)"),
    ("heads", "store.guide[...] = unit_length(context.mu)", "store.guide[...] = context.mu"),
    ("heads", "member = (index[..., -1] == position)", "member = (index[..., -1] >= 0)"),
    ("decode", "memory.position = shifted.shape[1]", "memory.position = 1"),
    ("decode", "    memory.position += 1\n", ""),
    ("decode", "    x = x + _attention(n, p", "    x = _attention(n, p"),
    ("decode", "p[\"w_q\"] * cfg.head_width ** -0.5", "p[\"w_q\"]"),
    ("decode", "p[xp.cumsum(p, axis=-1) - p >= top_p]", "p[xp.cumsum(p, axis=-1) >= top_p]"),
    ("decode", "z[:, top_k:] = -math.inf", "z[:, top_k + 1:] = -math.inf"),
    ("config", "if layer in self._layers(self.full_layers)", "if layer in self.full_layers"),
    ("config", "if both := self._layers(self.routing_layers) & self._layers(self.full_layers)",
     "if both := set(self.routing_layers) & set(self.full_layers)"),
    ("config", "(k for k in KINDS if KINDS[k].routes)", "(k for k in KINDS)"),
    ("parameters", "bound = math.sqrt(3 * gain / (sum(shape) / 2))",
     "bound = math.sqrt(3 * gain / sum(shape))"),
    ("parameters", "zlib.crc32(leaf.name.encode())", "zlib.crc32(leaf.name.encode()), 0][:1] + [7"),
    ("optim", "g = g + weight_decay * w", "g = g - weight_decay * w"),
    ("optim", "v / (1 - beta2 ** (step + 1))", "v / (1 - beta2 ** step) if step else v"),
    ("optim", "v += (1 - beta2) * (grads * grads - v)", "v += (1 - beta2) * (grads - v)"),
    ("optim", "grads *= xp.minimum(1, limit", "grads *= xp.maximum(1, limit"),
    ("optim", "lr * (step + 1) / warmup if step < warmup", "lr * step / warmup if step < warmup"),
    ("optim", "(0.1 + 0.45 * (1 + math.cos", "(0.1 + 0.9 * (1 + math.cos"),
    ("optim", "max(step - warmup, 0) / max(1, total - warmup)", "max(step - warmup, 0) / total"),
    ("optim", "math.sqrt(max(step, warmup, 1))", "math.sqrt(max(step, 1))"),
    ("optim", "if self.steady + 1 >= 2000", "if self.steady >= 2000"),
    ("step", "weights = weights / weights.sum()", "weights = weights / weights.size"),
    ("step", "grads += spare[i % together]\n", "pass\n"),
    ("step", "                                           state.step, weight_decay",
     "                                           state.step + 1, weight_decay"),
    ("step", "lr = learning_rate(state.step,", "lr = learning_rate(state.step + 1,"),
    ("step", "clip_by_global_norm(grads, train.clip) if train.clip", "global_norm(grads) if 1"),
    ("step", "state.scale.after(applied) if fp16", "state.scale.after(True) if fp16"),
    ("step", "        grads *= 1 / scale\n", "        pass\n"),
    ("step", "model.commitment * part.share", "model.commitment"),
    ("step", "if not KINDS[model.routing].mode.learns", "if False"),
    ("step", "min(len(own), n))", "min(len(own), train.accumulate))"),
    ("run/costs", "return 6 * entries + 14 * keys", "return 6 * entries + 12 * keys"),
    ("run/costs", "6 * entries", "4 * entries"),
    ("run/costs", " and \"_rel_\" not in leaf.name", ""),
    ("run/costs", "(\"embed.table\", \"embed.classes\")", "(\"embed.table\",)"),
    ("run/costs", "    if model.tie_embedding:\n", "    if model.embed_width:\n"),
    ("run/costs", "sum(n * KINDS[kind].keys(model)", "sum(KINDS[kind].keys(model)"),
    ("run/costs", "OPTIMIZERS[train.optimizer].copies", "2"),
    ("run/costs", "train.accumulate * min(train.parts, train.batch) - 1)",
     "min(train.parts, train.batch) - 1)"),
    ("run/costs", "live = train.batch * model.seq_len",
     "live = train.batch * train.accumulate * model.seq_len"),
    ("run/costs", "per_token // model.n_layers + ", "per_token + "),
    ("run/log", "float(share.min()), \"largest\"", "float(share.mean()), \"largest\""),
    ("run/log", "float(share.max())", "float(share.mean(0).max())"),
    ("run/log", "(counts == 0).sum()", "(counts < 2).sum()"),
    ("run/log", "share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)",
     "share = counts / np.maximum(counts.sum(), 1)"),
    ("run/log", "[float(m.uncovered)", "[float(m.several)"),
    ("dispatch", "(twin if takes is None or takes(*args) else function)", "twin"),
    ("released", "np.matmul(shared, w_o.reshape", "np.matmul(shared.T, w_o.reshape"),
    ("released", "value[:, value.shape[1] - leaf.shape[1] :]", "value[:, : leaf.shape[1]]"),
    ("released", "Centroids(mu, read(count), read(total))", "Centroids(mu, read(count), mu)"),
    ("released", "if missing or unused:", "if missing:"),
    ("released", "if embed_width == width else", "if embed_width else"),
    ("released", "width // head_width - n_routing", "width // head_width"),
    ("released", "(table[0] - 1) // 2", "table[0] // 2 + 1"),
    ("released", "fields[\"lookback\"] = flange // block", "fields[\"lookback\"] = flange"),
    ("released", "min(n for n in lengths if n)", "max(lengths)"),
    ("released", "if name in hparams and hparams[name] != value]", "if False]"),
    ("released", "if config.norm == \"pre\" else \"layer_post", "if config.norm else \"layer_post"),
    ("data/released_subwords", "len(ids) >= length:\n                if", "len(ids) > length:\n"
     "                if"),
    ("data/released_subwords", "if before and run[0].isalnum():", "if run[0].isalnum():"),
    ("data/released_subwords", "if run != \" \"]", "if run.strip()]"),
    ("data/released_subwords", "start + self.longest)", "start + self.longest - 3)"),
    ("data/released_subwords", "self.encode_line(line.strip())\n            if", "self.encode_line("
     "line)\n            if"),
    ("data/released_subwords", "rstrip(\"\\\\\"))) % 2", "rstrip(\"\\\\\"))) % 1"),
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
    ("kernels/cpu", "    rstd += epsilon\n", "    rstd += 2 * epsilon\n"),
    ("kernels/cpu", "        h *= half\n", ""),
    ("kernels/cpu", "x.size < 4 * x.shape[-1] else x.dot(w)", "x.size < 4 * x.shape[-1] else x"),
    ("kernels/cpu", "np.ones(len(rows), dy.dtype) @ rows if", "rows.mean(0) if"),
    ("kernels/cpu", "    n *= along\n", "    n *= 1.01 * along\n"),
    ("kernels/cpu", "da += 2 * GELU_SCALE ", "da += GELU_SCALE "),
    ("kernels/cpu", "z[own, here[own]] -= 1\n", "z[own, here[own]] -= 0.99\n"),
    ("kernels/cpu", "drel[0] += _outer(by_distance, q)[:-1]",
     "drel[0] += _outer(by_distance, q)[1:]"),
    ("kernels/cpu", "rows += grads[:, i * s", "rows -= grads[:, i * s"),
    ("kernels/cpu", "z[i - r.start, :, : before * cut.block] = HIDDEN", "pass"),
    ("kernels/cpu", "np.copyto(z, HIDDEN, where=apart)", "pass"),
    ("kernels/cpu", "wide[:, cut.near] += wide", "wide[:, cut.near] -= wide"),
    ("kernels/cpu", "left[count[left] > done]", "left[count[left] > done + 1]"),
]


def main(prefixes):
    bugs = [bug for bug in BUGS if bug[0].startswith(tuple(prefixes) or "")]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".ci", "runs", "data", "__pycache__", ".hypothesis"))
        shutil.copytree(ROOT / "rt_scratch" / "data", copy / "rt_scratch" / "data",
                        dirs_exist_ok=True)
        survived = sum(not noticed(copy, *bug) for bug in bugs)
    print(f"{len(bugs) - survived} of {len(bugs)} bugs noticed")
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
         "--hypothesis-profile=mutants", *tests],
        cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy)})
    path.write_text(text)
    failed = result.returncode == 1  # 1: tests failed; anything else is a broken plant
    assert result.returncode in (0, 1), result.stdout[-2000:]
    first = next((x for x in result.stdout.splitlines() if x.startswith("FAILED")), "")
    print("noticed " if failed else "SURVIVED", module, "|", old.strip()[:60].replace("\n", " "),
          "|", first[7:70], flush=True)
    return failed


if __name__ == "__main__":
    main(sys.argv[1:])
