// Counts (H, K) and sums (H, K, D) of the tokens that each centroid won, in two stages: per chunk
// g of a sequence, then over chunks and batch in order.
// Called by cluster_statistics in cuda.py.
#include "common.cuh"

constexpr int TILE = 4096, CLUSTERS = 1024;  // most floats of sums, and clusters, per block

// Grid (chunks G, B H, K / tile); threads own columns; tile D <= TILE, tile <=
// CLUSTERS.
template <typename T>
__global__ void cluster_sums(const T* x_bhtd, const int* winner_bht, float* sum_gbhkd,
                             float* count_gbhk, int tokens, int width, int clusters, int chunk,
                             int tile) {
  __shared__ float sums[TILE];
  __shared__ int counts[CLUSTERS];
  u64 bh = blockIdx.y;
  int first = blockIdx.z * tile, size = min(tile, clusters - first);
  int begin = blockIdx.x * chunk, end = min(tokens, begin + chunk);
  for (int i = threadIdx.x; i < size * width; i += blockDim.x) sums[i] = 0;
  for (int k = threadIdx.x; k < size; k += blockDim.x) counts[k] = 0;
  __syncthreads();
  for (int t = begin; t < end; t++) {
    int k = winner_bht[bh * tokens + t] - first;
    if (k < 0 || k >= size) continue;
    for (int d = threadIdx.x; d < width; d += blockDim.x)
      sums[k * width + d] += to_float(x_bhtd[(bh * tokens + t) * width + d]);
    if (threadIdx.x == 0) counts[k]++;
  }
  __syncthreads();
  u64 out = ((u64)blockIdx.x * gridDim.y + bh) * clusters + first;
  for (int i = threadIdx.x; i < size * width; i += blockDim.x) sum_gbhkd[out * width + i] = sums[i];
  for (int k = threadIdx.x; k < size; k += blockDim.x) count_gbhk[out + k] = counts[k];
}
