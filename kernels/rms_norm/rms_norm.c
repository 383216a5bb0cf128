// Root mean square norm of rows: x / sqrt(mean(x^2) + eps) * weight.
#include <math.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
enum { LANES = VECTOR_BYTES / 4, SUMS = 4 };

void rms_norm(const float *x, const float *weight, float *out, long rows, long size, float eps)
{
    long whole = size / (SUMS * LANES) * (SUMS * LANES);
    for (long r = 0; r < rows; r++, x += size, out += size) {
        lanes sums[SUMS] = {{0}};
        for (long i = 0; i < whole; i += SUMS * LANES) {
            for (int s = 0; s < SUMS; s++) {
                lanes part = *(const lanes *)(x + i + s * LANES);
                sums[s] += part * part;
            }
        }
        lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        float total = 0;
        for (int i = 0; i < LANES; i++) total += sum[i];
        for (long i = whole; i < size; i++) total += x[i] * x[i];
        float factor = 1 / sqrtf(total / size + eps);
        for (long i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
    }
}
