// Product of float32 rows and a weight in panels of integer codes; the layout is in panels.py.
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// SUMS: registers that hold sums; the others hold a widened weight, inputs and the table of codes.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define SUMS 24
#define MORE_TILES(F, bits) F(bits, 5) F(bits, 6)
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define SUMS 12
#define MORE_TILES(F, bits) F(bits, 5) F(bits, 6)
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define SUMS 24
#define MORE_TILES(F, bits) F(bits, 5) F(bits, 6)
#else
#define VECTOR_BYTES 16
#define SUMS 8
#define MORE_TILES(F, bits)
#endif

// A panel is 64 outputs: enough for a single row to hide the latency of additions. Products of up to CHUNK inputs of a
// group are added up before they are scaled. The codes of DEPTH inputs of a panel stay in the L1 cache, BLOCK bytes of
// rows in the L2 cache. PREFETCH: bytes ahead.
enum { PANEL = 64, LANES = VECTOR_BYTES / 4, VECTORS = PANEL / LANES };
enum { CHUNK = 128, DEPTH = 256, BLOCK = 1 << 19, PREFETCH = 4096 };
#define ONE(bits, rows) +1
enum { MAX_ROWS = 4 MORE_TILES(ONE, ) };

typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));
typedef int8_t bytes __attribute__((vector_size(VECTOR_BYTES / 4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define FITS(rows, vectors) ((vectors) <= VECTORS && (rows) * (vectors) <= SUMS)
#define VECTORS_OF(rows) (FITS(rows, 16) ? 16 : FITS(rows, 8) ? 8 : FITS(rows, 4) ? 4 : 2)
enum { MAX_VECTORS = 16 };

// A unit is the inputs whose codes fill whole words of one output: one word, or three for three bits.
#define UNIT(bits) ((bits) == 3 ? 32 : 32 / (bits))
#define WORDS(bits) ((bits) == 3 ? 3 : 1)

typedef struct {
    const char *codes;   // (panel, unit, word, output)
    const char *scale;   // (panel, group, output), bfloat16 or, if wide, float32
    const int8_t *zero;  // (panel, group, output) from the middle of the grid; NULL: all zero
    const float *x_sums; // (row, chunk): sums of inputs; NULL without zero points
    float *out;
    long inputs, outputs, group, groups, group_chunks;
    int wide;
} product;

#if defined(__AVX512F__)
// A permutation reads the low four bits of its index, so a table of fewer bits repeats itself.
static const float TABLE_2[16] = {0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1};
static const float TABLE_3[16] = {0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1};
static const float TABLE_4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
#define TABLE(bits) ((bits) == 2 ? TABLE_2 : (bits) == 3 ? TABLE_3 : TABLE_4)
#endif

// Codes of input k of a unit, which are two's complement of `bits` bits, as numbers.
INLINE lanes widen(const int bits, const words *unit, const int k)
{
    const int shift = k * bits % 32;
    const words *word = unit + k * bits / 32 * VECTORS;
    words field = word[0] >> shift;
    if (shift + bits > 32) field |= word[VECTORS] << (32 - shift);
#if defined(__AVX512F__)
    if (bits <= 4) return (lanes)_mm512_permutexvar_ps((__m512i)field, _mm512_loadu_ps(TABLE(bits)));
#endif
    if (shift + bits <= 32) field = word[0] << (32 - bits - shift);
    else field <<= 32 - bits;
    return __builtin_convertvector((integers)field >> (32 - bits), lanes);
}

// A tile: rows from `row` on, which lie at x as (input, row), times chunks `first` to `last` - 1 of a panel.
typedef struct {
    const product *of;
    const float *x;
    long panel, row, first, last;
} slice;

// Adds sums (row, vector) of a chunk, times its scales, to outputs from vector `first` on.
INLINE void add_scaled(const int rows, const int vectors, lanes *sum, const slice *at, long chunk, int first)
{
    const product *of = at->of;
    long index = (at->panel * of->groups + chunk / of->group_chunks) * PANEL + first * LANES;
    for (int v = 0; v < vectors; v++, index += LANES) {
        lanes scale = of->wide
            ? *(const lanes *)(of->scale + 4 * index)
            : (lanes)(__builtin_convertvector(*(const halves *)(of->scale + 2 * index), words) << 16);
        if (of->zero) {
            integers zero = __builtin_convertvector(*(const bytes *)(of->zero + index), integers);
            for (int r = 0; r < rows; r++) {
                float x_sum = of->x_sums[(at->row + r) * of->groups * of->group_chunks + chunk];
                sum[r * vectors + v] -= __builtin_convertvector(zero, lanes) * x_sum;
            }
        }
        for (int r = 0; r < rows; r++) {
            lanes *out = (lanes *)(of->out + (at->row + r) * of->outputs + at->panel * PANEL) + first + v;
            // Outputs are zero at first: without a branch, the sum is always rounded once, with its product.
            *out += scale * sum[r * vectors + v];
        }
    }
}

// Out of line, because it would take registers away from the sums of a tile.
static __attribute__((noinline)) void add_scaled_rows(
    int rows, int vectors, lanes *sum, const slice *at, long chunk, int first)
{
    add_scaled(rows, vectors, sum, at, chunk, first);
}

static long smaller(long a, long b) { return a < b ? a : b; }

// First input of a chunk.
static long start_of(const product *of, long chunk)
{
    return chunk / of->group_chunks * of->group + chunk % of->group_chunks * CHUNK;
}

#define EACH_SUM(statement) \
    _Pragma("GCC unroll 16") for (int r = 0; r < rows; r++) \
        _Pragma("GCC unroll 16") for (int v = 0; v < vectors; v++) statement;

// `bits` and `rows` are constant at every call, so that sums stay in registers.
INLINE void tile(const int bits, const int rows, const slice *at)
{
    const int vectors = VECTORS_OF(rows), inputs = UNIT(bits), lines = WORDS(bits) * vectors * VECTOR_BYTES / 64;
    const product *of = at->of;
    long start = start_of(of, at->first);
    const words *codes = (const words *)of->codes + (at->panel * of->inputs + start) / inputs * WORDS(bits) * VECTORS;
    for (int first = 0; first < VECTORS; first += vectors) {
        const words *unit = codes + first;
        const float *x = at->x + start * rows;
        for (long chunk = at->first; chunk < at->last; chunk++) {
            long depth = smaller(of->group - chunk % of->group_chunks * CHUNK, CHUNK);
            lanes sum[MAX_ROWS][MAX_VECTORS], stored[rows * vectors];
            EACH_SUM(sum[r][v] = (lanes){0})
            for (long k = 0; k < depth; k += inputs, unit += WORDS(bits) * VECTORS, x += inputs * rows) {
#pragma GCC unroll 16
                for (int line = 0; line < lines; line++)
                    __builtin_prefetch((const char *)unit + PREFETCH + 64 * line, 0, 3);
#pragma GCC unroll 32
                for (int j = 0; j < inputs; j++) {
#pragma GCC unroll 16
                    for (int v = 0; v < vectors; v++) {
                        lanes weight = widen(bits, unit + v, j);
#pragma GCC unroll 16
                        for (int r = 0; r < rows; r++) sum[r][v] += weight * x[j * rows + r];
                    }
                }
            }
            EACH_SUM(stored[r * vectors + v] = sum[r][v])
            if (rows <= 2)
                add_scaled(rows, vectors, stored, at, chunk, first);
            else
                add_scaled_rows(rows, vectors, stored, at, chunk, first);
        }
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

#define TILES(F, bits) F(bits, 1) F(bits, 2) F(bits, 3) F(bits, 4) MORE_TILES(F, bits)
#define TILE_FUNCTION(bits, rows) \
    static void tile_##bits##_##rows(const slice *at) { tile(bits, rows, at); }
#define PACK_FUNCTION(bits, rows) \
    static void pack_##rows(const float *x, float *packed, long inputs) { pack(rows, x, packed, inputs); }
TILES(PACK_FUNCTION, )
TILES(TILE_FUNCTION, 2)
TILES(TILE_FUNCTION, 3)
TILES(TILE_FUNCTION, 4)
TILES(TILE_FUNCTION, 8)
#define TILE(bits, rows) tile_##bits##_##rows,
#define PACK(bits, rows) pack_##rows,
static void (*const PACK_ROWS[MAX_ROWS + 1])(const float *, float *, long) = {0, TILES(PACK, )};
static void (*const TILE_OF_ROWS[][MAX_ROWS + 1])(const slice *) = {
    [2] = {0, TILES(TILE, 2)}, [3] = {0, TILES(TILE, 3)}, [4] = {0, TILES(TILE, 4)}, [8] = {0, TILES(TILE, 8)}};

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
    product of = {
        .codes = codes,
        .scale = scale,
        .zero = zero,
        .x_sums = x_sums,
        .out = out,
        .inputs = inputs,
        .outputs = outputs,
        .group = group,
        .groups = inputs / group,
        .group_chunks = (group + CHUNK - 1) / CHUNK,
        .wide = wide,
    };
    const long chunks = of.groups * of.group_chunks;
    // A single tile reads the codes once.
    const long step = rows > MAX_ROWS && group < DEPTH ? (DEPTH + group - 1) / group * of.group_chunks
        : rows > MAX_ROWS                              ? DEPTH / CHUNK
                                                       : chunks;
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
            for (long c = 0; c < chunks; c++) {
                long within = c % of.group_chunks * CHUNK;
                x_sums[r * chunks + c] = sum_of(x + r * inputs + start_of(&of, c), smaller(group - within, CHUNK));
            }
        }
#pragma omp for collapse(2)
        for (long b = 0; b < rows; b += block) {
            for (long p = 0; p < outputs / PANEL; p++) {
                long end = smaller(b + block, rows);
                for (long r = b; r < end; r++) memset(out + r * outputs + p * PANEL, 0, 4 * PANEL);
                for (long c = 0; c < chunks; c += step) {
                    for (long r = b; r < end; r += tile_rows) {
                        slice at = {&of, tiles_of_x + r * inputs, p, r, c, smaller(c + step, chunks)};
                        TILE_OF_ROWS[bits][smaller(rows - r, tile_rows)](&at);
                    }
                }
            }
        }
    }
}
