// What the attention kernels for a CPU share: vectors of floats, and the two products of attention over blocks of tokens.
//
// Every sum has one order, whatever other rows of queries are computed with it.
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

// Rows of caches are aligned to their elements only.
typedef float lanes __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef int32_t words __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef float quad __attribute__((vector_size(16), may_alias, aligned(4)));

enum { LANES = VECTOR_BYTES / 4, MAX_SIZE = 256, MAX_VECTORS = MAX_SIZE / LANES };
// Tokens whose keys or values stay in the first cache while all rows of queries read them.
enum { BLOCK = 32 };
// Below this many products, threads take longer to start than to compute.
enum { MIN_PARALLEL = 1 << 18 };

static inline float sum_of(lanes values)
{
    quad parts[LANES / 4];
    __builtin_memcpy(parts, &values, sizeof values);
    for (int step = LANES / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
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

// Lanes of a and b in turn: of every 2 * N lanes the first N of both, or the last N.
#if VECTOR_BYTES == 64
#define FIRST_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define LAST_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define FIRST_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LAST_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FIRST_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define LAST_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define FIRST_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define LAST_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif VECTOR_BYTES == 32
#define FIRST_1 0, 8, 2, 10, 4, 12, 6, 14
#define LAST_1 1, 9, 3, 11, 5, 13, 7, 15
#define FIRST_2 0, 1, 8, 9, 4, 5, 12, 13
#define LAST_2 2, 3, 10, 11, 6, 7, 14, 15
#define FIRST_4 0, 1, 2, 3, 8, 9, 10, 11
#define LAST_4 4, 5, 6, 7, 12, 13, 14, 15
#else
#define FIRST_1 0, 4, 2, 6
#define LAST_1 1, 5, 3, 7
#define FIRST_2 0, 1, 4, 5
#define LAST_2 2, 3, 6, 7
#endif
#define JOINED(a, b, n) (__builtin_shuffle(a, b, (words){FIRST_##n}) + __builtin_shuffle(a, b, (words){LAST_##n}))

// Sums of LANES vectors, which are overwritten.
static inline lanes sums_of(lanes *s)
{
    for (int i = 0; i < LANES / 2; i++) s[i] = JOINED(s[2 * i], s[2 * i + 1], 1);
    for (int i = 0; i < LANES / 4; i++) s[i] = JOINED(s[2 * i], s[2 * i + 1], 2);
#if VECTOR_BYTES >= 32
    for (int i = 0; i < LANES / 8; i++) s[i] = JOINED(s[2 * i], s[2 * i + 1], 4);
#endif
#if VECTOR_BYTES >= 64
    s[0] = JOINED(s[0], s[1], 8);
#endif
    return s[0];
}

// Sums of products of a query and LANES keys: `step` floats apart, and from number `last` on the same one.
static inline __attribute__((always_inline)) lanes products_of(
    const lanes *query, const float *keys, long step, long last, long vectors)
{
    lanes s[LANES];
#pragma GCC unroll 16
    for (long i = 0; i < LANES; i++) {
        const lanes *key = (const lanes *)(keys + (i < last ? i : last) * step);
        s[i] = query[0] * key[0];
        for (long v = 1; v < vectors; v++) s[i] += query[v] * key[v];
    }
    return sums_of(s);
}

// Scores of a query and `count` keys, which are `stride` floats apart. They are written in whole vectors: there must be
// room for LANES - 1 more.
static inline __attribute__((always_inline)) void vector_scores(
    const lanes *query, const float *keys, long stride, long count, long vectors, float *scores)
{
    long t = 0;
    for (; t + LANES <= count; t += LANES)
        *(lanes *)(scores + t) = products_of(query, keys + t * stride, stride, LANES, vectors);
    if (t < count) *(lanes *)(scores + t) = products_of(query, keys + t * stride, stride, count - 1 - t, vectors);
}

static inline void scores_of(
    const float *query, const float *keys, long stride, long count, long size, float *scores)
{
    // A constant number of vectors keeps the query in registers.
    if (size == 64) vector_scores((const lanes *)query, keys, stride, count, 64 / LANES, scores);
    else if (size == 128) vector_scores((const lanes *)query, keys, stride, count, 128 / LANES, scores);
    else vector_scores((const lanes *)query, keys, stride, count, size / LANES, scores);
}

// Scores become weights exp(score - largest), 0 where a score is -inf. row: room for whole vectors. The largest score and
// the sum of weights; -inf and 0 if no score is finite.
static inline void weights_of(float *row, long tokens, float *largest, float *sum)
{
    long padded = (tokens + LANES - 1) / LANES * LANES;
    for (long t = tokens; t < padded; t++) row[t] = -INFINITY;
    lanes tops = (lanes){0} - INFINITY;
    for (long t = 0; t < padded; t += LANES) {
        lanes score = *(lanes *)(row + t);
        words above = score > tops;
        tops = (lanes)((above & (words)score) | (~above & (words)tops));
    }
    float top = -INFINITY;
    for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    lanes total = {0};
    float base = top == -INFINITY ? 0 : top;
    for (long t = 0; t < padded; t += LANES) {
        lanes score = *(lanes *)(row + t);
        words seen = score > (lanes){0} - INFINITY;
        lanes weight = (lanes)(seen & (words)exponential(score - base));
        *(lanes *)(row + t) = weight;
        total += weight;
    }
    *largest = top;
    *sum = sum_of(total);
}

// sums += weights * values for ROWS rows and VECTORS vectors of a value.
static inline __attribute__((always_inline)) void add_part(
    const float *weights, long room, const float *values, long stride, long count, float *sums, const int rows,
    const int vectors)
{
    lanes held[rows][vectors];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) held[r][v] = ((lanes *)(sums + r * MAX_SIZE))[v];
    for (long t = 0; t < count; t++) {
        const lanes *value = (const lanes *)(values + t * stride);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) held[r][v] += weights[r * room + t] * value[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) ((lanes *)(sums + r * MAX_SIZE))[v] = held[r][v];
}

// sums (rows, MAX_SIZE) += weights (rows, room) * values (count, stride).
static inline void add_values(
    const float *weights, long room, const float *values, long stride, long count, long size, long rows, float *sums)
{
    for (long r = 0; r < rows;) {
        long v = 0, vectors = size / LANES, some = rows - r < 4 ? rows - r : 4;
        const float *own = weights + r * room;
        for (; v + 4 <= vectors; v += 4) {
            float *to = sums + r * MAX_SIZE + v * LANES;
            const float *from = values + v * LANES;
            if (some == 4) add_part(own, room, from, stride, count, to, 4, 4);
            else if (some == 3) add_part(own, room, from, stride, count, to, 3, 4);
            else if (some == 2) add_part(own, room, from, stride, count, to, 2, 4);
            else add_part(own, room, from, stride, count, to, 1, 4);
        }
        for (; v < vectors; v++)
            for (long i = 0; i < some; i++)
                add_part(
                    own + i * room, room, values + v * LANES, stride, count, sums + (r + i) * MAX_SIZE + v * LANES, 1, 1);
        r += some;
    }
}

enum { MAX_ROWS = 16 };

// Attention of at most MAX_ROWS rows of queries over the keys of their KV head, of which row r sees key t where byte t of
// row (first + r) % seen_rows of `seen`, of seen_stride bytes each, is not 0; NULL for all. bias: added to the scores of
// each key; NULL for none. cap: 0 for none. scores: rows * room floats, room being the tokens rounded up to whole vectors.
// Partial results o, which has rows of MAX_SIZE, m and l.
static inline void attend(
    const float *queries, const float *keys, const float *values, const uint8_t *seen, const float *bias, float *o,
    float *m, float *l, float *scores, long rows, long first, long seen_rows, long seen_stride, long tokens, long room,
    long size, float scale, float cap)
{
    float scaled[MAX_ROWS][MAX_SIZE];
    for (long r = 0; r < rows; r++) {
        for (long i = 0; i < size; i++) {
            scaled[r][i] = queries[r * size + i] * scale;
            o[r * MAX_SIZE + i] = 0;
        }
    }
    for (long t = 0; t < tokens; t += BLOCK) {
        long count = tokens - t < BLOCK ? tokens - t : BLOCK;
        for (long r = 0; r < rows; r++) scores_of(scaled[r], keys + t * size, size, count, size, scores + r * room + t);
    }
    for (long r = 0; r < rows; r++) {
        float *row = scores + r * room;
        if (cap > 0)
            for (long t = 0; t < tokens; t++) row[t] = cap * tanhf(row[t] / cap);
        if (bias)
            for (long t = 0; t < tokens; t++) row[t] += bias[t];
        if (seen) {
            const uint8_t *own = seen + (first + r) % seen_rows * seen_stride;
            for (long t = 0; t < tokens; t++) row[t] = own[t] ? row[t] : -INFINITY;
        }
        weights_of(row, tokens, m + r, l + r);
    }
    for (long t = 0; t < tokens; t += BLOCK) {
        long count = tokens - t < BLOCK ? tokens - t : BLOCK;
        add_values(scores + t, room, values + t * size, size, count, size, rows, o);
    }
}

// Merges `count` partial results of row r into out (size) and the logarithm of its denominator, with a sink of a logit;
// -INFINITY for none. A row without keys is 0.
static inline void merge_row(
    const float *const *o, const float *const *m, const float *const *l, long count, long r, long size, float sink,
    float *out, float *denominator)
{
    float top = sink;
    for (long s = 0; s < count; s++) top = m[s][r] > top ? m[s][r] : top;
    float base = top == -INFINITY ? 0 : top, total = expf(sink - base);
    for (long i = 0; i < size; i++) out[i] = 0;
    for (long s = 0; s < count; s++) {
        float share = expf(m[s][r] - base);
        total += share * l[s][r];
        for (long i = 0; i < size; i++) out[i] += share * o[s][r * size + i];
    }
    float factor = total > 0 ? 1 / total : 0;
    for (long i = 0; i < size; i++) out[i] *= factor;
    *denominator = base + logf(total);
}
