// Sums over the rows of a matrix in a fixed order, in two stages: strips of rows, then the strips.
// Called in cuda/sums.py.
#include "common.cuh"

// out_g = sum of the rows of strip g of x, which are `stride` entries apart. Blocks of 32 columns
// by 8 rows, grid (C / 32, strips).
template <typename T>
__global__ void column_sum(const T* x_strided, float* out_gc, int rows, int width, int strip,
                           int stride) {
  __shared__ float sums[8][32];
  int c = blockIdx.x * 32 + threadIdx.x;
  int end = min(rows, (int)(blockIdx.y + 1) * strip);
  float sum = 0;
  if (c < width)
    for (int n = blockIdx.y * strip + threadIdx.y; n < end; n += 8)
      sum += to_float(x_strided[(u64)n * stride + c]);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < width) {
    for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
    out_gc[(u64)blockIdx.y * width + c] = sum;
  }
}

// out = sum_g part_g of two arrays of parts (or one, the second null), or out += with `add`.
// One thread per column, grid (columns, 2).
__global__ void sum_strips(const float* part0_gc, const float* part1_gc, float* out0_c,
                           float* out1_c, int strips, int width0, int width1, int add) {
  const float* part_gc = blockIdx.y ? part1_gc : part0_gc;
  float* out_c = blockIdx.y ? out1_c : out0_c;
  int c = blockIdx.x * blockDim.x + threadIdx.x, width = blockIdx.y ? width1 : width0;
  if (c >= width) return;
  float sum = 0;
  for (int g = 0; g < strips; g++) sum += part_gc[(u64)g * width + c];
  out_c[c] = add ? out_c[c] + sum : sum;
}

// out = factor sum_n x_n. One block of 256 threads.
__global__ void sum_all(const float* x_n, float* out_1, int size, float factor) {
  float sum = 0;
  for (int n = threadIdx.x; n < size; n += 256) sum += x_n[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out_1[0] = factor * sum;
}
