// One step of online k-means. Called by replace_centroids in cuda/kmeans.py.
#include "common.cuh"

constexpr int CLUSTERS = 1024;  // most of a head

// c <- c + move (won - c),  m <- m + move (sum - m),  mu = m / c',  c' = n (c + s) / (n + s K),
// n = sum_k c, where the centroid won a token. One block of 256 per head, up to CLUSTERS clusters.
__global__ void replace_centroids(float* mu_hkd, float* count_hk, float* total_hkd,
                                  const float* won_hk, const float* sum_hkd, int clusters,
                                  int width, float move, float smoothing) {
  __shared__ float counts[CLUSTERS];
  u64 head = (u64)blockIdx.x * clusters;
  float n = 0;
  for (int k = threadIdx.x; k < clusters; k += 256) {
    float count = count_hk[head + k];
    count += move * (won_hk[head + k] - count);
    counts[k] = count_hk[head + k] = count;
    n += count;
  }
  n = block_sum(n);
  for (int i = threadIdx.x; i < clusters * width; i += 256) {
    int k = i / width;
    u64 at = head * width + i;
    float total = total_hkd[at];
    total_hkd[at] = total += move * (sum_hkd[at] - total);
    float smooth = (counts[k] + smoothing) * n / (n + smoothing * clusters);
    if (won_hk[head + k] > 0) mu_hkd[at] = total / fmaxf(smooth, 1.17549435e-38f);
  }
}
