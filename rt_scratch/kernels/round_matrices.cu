// The compute copy: matrices of the flat buffer in half precision, rows from 16 bytes to 16 bytes.
// Called by round_matrices in cuda/optim.py.
#include "common.cuh"

// A matrix, in entries: `source` in the flat buffer, `start` and, from row to row, `stride` in the
// copy.
struct Place { long long source, rows, columns, start, stride; };

// Grid (any, matrices), eight entries of the copy per thread at a time; 0 beyond the columns.
template <typename T>
__global__ void round_matrices(const float* w_n, const long long* table_mi, T* out_n) {
  const Place at = ((const Place*)table_mi)[blockIdx.y];
  u64 size = at.rows * at.stride, step = (u64)gridDim.x * blockDim.x * 8;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < size; i += step) {
    u64 row = i / at.stride, column = i % at.stride;
    float w[8];
    read_many(w_n, at.source + row * at.columns + column, at.source + (row + 1) * at.columns, w);
    write_many(out_n + at.start, i, size, w);
  }
}
