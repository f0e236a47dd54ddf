// Optimizer steps on the flat buffers of parameters w, gradients g and state; all float32.
// Called by adamw and adafactor in cuda.py.
#include "common.cuh"

// m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
// w <- w - rate (m / c1 / (sqrt(v / c2) + epsilon) + decay w),  c1 = 1 - b1^t,  c2 = 1 - b2^t.
// Four entries per thread.
__global__ void adamw(float* w_n, const float* g_n, float* m_n, float* v_n, long long size,
                      float rate, float b1, float b2, float c1, float c2, float epsilon,
                      float decay) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (first >= (u64)size) return;
  float w[4], g[4], m[4], v[4];
  read_many(w_n, first, size, w);
  read_many(g_n, first, size, g);
  read_many(m_n, first, size, m);
  read_many(v_n, first, size, v);
  for (int i = 0; i < 4; i++) {
    m[i] = b1 * m[i] + (1 - b1) * g[i];
    v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
    w[i] -= rate * (m[i] / c1 / (sqrtf(v[i] / c2) + epsilon) + decay * w[i]);
  }
  write_many(w_n, first, size, w);
  write_many(m_n, first, size, m);
  write_many(v_n, first, size, v);
}

// Adafactor (Shazeer, Stern 2018; the released code's constants) in five launches for all tensors
// together. A tensor of two or more axes is a row of matrices; its second moment is factored into
// the means of each matrix's rows and columns. A vector is one matrix of one row, not factored.
//   rows                vr_r <- d vr + (1 - d) mean_c (g^2 + 1e-30),  or v of a vector
//   columns, _finish    vc_c <- the same over rows;  mean = mean_r vr
//   squares             partial sums of x^2 and w^2,  x = g rsqrt(vr / mean) rsqrt(vc)
//   update              w <- w - rate max(rms w, 1e-3) x / max(1, rms x),  rms over the tensor
// Grids are (BLOCKS, matrices); a block takes every BLOCKS-th row or tile of columns.
constexpr int BLOCKS = 128;
constexpr float TINY = 1e-30f, LEAST_SCALE = 1e-3f;

// A line of the table, all places in entries: the matrix in the flat buffer, its size, its row
// moments (a vector's v) and column moments (-1: a vector) in the state, and which lines of the
// table are of the same tensor.
struct Matrix {
  long long start, rows, columns, row_state, column_state, tensor, matrices;
};

__global__ void adafactor_rows(const float* g_n, const long long* table_mi, float* state_s,
                               float decay) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  const float* g_rc = g_n + at.start;
  float* v = state_s + at.row_state;
  if (at.column_state < 0) {
    for (u64 c = blockIdx.x * blockDim.x + threadIdx.x; c < (u64)at.columns; c += BLOCKS * 256)
      v[c] = decay * v[c] + (1 - decay) * (g_rc[c] * g_rc[c] + TINY);
    return;
  }
  int lane = threadIdx.x % 32;
  for (u64 r = blockIdx.x * 8 + threadIdx.x / 32; r < (u64)at.rows; r += BLOCKS * 8) {
    float sum = 0;
    for (int c = lane; c < at.columns; c += 32) {
      float g = g_rc[r * at.columns + c];
      sum += g * g;
    }
    sum = warp_sum(sum);
    if (lane == 0) v[r] = decay * v[r] + (1 - decay) * (sum / at.columns + TINY);
  }
}

