// Attention of one new token over a cache, with the rotation of its query and key and the write of its key and value.
#include "../attention_vectors.h"

// Adjacent pairs (a, b) become (a cos - b sin, b cos + a sin).
static void rotate(float *row, const float *turns, long size)
{
    for (long i = 0; i < size; i += 2) {
        float a = row[i], b = row[i + 1], cosine = turns[i], sine = turns[i + 1];
        row[i] = a * cosine - b * sine;
        row[i + 1] = b * cosine + a * sine;
    }
}

// qkv: heads + 2 * kv_heads rows of `size`; queries and keys are rotated in place. cache: 2 * kv_heads blocks of
// `capacity` rows. scores: room for the positions, rounded up to whole vectors, for each head. cap: 0 for none.
void token_attention(
    float *qkv, const float *turns, float *cache, float *out, float *scores, long heads, long kv_heads, long size,
    long capacity, long first, long position, float scale, float cap, int threads)
{
    long groups = heads / kv_heads, length = position + 1 - first, room = (length + LANES - 1) / LANES * LANES;
    for (long h = 0; h < heads + kv_heads; h++) rotate(qkv + h * size, turns, size);
    for (long h = 0; h < 2 * kv_heads; h++) {
        float *row = cache + (h * capacity + position) * size;
        for (long i = 0; i < size; i++) row[i] = qkv[(heads + h) * size + i];
    }
    // The query heads of a KV head read its keys and values together, unless there are more threads than KV heads.
    long together = threads > kv_heads ? 1 : groups < MAX_ROWS ? groups : MAX_ROWS, parts = (groups + together - 1) / together;
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * length * size > MIN_PARALLEL)
    for (long part = 0; part < kv_heads * parts; part++) {
        long own = part % parts * together, rows = groups - own < together ? groups - own : together;
        long kv_head = part / parts, h = kv_head * groups + own;
        const float *keys = cache + (kv_head * capacity + first) * size, *values = keys + kv_heads * capacity * size;
        float sums[MAX_ROWS][MAX_SIZE], m[MAX_ROWS], l[MAX_ROWS];
        attend(
            qkv + h * size, keys, values, 0, 0, sums[0], m, l, scores + h * room, rows, 0, 1, 0, length, room, size, scale,
            cap);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < size; i++) out[(h + r) * size + i] = sums[r][i] / l[r];
    }
}
