// Product of float32 rows and a weight in panels of integer codes; the layout is in panels.py.
#include <stdint.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// SUMS: registers for sums; as many more hold weights, inputs and the table of codes. ROWS: F(n) for n rows of a tile.
#define ROWS_4(F) F(1) F(2) F(3) F(4)
#define ROWS_6(F) ROWS_4(F) F(5) F(6)
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define SUMS 24
#define ROWS ROWS_6
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define SUMS 12
#define ROWS ROWS_6
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define SUMS 24
#define ROWS ROWS_6
#else
#define VECTOR_BYTES 16
#define SUMS 8
#define ROWS ROWS_4
#endif

// A panel is 64 outputs: enough for a single row to hide the latency of additions. CHUNK inputs of it, widened, stay in
// the L1 cache; BLOCK bytes of rows stay in the L2 cache.
enum { PANEL = 64, LANES = VECTOR_BYTES / 4, VECTORS = PANEL / LANES };
enum { CHUNK = 128, BLOCK = 1 << 19, PREFETCH = 2048 };
#define COUNT_ROW(n) +1
enum { MAX_ROWS = 0 ROWS(COUNT_ROW) };

typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));
typedef int8_t bytes __attribute__((vector_size(VECTOR_BYTES / 4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define FITS(rows, vectors) ((vectors) <= VECTORS && (rows) * (vectors) <= SUMS)
#define VECTORS_OF(rows) (FITS(rows, 16) ? 16 : FITS(rows, 8) ? 8 : FITS(rows, 4) ? 4 : 2)
enum { MAX_VECTORS = 16 };

// A unit is the inputs that whole words of one output hold: one word, or three for three bits.
#define UNIT(bits) ((bits) == 3 ? 32 : 32 / (bits))
#define WORDS(bits) ((bits) == 3 ? 3 : 1)

typedef struct {
    const char *codes;   // (panel, unit, word, output)
    const char *scale;   // (panel, group, output), bfloat16 or, if wide, float32
    const int8_t *zero;  // (panel, group, output) from the middle of the grid; NULL: all zero
    const float *x_sums; // (row, chunk): sums of inputs; NULL without zero points
    float *out;
    long rows, inputs, outputs, group, groups, chunks;
    int wide;
} product;

#if defined(__AVX512F__)
// A permutation reads the low four bits of its index, so a table of fewer bits repeats itself.
static const float TABLE_2[16] = {0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1};
static const float TABLE_3[16] = {0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1};
static const float TABLE_4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
#define TABLE(bits) ((bits) == 2 ? TABLE_2 : (bits) == 3 ? TABLE_3 : TABLE_4)
#endif

// Codes of input k of a unit, whose first words are at `unit`, as numbers: two's complement of `bits` bits.
INLINE lanes widen(const int bits, const words *unit, const int k)
{
    const int per_word = 32 / bits;
    words field;
    int shift = 0;
    if (bits == 3 && k >= 30) {
        // The last two of 32 codes are in the two bits that remain of every word.
        field = unit[(k - 30) * VECTORS] >> 30 | (unit[2 * VECTORS] >> (k - 2) & 4);
    } else {
        field = unit[k / per_word * VECTORS];
        shift = k % per_word * bits;
    }
#if defined(__AVX512F__)
    if (bits <= 4) return (lanes)_mm512_permutexvar_ps((__m512i)(field >> shift), _mm512_loadu_ps(TABLE(bits)));
#endif
    return __builtin_convertvector((integers)(field << (32 - bits - shift)) >> (32 - bits), lanes);
}

// Adds sums of a chunk of group g, times its scales, to the outputs of a tile.
INLINE void finish(const int rows, const int vectors, lanes sum[MAX_ROWS][MAX_VECTORS], const product *of, long panel,
    long g, long chunk, long row, int first)
{
    long index = (panel * of->groups + g) * PANEL;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++) {
        long at = index + (first + v) * LANES;
        lanes scale = of->wide ? *(const lanes *)(of->scale + 4 * at)
                               : (lanes)(__builtin_convertvector(*(const halves *)(of->scale + 2 * at), words) << 16);
        if (of->zero) {
            lanes zero = __builtin_convertvector(*(const bytes *)(of->zero + at), lanes);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) sum[r][v] -= zero * of->x_sums[(row + r) * of->chunks + chunk];
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            lanes *out = (lanes *)(of->out + (row + r) * of->outputs + panel * PANEL) + first + v;
            *out = chunk ? *out + scale * sum[r][v] : scale * sum[r][v];
        }
    }
}

#define CLEAR(sum) \
    _Pragma("GCC unroll 16") for (int r = 0; r < rows; r++) \
        _Pragma("GCC unroll 16") for (int v = 0; v < vectors; v++) sum[r][v] = (lanes){0};

static long smaller(long a, long b) { return a < b ? a : b; }

// A panel's product with few rows: codes are widened in registers. x: packed (input, row).
INLINE void direct(const int bits, const int rows, const product *of, const float *rows_of_x, long panel)
{
    const int vectors = VECTORS_OF(rows);
    const words *codes = (const words *)(of->codes + panel * of->inputs / UNIT(bits) * WORDS(bits) * PANEL * 4);
    for (int first = 0; first < VECTORS; first += vectors) {
        const words *unit = codes + first;
        const float *x = rows_of_x;
        for (long g = 0, chunk = 0; g < of->groups; g++) {
            for (long start = 0; start < of->group; start += CHUNK, chunk++) {
                long depth = smaller(of->group - start, CHUNK);
                lanes sum[MAX_ROWS][MAX_VECTORS];
                CLEAR(sum)
                for (long k = 0; k < depth; k += UNIT(bits), unit += WORDS(bits) * VECTORS, x += UNIT(bits) * rows) {
#pragma GCC unroll 4
                    for (int line = 0; line < WORDS(bits) * PANEL * 4 / 64 * vectors / VECTORS; line++)
                        __builtin_prefetch((const char *)unit + PREFETCH + 64 * line, 0, 2);
#pragma GCC unroll 32
                    for (int j = 0; j < UNIT(bits); j++) {
#pragma GCC unroll 16
                        for (int v = 0; v < vectors; v++) {
                            lanes weight = widen(bits, unit + v, j);
#pragma GCC unroll 16
                            for (int r = 0; r < rows; r++) sum[r][v] += weight * x[j * rows + r];
                        }
                    }
                }
                finish(rows, vectors, sum, of, panel, g, chunk, 0, first);
            }
        }
    }
}

// Widens a chunk of a panel: (input, output).
INLINE void widen_chunk(const int bits, const words *unit, long depth, lanes *weights)
{
    for (long k = 0; k < depth; k += UNIT(bits), unit += WORDS(bits) * VECTORS, weights += UNIT(bits) * VECTORS) {
#pragma GCC unroll 32
        for (int j = 0; j < UNIT(bits); j++) {
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) weights[j * VECTORS + v] = widen(bits, unit + v, j);
        }
    }
}

