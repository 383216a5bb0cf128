// Product of a few float32 rows and a weight in panels of bfloat16; the layout is in reference.py.
#include <stdint.h>
#include <string.h>

// One AVX-512 register; compilers split these where registers are shorter.
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

// A panel is 32 outputs. A 32-bit word of it holds output j in its low half and output j + 16 in its high half. DEPTH
// inputs of a panel and of the rows of a tile stay in the L1 cache; AHEAD inputs, one page, are prefetched.
enum { LANES = 16, PANEL = 2 * LANES, DEPTH = 256, AHEAD = 64 };

// Rows of a tile: as many as have their sums in registers.
#ifdef __AVX512F__
enum { MAX_ROWS = 12 };
#else
enum { MAX_ROWS = 4 };
#endif

typedef struct {
    const float *x;
    const words *panel;
    float *out;
    long inputs, outputs, depth;
    int adds, fetches;
} panel_slice;

// Accumulates one slice of a panel. `rows` is a constant at every call, so that the sums stay in registers.
static inline __attribute__((always_inline)) void tile(const int rows, panel_slice slice)
{
    lanes low_sum[MAX_ROWS], high_sum[MAX_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) low_sum[r] = high_sum[r] = (lanes){0};
    for (long k = 0; k < slice.depth; k++) {
        if (slice.fetches) __builtin_prefetch(slice.panel + k + AHEAD);
        // A bfloat16 is the upper half of a float32.
        words pair = slice.panel[k];
        lanes low = (lanes)(pair << 16), high = (lanes)(pair & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            low_sum[r] += low * slice.x[r * slice.inputs + k];
            high_sum[r] += high * slice.x[r * slice.inputs + k];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *row = slice.out + r * slice.outputs;
        if (slice.adds) {
            lanes before[2];
            memcpy(before, row, sizeof before);
            low_sum[r] += before[0], high_sum[r] += before[1];
        }
        memcpy(row, &low_sum[r], sizeof low_sum[r]);
        memcpy(row + LANES, &high_sum[r], sizeof high_sum[r]);
    }
}

#define TILE(ROWS) static void tile_##ROWS(const panel_slice *slice) { tile(ROWS, *slice); }
TILE(1) TILE(2) TILE(3) TILE(4)
#if defined(__AVX512F__)
TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
static void (*const TILES[])(const panel_slice *) = {
    0, tile_1, tile_2, tile_3, tile_4,
#ifdef __AVX512F__
    tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12,
#endif
};

void skinny_gemm(const float *x, const void *packed, float *out, long rows, long inputs, long outputs, int threads)
{
    long tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, tile_rows = (rows + tiles - 1) / tiles;
    if (rows > 4 * MAX_ROWS) tile_rows = MAX_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long p = 0; p < outputs / PANEL; p++) {
        for (long k = 0; k < inputs; k += DEPTH) {
            for (long r = 0; r < rows; r += tile_rows) {
                panel_slice slice = {
                    .x = x + r * inputs + k,
                    .panel = (const words *)packed + p * inputs + k,
                    .out = out + r * outputs + p * PANEL,
                    .inputs = inputs,
                    .outputs = outputs,
                    .depth = inputs - k < DEPTH ? inputs - k : DEPTH,
                    .adds = k > 0,
                    .fetches = r == 0,
                };
                TILES[rows - r < tile_rows ? rows - r : tile_rows](&slice);
            }
        }
    }
}
