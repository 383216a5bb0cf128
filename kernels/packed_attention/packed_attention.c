// Attention of some queries over packed keys and values: codes are read as they are stored, and never unpacked to memory.
#include "../attention_vectors.h"
#include "../packed_vectors.h"

// queries, o: heads * rows * size; m, l: heads * rows; scores: heads * rows * room, room being the tokens rounded up to
// whole vectors. cap: 0 for none. A part of `width` numbers has a whole number of vectors in each phase.
void packed_attention(
    const float *queries, const uint8_t *keys, const uint16_t *key_scale, const uint16_t *key_offset,
    const uint8_t *values, const uint16_t *value_scale, const uint16_t *value_offset, float *o, float *m, float *l,
    float *scores, long rows, long tokens, long room, long heads, long size, long group, long width, int bits,
    float scale, float cap, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * rows * tokens * size > MIN_PARALLEL)
    for (long h = 0; h < heads; h++) {
        for (long first = 0; first < rows; first += MAX_ROWS) {
            long some = rows - first < MAX_ROWS ? rows - first : MAX_ROWS, at = h * rows + first;
            attend_packed(
                queries + at * size, keys, key_scale, key_offset, values, value_scale, value_offset, o + at * size, m + at,
                l + at, scores + at * room, some, tokens, room, heads, h, size, group, width, bits, scale, cap);
        }
    }
}
