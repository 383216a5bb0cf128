// Attention of a KV head over packed keys and values: codes are read as they are stored, and never unpacked to memory.
// Include attention_vectors.h before.
//
// A row of keys has the codes of all KV heads; a scale and an offset belong to a channel and `group` rows. A row of values
// has the codes of one head of one token, with a scale and an offset for `width` numbers. Codes of 2, 4 or 8 bits: byte i
// holds the numbers i * phases + p for p = 0 … phases - 1, lowest bits first, so a vector of bytes gives vectors of numbers
// `phases` apart. Queries and sums are kept in that order.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint8_t bytes __attribute__((vector_size(LANES), may_alias, aligned(1)));

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

// The same numbers times the scale, plus the offset of the part of `width` channels that they are in.
static inline void dequantize(
    const uint8_t *codes, const float *scale, const float *offset, float *numbers, long count, long width, int bits)
{
    int32_t mask = (1 << bits) - 1;
    long phases = 8 / bits;
    for (long i = 0; i < count; i += LANES) {
        words whole = widened(codes + i);
        long part = i * phases / width;
        for (long p = 0; p < phases; p++)
            *(lanes *)(numbers + p * count + i) =
                __builtin_convertvector((whole >> (p * bits)) & mask, lanes) * scale[part] + offset[part];
    }
}

// Numbers in the order of phases, of which each has `count`.
static inline void by_phase(const float *numbers, float *ordered, long count, long phases)
{
    for (long p = 0; p < phases; p++)
        for (long i = 0; i < count; i++) ordered[p * count + i] = numbers[i * phases + p];
}

// One KV head. queries, o: `rows` of `size`; m, l: `rows`. scores: rows * room.
static inline __attribute__((always_inline)) void head_attention(
    const float *queries, const uint8_t *keys, const float *key_scale, const float *key_offset, const uint8_t *values,
    const float *value_scale, const float *value_offset, float *o, float *m, float *l, float *scores, long rows,
    long tokens, long room, long heads, long head, long size, long group, long width, int bits, float scale, float cap)
{
    long phases = 8 / bits, count = size / phases, key_bytes = heads * size * bits / 8, value_bytes = size * bits / 8;
    long parts = size / width;
    float ordered[MAX_ROWS][MAX_SIZE], scaled[MAX_ROWS][MAX_SIZE], constant[MAX_ROWS], grid[2][MAX_SIZE];
    float numbers[BLOCK][MAX_SIZE], sums[MAX_ROWS][MAX_SIZE] = {{0}};
    for (long r = 0; r < rows; r++) {
        by_phase(queries + r * size, ordered[r], count, phases);
        for (long i = 0; i < size; i++) ordered[r][i] *= scale;
    }
    for (long first = 0; first < tokens;) {
        long last = (first / group + 1) * group;
        if (first % group == 0) {
            long at = (first / group * heads + head) * size;
            by_phase(key_scale + at, grid[0], count, phases);
            by_phase(key_offset + at, grid[1], count, phases);
            for (long r = 0; r < rows; r++) {
                lanes sum = {0};
                for (long v = 0; v < size / LANES; v++) {
                    lanes query = ((lanes *)ordered[r])[v];
                    ((lanes *)scaled[r])[v] = query * ((lanes *)grid[0])[v];
                    sum += query * ((lanes *)grid[1])[v];
                }
                constant[r] = sum_of(sum);
            }
        }
        if (last > tokens) last = tokens;
        if (last > first + BLOCK) last = first + BLOCK;
        for (long t = first; t < last; t++)
            unpack(keys + t * key_bytes + head * value_bytes, numbers[t - first], count, bits);
        for (long r = 0; r < rows; r++) {
            float *row = scores + r * room;
            scores_of(scaled[r], numbers[0], MAX_SIZE, last - first, size, row + first);
            for (long t = first; t < last; t++) row[t] += constant[r];
            if (cap > 0)
                for (long t = first; t < last; t++) row[t] = cap * tanhf(row[t] / cap);
        }
        first = last;
    }
    for (long r = 0; r < rows; r++) weights_of(scores + r * room, tokens, m + r, l + r);
    for (long first = 0; first < tokens; first += BLOCK) {
        long last = first + BLOCK < tokens ? first + BLOCK : tokens;
        for (long t = first; t < last; t++) {
            long at = t * heads + head;
            dequantize(
                values + at * value_bytes, value_scale + at * parts, value_offset + at * parts, numbers[t - first], count,
                width, bits);
        }
        add_values(scores + first, room, numbers[0], MAX_SIZE, last - first, size, rows, sums[0]);
    }
    for (long r = 0; r < rows; r++)
        for (long p = 0; p < phases; p++)
            for (long i = 0; i < count; i++) o[r * size + i * phases + p] = sums[r][p * count + i];
}

// The same with constant bits and sizes where these are common, which makes the loops over phases and vectors straight.
static inline void attend_packed(
    const float *queries, const uint8_t *keys, const float *key_scale, const float *key_offset, const uint8_t *values,
    const float *value_scale, const float *value_offset, float *o, float *m, float *l, float *scores, long rows,
    long tokens, long room, long heads, long head, long size, long group, long width, int bits, float scale, float cap)
{
#define HEAD(size, bits)                                                                                               \
    head_attention(                                                                                                    \
        queries, keys, key_scale, key_offset, values, value_scale, value_offset, o, m, l, scores, rows, tokens, room,  \
        heads, head, size, group, width, bits, scale, cap)
    if (bits == 4 && size == 64) HEAD(64, 4);
    else if (bits == 4 && size == 128) HEAD(128, 4);
    else HEAD(size, bits);
#undef HEAD
}
