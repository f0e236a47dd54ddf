// Cross-entropy of the rows of z + b, a chunk of logits (n rows, V columns, rows `stride` entries
// apart) fresh from the product:
//   lse = log sum_v exp(z_v + b_v),  loss = weight (lse - z_target - b_target).
// Called by linear_cross_entropy and its backward in cuda/loss.py. One block per row.
#include "common.cuh"

// Combines one (top, total) pair per thread, total = sum exp(z - top), in a fixed order.
__device__ inline void block_logsumexp(float& top, float& total) {
  __shared__ float tops[32], totals[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float high = warp_max(top);
  total = warp_sum(total * expf(top - high));
  if (lane == 0) {
    tops[warp] = high;
    totals[warp] = total;
  }
  __syncthreads();
  top = LOWEST;
  for (int i = 0; i < warps; i++) top = fmaxf(top, tops[i]);
  total = 0;
  for (int i = 0; i < warps; i++) total += totals[i] * expf(tops[i] - top);
}

__global__ void cross_entropy(const float* z_strided, const float* b_v, const int* target_n,
                              const float* weight_n, float* lse_n, float* loss_n, int vocabulary,
                              int stride) {
  u64 row = blockIdx.x;
  const float* z_v = z_strided + row * stride;
  float top = LOWEST, total = 0;
  for (int v = threadIdx.x; v < vocabulary; v += blockDim.x) {
    float z = z_v[v] + b_v[v];
    if (z > top) {
      total *= expf(top - z);
      top = z;
    }
    total += expf(z - top);
  }
  block_logsumexp(top, total);
  if (threadIdx.x == 0) {
    int target = target_n[row];
    lse_n[row] = top + logf(total);
    loss_n[row] = weight_n[row] * (lse_n[row] - z_v[target] - b_v[target]);
  }
}

// dz = weight (exp(z + b - lse) - [v = target]); weight holds the factor dloss. dz may be z.
template <typename T>
__global__ void cross_entropy_backward(const float* z_strided, const float* b_v,
                                       const int* target_n, const float* weight_n,
                                       const float* lse_n, T* dz_strided, int vocabulary,
                                       int stride) {
  u64 row = blockIdx.x;
  float weight = weight_n[row], lse = lse_n[row];
  int target = target_n[row];
  for (int v = threadIdx.x; v < vocabulary; v += blockDim.x) {
    float p = expf(z_strided[row * stride + v] + b_v[v] - lse);
    store(dz_strided + row * stride + v, weight * (v == target ? p - 1 : p));
  }
}
