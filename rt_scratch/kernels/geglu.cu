// GEGLU: y = gelu(a) b with gelu(a) = a (1 + tanh u) / 2, u = sqrt(2 / pi) (a + 0.044715 a^3), and
// the dropout behind it. Called by geglu, geglu_ffn and their backwards in cuda/feed_forward.py.
// Eight entries per thread.
#include "common.cuh"

constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBE = 0.044715f;

// y = gelu(a) b keep / (1 - rate).
template <typename T>
__global__ void geglu(const T* a_n, const T* b_n, T* y_n, long long size, unsigned threshold,
                      unsigned seed_low, unsigned seed_high, unsigned stream,
                      const unsigned* step_1, long long first_entry) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  unsigned bits = kept_from(first, drop);
  float scale = kept_scale(drop), a[8], b[8], y[8];
  read_many(a_n, first, size, a);
  read_many(b_n, first, size, b);
  for (int i = 0; i < 8; i++) {
    float t = tanhf(SCALE * a[i] * (1 + CUBE * a[i] * a[i]));
    y[i] = (bits >> i) & 1 ? 0.5f * a[i] * (1 + t) * b[i] * scale : 0.0f;
  }
  write_many(y_n, first, size, y);
}

// With g = dy keep / (1 - rate):  da = g b gelu'(a),  db = g gelu(a),
// gelu' = (1 + t) / 2 + a (1 - t^2) u' / 2,  t = tanh u.  y (or null) is computed again.
template <typename T>
__global__ void geglu_backward(const T* dy_n, const T* a_n, const T* b_n, T* da_n, T* db_n, T* y_n,
                               long long size, unsigned threshold, unsigned seed_low,
                               unsigned seed_high, unsigned stream, const unsigned* step_1,
                               long long first_entry) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  Drop drop = drop_of(threshold, seed_low, seed_high, stream, step_1, first_entry);
  unsigned bits = kept_from(first, drop);
  float scale = kept_scale(drop), dy[8], a[8], b[8], y[8];
  read_many(dy_n, first, size, dy);
  read_many(a_n, first, size, a);
  read_many(b_n, first, size, b);
  for (int i = 0; i < 8; i++) {
    float t = tanhf(SCALE * a[i] * (1 + CUBE * a[i] * a[i]));
    float du = SCALE * (1 + 3 * CUBE * a[i] * a[i]), factor = (bits >> i) & 1 ? scale : 0.0f;
    float gelu = 0.5f * a[i] * (1 + t), g = dy[i] * factor;
    y[i] = gelu * b[i] * factor;
    a[i] = g * b[i] * (0.5f * (1 + t) + 0.5f * a[i] * (1 - t * t) * du);
    b[i] = g * gelu;
  }
  write_many(da_n, first, size, a);
  write_many(db_n, first, size, b);
  if (y_n) write_many(y_n, first, size, y);
}
