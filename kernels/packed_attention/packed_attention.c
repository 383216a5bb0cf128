// Attention of some queries over packed keys and values: codes are read as they are stored, and never unpacked to memory.
//
// A row of keys has the codes of all KV heads; a scale and an offset belong to a channel and `group` rows. A row of values
// has the codes of one head of one token, with a scale and an offset for `width` numbers. Codes of 2, 4 or 8 bits: byte i
// holds the numbers i * phases + p for p = 0 … phases - 1, lowest bits first, so a vector of bytes gives vectors of numbers
// `phases` apart. Queries and sums are kept in that order.
#include <math.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef int32_t words __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));

enum { LANES = VECTOR_BYTES / 4, MAX_SIZE = 256, MAX_VECTORS = MAX_SIZE / LANES, MAX_ROWS = 64, BLOCK = 32 };
typedef uint8_t bytes __attribute__((vector_size(LANES), may_alias, aligned(1)));
typedef float quad __attribute__((vector_size(16), may_alias, aligned(4)));
// Below this many products, threads take longer to start than to compute.
enum { MIN_PARALLEL = 1 << 18 };

// Sums of four vectors, each in one order whatever the others are.
static inline quad quarter(lanes values)
{
    quad parts[LANES / 4];
    __builtin_memcpy(parts, &values, sizeof values);
    for (int step = LANES / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

typedef int32_t indices __attribute__((vector_size(16)));

static inline quad sums_of(lanes a, lanes b, lanes c, lanes d)
{
    quad qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
    quad ab = __builtin_shuffle(qa, qb, (indices){0, 1, 4, 5}) + __builtin_shuffle(qa, qb, (indices){2, 3, 6, 7});
    quad cd = __builtin_shuffle(qc, qd, (indices){0, 1, 4, 5}) + __builtin_shuffle(qc, qd, (indices){2, 3, 6, 7});
    return __builtin_shuffle(ab, cd, (indices){0, 2, 4, 6}) + __builtin_shuffle(ab, cd, (indices){1, 3, 5, 7});
}

static inline float sum_of(lanes values)
{
    quad q = quarter(values);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// exp(x) for x <= 0, within 2 units in the last place: 2^n times a polynomial of the remainder.
static inline lanes exponential(lanes x)
{
    const lanes least = (lanes){0} - 87.0f;
    words below = x < least;
    x = (lanes)((below & (words)least) | (~below & (words)x));
    words n = __builtin_convertvector(x * 1.44269504f - 0.5f, words);
    lanes whole = __builtin_convertvector(n, lanes);
    lanes r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    lanes p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
    return p * (lanes)((n + 127) << 23);
}

// LANES bytes as words. GCC 12 converts vectors of bytes one by one.
static inline words widened(const uint8_t *codes)
{
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
#else
    return __builtin_convertvector(*(const bytes *)codes, words);
#endif
}

// Numbers of `size` channels from their codes, in the order of phases: numbers[p * size / phases + i]. count: bytes, a
// multiple of LANES.
static inline void unpack(const uint8_t *codes, float *numbers, long count, int bits)
{
    int32_t mask = (1 << bits) - 1;
    for (long i = 0; i < count; i += LANES) {
        words whole = widened(codes + i);
        for (int p = 0; p * bits < 8; p++)
            *(lanes *)(numbers + p * count + i) = __builtin_convertvector((whole >> (p * bits)) & mask, lanes);
    }
}

// One KV head. queries, o: `rows` of `size`; m, l: `rows`. scores: rows * room.
static void head_attention(
    const float *queries, const uint8_t *keys, const float *key_scale, const float *key_offset, const uint8_t *values,
    const float *value_scale, const float *value_offset, float *o, float *m, float *l, float *scores, long rows,
    long tokens, long room, long heads, long head, long size, long group, long width, int bits, float cap)
{
    long phases = 8 / bits, count = size / phases, key_bytes = heads * size * bits / 8, value_bytes = size * bits / 8;
    long vectors = size / LANES, parts = size / width, inner = width / phases / LANES;
    float scaled[MAX_ROWS][MAX_SIZE], constant[MAX_ROWS], numbers[BLOCK][MAX_SIZE];
    for (long first = 0; first < tokens;) {
        long last = (first / group + 1) * group;
        if (first % group == 0) {
            const float *scale = key_scale + (first / group * heads + head) * size;
            const float *offset = key_offset + (first / group * heads + head) * size;
            for (long r = 0; r < rows; r++) {
                const float *query = queries + r * size;
                constant[r] = 0;
                for (long c = 0; c < size; c++) constant[r] += query[c] * offset[c];
                for (long p = 0; p < phases; p++)
                    for (long i = 0; i < count; i++)
                        scaled[r][p * count + i] = query[i * phases + p] * scale[i * phases + p];
            }
        }
        if (last > tokens) last = tokens;
        if (last > first + BLOCK) last = first + BLOCK;
        for (long t = first; t < last; t++)
            unpack(keys + t * key_bytes + head * value_bytes, numbers[t - first], count, bits);
        for (long r = 0; r < rows; r++) {
            const lanes *query = (const lanes *)scaled[r];
            float *row = scores + r * room;
            long t = first;
            for (; t + 4 <= last; t += 4) {
                const lanes *a = (const lanes *)numbers[t - first], *b = (const lanes *)numbers[t - first + 1];
                const lanes *c = (const lanes *)numbers[t - first + 2], *d = (const lanes *)numbers[t - first + 3];
                lanes sa = query[0] * a[0], sb = query[0] * b[0], sc = query[0] * c[0], sd = query[0] * d[0];
                for (long v = 1; v < vectors; v++) {
                    sa += query[v] * a[v];
                    sb += query[v] * b[v];
                    sc += query[v] * c[v];
                    sd += query[v] * d[v];
                }
                *(quad *)(row + t) = sums_of(sa, sb, sc, sd) + constant[r];
            }
            for (; t < last; t++) {
                const lanes *key = (const lanes *)numbers[t - first];
                lanes sum = query[0] * key[0];
                for (long v = 1; v < vectors; v++) sum += query[v] * key[v];
                row[t] = sum_of(sum) + constant[r];
            }
            if (cap > 0)
                for (t = first; t < last; t++) row[t] = cap * tanhf(row[t] / cap);
        }
        first = last;
    }
    for (long r = 0; r < rows; r++) {
        float *row = scores + r * room, top = -INFINITY;
        for (long t = 0; t < tokens; t++) top = row[t] > top ? row[t] : top;
        for (long t = tokens; t < room; t++) row[t] = -INFINITY;
        lanes total = {0};
        for (long t = 0; t < room; t += LANES) {
            lanes weight = exponential(*(lanes *)(row + t) - top);
            if (t + LANES > tokens)
                for (long i = tokens > t ? tokens - t : 0; i < LANES; i++) weight[i] = 0;
            *(lanes *)(row + t) = weight;
            total += weight;
        }
        m[r] = top;
        l[r] = sum_of(total);
    }
    float sums[MAX_ROWS][MAX_SIZE] = {{0}}, offsets[MAX_ROWS][MAX_SIZE / 8] = {{0}};
    for (long first = 0; first < tokens; first += BLOCK) {
        long last = first + BLOCK < tokens ? first + BLOCK : tokens;
        for (long t = first; t < last; t++)
            unpack(values + (t * heads + head) * value_bytes, numbers[t - first], count, bits);
        for (long r = 0; r < rows; r++) {
            const float *weights = scores + r * room;
            for (long g = 0; g < parts; g++) {
                float scaled_weights[BLOCK], offset = 0;
                for (long t = first; t < last; t++) {
                    long at = (t * heads + head) * parts + g;
                    scaled_weights[t - first] = weights[t] * value_scale[at];
                    offset += weights[t] * value_offset[at];
                }
                offsets[r][g] += offset;
                for (long p = 0; p < phases; p++) {
                    for (long v = 0; v < inner; v++) {
                        long at = p * count + (g * inner + v) * LANES;
                        lanes sum = *(lanes *)(sums[r] + at);
                        for (long t = first; t < last; t++)
                            sum += scaled_weights[t - first] * *(const lanes *)(numbers[t - first] + at);
                        *(lanes *)(sums[r] + at) = sum;
                    }
                }
            }
        }
    }
    for (long r = 0; r < rows; r++)
        for (long p = 0; p < phases; p++)
            for (long i = 0; i < count; i++)
                o[r * size + i * phases + p] = sums[r][p * count + i] + offsets[r][(i * phases + p) / width];
}

// queries, o: heads * rows * size; m, l: heads * rows; scores: heads * rows * room, room being the tokens rounded up to
// whole vectors. cap: 0 for none. A part of `width` numbers has a whole number of vectors in each phase.
void packed_attention(
    const float *queries, const uint8_t *keys, const float *key_scale, const float *key_offset, const uint8_t *values,
    const float *value_scale, const float *value_offset, float *o, float *m, float *l, float *scores, long rows,
    long tokens, long room, long heads, long size, long group, long width, int bits, float cap, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * rows * tokens * size > MIN_PARALLEL)
    for (long h = 0; h < heads; h++) {
        for (long first = 0; first < rows; first += MAX_ROWS) {
            long some = rows - first < MAX_ROWS ? rows - first : MAX_ROWS, at = h * rows + first;
            head_attention(
                queries + at * size, keys, key_scale, key_offset, values, value_scale, value_offset, o + at * size, m + at,
                l + at, scores + at * room, some, tokens, room, heads, h, size, group, width, bits, cap);
        }
    }
}
