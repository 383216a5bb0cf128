// Attention of some queries over the keys of a cache's segment, and the merging of the results of several segments.
#include "../attention_vectors.h"

// heads KV heads; keys[h], values[h]: lengths[h] rows of `size`. queries, o: heads * rows * size; m, l: heads * rows.
// seen: for each head, head_seen apart, seen_rows rows of seen_stride bytes: row r sees key t where byte t of row
// r % seen_rows is not 0; NULL for all. bias: room apart for each head, added to scores; NULL for none. scores: heads *
// rows * room floats, room being the largest length rounded up to whole vectors. cap: 0 for none.
void segment_attention(
    const float *queries, const float *const *keys, const float *const *values, const long *lengths, const uint8_t *seen,
    const float *bias, float *o, float *m, float *l, float *scores, long heads, long rows, long size, long room,
    long head_seen, long seen_rows, long seen_stride, long bias_stride, float scale, float cap, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * rows * room * size > MIN_PARALLEL)
    for (long h = 0; h < heads; h++) {
        for (long first = 0; first < rows; first += MAX_ROWS) {
            long some = rows - first < MAX_ROWS ? rows - first : MAX_ROWS, at = h * rows + first;
            float sums[MAX_ROWS][MAX_SIZE];
            attend(
                queries + at * size, keys[h], values[h], seen ? seen + h * head_seen : 0, bias ? bias + h * bias_stride : 0,
                sums[0], m + at, l + at, scores + at * room, some, first, seen_rows, seen_stride, lengths[h], room, size,
                scale, cap);
            for (long r = 0; r < some; r++)
                for (long i = 0; i < size; i++) o[(at + r) * size + i] = sums[r][i];
        }
    }
}

// Merges `count` partial results of `rows` rows into out (rows, size) and the logarithms of their denominators (rows).
// sinks: a logit of each row, rows counted modulo sink_rows; NULL for none. Rows without keys are 0.
void merged_attention(
    const float *const *o, const float *const *m, const float *const *l, const float *sinks, float *out,
    float *denominators, long count, long rows, long size, long sink_rows)
{
    for (long r = 0; r < rows; r++)
        merge_row(
            o, m, l, count, r, size, sinks ? sinks[r % sink_rows] : -INFINITY, out + r * size, denominators + r);
}