// A tile of rows from `row` on times a widened chunk.
INLINE void tile(const int rows, const product *of, const float *x_tile, const lanes *widened, long depth, long panel,
    long g, long chunk, long row)
{
    const int vectors = VECTORS_OF(rows);
    for (int first = 0; first < VECTORS; first += vectors) {
        lanes sum[MAX_ROWS][MAX_VECTORS];
        CLEAR(sum)
        const lanes *weights = widened + first;
        const float *x = x_tile;
        for (long k = 0; k < depth; k++, weights += VECTORS, x += rows) {
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) sum[r][v] += weights[v] * x[r];
            }
        }
        finish(rows, vectors, sum, of, panel, g, chunk, row, first);
    }
}

// Packs rows as (input, row).
INLINE void pack(const int rows, const float *x, float *packed, long inputs)
{
    for (long k = 0; k < inputs; k++, packed += rows) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) packed[r] = x[r * inputs + k];
    }
}

#define ROW_FUNCTIONS(n) \
    static void pack_##n(const float *x, float *packed, long inputs) { pack(n, x, packed, inputs); } \
    static void tile_##n(const product *of, const float *x, const lanes *widened, long depth, long panel, long g, \
        long chunk, long row) { tile(n, of, x, widened, depth, panel, g, chunk, row); } \
    static void direct_2_##n(const product *of, const float *x, long panel) { direct(2, n, of, x, panel); } \
    static void direct_3_##n(const product *of, const float *x, long panel) { direct(3, n, of, x, panel); } \
    static void direct_4_##n(const product *of, const float *x, long panel) { direct(4, n, of, x, panel); } \
    static void direct_8_##n(const product *of, const float *x, long panel) { direct(8, n, of, x, panel); }
ROWS(ROW_FUNCTIONS)
#define WIDEN_FUNCTION(bits) \
    static void widen_##bits(const words *unit, long depth, lanes *out) { widen_chunk(bits, unit, depth, out); }
