// Softmax over rows of attention logits, with everything that would otherwise be another pass over
// them: scale, relative positions, mask, dropout.
//   z_ij = scale (s_ij + r_i,c),  c = j - i + S - 1 - clipped: column of the distance from query i
//   to key j, 0 for all that are below 0: the farthest keys share the first row of the table
//   p_ij = exp(z_ij - lse_i) keep_ij / (1 - rate),  lse_i = log sum_j exp z_ij over visible j
// Axes: b block of the batch, q its S queries, n its N keys, d the P distances. Besides p the same
// numbers are written by distance, u_i,c = sum of p_ij over the keys of that column: o = p v + u
// rel_v are two products. A row that sees nothing gives p = 0 and lse = 0.
// The arrays over n and d hold `rows` rows, a chunk of the batch that begins at first_row; lse,
// mask and dropout know the whole batch.
// Called by attend and attend_backward in cuda/attention.py. One warp per row, eight warps per
// block; p may be s and u may be r where the types agree: once writing has begun, every entry is
// read and written by the same lane.
#include "common.cuh"

// Who sees whom. Query i of block b stands at position b % blocks S + i of its sequence b / blocks,
// key j at position b % blocks S + j - offset. With `mask` its entry decides (a mask of fewer blocks
// than the batch repeats), with window > 0 also: 0 <= position of query - position of key < window, and,
// with `segment`, the same segment at both positions.
struct Sight {
  const bool* mask_mqn;
  const int* segment_bt;
  int queries, keys, mask_blocks, blocks, tokens, offset, window;
};

__device__ inline bool visible(const Sight& sight, int b, int i, int j) {
  if (sight.mask_mqn) {
    u64 row = (u64)(b % sight.mask_blocks) * sight.queries + i;
    if (!sight.mask_mqn[row * sight.keys + j]) return false;
  }
  if (sight.window > 0) {
    int back = i - j + sight.offset;
    int query = b % sight.blocks * sight.queries + i, key = query - back;
    if (back < 0 || back >= sight.window || key < 0 || query >= sight.tokens) return false;
    if (sight.segment_bt) {
      const int* segment_t = sight.segment_bt + (u64)(b / sight.blocks) * sight.tokens;
      return segment_t[query] == segment_t[key];
    }
  }
  return true;
}

// One row of logits.
struct Logits {
  const float *s_n, *r_d;
  int b, i, first, distances;  // key j is in column first + j of r_d, or 0
  float scale;
};

__device__ inline float logit(const Logits& row, const Sight& sight, int j) {
  if (!visible(sight, row.b, row.i, j)) return minus_infinity();
  float z = row.s_n[j];
  if (row.r_d && row.first + j < row.distances) z += row.r_d[max(row.first + j, 0)];
  return z * row.scale;
}

// Fills the columns of a row by distance that no key has to itself: 0, and the sum of the lanes'
// `shared` in the first one.
template <typename T>
__device__ inline void fill_rest(T* u_d, float shared, int first, int keys, int distances,
                                 int lane) {
  shared = warp_sum(shared);
  for (int c = lane; c < distances; c += 32)
    if (c == 0 || c < first || c >= first + keys) store(u_d + c, c == 0 ? shared : 0.0f);
}

