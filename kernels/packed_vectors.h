// Attention of a KV head over packed keys and values: codes are read as they are stored, and never unpacked to memory.
// Include attention_vectors.h before.
//
// A row of keys has the codes of all KV heads; a scale and an offset belong to a channel and `group` rows. A row of values
// has the codes of one head of one token, with a scale and an offset for `width` numbers. Scales and offsets are finite
// numbers of float16. Codes of 2, 4 or 8 bits: byte i holds the numbers i * phases + p for p = 0 … phases - 1, lowest bits
// first, so a vector of bytes gives vectors of numbers `phases` apart. Queries and sums are kept in that order.
#if defined(__AVX2__) || defined(__F16C__)
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

// The number that a finite one of float16 is.
static inline float number_of(uint16_t half)
{
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    // Exponent and fraction in the places of float32, whose exponents count from 112 less; then the sign.
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof bits);
    return (half & 0x8000 ? -0x1p112f : 0x1p112f) * magnitude;
#endif
}

// The numbers that `count` finite ones of float16 are, a multiple of 8.
static inline void numbers_of(const uint16_t *halves, float *numbers, long count)
{
#if defined(__F16C__)
    for (long i = 0; i < count; i += 8)
        _mm256_storeu_ps(numbers + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#else
    for (long i = 0; i < count; i++) numbers[i] = number_of(halves[i]);
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
    const uint8_t *codes, const uint16_t *scale, const uint16_t *offset, float *numbers, long count, long width, int bits)
{
    int32_t mask = (1 << bits) - 1;
    long phases = 8 / bits;
    for (long first = 0; first < count; first += width / phases, scale++, offset++) {
        float step = number_of(*scale), start = number_of(*offset);
        for (long i = first; i < first + width / phases; i += LANES) {
            words whole = widened(codes + i);
            for (long p = 0; p < phases; p++)
                *(lanes *)(numbers + p * count + i) =
                    __builtin_convertvector((whole >> (p * bits)) & mask, lanes) * step + start;
        }
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
    const float *queries, const uint8_t *keys, const uint16_t *key_scale, const uint16_t *key_offset,
    const uint8_t *values, const uint16_t *value_scale, const uint16_t *value_offset, float *o, float *m, float *l,
    float *scores, long rows, long tokens, long room, long heads, long head, long size, long group, long width, int bits,
    float scale, float cap)
{
    long phases = 8 / bits, count = size / phases, key_bytes = heads * size * bits / 8, value_bytes = size * bits / 8;
    long parts = size / width;
    float ordered[MAX_ROWS][MAX_SIZE], scaled[MAX_ROWS][MAX_SIZE], constant[MAX_ROWS];
    float steps[MAX_SIZE], ordered_steps[MAX_SIZE], starts[MAX_SIZE];
    float numbers[BLOCK][MAX_SIZE], sums[MAX_ROWS][MAX_SIZE] = {{0}};
    for (long r = 0; r < rows; r++) {
        by_phase(queries + r * size, ordered[r], count, phases);
        for (long i = 0; i < size; i++) ordered[r][i] *= scale;
    }
    for (long first = 0; first < tokens;) {
        long last = (first / group + 1) * group;
        if (first % group == 0) {
            long at = (first / group * heads + head) * size;
            numbers_of(key_scale + at, steps, size);
            by_phase(steps, ordered_steps, count, phases);
            numbers_of(key_offset + at, starts, size);
            for (long r = 0; r < rows; r++) {
                lanes sum = {0};
                for (long v = 0; v < size / LANES; v++) {
                    ((lanes *)scaled[r])[v] = ((lanes *)ordered[r])[v] * ((lanes *)ordered_steps)[v];
                    sum += ((const lanes *)(queries + r * size))[v] * ((lanes *)starts)[v];
                }
                constant[r] = scale * sum_of(sum);
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
    const float *queries, const uint8_t *keys, const uint16_t *key_scale, const uint16_t *key_offset,
    const uint8_t *values, const uint16_t *value_scale, const uint16_t *value_offset, float *o, float *m, float *l,
    float *scores, long rows, long tokens, long room, long heads, long head, long size, long group, long width, int bits,
    float scale, float cap)
{
#define HEAD(size, width, bits)                                                                                        \
    head_attention(                                                                                                    \
        queries, keys, key_scale, key_offset, values, value_scale, value_offset, o, m, l, scores, rows, tokens, room,  \
        heads, head, size, group, width, bits, scale, cap)
    if (bits == 4 && size == 64 && width == 64) HEAD(64, 64, 4);
    else if (bits == 4 && size == 128 && width == 64) HEAD(128, 64, 4);
    else if (bits == 2 && size == 64 && width == 64) HEAD(64, 64, 2);
    else if (bits == 2 && size == 128 && width == 64) HEAD(128, 64, 2);
    else HEAD(size, width, bits);
#undef HEAD
}