WIDEN_FUNCTION(2) WIDEN_FUNCTION(3) WIDEN_FUNCTION(4) WIDEN_FUNCTION(8)

#define PACK(n) pack_##n,
#define TILE(n) tile_##n,
#define DIRECT_2(n) direct_2_##n,
#define DIRECT_3(n) direct_3_##n,
#define DIRECT_4(n) direct_4_##n,
#define DIRECT_8(n) direct_8_##n,
static void (*const PACK_ROWS[])(const float *, float *, long) = {0, ROWS(PACK)};
static void (*const TILE_OF_ROWS[])(const product *, const float *, const lanes *, long, long, long, long, long)
    = {0, ROWS(TILE)};
static void (*const DIRECT[][MAX_ROWS + 1])(const product *, const float *, long)
    = {[2] = {0, ROWS(DIRECT_2)}, [3] = {0, ROWS(DIRECT_3)}, [4] = {0, ROWS(DIRECT_4)}, [8] = {0, ROWS(DIRECT_8)}};
static void (*const WIDEN[])(const words *, long, lanes *) = {[2] = widen_2, [3] = widen_3, [4] = widen_4, [8] = widen_8};

// Sum in an order that does not depend on the length of vectors.
static float sum_of(const float *x, long count)
{
    float sums[16] = {0};
    long k = 0;
    for (; k + 16 <= count; k += 16)
        for (int i = 0; i < 16; i++) sums[i] += x[k + i];
    for (; k < count; k++) sums[k % 16] += x[k];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// scratch: room for rows * inputs floats; it is not used for one row. x_sums: room for a float a row and chunk; NULL
// without zero points.
void packed_gemm(const float *x, const void *codes, const void *scale, const int8_t *zero, float *out, float *scratch,
    float *x_sums, long rows, long inputs, long outputs, long group, int bits, int wide, int threads)
{
    long tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, tile_rows = (rows + tiles - 1) / tiles;
    long block = BLOCK / (4 * inputs) / tile_rows * tile_rows;
    if (block < tile_rows) block = tile_rows;
    const float *tiles_of_x = rows == 1 ? x : scratch;
    long group_chunks = (group + CHUNK - 1) / CHUNK, groups = inputs / group;
    product of = {codes, scale, zero, x_sums, out, rows, inputs, outputs, group, groups, groups * group_chunks, wide};
    const long word_bytes = 4 * PANEL * WORDS(bits);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // The inputs of a tile's rows lie together, because a large power of two between rows would put all of them
        // into the same few lines of the L1 cache.
#pragma omp for
        for (long r = 0; r < (rows == 1 ? 0 : rows); r += tile_rows) {
            PACK_ROWS[smaller(rows - r, tile_rows)](x + r * inputs, scratch + r * inputs, inputs);
        }
#pragma omp for
        for (long r = 0; r < (zero ? rows : 0); r++) {
            for (long g = 0; g < groups; g++) {
                for (long c = 0; c < group_chunks; c++) {
                    x_sums[r * of.chunks + g * group_chunks + c]
                        = sum_of(x + r * inputs + g * group + c * CHUNK, smaller(group - c * CHUNK, CHUNK));
                }
            }
        }
        if (rows <= MAX_ROWS) {
#pragma omp for
            for (long p = 0; p < outputs / PANEL; p++) DIRECT[bits][rows](&of, tiles_of_x, p);
        } else {
#pragma omp for collapse(2)
            for (long b = 0; b < rows; b += block) {
                for (long p = 0; p < outputs / PANEL; p++) {
                    // Many rows share one widening of a chunk.
                    lanes widened[CHUNK * VECTORS];
                    long end = smaller(b + block, rows);
                    for (long chunk = 0; chunk < of.chunks; chunk++) {
                        long g = chunk / group_chunks, within = chunk % group_chunks * CHUNK, k = g * group + within;
                        long depth = smaller(group - within, CHUNK);
                        const char *unit = (const char *)codes + (p * inputs + k) / UNIT(bits) * word_bytes;
                        WIDEN[bits]((const words *)unit, depth, widened);
                        for (long r = b; r < end; r += tile_rows) {
                            long count = smaller(rows - r, tile_rows);
                            TILE_OF_ROWS[count](
                                &of, tiles_of_x + r * inputs + k * count, widened, depth, p, g, chunk, r);
                        }
                    }
                }
            }
        }
    }
}