template <typename T>
__global__ void __launch_bounds__(256, 4) attention_softmax(
    const float* s_bqn, const float* r_bqd, const bool* mask_mqn, const int* segment_bt, T* p_bqn,
    T* u_bqd, float* lse_bq, long long first_row, long long rows, int queries, int keys,
    int distances, int clipped, int mask_blocks, int blocks, int tokens, int offset, int window, float scale,
    unsigned threshold, unsigned seed_low, unsigned seed_high, unsigned stream,
    const unsigned* step_1, long long first_entry) {
  long long at = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (at >= rows) return;
  long long whole = first_row + at;
  int b = whole / queries, i = whole % queries, first = queries - 1 - i - clipped;
  Sight sight = {mask_mqn, segment_bt, queries, keys, mask_blocks, blocks, tokens, offset, window};
  Logits row = {s_bqn + at * keys, r_bqd ? r_bqd + at * distances : nullptr, b, i, first,
                distances, scale};
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 entry = drop.first + (u64)whole * keys;  // of the row, for dropout

  float top = LOWEST;
  for (int j = lane; j < keys; j += 32) top = fmaxf(top, logit(row, sight, j));
  top = warp_max(top);
  float total = 0;
  for (int j = lane; j < keys; j += 32) total += expf(logit(row, sight, j) - top);
  total = warp_sum(total);
  // Written so that a NaN spreads over the whole row and is seen in the loss.
  float factor = total == 0 ? 0.0f : kept_scale(drop) / total;
  if (lane == 0) lse_bq[whole] = total == 0 ? 0.0f : top + logf(total);

  // Tiles of 256 entries, from a multiple of eight on: each lane draws for eight neighbours, then
  // asks the lane that drew for its own entry.
  int lead = entry % 8;
  float shared = 0;
  for (int base = -lead; base < keys; base += 256) {
    unsigned bits = kept((entry + base) / 8 + lane, drop);
    for (int part = 0; part < 8; part++) {
      int j = base + part * 32 + lane, c = first + j;
      unsigned keep = __shfl_sync(ALL, bits, part * 4 + lane / 8) >> (lane % 8) & 1;
      if (j < 0 || j >= keys) continue;
      float p = keep ? expf(logit(row, sight, j) - top) * factor : 0.0f;
      store(p_bqn + at * keys + j, p);
      if (c <= 0) shared += p;
      else if (u_bqd && c < distances) store(u_bqd + at * distances + c, p);
    }
  }
  if (u_bqd) fill_rest(u_bqd + at * distances, shared, first, keys, distances, lane);
}

// Computes p again from s, r and lse; with g_ij = (dp_ij + dr_i,c) keep_ij / (1 - rate) writes
//   dz_ij = scale q_ij (g_ij - sum_j q_ij g_ij),  q = p without dropout
// and du, the same numbers by distance, beside p and u. In place: p on s, u on r, dz on dp, du on
// dr, where the types agree.
template <typename T>
__global__ void __launch_bounds__(256, 4) attention_softmax_backward(
    const float* s_bqn, const float* r_bqd, const bool* mask_mqn, const int* segment_bt,
    const float* lse_bq, const float* dp_bqn, const float* dr_bqd, T* p_bqn, T* u_bqd, T* dz_bqn,
    T* du_bqd, long long first_row, long long rows, int queries, int keys, int distances,
    int clipped, int mask_blocks, int blocks, int tokens, int offset, int window, float scale,
    unsigned threshold, unsigned seed_low, unsigned seed_high, unsigned stream,
    const unsigned* step_1, long long first_entry) {
  long long at = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (at >= rows) return;
  long long whole = first_row + at;
  int b = whole / queries, i = whole % queries, first = queries - 1 - i - clipped;
  Sight sight = {mask_mqn, segment_bt, queries, keys, mask_blocks, blocks, tokens, offset, window};
  Logits row = {s_bqn + at * keys, r_bqd ? r_bqd + at * distances : nullptr, b, i, first,
                distances, scale};
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 entry = drop.first + (u64)whole * keys;  // of the row, for dropout
  float lse = lse_bq[whole], kept_factor = kept_scale(drop), dot = 0, shared = 0, dshared = 0;
  int lead = entry % 8;

  // First round: the sum; second round: the results.
  for (int round = 0; round < 2; round++) {
    for (int base = -lead; base < keys; base += 256) {
      unsigned bits = kept((entry + base) / 8 + lane, drop);
      for (int part = 0; part < 8; part++) {
        int j = base + part * 32 + lane, c = first + j;
        unsigned keep = __shfl_sync(ALL, bits, part * 4 + lane / 8) >> (lane % 8) & 1;
        if (j < 0 || j >= keys) continue;
        bool by_distance = dr_bqd && c < distances;
        u64 there = at * distances + max(c, 0);
        float q = expf(logit(row, sight, j) - lse);
        float g = dp_bqn[at * keys + j] + (by_distance ? dr_bqd[there] : 0.0f);
        g = keep ? g * kept_factor : 0.0f;
        if (round == 0) {
          dot += q * g;
          continue;
        }
        float p = keep ? q * kept_factor : 0.0f, dz = scale * q * (g - dot);
        store(p_bqn + at * keys + j, p);
        store(dz_bqn + at * keys + j, dz);
        if (c <= 0) {
          shared += p;
          dshared += dz;
        } else if (by_distance) {
          store(u_bqd + there, p);
          store(du_bqd + there, dz);
        }
      }
    }
    if (round == 0) dot = warp_sum(dot);
  }
  if (dr_bqd) {
    fill_rest(u_bqd + at * distances, shared, first, keys, distances, lane);
    fill_rest(du_bqd + at * distances, dshared, first, keys, distances, lane);
  }
}
