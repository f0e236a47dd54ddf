// y = x keep / (1 - rate); the bits of keep depend only on (seed, stream, step, position), so the
// backward is the same kernel on dy and no mask is stored.
// Called by dropout in cuda.py. Eight entries, one draw, per thread.
#include "common.cuh"

template <typename T>
__global__ void dropout(const T* x_n, T* y_n, long long size, unsigned threshold,
                        unsigned seed_low, unsigned seed_high, unsigned stream, unsigned step) {
  u64 octet = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (octet * 8 >= (u64)size) return;
  Drop drop = {threshold, seed_low, seed_high, stream, step};
  unsigned bits = kept(octet, drop);
  float scale = kept_scale(drop), x[8];
  read_many(x_n, octet * 8, size, x);
  for (int i = 0; i < 8; i++) x[i] = (bits >> i) & 1 ? x[i] * scale : 0.0f;
  write_many(y_n, octet * 8, size, x);
}
