// LayerNorm over the columns of x (n rows, c columns):
//   mean = sum_c x / C,  rstd = 1 / sqrt(sum_c (x - mean)^2 / C + epsilon),
//   y = (x - mean) rstd gain + bias.            gain and bias null: neither is applied.
// Called by layer_norm, normalize and their backwards in cuda.py.
#include "common.cuh"

// One warp per row; any number of warps per block.
template <typename T>
__global__ void layer_norm(const T* x_nc, const float* gain_c, const float* bias_c, T* y_nc,
                           float* mean_n, float* rstd_n, int rows, int width, float epsilon) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T* x_c = x_nc + (u64)row * width;
  T* y_c = y_nc + (u64)row * width;

  float sum = 0;
  for (int c = lane; c < width; c += 32) sum += to_float(x_c[c]);
  float mean = warp_sum(sum) / width;
  float squares = 0;
  for (int c = lane; c < width; c += 32) {
    float centred = to_float(x_c[c]) - mean;
    squares += centred * centred;
  }
  float rstd = 1.0f / sqrtf(warp_sum(squares) / width + epsilon);
  for (int c = lane; c < width; c += 32) {
    float n = (to_float(x_c[c]) - mean) * rstd;
    store(y_c + c, gain_c ? n * gain_c[c] + bias_c[c] : n);
  }
  if (lane == 0) {
    mean_n[row] = mean;
    rstd_n[row] = rstd;
  }
}

// dx = rstd (dn - mean_c dn - n mean_c (dn n)),  n = (x - mean) rstd,  dn = dy gain.
// One warp per row; any number of warps per block.
template <typename T>
__global__ void layer_norm_backward(const T* dy_nc, const T* x_nc, const float* gain_c,
                                    const float* mean_n, const float* rstd_n, T* dx_nc, int rows,
                                    int width) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T* dy_c = dy_nc + (u64)row * width;
  const T* x_c = x_nc + (u64)row * width;
  T* dx_c = dx_nc + (u64)row * width;
  float mean = mean_n[row], rstd = rstd_n[row];

  float sum = 0, product = 0;
  for (int c = lane; c < width; c += 32) {
    float dn = to_float(dy_c[c]) * (gain_c ? gain_c[c] : 1.0f);
    sum += dn;
    product += dn * (to_float(x_c[c]) - mean) * rstd;
  }
  sum = warp_sum(sum) / width;
  product = warp_sum(product) / width;
  for (int c = lane; c < width; c += 32) {
    float dn = to_float(dy_c[c]) * (gain_c ? gain_c[c] : 1.0f);
    float n = (to_float(x_c[c]) - mean) * rstd;
    store(dx_c + c, rstd * (dn - sum - n * product));
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
