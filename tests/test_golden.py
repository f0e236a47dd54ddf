"""Agreement with the authors' released code, array by array (golden/README.md).

Left out, because we do otherwise on purpose:
- A, `noema_train`, gradient of the means: here centroids are state and have no gradient.
- A, `empty_cluster`: the released mean of a cluster without tokens grows to 5e6; ours stays.
- A, B3, E, F, counts: the released code mixes the heads' counts by a reshape. Counts are fed from
  the stored ones, and everything computed from them is compared.
- B, B3, C, key columns of routing heads that share queries and keys: never used, gradient 0.
- D3, `zero_rows`: the released code takes a row of exact zeros for padding and lets its query see
  the future; here every token is a token.
- H, two-dimensional blocks: not part of this model.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rt_scratch import model, released, routing
from rt_scratch.attention import (
    attend,
    distance_rows,
    local_attention,
    local_attention_backward,
    skew,
)
from rt_scratch.config import ModelConfig
from rt_scratch.errors import UserError
from rt_scratch.kmeans import (
    Centroids,
    commitment,
    commitment_backward,
    nearest,
    update_centroids,
)
from rt_scratch.layers import (
    embedding,
    geglu,
    image_embedding,
    linear,
    normalize,
    shift_right,
    timing_signal,
)
from rt_scratch.optim import adafactor_init, adafactor_update, learning_rate
from rt_scratch.parameters import Leaf, parameter_table, views
from rt_scratch.routing import TOPK, Rule, routing_attention, routing_attention_backward

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}  # of the array's largest entry
both = pytest.mark.parametrize("dtype", ["float64", "float32"])


class Golden:
    """One file; floating-point arrays come in the dtype under test, or as they are."""

    def __init__(self, name, dtype="float64"):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.dtype = dtype

    def __getitem__(self, name):
        a = self.arrays[name]
        return a.astype(self.dtype) if a.dtype.kind == "f" else a

    def below(self, prefix):
        return {k[len(prefix):]: self[k] for k in self.arrays if k.startswith(prefix)}

    def check(self, got, name):
        want = self.arrays[name]
        assert got.shape == want.shape, name
        error = np.abs(got.astype("float64") - want).max() / max(np.abs(want).max(), 1e-300)
        stored = 1e-7 if want.dtype == np.float32 else 0  # a few large results
        assert error <= max(TOLERANCE[self.dtype], stored), (name, error)  # NaN fails


# ------------------------------------------------------------------------------------- k-means

@both
@pytest.mark.parametrize("case", ["fresh_decay0.9", "fresh_decay0.999", "warm_decay0.9",
                                  "warm_decay0.999", "empty_cluster_decay0.9"])
def test_online_kmeans(case, dtype):
    z = Golden("A", dtype)
    decay, empty, warm = float(case.rpartition("decay")[2]), "empty" in case, "warm" in case
    mu = z["in/means0_empty" if empty else "in/means0"]
    count = z["in/ema_count0_warm"] if warm else np.zeros(mu.shape[:2], dtype)
    state = Centroids(mu, count, z["in/ema_means0_warm"] if warm else mu)
    for step in (1, 2, 3):
        at = f"out/{case}/step{step}"
        x = z["in/x_raw" if empty else f"in/x{step}"]
        z.check(-(x @ state.mu.swapaxes(-1, -2)), f"{at}/x_dist")
        winner = nearest(x, state.mu)
        loss, cache = commitment(x, state.mu, winner)
        z.check(np.asarray(0.25 * loss), f"{at}/loss")
        if f"{at}/grad_inputs" in z.arrays:
            z.check(commitment_backward(0.25, cache), f"{at}/grad_inputs")
        hot = (winner[..., None] == np.arange(4)) & (x != 0).any(-1)[..., None]
        sums = np.einsum("bhtk,bhtd->hkd", hot.astype(dtype), x)
        before, counts = state, fed(state, z[f"{at}/ema_count"], decay)
        state = update_centroids(state, counts, sums, decay)
        z.check(state.count, f"{at}/ema_count")
        z.check(state.total, f"{at}/ema_means")
        won = counts > 0
        assert won.all() != empty
        np.testing.assert_array_equal(state.mu[~won], before.mu[~won])
        # where the released mean went its own way, the walk goes on from it
        stored = z[f"{at}/means"]
        error = np.abs(state.mu - stored)[won].max() / np.abs(stored[won]).max()
        assert error <= TOLERANCE[dtype]
        state = state._replace(mu=np.where(won[..., None], state.mu, stored))


def fed(state, count_after, decay):
    """The counts that lead to the stored average."""
    counts = np.rint(state.count + (count_after - state.count) / (1 - decay))
    return counts.astype(state.mu.dtype)


@both
@pytest.mark.parametrize("case, factor", [("eval", 0.25), ("noema_train", 0.25)])
def test_kmeans_without_update(case, factor, dtype):
    z = Golden("A", dtype)
    x, mu = z["in/x1"], z["in/means0"]
    loss, cache = commitment(x, mu, nearest(x, mu))
    z.check(commitment_backward(factor, cache), f"out/{case}/step1/grad_inputs")
    if case == "noema_train":  # the released loss then has the same value once more, for the means
        factor += 1
    z.check(np.asarray(factor * loss), f"out/{case}/step1/loss")


def unfold_gradients(dw, shared, w_o):
    """Gradients of the (D, D) matrix and of the released w_o from that of the folded one."""
    d = shared.shape[0]
    blocks, dblocks = w_o.reshape(-1, d, w_o.shape[1]), dw.reshape(-1, d, w_o.shape[1])
    dshared = np.matmul(dblocks, blocks.swapaxes(1, 2)).sum(0)
    return dshared, np.matmul(shared.T, dblocks).reshape(w_o.shape)


# ----------------------------------------------------------------------------------- attention

@both
@pytest.mark.parametrize("file, case", [
    ("B", "norel"), ("B", "rel17"), ("B", "rel5_clip"),
    ("B3", "train_decay0.9"), ("B3", "train_decay0.999"),
    ("C", "norel"), ("C", "rel17"), ("C", "share_qk_rel17")])
def test_routing_attention(file, case, dtype, monkeypatch):
    """In C the members of a cluster see each other whatever their time, as no head of ours does."""
    z = Golden(file, dtype)
    if file == "C":
        every = np.ones((16, 16), bool)
        monkeypatch.setattr(routing, "attend", lambda q, k, v, rows_k, rows_v, mask, *rest: attend(
            q, k, v, rows_k, rows_v, every, *rest))
        monkeypatch.setattr(routing, "distance_rows", lambda table, first, last: distance_rows(
            table, first, -first))
    q, k, v, r = (z[f"in/{case}/{name}"] for name in "qkvR")
    scope = f"w/{case}/cluster_attention/cluster_attention"
    has_rel = f"{scope}/relative_positions_keys/embeddings" in z.arrays
    rel_k, rel_v = ((z[f"{scope}/relative_positions_{x}/embeddings"] for x in ("keys", "values"))
                    if has_rel else (None, None))
    shared = file != "C" or "share" in case
    rule = Rule(TOPK, 16, 1.0)
    (o, loss), cache, membership, route = routing_attention(
        q, None if shared else k, v, rel_k, rel_v, z[f"{scope}/means"], rule)
    np.testing.assert_array_equal(route.members, z[f"out/{case}/q_idx"])
    z.check(o, f"out/{case}/output")
    beta = z[f"out/{case}/cluster_loss"] / loss  # the cases have several betas
    assert min(abs(beta / b - 1) for b in (1.0, 0.25, 1e-4, 1e-3, 1e-2, 0.1)) < 1e-5, beta
    gradients = routing_attention_backward(r, 0.0, cache)
    for name, got in zip(("q", "k", "v", "rel_keys", "rel_values"), gradients, strict=True):
        if got is not None:
            z.check(got, f"out/{case}/grad_main/{name}")
    from_loss = routing_attention_backward(np.zeros_like(r), beta, cache)
    z.check(from_loss[0], f"out/{case}/grad_loss/q")
    if not shared:
        z.check(from_loss[1], f"out/{case}/grad_loss/k")
    if file == "B3":
        state = Centroids(*(z[f"{scope}/{x}"] for x in ("means", "ema_count", "ema_means")))
        decay = float(case.rpartition("decay")[2])
        counts = fed(state, z[f"out/{case}/after_ema_count"], decay)
        after = update_centroids(state, counts, membership.sums, decay)
        z.check(after.total, f"out/{case}/after_ema_means")
        z.check(after.mu, f"out/{case}/after_means")


@both
@pytest.mark.parametrize("file, case, lookback", [
    ("D", "q16_f16_norel", 1), ("D", "q16_f16_rel17", 1),
    ("D3", "q16_f0_norel", 0), ("D3", "seq56_rel17", 1)])
def test_local_attention(file, case, lookback, dtype):
    z = Golden(file, dtype)
    scope = f"w/{case}/self_attention"
    x, r = z[f"in/{case}/x"], z[f"in/{case}/R"]
    w_q, w_k, w_v = (z[f"{scope}/{name}/kernel"] for name in "qkv")
    tables = z.below(f"{scope}/attention_nd/local_nd/relative_positions_")
    shared, w_out = z[f"{scope}/attention_nd/dense/kernel"], z[f"{scope}/output_transform/kernel"]
    w_o = released.fold(shared, w_out)
    cfg = ModelConfig(width=16, n_local_heads=2, n_routing_heads=0, seq_len=x.shape[1], block=16,
                      window=16, lookback=lookback, local_max_distance=17 if tables else 0)
    p = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    if tables:
        p |= {"local_rel_k": tables["keys/embeddings"], "local_rel_v": tables["values/embeddings"]}
    y, cache, _ = model.attention(x, p, cfg, 0)
    z.check(y, f"out/{case}/output")
    (q, k, v), _ = model.project(x, p, cfg)
    for name, got in (("q_scaled", q), ("k", k), ("v", v)):
        z.check(got, f"out/{case}/{name}")

    g = {name: np.zeros_like(a) for name, a in p.items()}
    dx = model.attention_backward(r, 0.0, cache, g)
    z.check(dx, f"out/{case}/grad/x")
    at = f"out/{case}/grad/self_attention"
    for name in "qkv":
        z.check(g[f"w_{name}"], f"{at}/{name}/kernel")
    dshared, dw_out = unfold_gradients(g["w_o"], shared, w_out)
    z.check(dshared, f"{at}/attention_nd/dense/kernel")
    z.check(dw_out, f"{at}/output_transform/kernel")
    if tables:
        for ours, theirs in (("k", "keys"), ("v", "values")):
            z.check(g[f"local_rel_{ours}"],
                    f"{at}/attention_nd/local_nd/relative_positions_{theirs}/embeddings")


# -------------------------------------------------------------------------------- whole models

TEXT = ModelConfig(
    vocab_size=80, seq_len=64, pad_id=0, n_layers=2, width=32, ffn_width=48, n_local_heads=2,
    n_routing_heads=2, routing="topk", n_clusters=4, window=16, block=16, lookback=1,
    local_max_distance=17, routing_max_distance=17, centroid_decay=0.9)
CONFIGS = {
    "E1": replace(TEXT, norm="post"),
    "E2": TEXT,
    "F": replace(
        TEXT,
        kind="image", image_size=8, vocab_size=256, seq_len=192, pad_id=-1, width=24, ffn="relu",
        ffn_width=40, norm="post", window=48, block=32, local_max_distance=0,
        routing_max_distance=0),
}


@both
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_model(name, dtype):
    z, cfg = Golden(name, dtype), CONFIGS[name].validate()
    variables = z.below("w/")
    params, state = released.convert(variables, cfg)
    ids = z["in/targets"].reshape(2, -1)
    weights = model.target_weights(cfg, ids, dtype)
    weights /= weights.sum()
    (nats, commitment_loss), cache, report = model.loss(params, state, cfg, ids, weights)
    z.check(nats, "out/loss_training")
    z.check(cfg.commitment * commitment_loss, "out/loss_extra")
    logits = model.logits(params, state, cfg, ids)
    if name == "F":
        picture = logits.reshape(2, 8, 8, 3, 256)
        np.testing.assert_allclose(picture[:, ::2], z["out/logits_even_rows_f32"], atol=1e-4)
        z.check(picture[:, :2, :2], "out/logits_sample_f64")
    else:
        z.check(logits, "out/logits")
    for i in range(2):
        np.testing.assert_array_equal(report.routes[i].members, z[f"out/layer{i}/idx"])
        scope = f"decoder_layer_{i}/self_attention/self_attention/attention_nd/" \
                "cluster_attention/cluster_attention"
        counts = fed(state[i], z[f"out/after/{scope}/ema_count"], 0.9)
        after = update_centroids(state[i], counts, report.memberships[i].sums, 0.9)
        z.check(after.total, f"out/after/{scope}/ema_means")
        z.check(after.mu, f"out/after/{scope}/means")

    for kind, dnats, dloss in (("training", 1.0, 0.0), ("extra", 0.0, cfg.commitment)):
        _, cache, _ = model.loss(params, state, cfg, ids, weights)  # a backward uses its cache up
        table = parameter_table(cfg)
        flat = np.zeros(table[-1].stop, dtype)
        model.loss_backward(dnats, dloss, cache, views(flat, table))
        got = released_gradients(flat, table, cfg, variables)
        stored = [k for k in z.arrays if k.startswith(f"out/grad_{kind}/")]
        assert len(stored) > 15
        for key in stored:
            variable = key.partition(f"grad_{kind}/")[2]
            z.check(got[variable].reshape(z.arrays[key].shape), key)


def released_gradients(flat, table, cfg, variables):
    """Our gradients under the released names, in the released layout."""
    out = {}
    for leaf in table:
        g = flat[leaf.start : leaf.stop].reshape(leaf.shape)
        if leaf.name.endswith("w_o"):
            scope = f"decoder_layer_{leaf.name.split('.')[1]}/self_attention/self_attention"
            names = [f"{scope}/attention_nd/dense/kernel", f"{scope}/output_transform/kernel"]
            pair = unfold_gradients(g, *(variables[n] for n in names))
            out |= dict(zip(names, pair, strict=True))
        elif leaf.name.endswith("w_k"):  # routing heads: columns that are never used
            name = released.released_name(leaf.name, cfg)
            out[name] = np.zeros_like(variables[name])
            out[name][:, -g.shape[1]:] = g
        else:
            out[released.released_name(leaf.name, cfg)] = g
    return out


def test_convert_names_what_is_wrong():
    variables = Golden("E1").below("w/")
    for change, word in (
            (lambda v: v.pop("emb_dense/bias"), "lack emb_dense/bias$"),
            (lambda v: [v.pop(n) for n in ("emb_dense/bias", "final_dense_2/bias")],
             "lack emb_dense/bias, final_dense_2/bias$"),
            (lambda v: v.update(surplus=np.zeros(2), more=np.zeros(())),
             "no place for surplus, more$"),
            (lambda v: v.update({"emb_dense/kernel": np.zeros((4, 4)),
                                 "emb_dense/bias": np.zeros(3)}),
             r"emb_dense/kernel \(4, 4\), needed \(32, 32\); emb_dense/bias \(3,\), needed"),
            (lambda v: v.update({"emb_dense/bias": np.full(32, np.nan)}),
             "emb_dense/bias has values that are not finite")):
        wrong = dict(variables)
        change(wrong)
        with pytest.raises(UserError, match=word):
            released.convert(wrong, CONFIGS["E1"])


# ----------------------------------------------------------------------------- optimizer, rest

@both
def test_adafactor(dtype):
    z = Golden("G", dtype)
    names = ("matrix", "vector", "tensor3d", "pos4d", "scalar", "zero_matrix", "tiny_grad")
    table, start = [], 0
    for name in names:
        shape = z[f"in/{name}/init"].shape
        table.append(Leaf(name, shape, start, start + int(np.prod(shape)), ""))
        start = table[-1].stop
    flat = np.concatenate([z[f"in/{name}/init"].ravel() for name in names])
    state = adafactor_init(flat, table)
    for step in range(5):
        grads = np.concatenate([z[f"in/{name}/grads"][step].ravel() for name in names])
        adafactor_update(flat, grads, state, table, 0.01, step)
        for leaf in table:
            z.check(flat[leaf.start : leaf.stop].reshape(leaf.shape),
                    f"out/step{step}/{leaf.name}")


def test_learning_rate():
    z = Golden("G")
    got = [learning_rate(int(s), "rsqrt", 0.01, 10_000, 0) for s in z["lr/steps"]]
    np.testing.assert_allclose(got, z["lr/values_f32"], rtol=3e-7)  # stored as float32


def test_shift_and_embeddings():
    z = Golden("H")
    shifted = shift_right(z["in/shift1d"][..., 0])
    np.testing.assert_array_equal(shifted, z["out/shift1d_block16"][..., 0])
    table = z["in/channel_table"]
    no_positions = np.zeros((1, 1, 6)), np.zeros((1, 1, 6))
    ids = z["in/channel_targets"].reshape(1, -1)
    # the released function embeds one row of two pixels; the square picture here has one
    for pixel in range(2):
        y, _ = image_embedding(ids[:, 3 * pixel : 3 * pixel + 3], 0, table, *no_positions)
        np.testing.assert_allclose(y[0].ravel(), z["out/channel_embeddings"][0, 0, pixel])
    for length, width in ((20, 11), (64, 32)):
        z.check(timing_signal(np, length, width, "float64")[None],
                f"out/timing_signal_len{length}_ch{width}")


def test_gelu_and_layer_norm():
    z = Golden("H")
    a = z["in/gelu"]
    z.check(geglu(a, np.ones_like(a))[0], "out/gelu")
    z.check(normalize(z["in/layer_norm"])[0], "out/layer_norm_noscale")


@pytest.mark.parametrize("keys, m", [(16, 17), (16, 5), (32, 17), (48, 40), (48, 17)])
def test_relative_positions(keys, m):
    """A table whose row r holds r shows, after the skew, which row each pair uses."""
    want = Golden("H")[f"out/rel_index_q16_k{keys}_max{m}"]
    table = np.arange(2 * m + 1.0)[:, None]
    rows, _ = distance_rows(table, 1 - keys, 0)
    got = skew(np.broadcast_to(rows[:, 0], (16, keys)), keys)
    causal = np.arange(keys)[None] - (keys - 16) <= np.arange(16)[:, None]
    np.testing.assert_array_equal(got[causal], want[causal])
    rows, _ = distance_rows(table, 1 - keys, keys - 1)  # both directions, for equal blocks
    if keys == 16:
        got = skew(np.broadcast_to(rows[:, 0], (16, 2 * keys - 1)), keys)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("lookback", [1, 2])
def test_local_mask(lookback):
    """Attention to constant values weighs visible keys alike; the released bias says which."""
    bias = Golden("H")[f"out/causal_bias_q16_f{16 * lookback}"][0, 0]  # (16, 16 (lookback + 1))
    t = 16 * (lookback + 1)
    q = np.zeros((1, 1, t, t))
    v = np.eye(t)[None, None]
    o, cache = local_attention(q, q, v, None, None, 16, lookback, 1.0)
    weights = o[0, 0, -16:]  # the last block sees all blocks
    np.testing.assert_array_equal(weights > 0, bias == 0)
    dv = local_attention_backward(np.ones_like(o), cache)[2]
    np.testing.assert_allclose(dv.sum(), t * t)


def test_first_layer_of_text():
    """Embedding, dense and shift by hand, against the model's own way in."""
    z = Golden("E1")
    params, _ = released.convert(z.below("w/"), CONFIGS["E1"])
    ids = z["in/targets"].reshape(2, -1)
    p = params["embed"]
    by_hand = linear(embedding(shift_right(ids), p["table"])[0], p["w"], p["b"])[0]
    x, _ = model.embed(params, CONFIGS["E1"], shift_right(ids), 0)
    np.testing.assert_array_equal(x, by_hand)