// Sums of squares of each column over a strip z of the rows. Blocks of 32 columns by 8 rows, grid
// (any, matrices, strips).
__global__ void adafactor_columns(const float* g_n, const long long* table_mi, float* part_zs,
                                  long long state_size) {
  __shared__ float sums[8][32];
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (at.column_state < 0) return;
  const float* g_rc = g_n + at.start;
  long long strip = (at.rows + gridDim.z - 1) / gridDim.z;
  long long begin = blockIdx.z * strip, end = min(begin + strip, at.rows);
  for (long long first = blockIdx.x * 32; first < at.columns; first += gridDim.x * 32) {
    long long c = first + threadIdx.x;
    float sum = 0;
    if (c < at.columns) {
      for (long long r = begin + threadIdx.y; r < end; r += 8) {
        float g = g_rc[r * at.columns + c];
        sum += g * g;
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < at.columns) {
      for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
      part_zs[blockIdx.z * state_size + at.column_state + c] = sum;
    }
    __syncthreads();
  }
}

// Sum of one number per thread of a block of 256, in a fixed order, in every thread.
__device__ inline float block_sum(float x) {
  __shared__ float sums[8];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < 8; i++) x += sums[i];
  return x;
}

// Column moments from the strips; block 0 of each matrix also takes the mean of its row moments.
__global__ void adafactor_columns_finish(const float* part_zs, const long long* table_mi,
                                         float* state_s, float* mean_m, int strips,
                                         long long state_size, float decay) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (at.column_state < 0) return;
  float* v = state_s + at.column_state;
  for (long long c = blockIdx.x * 256 + threadIdx.x; c < at.columns; c += BLOCKS * 256) {
    float sum = 0;
    for (int z = 0; z < strips; z++) sum += part_zs[z * state_size + at.column_state + c];
    v[c] = decay * v[c] + (1 - decay) * (sum / at.rows + TINY);
  }
  if (blockIdx.x > 0) return;
  float sum = 0;
  for (long long r = threadIdx.x; r < at.rows; r += 256) sum += state_s[at.row_state + r];
  sum = block_sum(sum);
  if (threadIdx.x == 0) mean_m[blockIdx.y] = sum / at.rows;
}

// The update of entry (r, c) before its scale.
__device__ inline float adafactor_x(const Matrix& at, const float* g_n, const float* state_s,
                                    float mean, long long r, long long c) {
  float g = g_n[at.start + r * at.columns + c];
  if (at.column_state < 0) return g * rsqrtf(state_s[at.row_state + c]);
  return g * rsqrtf(state_s[at.row_state + r] / mean) * rsqrtf(state_s[at.column_state + c]);
}

__global__ void adafactor_squares(const float* w_n, const float* g_n, const long long* table_mi,
                                  const float* state_s, const float* mean_m, float* square_mk) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  float squares_x = 0, squares_w = 0;
  for (long long r = blockIdx.x; r < at.rows; r += BLOCKS) {
    for (long long c = threadIdx.x; c < at.columns; c += 256) {
      float x = adafactor_x(at, g_n, state_s, mean_m[blockIdx.y], r, c);
      float w = w_n[at.start + r * at.columns + c];
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
                                 const float* state_s, const float* mean_m,
                                 const float* square_mk, float rate) {
  const Matrix at = ((const Matrix*)table_mi)[blockIdx.y];
  if (blockIdx.x >= at.rows) return;
  float squares_x = 0, squares_w = 0;
  for (long long i = threadIdx.x; i < at.matrices * BLOCKS; i += 256) {
    u64 matrix = at.tensor + i / BLOCKS;
    squares_x += square_mk[matrix * 2 * BLOCKS + i % BLOCKS];
    squares_w += square_mk[matrix * 2 * BLOCKS + BLOCKS + i % BLOCKS];
  }
  float size = (float)at.matrices * at.rows * at.columns;
  float rms_x = sqrtf(block_sum(squares_x) / size), rms_w = sqrtf(block_sum(squares_w) / size);
  float factor = rate * fmaxf(rms_w, LEAST_SCALE) / fmaxf(1.0f, rms_x);
  for (long long r = blockIdx.x; r < at.rows; r += BLOCKS)
    for (long long c = threadIdx.x; c < at.columns; c += 256)
      w_n[at.start + r * at.columns + c] -=
          factor * adafactor_x(at, g_n, state_s, mean_m[blockIdx.y], r, c);
}
