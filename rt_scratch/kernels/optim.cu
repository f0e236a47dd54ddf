// Optimizer steps on the flat buffers of parameters w, gradients g and state; all float32.
// Called by global_norm, adamw, muon and adafactor in cuda/optim.py. The learning rate and the step
// are read from the device: a CUDA graph of a step repeats what was passed by value.
#include "common.cuh"

// Sum of squares of the entries that a block of 256 takes, four per thread at a time.
__global__ void sum_squares(const float* x_n, float* part_b, long long size) {
  float sum = 0, x[4];
  u64 stride = (u64)gridDim.x * 1024;
  for (u64 first = ((u64)blockIdx.x * 256 + threadIdx.x) * 4; first < (u64)size; first += stride) {
    read_many(x_n, first, size, x);
    for (int i = 0; i < 4; i++) sum += x[i] * x[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) part_b[blockIdx.x] = sum;
}

// A leaf of the flat buffer, in entries, and where its second moments begin in theirs.
struct Leaf { long long start, size, decays, second; };

// 1 - (1 - move)^n, exact to float's rounding also where n move is small.
__device__ inline float unbias(float move, unsigned n) { return -expm1f(n * log1pf(-move)); }

// m <- m + move1 (g - m),  v <- v + move2 (g^2 - v),  move = 1 - beta,
// w <- w - lr decay w - lr / c1 m / (sqrt(v / c2) + epsilon),  c = 1 - beta^(step + 1), decay in
// leaves that have it.
// Grid (any, leaves), four entries per thread at a time.
__global__ void adamw(float* w_n, const float* g_n, float* m_n, float* v_n,
                      const long long* table_li, const float* lr_1, const unsigned* step_1,
                      float move1, float move2, float epsilon, float decay) {
  float rate = *lr_1 / unbias(move1, *step_1 + 1), c2 = sqrtf(unbias(move2, *step_1 + 1));
  const Leaf leaf = ((const Leaf*)table_li)[blockIdx.y];
  u64 end = leaf.start + leaf.size, stride = (u64)gridDim.x * blockDim.x * 4;
  u64 second = leaf.second - leaf.start;  // may wrap around, and the sums below back again
  u64 first = leaf.start + ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  for (; first < end; first += stride) {
    float w[4], g[4], m[4], v[4];
    read_many(w_n, first, end, w);
    read_many(g_n, first, end, g);
    read_many(m_n, first, end, m);
    read_many(v_n, first + second, end + second, v);
    for (int i = 0; i < 4; i++) {
      m[i] += move1 * (g[i] - m[i]);
      v[i] += move2 * (g[i] * g[i] - v[i]);
      if (leaf.decays) w[i] -= *lr_1 * decay * w[i];
      w[i] -= rate * (m[i] / (sqrtf(v[i]) / c2 + epsilon));
    }
    write_many(w_n, first, end, w);
    write_many(m_n, first, end, m);
    write_many(v_n, first + second, end + second, v);
  }
}

// Muon, the parts around the matrix products, for matrices of one shape (`size` entries); table_li
// are their leaves, x_ln their stack. Grid (any, leaves), four entries per thread at a time.

// m <- momentum m + g,  x = g + momentum m.
__global__ void muon_momentum(const float* g_n, float* m_n, const long long* table_li, float* x_ln,
                              long long size, float momentum) {
  u64 start = ((const Leaf*)table_li)[blockIdx.y].start, end = start + size;
  u64 out = blockIdx.y * (u64)size, stride = (u64)gridDim.x * blockDim.x * 4;
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  for (; first < (u64)size; first += stride) {
    float g[4], m[4], x[4];
    read_many(g_n, start + first, end, g);
    read_many(m_n, start + first, end, m);
    for (int i = 0; i < 4; i++) {
      m[i] = momentum * m[i] + g[i];
      x[i] = g[i] + momentum * m[i];
    }
    write_many(m_n, start + first, end, m);
    write_many(x_ln, out + first, out + size, x);
  }
}

// w <- w - lr decay w - lr scale x.
__global__ void muon_update(float* w_n, const long long* table_li, const float* x_ln,
                            const float* lr_1, long long size, float scale, float decay) {
  u64 start = ((const Leaf*)table_li)[blockIdx.y].start, end = start + size;
  u64 out = blockIdx.y * (u64)size, stride = (u64)gridDim.x * blockDim.x * 4;
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  float lr = *lr_1;
  for (; first < (u64)size; first += stride) {
    float w[4], x[4];
    read_many(w_n, start + first, end, w);
    read_many(x_ln, out + first, out + size, x);
    for (int i = 0; i < 4; i++) w[i] -= lr * (decay * w[i] + scale * x[i]);
    write_many(w_n, start + first, end, w);
  }
}

// Adafactor (Shazeer, Stern 2018; the released code's constants) in five launches for all leaves
// together. A leaf of two or more axes is a row of matrices; its second moment is factored into
// the means of each matrix's rows and columns. A vector is one matrix of one row, not factored.
//   rows                r <- r + move (mean_c (g^2 + 1e-30) - r),  or the v of a vector
//   columns, _finish    c <- the same over rows;  mean = mean_r r
//   squares             partial sums of x^2 and w^2,  x = g rsqrt(r / mean) rsqrt(c)
//   update              w <- w - lr max(rms w, 1e-3) x / max(1, rms x),  rms over the leaf
// Where the leaf decays, g is g + decay w. Grids are (BLOCKS, matrices); a block takes every
// BLOCKS-th row or tile of columns.
constexpr int BLOCKS = 128;
constexpr float SQUARE_FLOOR = 1e-30f, SCALE_FLOOR = 1e-3f;

// 1 - decay of the second moments: (step + 1)^-0.8.
__device__ inline float move_at(const unsigned* step_1) { return powf(*step_1 + 1.0f, -0.8f); }

// A line of the table, all positions in entries: the matrix in the flat buffer, its size, its
// position among the row moments (a vector: among the full moments) and the column moments (a
// vector: -1), which lines of the table are of the same leaf, and whether it decays.
struct Matrix {
  long long start, rows, columns, row_state, column_state, leaf, matrices, decays;
};

// One matrix and the step's gradient of its entries.
struct Gradient {
  const float *w_rc, *g_rc;
  long long columns;
  float decay;
};

__device__ inline Gradient gradient_of(const Matrix& at, const float* w_n, const float* g_n,
                                       float decay) {
  return {w_n + at.start, g_n + at.start, at.columns, at.decays ? decay : 0.0f};
}

__device__ inline float gradient(const Gradient& of, long long r, long long c) {
  long long i = r * of.columns + c;
  return of.decay == 0 ? of.g_rc[i] : of.g_rc[i] + of.decay * of.w_rc[i];
}

__global__ void adafactor_rows(const float* w_n, const float* g_n, const long long* table_mi,
                               float* row_s, float* full_s, const unsigned* step_1, float decay) {
  float move = move_at(step_1);
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  const Gradient of = gradient_of(at, w_n, g_n, decay);
  if (at.column_state < 0) {
    float* v = full_s + at.row_state;
    for (long long c = blockIdx.x * 256 + threadIdx.x; c < at.columns; c += BLOCKS * 256) {
      float g = gradient(of, 0, c);
      v[c] += move * (g * g + SQUARE_FLOOR - v[c]);
    }
    return;
  }
  float* v = row_s + at.row_state;
  int lane = threadIdx.x % 32;
  for (long long r = blockIdx.x * 8 + threadIdx.x / 32; r < at.rows; r += BLOCKS * 8) {
    float sum = 0;
    for (int c = lane; c < at.columns; c += 32) {
      float g = gradient(of, r, c);
      sum += g * g;
    }
    sum = warp_sum(sum);
    if (lane == 0) v[r] += move * (sum / at.columns + SQUARE_FLOOR - v[r]);
  }
}

// Sums of squares of each column over a strip z of the rows. Blocks of 32 columns by 8 rows, grid
// (any, matrices, strips).
__global__ void adafactor_columns(const float* w_n, const float* g_n, const long long* table_mi,
                                  float* part_zs, long long states, float decay) {
  __shared__ float sums[8][32];
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (at.column_state < 0) return;
  const Gradient of = gradient_of(at, w_n, g_n, decay);
  long long strip = (at.rows + gridDim.z - 1) / gridDim.z;
  long long begin = blockIdx.z * strip, end = min(begin + strip, at.rows);
  for (long long first = blockIdx.x * 32; first < at.columns; first += gridDim.x * 32) {
    long long c = first + threadIdx.x;
    float sum = 0;
    if (c < at.columns) {
      for (long long r = begin + threadIdx.y; r < end; r += 8) {
        float g = gradient(of, r, c);
        sum += g * g;
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < at.columns) {
      for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
      part_zs[blockIdx.z * states + at.column_state + c] = sum;
    }
    __syncthreads();
  }
}

// Column moments from the strips; block 0 of each matrix also takes the mean of its row moments.
__global__ void adafactor_columns_finish(const float* part_zs, const long long* table_mi,
                                         const float* row_s, float* column_s, float* mean_m,
                                         int strips, long long states, const unsigned* step_1) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (at.column_state < 0) return;
  float *v = column_s + at.column_state, move = move_at(step_1);
  for (long long c = blockIdx.x * 256 + threadIdx.x; c < at.columns; c += BLOCKS * 256) {
    float sum = 0;
    for (int z = 0; z < strips; z++) sum += part_zs[z * states + at.column_state + c];
    v[c] += move * (sum / at.rows + SQUARE_FLOOR - v[c]);
  }
  if (blockIdx.x > 0) return;
  float sum = 0;
  for (long long r = threadIdx.x; r < at.rows; r += 256) sum += row_s[at.row_state + r];
  sum = block_sum(sum);
  if (threadIdx.x == 0) mean_m[blockIdx.y] = sum / at.rows;
}

// The second moments of one matrix, whose entry (r, c) moves by g times `inverse_root`.
struct Moments {
  const float *row, *column;  // a vector: its full moments, null
  float mean;
};

__device__ inline Moments moments_of(const Matrix& at, const float* row_s, const float* column_s,
                                     const float* full_s, float mean) {
  if (at.column_state < 0) return {full_s + at.row_state, nullptr, 1.0f};
  return {row_s + at.row_state, column_s + at.column_state, mean};
}

__device__ inline float inverse_root(const Moments& v, long long r, long long c) {
  return v.column ? rsqrtf(v.row[r] / v.mean) * rsqrtf(v.column[c]) : rsqrtf(v.row[c]);
}

__global__ void adafactor_squares(const float* w_n, const float* g_n, const long long* table_mi,
                                  const float* row_s, const float* column_s, const float* full_s,
                                  const float* mean_m, float* square_mk, float decay) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  const Gradient of = gradient_of(at, w_n, g_n, decay);
  const Moments v = moments_of(at, row_s, column_s, full_s, mean_m[blockIdx.y]);
  float squares_x = 0, squares_w = 0;
  for (long long r = blockIdx.x; r < at.rows; r += BLOCKS) {
    for (long long c = threadIdx.x; c < at.columns; c += 256) {
      float x = gradient(of, r, c) * inverse_root(v, r, c), w = of.w_rc[r * at.columns + c];
      squares_x += x * x;
      squares_w += w * w;
    }
  }
  squares_x = block_sum(squares_x);
  squares_w = block_sum(squares_w);
  if (threadIdx.x == 0) {
    square_mk[(u64)blockIdx.y * 2 * BLOCKS + blockIdx.x] = squares_x;
    square_mk[(u64)blockIdx.y * 2 * BLOCKS + BLOCKS + blockIdx.x] = squares_w;
  }
}

