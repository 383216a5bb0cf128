// Product of a few float32 rows and a weight in panels of bfloat16; the layout is in reference.py.
#include <stdint.h>

// Vectors are as long as the processor's registers, because longer ones would be kept in memory. REGISTERS: those that
// are free for sums, widened weights and an input. TILES: F(n) for n rows, up to REGISTERS / 2 - 2.
#define TILES_4(F) F(1) F(2) F(3) F(4)
#define TILES_6(F) TILES_4(F) F(5) F(6)
#define TILES_10(F) TILES_6(F) F(7) F(8) F(9) F(10)
#define TILES_14(F) TILES_10(F) F(11) F(12) F(13) F(14)
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTERS 32
#define TILES TILES_14
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define REGISTERS 16
#define TILES TILES_6
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define REGISTERS 25 // of 32: GCC loads some inputs before it needs them
#define TILES TILES_10
#else
#define VECTOR_BYTES 16
#define REGISTERS 12 // of 16, for products that are not added to a sum by the same instruction
#define TILES TILES_4
#endif

typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES), may_alias));

// A panel is 32 outputs. A 32-bit word of it holds output j in its low half and output j + 16 in its high half, so that
// an input of a panel takes LINE bytes, or VECTORS vectors. DEPTH inputs of a panel and of the rows of a tile stay in
// the L1 cache; BLOCK bytes of rows stay in the L2 cache.
enum { PANEL = 32, LINE = 64, VECTORS = LINE / VECTOR_BYTES };
enum { DEPTH = 256, BLOCK = 1 << 19 };

// A tile of `rows` rows takes `vectors` vectors of a panel at once: as many as leave the sums, the widened weights and
// an input in registers.
#define FITS(rows, vectors) ((vectors) <= VECTORS && 2 * (vectors) * ((rows) + 1) < REGISTERS)
#define VECTORS_OF(rows) (FITS(rows, 4) ? 4 : FITS(rows, 2) ? 2 : 1)
enum { MAX_ROWS = REGISTERS / 2 - 2, MAX_VECTORS = 4 };

// So few rows wait for memory.
enum { MEMORY_BOUND_ROWS = 4 };

// x: the tile's rows, packed (input, row). ahead: first weights to prefetch, `step` bytes more at each input.
typedef struct {
    const float *x;
    const words *panel;
    float *out;
    const char *ahead;
    long outputs, depth, step;
    int adds;
} panel_slice;

// Accumulates one slice of a panel. `rows` and `vectors` are constant at every call, so that sums stay in registers.
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, panel_slice slice)
{
    for (int first = 0; first < VECTORS; first += vectors) {
        lanes low_sum[MAX_ROWS][MAX_VECTORS], high_sum[MAX_ROWS][MAX_VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) low_sum[r][v] = high_sum[r][v] = (lanes){0};
        }
        const words *weights = slice.panel + first;
        const float *x = slice.x;
        for (long k = 0; k < slice.depth; k++, weights += VECTORS, x += rows, slice.ahead += slice.step) {
            // Few rows leave no time to move weights on from the L2 cache, and many find them there too late.
            if (rows <= MEMORY_BOUND_ROWS)
                __builtin_prefetch(slice.ahead, 0, 2);
            else
                __builtin_prefetch(slice.ahead, 0, 3);
            lanes low[MAX_VECTORS], high[MAX_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                // A bfloat16 is the upper half of a float32.
                low[v] = (lanes)(weights[v] << 16);
                high[v] = (lanes)(weights[v] & 0xffff0000u);
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    low_sum[r][v] += low[v] * x[r];
                    high_sum[r][v] += high[v] * x[r];
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            lanes *low_out = (lanes *)(slice.out + r * slice.outputs) + first, *high_out = low_out + VECTORS;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                if (slice.adds) low_sum[r][v] += low_out[v], high_sum[r][v] += high_out[v];
                low_out[v] = low_sum[r][v], high_out[v] = high_sum[r][v];
            }
        }
    }
}

// Packs rows as (input, row).
static inline __attribute__((always_inline)) void pack(const int rows, const float *x, float *packed, long inputs)
{
    for (long k = 0; k < inputs; k++, packed += rows) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) packed[r] = x[r * inputs + k];
    }
}

#define FUNCTIONS(ROWS) \
    static void tile_##ROWS(const panel_slice *slice) { tile(ROWS, VECTORS_OF(ROWS), *slice); } \
    static void pack_##ROWS(const float *x, float *packed, long inputs) { pack(ROWS, x, packed, inputs); }
TILES(FUNCTIONS)
#define TILE(ROWS) tile_##ROWS,
#define PACK(ROWS) pack_##ROWS,
static void (*const TILE_OF_ROWS[MAX_ROWS + 1])(const panel_slice *) = {0, TILES(TILE)};
static void (*const PACK_ROWS[MAX_ROWS + 1])(const float *, float *, long) = {0, TILES(PACK)};

static long smaller(long a, long b) { return a < b ? a : b; }

// scratch: room for rows * inputs floats; it is not used for one row.
void skinny_gemm(
    const float *x, const void *packed, float *out, float *scratch, long rows, long inputs, long outputs, int threads)
{
    long tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, tile_rows = (rows + tiles - 1) / tiles;
    long block = BLOCK / (4 * inputs) / tile_rows * tile_rows;
    if (block < tile_rows) block = tile_rows;
    const float *tiles_of_x = rows == 1 ? x : scratch;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // The inputs of a tile's rows lie together, because a large power of two between rows would put all of them
        // into the same few lines of the L1 cache.
#pragma omp for
        for (long r = 0; r < (rows == 1 ? 0 : rows); r += tile_rows) {
            PACK_ROWS[smaller(rows - r, tile_rows)](x + r * inputs, scratch + r * inputs, inputs);
        }
#pragma omp for collapse(2)
        for (long b = 0; b < rows; b += block) {
            for (long p = 0; p < outputs / PANEL; p++) {
                long end = smaller(b + block, rows);
                // All passes over a slice together prefetch the next one, each an equal share of every line.
                long passes = (end - b + tile_rows - 1) / tile_rows * (VECTORS / VECTORS_OF(tile_rows));
                for (long k = 0; k < inputs; k += DEPTH) {
                    long depth = smaller(inputs - k, DEPTH);
                    const char *panel = (const char *)packed + (p * inputs + k) * LINE;
                    // With one pass, both slices would fill the L1 cache: half of one ahead is enough.
                    const char *ahead = panel + LINE * DEPTH / (passes == 1 && rows > MEMORY_BOUND_ROWS ? 2 : 1);
                    for (long r = b; r < end; r += tile_rows) {
                        long count = smaller(rows - r, tile_rows), step = LINE / passes;
                        panel_slice slice = {
                            .x = tiles_of_x + r * inputs + k * count,
                            .panel = (const words *)panel,
                            .out = out + r * outputs + p * PANEL,
                            .ahead = ahead + (r - b) / tile_rows * (VECTORS / VECTORS_OF(tile_rows)) * depth * step,
                            .outputs = outputs,
                            .depth = depth,
                            .step = step,
                            .adds = k > 0,
                        };
                        TILE_OF_ROWS[count](&slice);
                    }
                }
            }
        }
    }
}
