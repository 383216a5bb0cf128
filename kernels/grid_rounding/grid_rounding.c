// Rounding to the values of a grid. Groups of `size` adjacent numbers share a scale, and a zero point where it is given.
#include "../grid_vectors.h"

// Sums of a group's numbers: so many whatever the length of vectors, so that they are the same on all processors.
enum { SUMS = 16, VECTORS = SUMS / LANES };

INLINE float sum_of(const lanes *sums)
{
    float part[SUMS];
    memcpy(part, sums, sizeof part);
    for (int half = SUMS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

// Squared error of the numbers in a vector that are rounded.
INLINE lanes error_of(const int kind, lanes x, float scale, float zero, float top)
{
    lanes value;
    if (kind == INTEGERS) value = nearest(kind, x / scale + zero, 0, top) - zero;
    else value = nearest(kind, x / scale, -top, top);
    lanes error = value * scale - x;
    return error * error;
}

INLINE void losses_of(const int kind, const float *x, const float *scale, const float *zero, float *loss, long groups,
                      long size, float top, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; g++) {
        const float *group = x + g * size, own_scale = scale[g], own_zero = zero ? zero[g] : 0;
        lanes sums[VECTORS] = {{0}};
        // Zeros behind the last number are values of every grid, and add nothing.
        for (long k = 0; k < size; k += SUMS)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[v] += error_of(kind, loaded(group, k + v * LANES, size), own_scale, own_zero, top);
        loss[g] = sum_of(sums);
    }
}

// loss: of each group, its sum of squared errors. top: the largest code of integers, the largest value of floats.
void grid_losses(const float *x, const float *scale, const float *zero, float *loss, long groups, long size, int kind,
                 float top, int threads)
{
    if (kind == INTEGERS) losses_of(INTEGERS, x, scale, zero, loss, groups, size, top, threads);
    else if (kind == E4M3) losses_of(E4M3, x, scale, zero, loss, groups, size, top, threads);
    else losses_of(E2M1, x, scale, zero, loss, groups, size, top, threads);
}

INLINE bytes codes_of(const int kind, lanes x, float scale, float zero, float top)
{
    if (kind == INTEGERS) return integer_codes(nearest(kind, x / scale + zero, 0, top));
    return float_codes(kind, nearest(kind, x / scale, -top, top));
}

INLINE void encode(const int kind, const float *x, const float *scale, const float *zero, uint8_t *codes, long groups,
                   long size, float top, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; g++) {
        const float *group = x + g * size, own_scale = scale[g], own_zero = zero ? zero[g] : 0;
        uint8_t *out = codes + g * size;
        for (long k = 0; k < size; k += LANES)
            store_bytes(out, k, size, codes_of(kind, loaded(group, k, size), own_scale, own_zero, top));
    }
}

void grid_encode(const float *x, const float *scale, const float *zero, uint8_t *codes, long groups, long size, int kind,
                 float top, int threads)
{
    if (kind == INTEGERS) encode(INTEGERS, x, scale, zero, codes, groups, size, top, threads);
    else if (kind == E4M3) encode(E4M3, x, scale, zero, codes, groups, size, top, threads);
    else encode(E2M1, x, scale, zero, codes, groups, size, top, threads);
}

INLINE lanes value_of(const int kind, bytes codes, float zero)
{
    ints code = of_bytes(codes);
    if (kind == INTEGERS) return __builtin_convertvector(code, lanes) - zero;
    const int sign = kind == E4M3 ? 0x80 : 8, fraction = kind == E4M3 ? 20 : 22;
    ints magnitude = code & (sign - 1), small = magnitude < (kind == E4M3 ? 8 : 2);
    lanes below = __builtin_convertvector(magnitude, lanes) * (kind == E4M3 ? 0x1p-9f : 0.5f);
    lanes normal = (lanes)((magnitude << fraction) + ((kind == E4M3 ? 120 : 126) << 23));
    lanes value = select_lanes(small, below, normal);
    return (lanes)((ints)value | ((ints)((code & sign) != 0) & (int32_t)0x80000000));
}