__global__ void adafactor_update(float* w_n, const float* g_n, const long long* table_mi,
                                 const float* row_s, const float* column_s, const float* full_s,
                                 const float* mean_m, const float* square_mk,
                                 const float* lr_1, float decay) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (blockIdx.x >= at.rows) return;
  const Gradient of = gradient_of(at, w_n, g_n, decay);
  const Moments v = moments_of(at, row_s, column_s, full_s, mean_m[blockIdx.y]);
  float squares_x = 0, squares_w = 0;
  for (long long i = threadIdx.x; i < at.matrices * BLOCKS; i += 256) {
    u64 matrix = at.leaf + i / BLOCKS;
    squares_x += square_mk[matrix * 2 * BLOCKS + i % BLOCKS];
    squares_w += square_mk[matrix * 2 * BLOCKS + BLOCKS + i % BLOCKS];
  }
  float size = (float)at.matrices * at.rows * at.columns;
  float rms_x = sqrtf(block_sum(squares_x) / size), rms_w = sqrtf(block_sum(squares_w) / size);
  float factor = *lr_1 * fmaxf(rms_w, SCALE_FLOOR) / fmaxf(1.0f, rms_x);
  for (long long r = blockIdx.x; r < at.rows; r += BLOCKS)
    for (long long c = threadIdx.x; c < at.columns; c += 256)
      w_n[at.start + r * at.columns + c] -=
          factor * gradient(of, r, c) * inverse_root(v, r, c);
}
