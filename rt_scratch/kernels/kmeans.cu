// Tokens and centroids: who wins whom, what was won, how far it is.
// Called by compare, cluster_statistics, commitment and add_commitment_gradient in cuda/kmeans.py.
#include "common.cuh"

// product_bhkt = x . mu, or x . mu / |mu| with equal_length; winner_bht: the k of the largest, the
// lowest on ties. Tiles of 32 tokens, 32 clusters and 32 columns; a lane owns a token, a warp four
// clusters. Grid (T / 32, B H), 256 threads.
template <typename T>
__global__ void __launch_bounds__(256)
    compare(const T* x_bhtd, const float* mu_hkd, int* winner_bht, float* product_bhkt, int heads,
            int tokens, int width, int clusters, int equal_length) {
  __shared__ float x_td[32][33], mu_kd[32][33], tops[8][32];
  __shared__ int winners[8][32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 32;
  u64 bh = blockIdx.y, t = first + lane;
  const float* mu = mu_hkd + bh % heads * clusters * width;
  float top = LOWEST;
  int winner = 0;
  for (int tile = 0; tile < clusters; tile += 32) {
    float product[4] = {0, 0, 0, 0}, square[4] = {0, 0, 0, 0};
    for (int left = 0; left < width; left += 32) {
      int d = left + lane;
      for (int i = warp; i < 32; i += 8) {
        bool in_x = first + i < tokens && d < width, in_mu = tile + i < clusters && d < width;
        x_td[i][lane] = in_x ? to_float(x_bhtd[(bh * tokens + first + i) * width + d]) : 0.0f;
        mu_kd[i][lane] = in_mu ? mu[(u64)(tile + i) * width + d] : 0.0f;
      }
      __syncthreads();
      for (int c = 0; c < 32; c++) {
        for (int i = 0; i < 4; i++) {
          float m = mu_kd[warp + 8 * i][c];
          product[i] += x_td[lane][c] * m;
          square[i] += m * m;
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
      int k = tile + warp + 8 * i;
      if (k >= clusters || t >= (u64)tokens) continue;
      if (equal_length) product[i] /= sqrtf(fmaxf(square[i], 1.17549435e-38f));
      product_bhkt[(bh * clusters + k) * tokens + t] = product[i];
      if (product[i] > top) {
        top = product[i];
        winner = k;
      }
    }
  }
  tops[warp][lane] = top;
  winners[warp][lane] = winner;
  __syncthreads();
  if (warp > 0 || t >= (u64)tokens) return;
  for (int i = 1; i < 8; i++) {
    bool better = tops[i][lane] > top || (tops[i][lane] == top && winners[i][lane] < winner);
    top = better ? tops[i][lane] : top;
    winner = better ? winners[i][lane] : winner;
  }
  winner_bht[bh * tokens + t] = winner;
}

// apart = x - mu[winner], and the sum of its squares over each block's rows. Grid (rows / chunk),
// 256 threads.
template <typename T>
__global__ void commitment(const T* x_bhtd, const float* mu_hkd, const int* winner_bht,
                           float* apart_bhtd, float* square_g, int rows, int heads, int tokens,
                           int width, int clusters, int chunk) {
  int begin = blockIdx.x * chunk, size = min(chunk, rows - begin);
  float sum = 0;
  for (long long i = threadIdx.x; i < (long long)size * width; i += 256) {
    int row = begin + i / width, d = i % width, h = row / tokens % heads;
    float m = mu_hkd[((u64)h * clusters + winner_bht[row]) * width + d];
    float apart = to_float(x_bhtd[(u64)row * width + d]) - m;
    apart_bhtd[(u64)row * width + d] = apart;
    sum += apart * apart;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) square_g[blockIdx.x] = sum;
}

// dx += factor apart, in place. Eight entries per thread.
template <typename T>
__global__ void add_scaled(T* dx_n, const float* apart_n, long long size, float factor) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  float dx[8], apart[8];
  read_many(dx_n, first, size, dx);
  read_many(apart_n, first, size, apart);
  for (int i = 0; i < 8; i++) dx[i] += factor * apart[i];
  write_many(dx_n, first, size, dx);
}

// Counts (H, K) and sums (H, K, D) of the tokens that each centroid won, in two stages: per chunk
// g of a sequence, then over chunks and batch in order.

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