INLINE void decode(const int kind, const uint8_t *codes, const float *scale, const float *zero, void *out, long groups,
                   long size, int narrow, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; g++) {
        const uint8_t *group = codes + g * size;
        const float own_scale = scale[g], own_zero = zero ? zero[g] : 0;
        for (long k = 0; k < size; k += LANES) {
            bytes own = {0};
            if (k + LANES <= size) memcpy(&own, group + k, sizeof own);
            else memcpy(&own, group + k, size - k);
            lanes value = value_of(kind, own, own_zero) * own_scale;
            if (narrow) store_bfloat16((uint16_t *)out + g * size, k, size, value);
            else store((float *)out + g * size, k, size, value);
        }
    }
}

// out: values times scales, bfloat16 if narrow, else float32.
void grid_decode(const uint8_t *codes, const float *scale, const float *zero, void *out, long groups, long size, int kind,
                 int narrow, int threads)
{
    if (kind == INTEGERS) decode(INTEGERS, codes, scale, zero, out, groups, size, narrow, threads);
    else if (kind == E4M3) decode(E4M3, codes, scale, zero, out, groups, size, narrow, threads);
    else decode(E2M1, codes, scale, zero, out, groups, size, narrow, threads);
}

// Numbers over their scale on the grid, times the scale; the quotient is rounded to bfloat16 first if `narrow`.
INLINE lanes on_grid(const int kind, lanes x, float scale, float low, float high, int narrow)
{
    lanes quotient = x / scale;
    if (narrow) quotient = (lanes)(to_bfloat16(quotient) << 16);
    lanes value = nearest(kind, quotient, low, high);
    // The sign of zeros is kept.
    value = (lanes)((ints)value | ((ints)quotient & (int32_t)0x80000000));
    return value * scale;
}

INLINE void round_groups(const int kind, const void *x, const float *scale, void *out, long groups, long size, float low,
                         float high, int is_bfloat16, int narrow, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; g++) {
        const float own = scale[g];
        for (long k = 0; k < size; k += LANES) {
            if (is_bfloat16) {
                lanes given = loaded_bfloat16((const uint16_t *)x + g * size, k, size);
                store_bfloat16((uint16_t *)out + g * size, k, size, on_grid(kind, given, own, low, high, narrow));
            } else {
                lanes given = loaded((const float *)x + g * size, k, size);
                store((float *)out + g * size, k, size, on_grid(kind, given, own, low, high, 0));
            }
        }
    }
}

// x, out: bfloat16 or float32. low, high: of the values.
void grid_round(const void *x, const float *scale, void *out, long groups, long size, int kind, float low, float high,
                int is_bfloat16, int narrow, int threads)
{
    if (kind == INTEGERS) round_groups(INTEGERS, x, scale, out, groups, size, low, high, is_bfloat16, narrow, threads);
    else if (kind == E4M3) round_groups(E4M3, x, scale, out, groups, size, low, high, is_bfloat16, narrow, threads);
    else round_groups(E2M1, x, scale, out, groups, size, low, high, is_bfloat16, narrow, threads);
}

// Largest magnitude of each group, as float32. Those of numbers are in the order of their bits, NaN above all.
void grid_absmax(const void *x, float *largest, long groups, long size, int is_bfloat16, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; g++) {
        ints most = {0};
        for (long k = 0; k < size; k += LANES) {
            lanes given = is_bfloat16 ? loaded_bfloat16((const uint16_t *)x + g * size, k, size)
                                      : loaded((const float *)x + g * size, k, size);
            ints magnitude = (ints)given & 0x7fffffff, larger = magnitude > most;
            most = (magnitude & larger) | (most & ~larger);
        }
        int32_t part[LANES];
        memcpy(part, &most, sizeof part);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++)
                if (part[i + half] > part[i]) part[i] = part[i + half];
        memcpy(largest + g, part, sizeof *largest);
    }
}
