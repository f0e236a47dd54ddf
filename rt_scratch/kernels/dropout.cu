// y = x keep / (1 - rate); the bits of keep depend only on (seed, stream, step, position), where
// that of x_n[0] is first_entry, so the backward is the same kernel on dy and no mask is stored.
// Called by dropout in cuda/dropout.py. Eight entries per thread: one draw, two where they begin
// inside an octet.
#include "common.cuh"

template <typename T>
__global__ void dropout(const T* x_n, T* y_n, long long size, unsigned threshold,
                        unsigned seed_low, unsigned seed_high, unsigned stream,
                        const unsigned* step_1, long long first_entry) {
  u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= (u64)size) return;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  unsigned bits = kept_from(at, drop);
  float scale = kept_scale(drop), x[8];
  read_many(x_n, at, size, x);
  for (int i = 0; i < 8; i++) x[i] = (bits >> i) & 1 ? x[i] * scale : 0.0f;
  write_many(y_n, at, size, x);
}
