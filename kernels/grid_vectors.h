// What kernels that round to the values of a grid share: vectors of numbers, the nearest values, and their codes.
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// As long as the registers are: GCC takes longer vectors apart by way of memory.
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { INTEGERS, E4M3, E2M1 };

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE lanes select_lanes(ints mask, lanes yes, lanes no)
{
    return (lanes)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE lanes clamped(lanes x, float low, float high)
{
    lanes least = (lanes){0} + low, most = (lanes){0} + high;
    x = select_lanes(x < least, least, x);
    return select_lanes(x > most, most, x);
}

// The nearest whole numbers or floats to x between low and high, of two at the same distance the even one.
INLINE lanes nearest(const int kind, lanes x, float low, float high)
{
    x = clamped(x, low, high);
    // The sum with 1.5 * 2**23 steps is rounded to whole steps, which are those of the number's exponent.
    lanes steps = (lanes){0} + 12582912.0f;
    if (kind != INTEGERS) {
        ints exponent = (ints)x & 0x7f800000, normal = (ints){0} + (kind == E4M3 ? 0x3c800000 : 0x3f800000);
        ints small = exponent < normal;
        exponent = (normal & small) | (exponent & ~small);
        steps = (lanes)exponent * (kind == E4M3 ? 0x1.8p20f : 0x1.8p22f);
    }
    return (x + steps) - steps;
}

// GCC 12 converts vectors of bytes, and shorter words, one by one.
INLINE ints of_bytes(bytes x)
{
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&x));
#else
    return __builtin_convertvector(x, ints);
#endif
}

// Numbers from 0 to 65535.
INLINE halves to_halves(words x)
{
#if defined(__AVX512F__)
    return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    return (halves)_mm_packus_epi32(low, high);
#else
    return __builtin_convertvector(x, halves);
#endif
}

// Numbers from 0 to 255.
INLINE bytes to_bytes(ints x)
{
#if defined(__AVX512F__)
    return (bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
    __m128i pairs = (__m128i)to_halves((words)x);
    bytes out;
    _mm_storel_epi64((__m128i *)&out, _mm_packus_epi16(pairs, pairs));
    return out;
#else
    return __builtin_convertvector(x, bytes);
#endif
}

INLINE lanes of_bfloat16(halves x)
{
#if defined(__AVX512F__)
    words wide = (words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    words wide = (words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    words wide = __builtin_convertvector(x, words);
#endif
    return (lanes)(wide << 16);
}

// Rounded to bfloat16, ties to even.
INLINE words to_bfloat16(lanes x)
{
    words bits = (words)x, nan = (words)(x != x);
    return (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & ~nan) | (nan & 0x7fc0);
}

// The numbers from k on of a group of `size`, as many as a vector holds, with zeros behind the last one.
INLINE lanes loaded(const float *group, long k, long size)
{
    lanes x = {0};
    if (k + LANES <= size) memcpy(&x, group + k, sizeof x);
    else if (k < size) memcpy(&x, group + k, (size - k) * sizeof *group);
    return x;
}

INLINE lanes loaded_bfloat16(const uint16_t *group, long k, long size)
{
    halves x = {0};
    if (k + LANES <= size) memcpy(&x, group + k, sizeof x);
    else memcpy(&x, group + k, (size - k) * sizeof *group);
    return of_bfloat16(x);
}

INLINE void store(float *group, long k, long size, lanes x)
{
    if (k + LANES <= size) memcpy(group + k, &x, sizeof x);
    else memcpy(group + k, &x, (size - k) * sizeof *group);
}

INLINE void store_bfloat16(uint16_t *group, long k, long size, lanes x)
{
    halves rounded = to_halves(to_bfloat16(x));
    if (k + LANES <= size) memcpy(group + k, &rounded, sizeof rounded);
    else memcpy(group + k, &rounded, (size - k) * sizeof *group);
}

INLINE void store_bytes(uint8_t *group, long k, long size, bytes x)
{
    if (k + LANES <= size) memcpy(group + k, &x, sizeof x);
    else memcpy(group + k, &x, size - k);
}

INLINE bytes integer_codes(lanes value)
{
    return to_bytes(__builtin_convertvector(value, ints));
}

// Codes of values that are floats of a kind.
INLINE bytes float_codes(const int kind, lanes value)
{
    ints bits = (ints)value, magnitude = bits & 0x7fffffff, sign = (ints)((words)bits >> 31), code;
    if (kind == E4M3) {
        // Numbers below the smallest normal one are multiples of 2**-9.
        ints below = __builtin_convertvector((lanes)magnitude * 512.0f, ints), small = magnitude < 0x3c800000;
        code = (below & small) | (((magnitude >> 20) - (120 << 3)) & ~small) | sign << 7;
    } else {
        ints twice = __builtin_convertvector((lanes)magnitude * 2.0f, ints), small = magnitude < 0x3f800000;
        code = (twice & small) | (((magnitude >> 22) - (126 << 1)) & ~small);
        code |= (sign << 3) & (code != 0);
    }
    return to_bytes(code);
}
