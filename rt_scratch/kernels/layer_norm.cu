// LayerNorm over the columns of x (n rows, c columns):
//   mean = sum_c x / C,  rstd = 1 / sqrt(sum_c (x - mean)^2 / C + epsilon),
//   y = (x - mean) rstd gain + bias.            gain and bias null: neither is applied.
// Called by layer_norm, normalize, residual and their backwards in cuda/layers.py. One warp per
// row; any number of warps per block. Row n of x may lie anywhere: it is token n % tokens of head
// n / tokens % heads, as `Rows` says.
#include "common.cuh"

struct Rows { int heads, tokens; long long stride_b, stride_h, stride_t; };

__device__ inline long long offset(Rows x, int row) {
  int bh = row / x.tokens;
  return bh / x.heads * x.stride_b + bh % x.heads * x.stride_h + row % x.tokens * x.stride_t;
}

// Mean and rstd of a row, in every lane.
template <typename T>
__device__ inline void statistics(const T* x_c, int width, float epsilon, float& mean,
                                  float& rstd) {
  int lane = threadIdx.x % 32;
  float sum = 0, squares = 0;
  for (int c = lane; c < width; c += 32) sum += to_float(x_c[c]);
  mean = warp_sum(sum) / width;
  for (int c = lane; c < width; c += 32) {
    float centred = to_float(x_c[c]) - mean;
    squares += centred * centred;
  }
  rstd = 1.0f / sqrtf(warp_sum(squares) / width + epsilon);
}

template <typename T>
__global__ void layer_norm(const T* x_strided, const float* gain_c, const float* bias_c, T* y_nc,
                           float* mean_n, float* rstd_n, int rows, int width, float epsilon,
                           int heads, int tokens, long long stride_b, long long stride_h,
                           long long stride_t) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T* x_c = x_strided + offset({heads, tokens, stride_b, stride_h, stride_t}, row);
  T* y_c = y_nc + (u64)row * width;
  float mean, rstd;
  statistics(x_c, width, epsilon, mean, rstd);
  for (int c = lane; c < width; c += 32) {
    float n = (to_float(x_c[c]) - mean) * rstd;
    store(y_c + c, gain_c ? n * gain_c[c] + bias_c[c] : n);
  }
  if (lane == 0) {
    mean_n[row] = mean;
    rstd_n[row] = rstd;
  }
}

// sum = x + f keep / (1 - rate),  y = LayerNorm of sum. Without gain the sum is all.
template <typename T>
__global__ void __launch_bounds__(256, 4) residual(
    const T* x_nc, const T* f_nc, const float* gain_c, const float* bias_c, T* sum_nc, T* y_nc,
    float* mean_n, float* rstd_n, int rows, int width, float epsilon, unsigned threshold,
    unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* step_1,
    long long first_entry) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 at = (u64)row * width, entry = drop.first + at;
  float scale = kept_scale(drop);
  // Tiles of 256 entries, from a multiple of eight on: each lane draws for eight neighbours.
  for (int base = -(int)(entry % 8); base < width; base += 256) {
    unsigned bits = kept((entry + base) / 8 + lane, drop);
    for (int part = 0; part < 8; part++) {
      int c = base + part * 32 + lane;
      unsigned keep = __shfl_sync(ALL, bits, part * 4 + lane / 8) >> (lane % 8) & 1;
      if (c < 0 || c >= width) continue;
      float f = keep ? to_float(f_nc[at + c]) * scale : 0.0f;
      store(sum_nc + at + c, to_float(x_nc[at + c]) + f);
    }
  }
  if (!gain_c) return;
  __syncwarp();  // lanes read what others wrote
  float mean, rstd;
  statistics(sum_nc + at, width, epsilon, mean, rstd);
  for (int c = lane; c < width; c += 32)
    store(y_nc + at + c, (to_float(sum_nc[at + c]) - mean) * rstd * gain_c[c] + bias_c[c]);
  if (lane == 0) {
    mean_n[row] = mean;
    rstd_n[row] = rstd;
  }
}

