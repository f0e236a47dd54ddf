// Sums over the rows of a matrix in a fixed order, in two stages: strips of rows, then the strips.
// Called by layer_norm_backward and linear_cross_entropy_backward in cuda.py.
#include "common.cuh"

// out_g = sum of the rows of strip g of x.  Blocks of 32 columns by 8 rows, grid (C / 32, strips).
template <typename T>
__global__ void column_sum(const T* x_nc, float* out_gc, int rows, int width, int strip) {
  __shared__ float sums[8][32];
  int c = blockIdx.x * 32 + threadIdx.x;
  int end = min(rows, (int)(blockIdx.y + 1) * strip);
  float sum = 0;
  if (c < width)
    for (int n = blockIdx.y * strip + threadIdx.y; n < end; n += 8)
      sum += to_float(x_nc[(u64)n * width + c]);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < width) {
    for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
    out_gc[(u64)blockIdx.y * width + c] = sum;
  }
}

// out = sum_g part_g.  One thread per column.
__global__ void sum_strips(const float* part_gc, float* out_c, int strips, int width) {
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= width) return;
  float sum = 0;
  for (int g = 0; g < strips; g++) sum += part_gc[(u64)g * width + c];
  out_c[c] = sum;
}
