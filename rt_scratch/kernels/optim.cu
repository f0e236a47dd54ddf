// Optimizer steps on the flat buffers of parameters w, gradients g and state; all float32.
// Called by adamw and adafactor in cuda.py.
#include "common.cuh"

// A leaf of the flat buffer, in entries.
struct Leaf { long long start, size, decays; };

// m <- m + move1 (g - m),  v <- v + move2 (g^2 - v),  move = 1 - beta,
// w <- w - w decay - rate m / (sqrt(v) / c2 + epsilon),  decay in leaves that have it.
// Grid (any, leaves), four entries per thread at a time.
__global__ void adamw(float* w_n, const float* g_n, float* m_n, float* v_n,
                      const long long* table_li, float rate, float move1, float move2, float c2,
                      float epsilon, float decay) {
  const Leaf leaf = ((const Leaf*)table_li)[blockIdx.y];
  u64 end = leaf.start + leaf.size, stride = (u64)gridDim.x * blockDim.x * 4;
  u64 first = leaf.start + ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  for (; first < end; first += stride) {
    float w[4], g[4], m[4], v[4];
    read_many(w_n, first, end, w);
    read_many(g_n, first, end, g);
    read_many(m_n, first, end, m);
    read_many(v_n, first, end, v);
    for (int i = 0; i < 4; i++) {
      m[i] += move1 * (g[i] - m[i]);
      v[i] += move2 * (g[i] * g[i] - v[i]);
      if (leaf.decays) w[i] -= decay * w[i];
      w[i] -= rate * (m[i] / (sqrtf(v[i]) / c2 + epsilon));
    }
    write_many(w_n, first, end, w);
    write_many(m_n, first, end, m);
    write_many(v_n, first, end, v);
  }
}

// Adafactor (Shazeer, Stern 2018; the released code's constants) in five launches for all leaves
// together. A leaf of two or more axes is a row of matrices; its second moment is factored into
// the means of each matrix's rows and columns. A vector is one matrix of one row, not factored.
//   rows                r <- r + move (mean_c (g^2 + 1e-30) - r),  or the v of a vector
//   columns, _finish    c <- the same over rows;  mean = mean_r r
//   squares             partial sums of x^2 and w^2,  x = g rsqrt(r / mean) rsqrt(c)
//   update              w <- w - rate max(rms w, 1e-3) x / max(1, rms x),  rms over the leaf
// Where the leaf decays, g is g + decay w. Grids are (BLOCKS, matrices); a block takes every
// BLOCKS-th row or tile of columns.
constexpr int BLOCKS = 128;
constexpr float SQUARE_FLOOR = 1e-30f, SCALE_FLOOR = 1e-3f;

// A line of the table, all positions in entries: the matrix in the flat buffer, its size, its position
// among the row moments (a vector: among the full moments) and the column moments (a vector: -1),
// which lines of the table are of the same leaf, and whether it decays.
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
                               float* row_s, float* full_s, float move, float decay) {
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
                                         int strips, long long states, float move) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (at.column_state < 0) return;
  float* v = column_s + at.column_state;
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
                                 const float* mean_m, const float* square_mk, float rate,
                                 float decay) {
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
  float factor = rate * fmaxf(rms_w, SCALE_FLOOR) / fmaxf(1.0f, rms_x);
  for (long long r = blockIdx.x; r < at.rows; r += BLOCKS)
    for (long long c = threadIdx.x; c < at.columns; c += 256)
      w_n[at.start + r * at.columns + c] -=
          factor * gradient(of, r, c) * inverse_root(v, r, c);
}
