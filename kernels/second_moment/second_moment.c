// Adds x' x to sums in panels; the layout is in __init__.py.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#endif

// A strip is 32 columns of the inputs, packed for DEPTH steps. A step is one token in float32, two in bfloat16, whose
// word holds the earlier token in its low half. Tiles of the sums have as many rows as have their sums in registers.
enum { STRIP = 32, DEPTH = 256, LANES = 16, ROWS = 8, VECTORS = 2, COLUMNS = LANES * VECTORS };

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef void tile_function(const void *left, const void *right, long steps, float *out);
typedef void pack_function(const void *x, long tokens, long columns, long first, void *strip);

// 1: faster than a general matrix product of float32. 2: the processor multiplies bfloat16 values. With shorter vectors
// than AVX-512's the tiles do not fit in the registers, and a matrix product is faster.
int second_moment_abilities(void)
{
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return 1 | 2;
#elif defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}

static void pack_float32(const void *inputs, long tokens, long columns, long first, void *strip)
{
    long width = columns - first < STRIP ? columns - first : STRIP;
    for (long k = 0; k < tokens; k++) {
        float *row = (float *)strip + k * STRIP;
        memcpy(row, (const float *)inputs + k * columns + first, width * sizeof *row);
        memset(row + width, 0, (STRIP - width) * sizeof *row);
    }
}

// Products of ROWS columns of the left strip and COLUMNS of the right one, summed over the steps.
static void tile_float32(const void *left, const void *right, long steps, float *out)
{
    // All loops over the sums are unrolled, so that compilers hold them in registers.
    lanes sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = (lanes){0};
    for (long k = 0; k < steps; k++) {
        const float *a = (const float *)left + k * STRIP, *b = (const float *)right + k * STRIP;
        lanes columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) memcpy(&columns[v], b + v * LANES, sizeof columns[v]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] += columns[v] * a[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) memcpy(out + r * COLUMNS + v * LANES, &sums[r][v], sizeof sums[r][v]);
}

// Adds a tile to the sums; `row` and `column` are its first ones. What is above the diagonal is not stored, but for the
// transpose of what is below it in a panel's own square.
static void add_tile(const float *tile, long row, long column, long columns, long width, float *sums)
{
    for (long r = row; r < row + ROWS && r < columns; r++, tile += COLUMNS) {
        long start = r / width * width, stop = start + width < columns ? start + width : columns;
        // Panels before this one are full, and each has `width` columns more than the one before.
        float *panel = sums + start * (start + width) / 2, *to = panel + (r - start) * stop + column;
        long end = r + 1 - column < COLUMNS ? r + 1 - column : COLUMNS;
        for (long c = 0; c < end; c++) to[c] += tile[c];
        for (long c = column < start ? start - column : 0; c < end && column + c < r; c++)
            panel[(column + c - start) * stop + r] += tile[c];
    }
}

// token_bytes: of a row of x. step_tokens: tokens of a step.
static int run(const void *x, long token_bytes, long tokens, long step_tokens, long columns, long width, float *sums,
               pack_function *pack, tile_function *tile, int threads)
{
    long strips = (columns + STRIP - 1) / STRIP, strip_bytes = STRIP * DEPTH * 4;
    char *packed = aligned_alloc(64, strips * strip_bytes);
    if (!packed) return 1;
    for (long t = 0; t < tokens; t += DEPTH * step_tokens) {
        long count = tokens - t < DEPTH * step_tokens ? tokens - t : DEPTH * step_tokens;
        long steps = (count + step_tokens - 1) / step_tokens;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (long p = 0; p < strips; p++)
            pack((const char *)x + t * token_bytes, count, columns, p * STRIP, packed + p * strip_bytes);
        // Tiles of different strips are added to different places, so the order of summation is always the same.
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
        for (long i = strips - 1; i >= 0; i--)
            for (long j = 0; j <= i; j++)
                for (long r = 0; r < STRIP; r += ROWS)
                    for (long c = 0; c < STRIP; c += COLUMNS) {
                        float out[ROWS * COLUMNS];
                        tile(packed + i * strip_bytes + r * 4, packed + j * strip_bytes + c * 4, steps, out);
                        add_tile(out, i * STRIP + r, j * STRIP + c, columns, width, sums);
                    }
    }
    free(packed);
    return 0;
}

int second_moment_float32(const float *x, long tokens, long columns, long width, float *sums, int threads)
{
    return run(x, 4 * columns, tokens, 1, columns, width, sums, pack_float32, tile_float32, threads);
}

// Writes a panel, divided by `tokens`, to a whole matrix whose rows and columns have another order: `place` of each. The
// panel has rows start to stop - 1 and the columns before stop.
void second_moment_spread(const float *panel, long start, long stop, long columns, const int64_t *place, float tokens,
                          float *out, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long r = start; r < stop; r++) {
        const float *from = panel + (r - start) * stop;
        float *to = out + place[r] * columns;
        for (long c = 0; c < stop; c++) to[place[c]] = from[c] / tokens;
    }
    // The same above the diagonal: of as many columns as share a line of the cache.
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long first = 0; first < start; first += LANES)
        for (long c = first; c < first + LANES && c < start; c++) {
            float *to = out + place[c] * columns;
            for (long r = start; r < stop; r++) to[place[r]] = panel[(r - start) * stop + c] / tokens;
        }
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
static void pack_bfloat16(const void *inputs, long tokens, long columns, long first, void *strip)
{
    long width = columns - first < STRIP ? columns - first : STRIP;
    for (long k = 0; k < tokens; k += 2) {
        const uint16_t *low = (const uint16_t *)inputs + k * columns + first;
        uint32_t *row = (uint32_t *)strip + k / 2 * STRIP;
        if (k + 1 < tokens)
            for (long c = 0; c < width; c++) row[c] = low[c] | (uint32_t)low[c + columns] << 16;
        else
            for (long c = 0; c < width; c++) row[c] = low[c];
        memset(row + width, 0, (STRIP - width) * sizeof *row);
    }
}

static void tile_bfloat16(const void *left, const void *right, long steps, float *out)
{
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (long k = 0; k < steps; k++) {
        const uint32_t *a = (const uint32_t *)left + k * STRIP, *b = (const uint32_t *)right + k * STRIP;
        __m512bh columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) memcpy(out + r * COLUMNS + v * LANES, &sums[r][v], sizeof sums[r][v]);
}

int second_moment_bfloat16(const uint16_t *x, long tokens, long columns, long width, float *sums, int threads)
{
    return run(x, 2 * columns, tokens, 2, columns, width, sums, pack_bfloat16, tile_bfloat16, threads);
}
#else
int second_moment_bfloat16(const uint16_t *x, long tokens, long columns, long width, float *sums, int threads)
{
    (void)x, (void)tokens, (void)columns, (void)width, (void)sums, (void)threads;
    return 1;
}
#endif
