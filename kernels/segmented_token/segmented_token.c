// Attention of one new token over the segments of a compressed cache and the dense tokens behind them, with the rotation
// of its query and key and the write of its key and value.
#include "../attention_vectors.h"
#include "../packed_vectors.h"

// Dense where bits is 0: keys and values point to one block of lengths[h] rows for each KV head, and bias, bias_stride
// apart for each head, is added to scores; NULL for none. Otherwise packed, see packed_vectors.h.
typedef struct {
    const void *keys, *values;
    const long *lengths;
    const float *bias;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    long tokens, bias_stride, group, width, bits;
} segment;

// Of the first `turned` numbers of a row, adjacent pairs (a, b) become (a cos - b sin, b cos + a sin), of which all first
// numbers come before all second ones, as transformers stores keys.
static void rotate(const float *row, const float *turns, long turned, long size, float *out)
{
    for (long i = 0; i < turned; i += 2) {
        float a = row[i], b = row[i + 1], cosine = turns[i], sine = turns[i + 1];
        out[i / 2] = a * cosine - b * sine;
        out[(turned + i) / 2] = b * cosine + a * sine;
    }
    for (long i = turned; i < size; i++) out[i] = row[i];
}

// qkv: heads + 2 * kv_heads rows of `size`, not rotated. keys, values: kv_heads blocks of `capacity` rows, of which the
// token's own is number `place`; positions: of these rows. out, queries (rotated): heads * size; denominators, their
// logarithms: heads. scores: heads * room, room being the tokens of the longest segment rounded up to whole vectors.
// partials: (count + 1) * heads * (size + 2). cap: 0 for none.
void segmented_token(
    const float *qkv, const float *turns, float *keys, float *values, int32_t *positions, const segment *segments,
    float *out, float *queries, float *denominators, float *scores, float *partials, long turned, long position,
    long place, long count, long heads, long kv_heads, long size, long capacity, long room, float scale, float cap,
    int threads)
{
    long groups = heads / kv_heads, tokens = 0;
    for (long h = 0; h < heads; h++) rotate(qkv + h * size, turns, turned, size, queries + h * size);
    for (long h = 0; h < kv_heads; h++) {
        long row = (h * capacity + place) * size;
        rotate(qkv + (heads + h) * size, turns, turned, size, keys + row);
        for (long i = 0; i < size; i++) values[row + i] = qkv[(heads + kv_heads + h) * size + i];
    }
    positions[place] = position;
    for (long s = 0; s < count; s++) tokens += segments[s].tokens;
    const float *o[count + 1], *m[count + 1], *l[count + 1];
    for (long s = 0; s <= count; s++) {
        o[s] = partials + s * heads * (size + 2);
        m[s] = o[s] + heads * size;
        l[s] = m[s] + heads;
    }
    // The query heads of a KV head read its keys and values together, unless there are more threads than KV heads.
    long together = threads > kv_heads ? 1 : groups < MAX_ROWS ? groups : MAX_ROWS, parts = (groups + together - 1) / together;
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * (tokens + place) * size > MIN_PARALLEL)
    for (long part = 0; part < kv_heads * parts; part++) {
        long own = part % parts * together, rows = groups - own < together ? groups - own : together;
        long kv_head = part / parts, h = kv_head * groups + own;
        for (long s = 0; s <= count; s++) {
            const segment *from = segments + s;
            float *to = (float *)o[s] + h * size, *top = (float *)m[s] + h, *sum = (float *)l[s] + h;
            if (s < count && from->bits) {
                attend_packed(
                    queries + h * size, from->keys, from->key_scale, from->key_offset, from->values, from->value_scale,
                    from->value_offset, to, top, sum, scores + h * room, rows, from->tokens, room, kv_heads, kv_head, size,
                    from->group, from->width, from->bits, scale, cap);
                continue;
            }
            int is_new = s == count;
            float sums[MAX_ROWS][MAX_SIZE];
            attend(
                queries + h * size, is_new ? keys + kv_head * capacity * size : ((const float *const *)from->keys)[kv_head],
                is_new ? values + kv_head * capacity * size : ((const float *const *)from->values)[kv_head], 0,
                is_new || !from->bias ? 0 : from->bias + kv_head * from->bias_stride, sums[0], top, sum, scores + h * room,
                rows, 0, 1, 0, is_new ? place + 1 : from->lengths[kv_head], room, size, scale, cap);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < size; i++) to[r * size + i] = sums[r][i];
        }
        for (long r = h; r < h + rows; r++)
            merge_row(o, m, l, count + 1, r, size, -INFINITY, out + r * size, denominators + r);
    }
}
