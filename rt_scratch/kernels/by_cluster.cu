// Places sorted by (cluster, time): a stable counting sort of the winners of each row (batch,
// head), in three steps over chunks g of a row.
//   cluster_counts   count_rkg: members of cluster k in chunk g
//   cluster_starts   their running sum: where the first member of (k, g) goes
//   cluster_positions   order_rt: positions in order
// and the inverse, which says where each token went.
// Called by by_cluster and inverse in cuda/routing.py.
#include "common.cuh"

constexpr int CLUSTERS = 1024;  // at most

// One warp per chunk, grid (chunks, rows).
__global__ void cluster_counts(const int* winner_rt, int* count_rkg, int tokens, int clusters,
                               int chunk) {
  __shared__ int counts[CLUSTERS];
  for (int k = threadIdx.x; k < clusters; k += 32) counts[k] = 0;
  __syncwarp();
  int begin = blockIdx.x * chunk, end = min(tokens, begin + chunk);
  for (int t = begin + threadIdx.x; t < end; t += 32)
    atomicAdd(&counts[winner_rt[(u64)blockIdx.y * tokens + t]], 1);
  __syncwarp();
  for (int k = threadIdx.x; k < clusters; k += 32)
    count_rkg[((u64)blockIdx.y * clusters + k) * gridDim.x + blockIdx.x] = counts[k];
}

// Exclusive running sum of the n counts of a row, in place. One block of 256 threads per row.
__global__ void cluster_starts(int* count_rn, int n) {
  __shared__ int sums[8];
  int* count_n = count_rn + (u64)blockIdx.x * n;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, total = 0;
  for (int base = 0; base < n; base += 256) {
    int at = base + threadIdx.x;
    int count = at < n ? count_n[at] : 0, sum = count;
    for (int step = 1; step < 32; step <<= 1) {
      int other = __shfl_up_sync(ALL, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int before = total;
    for (int i = 0; i < 8; i++) {
      if (i < warp) before += sums[i];
      total += sums[i];
    }
    if (at < n) count_n[at] = before + sum - count;
    __syncthreads();
  }
}

// One warp per chunk, grid (chunks, rows); walks the chunk 32 tokens at a time.
__global__ void cluster_positions(const int* winner_rt, const int* start_rkg, int* order_rt,
                                  int tokens, int clusters, int chunk) {
  __shared__ int next[CLUSTERS];
  int lane = threadIdx.x;
  u64 row = (u64)blockIdx.y * tokens;
  for (int k = lane; k < clusters; k += 32)
    next[k] = start_rkg[((u64)blockIdx.y * clusters + k) * gridDim.x + blockIdx.x];
  __syncwarp();
  int begin = blockIdx.x * chunk, end = min(tokens, begin + chunk);
  for (int base = begin; base < end; base += 32) {
    int t = base + lane;
    bool valid = t < end;
    int cluster = valid ? winner_rt[row + t] : -1;
    unsigned peers = __match_any_sync(ALL, cluster);
    int earlier = __popc(peers & ((1u << lane) - 1));
    int position = valid ? next[cluster] + earlier : 0;
    __syncwarp();
    if (valid && earlier == 0) next[cluster] += __popc(peers);
    __syncwarp();
    if (valid) order_rt[row + position] = t;
  }
}

// rank[order[i]] = i for a permutation of each row. One thread per position, grid
// (T / threads, rows).
__global__ void invert(const int* order_rt, int* rank_rt, int tokens) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  u64 row = (u64)blockIdx.y * tokens;
  if (i < tokens) rank_rt[row + order_rt[row + i]] = i;
}
