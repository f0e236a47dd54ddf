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
// read and written by the same lane, but for column 0 of r and dr, which all lanes read, and which
// is written last, when all have read it.
#include "common.cuh"

// Who sees whom. Query i of block b stands at position b % blocks S + i of its sequence b / blocks,
// key j at position b % blocks S + j - offset. With `mask` its entry decides (a mask of fewer
// blocks than the batch repeats), with window > 0 also 0 <= position of query - position of key <
// window and, with `segment`, the same segment at both positions.
struct Sight {
  const bool* mask_mqn;
  const int* segment_bt;
  int queries, keys, mask_blocks, blocks, tokens, offset, window;
};

// One row of logits. Keys outside low .. high - 1 are not seen; of the others mask and segment
// decide.
struct Row {
  const float *s_n, *r_d;
  const bool* mask_n;
  const int *segment_t, *key_segment_n;  // of the query, and by key
  int low, high, first, distances;       // key j is in column first + j of r_d, or 0
  float scale;
};

__device__ inline Row row_of(const Sight& sight, const float* s_n, const float* r_d, int b, int i,
                             int first, int distances, float scale) {
  Row row = {s_n, r_d, nullptr, nullptr, nullptr, 0, sight.keys, first, distances, scale};
  if (sight.mask_mqn)
    row.mask_n = sight.mask_mqn
                 + ((u64)(b % sight.mask_blocks) * sight.queries + i) * sight.keys;
  if (sight.window > 0) {
    int query = b % sight.blocks * sight.queries + i, same = i + sight.offset;  // key of the query
    row.low = max(0, same - min(sight.window - 1, query));
    row.high = query < sight.tokens ? min(sight.keys, same + 1) : 0;
    if (sight.segment_bt) {
      row.segment_t = sight.segment_bt + (u64)(b / sight.blocks) * sight.tokens + query;
      row.key_segment_n = row.segment_t - same;
    }
  }
  return row;
}

__device__ inline float logit(const Row& row, int j) {
  if (j < row.low || j >= row.high || (row.mask_n && !row.mask_n[j])
      || (row.segment_t && *row.segment_t != row.key_segment_n[j]))
    return minus_infinity();
  float z = row.s_n[j];
  if (row.r_d && row.first + j < row.distances) z += row.r_d[max(row.first + j, 0)];
  return z * row.scale;
}

// Tiles of 256 entries of a row, from a multiple of eight on, where dropout draws for eight: each
// lane draws for eight neighbours, then asks the lane that drew for its own entry, which is
// number base + 32 part + lane. In a tile that is not seen nothing is drawn, and nothing kept.
__device__ inline unsigned tile_bits(const Row& row, u64 entry, int base, int lane, Drop drop) {
  bool seen = base < row.high && base + 256 > row.low;
  return seen ? kept((entry + base) / 8 + lane, drop) : 0;
}

__device__ inline bool bit_of(unsigned bits, int part, int lane) {
  return __shfl_sync(ALL, bits, part * 4 + lane / 8) >> (lane % 8) & 1;
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
    int distances, int clipped, int mask_blocks, int blocks, int tokens, int offset, int window,
    float scale, unsigned threshold, unsigned seed_low, unsigned seed_high, unsigned stream,
    const unsigned* step_1, long long first_entry) {
  long long at = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (at >= rows) return;
  long long whole = first_row + at;
  int b = whole / queries, i = whole % queries, first = queries - 1 - i - clipped;
  Sight sight = {mask_mqn, segment_bt, queries, keys, mask_blocks, blocks, tokens, offset, window};
  Row row = row_of(sight, s_bqn + at * keys, r_bqd ? r_bqd + at * distances : nullptr, b, i, first,
                   distances, scale);
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 entry = drop.first + (u64)whole * keys;  // of the row, for dropout

  float top = LOWEST, total = 0;
#pragma unroll 4
  for (int j = row.low + lane; j < row.high; j += 32) top = fmaxf(top, logit(row, j));
  top = warp_max(top);
#pragma unroll 4
  for (int j = row.low + lane; j < row.high; j += 32) total += expf(logit(row, j) - top);
  total = warp_sum(total);
  // Written so that a NaN spreads over all of the row that is seen, and shows in the loss.
  float factor = total == 0 ? 0.0f : kept_scale(drop) / total;
  if (lane == 0) lse_bq[whole] = total == 0 ? 0.0f : top + logf(total);

  float shared = 0;
  for (int base = -(int)(entry % 8); base < keys; base += 256) {
    unsigned bits = tile_bits(row, entry, base, lane, drop);
    float z[8];  // all are read before the first is written, so that eight reads are under way
#pragma unroll
    for (int part = 0; part < 8; part++) z[part] = logit(row, base + part * 32 + lane);
#pragma unroll
    for (int part = 0; part < 8; part++) {
      int j = base + part * 32 + lane, c = first + j;
      bool keep = bit_of(bits, part, lane);
      if (j < 0 || j >= keys) continue;
      float p = keep ? expf(z[part] - top) * factor : 0.0f;
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
  Row row = row_of(sight, s_bqn + at * keys, r_bqd ? r_bqd + at * distances : nullptr, b, i, first,
                   distances, scale);
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 entry = drop.first + (u64)whole * keys;  // of the row, for dropout
  float lse = lse_bq[whole], kept_factor = kept_scale(drop), dot = 0, shared = 0, dshared = 0;

  // First round: the sum, over the tiles that are seen; second round: the results.
  for (int round = 0; round < 2; round++) {
    for (int base = -(int)(entry % 8); base < keys; base += 256) {
      if (round == 0 && (base >= row.high || base + 256 <= row.low)) continue;
      unsigned bits = tile_bits(row, entry, base, lane, drop);
      for (int parts = 0; parts < 8; parts += 2) {  // two at a time: what the registers hold
        float q[2], g[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int j = base + (parts + k) * 32 + lane, c = first + j;
          q[k] = logit(row, j);
          g[k] = 0;
          if (q[k] == minus_infinity()) continue;
          g[k] = dp_bqn[at * keys + j];
          if (dr_bqd && c < distances) g[k] += dr_bqd[at * distances + max(c, 0)];
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int j = base + (parts + k) * 32 + lane, c = first + j;
          bool keep = bit_of(bits, parts + k, lane);
          q[k] = expf(q[k] - lse);
          g[k] = keep ? g[k] * kept_factor : 0.0f;
          if (round == 0) dot += q[k] * g[k];
          if (round == 0 || j < 0 || j >= keys) continue;
          float p = keep ? q[k] * kept_factor : 0.0f, dz = scale * q[k] * (g[k] - dot);
          store(p_bqn + at * keys + j, p);
          store(dz_bqn + at * keys + j, dz);
          if (c <= 0) {
            shared += p;
            dshared += dz;
          } else if (dr_bqd && c < distances) {
            store(u_bqd + at * distances + c, p);
            store(du_bqd + at * distances + c, dz);
          }
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