// dx = rstd (dn - mean_c dn - n mean_c (dn n)),  n = (x - mean) rstd,  dn = dy gain.
// With `add` that is added to dx. df (or null) is dx keep / (1 - rate).
template <typename T>
__global__ void __launch_bounds__(256, 4) layer_norm_backward(
    const T* dy_nc, const T* x_strided, const float* gain_c, const float* mean_n,
    const float* rstd_n, T* dx_nc, T* df_nc, int rows, int width, int add, int heads, int tokens,
    long long stride_b, long long stride_h, long long stride_t, unsigned threshold,
    unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* step_1,
    long long first_entry) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  u64 at = (u64)row * width;
  const T* dy_c = dy_nc + at;
  const T* x_c = x_strided + offset({heads, tokens, stride_b, stride_h, stride_t}, row);
  float mean = mean_n[row], rstd = rstd_n[row];

  float sum = 0, product = 0;
  for (int c = lane; c < width; c += 32) {
    float dn = to_float(dy_c[c]) * (gain_c ? gain_c[c] : 1.0f);
    sum += dn;
    product += dn * (to_float(x_c[c]) - mean) * rstd;
  }
  sum = warp_sum(sum) / width;
  product = warp_sum(product) / width;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  u64 entry = drop.first + at;
  float scale = kept_scale(drop);
  for (int base = -(int)(entry % 8); base < width; base += 256) {
    unsigned bits = df_nc ? kept((entry + base) / 8 + lane, drop) : 0;
    for (int part = 0; part < 8; part++) {
      int c = base + part * 32 + lane;
      unsigned keep = __shfl_sync(ALL, bits, part * 4 + lane / 8) >> (lane % 8) & 1;
      if (c < 0 || c >= width) continue;
      float dn = to_float(dy_c[c]) * (gain_c ? gain_c[c] : 1.0f);
      float n = (to_float(x_c[c]) - mean) * rstd;
      float dx = rstd * (dn - sum - n * product) + (add ? to_float(dx_nc[at + c]) : 0.0f);
      store(dx_nc + at + c, dx);
      if (df_nc) store(df_nc + at + c, keep ? dx * scale : 0.0f);
    }
  }
}

// Per strip g of `strip` rows: dgain_g = sum_n dy n,  dbias_g = sum_n dy. The strips are added by
// sum_strips. Blocks of 32 columns by 8 rows, grid (C / 32, strips).
template <typename T>
__global__ void layer_norm_backward_columns(const T* dy_nc, const T* x_nc, const float* mean_n,
                                            const float* rstd_n, float* dgain_gc,
                                            float* dbias_gc, int rows, int width, int strip) {
  __shared__ float gains[8][32], biases[8][32];
  int c = blockIdx.x * 32 + threadIdx.x;
  int end = min(rows, (int)(blockIdx.y + 1) * strip);
  float dgain = 0, dbias = 0;
  if (c < width) {
    for (int n = blockIdx.y * strip + threadIdx.y; n < end; n += 8) {
      float dy = to_float(dy_nc[(u64)n * width + c]);
      dgain += dy * (to_float(x_nc[(u64)n * width + c]) - mean_n[n]) * rstd_n[n];
      dbias += dy;
    }
  }
  gains[threadIdx.y][threadIdx.x] = dgain;
  biases[threadIdx.y][threadIdx.x] = dbias;
  __syncthreads();
  if (threadIdx.y == 0 && c < width) {
    for (int i = 1; i < 8; i++) {
      dgain += gains[i][threadIdx.x];
      dbias += biases[i][threadIdx.x];
    }
    dgain_gc[(u64)blockIdx.y * width + c] = dgain;
    dbias_gc[(u64)blockIdx.y * width + c] = dbias;
  }
}
