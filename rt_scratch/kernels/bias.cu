// What stands between two products: a bias, the ReLU, its dropout.
// Called by linear in cuda/layers.py, by relu_ffn and relu_ffn_backward in cuda/feed_forward.py.
// Eight entries per thread.
#include "common.cuh"

// y = y + b, in place, or y = max(y + b, 0) keep / (1 - rate) with `relu`.
template <typename T>
__global__ void add_bias(T* y_nc, const float* b_c, long long size, int width, int relu,
                         unsigned threshold, unsigned seed_low, unsigned seed_high,
                         unsigned stream, const unsigned* step_1, long long first_entry) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  unsigned bits = kept_from(first, drop);
  float scale = kept_scale(drop), y[8];
  read_many(y_nc, first, size, y);
  int c = first % width;
  for (int i = 0; i < 8; i++) {
    y[i] += b_c[c];
    if (relu && y[i] <= 0) y[i] = 0;  // a NaN stays one
    if (relu) y[i] = (bits >> i) & 1 ? y[i] * scale : 0.0f;
    if (++c == width) c = 0;
  }
  write_many(y_nc, first, size, y);
}

// dz = dd scale where d > 0, else 0: back through the dropout and the ReLU that gave d. In place.
template <typename T>
__global__ void relu_backward(T* dd_n, const T* d_n, long long size, float scale) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  float dd[8], d[8];
  read_many(dd_n, first, size, dd);
  read_many(d_n, first, size, d);
  for (int i = 0; i < 8; i++) dd[i] = d[i] > 0 ? dd[i] * scale : 0.0f;
  write_many(dd_n, first, size, dd);
}
