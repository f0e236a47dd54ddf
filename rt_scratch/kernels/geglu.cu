// GEGLU: y = gelu(a) b with gelu(a) = a (1 + tanh u) / 2, u = sqrt(2 / pi) (a + 0.044715 a^3).
// Called by geglu and geglu_backward in cuda.py. Eight entries per thread.
#include "common.cuh"

constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBE = 0.044715f;

template <typename T>
__global__ void geglu(const T* a_n, const T* b_n, T* y_n, long long size) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  float a[8], b[8], y[8];
  read_many(a_n, first, size, a);
  read_many(b_n, first, size, b);
  for (int i = 0; i < 8; i++) {
    float t = tanhf(SCALE * a[i] * (1 + CUBE * a[i] * a[i]));
    y[i] = 0.5f * a[i] * (1 + t) * b[i];
  }
  write_many(y_n, first, size, y);
}

// da = dy b gelu'(a),  db = dy gelu(a),  gelu' = (1 + t) / 2 + a (1 - t^2) u' / 2,  t = tanh u.
template <typename T>
__global__ void geglu_backward(const T* dy_n, const T* a_n, const T* b_n, T* da_n, T* db_n,
                               long long size) {
  u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (first >= (u64)size) return;
  float dy[8], a[8], b[8], da[8], db[8];
  read_many(dy_n, first, size, dy);
  read_many(a_n, first, size, a);
  read_many(b_n, first, size, b);
  for (int i = 0; i < 8; i++) {
    float t = tanhf(SCALE * a[i] * (1 + CUBE * a[i] * a[i]));
    float du = SCALE * (1 + 3 * CUBE * a[i] * a[i]);
    da[i] = dy[i] * b[i] * (0.5f * (1 + t) + 0.5f * a[i] * (1 - t * t) * du);
    db[i] = dy[i] * 0.5f * a[i] * (1 + t);
  }
  write_many(da_n, first, size, da);
  write_many(db_n, first, size, db);
}
