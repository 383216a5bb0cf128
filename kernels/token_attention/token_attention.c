// Attention of one new token over a cache, with the rotation of its query and key and the write of its key and value.
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

enum { LANES = VECTOR_BYTES / 4, MAX_SIZE = 256, MAX_VECTORS = MAX_SIZE / LANES };
// Below this many products, threads take longer to start than to compute.
enum { MIN_PARALLEL = 1 << 18 };

// Adjacent pairs (a, b) become (a cos - b sin, b cos + a sin).
static void rotate(float *row, const float *turns, long size)
{
    for (long i = 0; i < size; i += 2) {
        float a = row[i], b = row[i + 1], cosine = turns[i], sine = turns[i + 1];
        row[i] = a * cosine - b * sine;
        row[i + 1] = b * cosine + a * sine;
    }
}

typedef float quad __attribute__((vector_size(16), may_alias, aligned(4)));

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

// scores: room for `length` floats, rounded up to whole vectors, of this head alone.
static void head_attention(
    const float *query, const float *keys, const float *values, float *out, float *scores, long length, long size,
    float scale, float cap)
{
    long vectors = size / LANES;
    lanes q[MAX_VECTORS];
    for (long v = 0; v < vectors; v++) q[v] = ((const lanes *)query)[v] * scale;
    float top = -INFINITY;
    for (long t = 0; t < length; t++) {
        const lanes *key = (const lanes *)(keys + t * size);
        lanes sum = q[0] * key[0];
        for (long v = 1; v < vectors; v++) sum += q[v] * key[v];
        float score = sum_of(sum);
        if (cap > 0) score = cap * tanhf(score / cap);
        scores[t] = score;
        top = score > top ? score : top;
    }
    long padded = (length + LANES - 1) / LANES * LANES;
    for (long t = length; t < padded; t++) scores[t] = -INFINITY;
    lanes total = {0};
    for (long t = 0; t < padded; t += LANES) {
        lanes weight = exponential(*(lanes *)(scores + t) - top);
        *(lanes *)(scores + t) = weight;
        if (t + LANES > length)
            for (long i = length - t; i < LANES; i++) weight[i] = 0;
        total += weight;
    }
    float inverse = 1 / sum_of(total);
    lanes sums[MAX_VECTORS] = {{0}};
    for (long t = 0; t < length; t++) {
        const lanes *value = (const lanes *)(values + t * size);
        float weight = scores[t];
        for (long v = 0; v < vectors; v++) sums[v] += weight * value[v];
    }
    for (long v = 0; v < vectors; v++) ((lanes *)out)[v] = sums[v] * inverse;
}

// qkv: heads + 2 * kv_heads rows of `size`; queries and keys are rotated in place. cache: 2 * kv_heads blocks of
// `capacity` rows. scores: room for a vector more than the positions, for each head. cap: 0 for none.
void token_attention(
    float *qkv, const float *turns, float *cache, float *out, float *scores, long heads, long kv_heads, long size,
    long capacity, long first, long position, float scale, float cap, int threads)
{
    long groups = heads / kv_heads, length = position + 1 - first, room = length + LANES;
    for (long h = 0; h < heads + kv_heads; h++) rotate(qkv + h * size, turns, size);
    for (long h = 0; h < 2 * kv_heads; h++) {
        float *row = cache + (h * capacity + position) * size;
        for (long i = 0; i < size; i++) row[i] = qkv[(heads + h) * size + i];
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * length * size > MIN_PARALLEL)
    for (long h = 0; h < heads; h++) {
        const float *keys = cache + (h / groups * capacity + first) * size;
        const float *values = keys + kv_heads * capacity * size;
        head_attention(qkv + h * size, keys, values, out + h * size, scores + h * room, length, size, scale, cap);
    }
}
