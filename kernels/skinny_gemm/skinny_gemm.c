// Products of float32 rows by a weight that lies in panels of bfloat16; see few_rows.py.
#include <stdint.h>
#include <string.h>

// Compilers split these where registers are shorter.
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

// A panel is 32 outputs; a word of it holds an even and an odd one. DEPTH inputs of a panel and of the rows of a tile
// stay in the first cache; AHEAD inputs, which is a page, are fetched before they are needed.
enum { LANES = 16, PANEL = 2 * LANES, DEPTH = 256, AHEAD = 64 };

// Rows whose sums fill the registers.
#ifdef __AVX512F__
enum { MOST = 12 };
#else
enum { MOST = 4 };
#endif

typedef struct {
    const float *x;
    const words *panel;
    float *out;
    long inputs, outputs, depth;
    int adds, fetches;
} piece;

// Sums of one piece; `rows` is a constant wherever this is called, so that the sums are registers.
static inline __attribute__((always_inline)) void tile(const int rows, piece at)
{
    lanes even[MOST], odd[MOST];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) even[r] = odd[r] = (lanes){0};
    for (long k = 0; k < at.depth; k++) {
        if (at.fetches) __builtin_prefetch(at.panel + k + AHEAD);
        // A bfloat16 is the upper half of a float32.
        words both = at.panel[k];
        lanes low = (lanes)(both << 16), high = (lanes)(both & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            even[r] += low * at.x[r * at.inputs + k];
            odd[r] += high * at.x[r * at.inputs + k];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *place = at.out + r * at.outputs;
        if (at.adds) {
            lanes before[2];
            memcpy(before, place, sizeof before);
            even[r] += before[0], odd[r] += before[1];
        }
        memcpy(place, &even[r], sizeof even[r]);
        memcpy(place + LANES, &odd[r], sizeof odd[r]);
    }
}

#define TILE(ROWS) static void tile_##ROWS(const piece *at) { tile(ROWS, *at); }
TILE(1) TILE(2) TILE(3) TILE(4)
#if defined(__AVX512F__)
TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
static void (*const TILES[])(const piece *) = {
    0, tile_1, tile_2, tile_3, tile_4,
#ifdef __AVX512F__
    tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12,
#endif
};

void few_rows(const float *x, const void *packed, float *out, long rows, long inputs, long outputs, int threads)
{
    long tiles = (rows + MOST - 1) / MOST, each = (rows + tiles - 1) / tiles;
    if (rows > 4 * MOST) each = MOST;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long p = 0; p < outputs / PANEL; p++) {
        for (long k = 0; k < inputs; k += DEPTH) {
            for (long r = 0; r < rows; r += each) {
                piece at = {
                    .x = x + r * inputs + k,
                    .panel = (const words *)packed + p * inputs + k,
                    .out = out + r * outputs + p * PANEL,
                    .inputs = inputs,
                    .outputs = outputs,
                    .depth = inputs - k < DEPTH ? inputs - k : DEPTH,
                    .adds = k > 0,
                    .fetches = r == 0,
                };
                TILES[rows - r < each ? rows - r : each](&at);
            }
        }
    }
}
