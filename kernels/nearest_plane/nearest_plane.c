// Columns of a weight are rounded one after another, and each one's error is carried to those that are left.
#include "../grid_vectors.h"
#include <stdlib.h>

// Rows of the weight that are solved together, so that what is carried to them stays in the L1 cache.
enum { VECTORS = 4, WIDTH = VECTORS * LANES };

typedef struct {
    const float *target;  // (column, row)
    const float *lower;   // (column, column) of `pitch`: what the error of a column adds to those before it
    const float *scale;   // (group, row)
    const float *zero;    // (group, row); floats do not read it
    const int64_t *group; // (column)
    float *carried;       // (column, row)
    uint8_t *codes;       // (column, row)
    float *residual;      // (column, row)
    float *error;         // (column, row)
    long rows, pitch, first, last;
    float top;
    int narrow;
} plane;

// `vectors` of rows from `row` on; what is carried to them lies at `carried` as (column, vector).
INLINE void visit(const int kind, const int vectors, const plane *of, long row, lanes *restrict carried)
{
    const long rows = of->rows;
    for (long k = 0; k < of->last; k++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            carried[k * vectors + v] = loaded(of->carried + k * rows, row + v * LANES, rows);
    for (long k = of->last - 1; k >= of->first; k--) {
        lanes residual[VECTORS];
        const long at = k * rows, in_group = of->group[k] * rows;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const long r = row + v * LANES;
            lanes target = loaded(of->target + at, r, rows), scale = loaded(of->scale + in_group, r, rows);
            lanes wanted = target + carried[k * vectors + v], value;
            // Behind the last row: any number but zero.
            if (r + LANES > rows)
                for (long i = rows - r; i < LANES; i++) scale[i] = 1;
            if (kind == INTEGERS) {
                lanes zero = loaded(of->zero + in_group, r, rows);
                lanes code = nearest(kind, wanted / scale + zero, 0, of->top);
                store_bytes(of->codes + at, r, rows, integer_codes(code));
                value = (code - zero) * scale;
            } else {
                value = nearest(kind, wanted / scale, -of->top, of->top);
                store_bytes(of->codes + at, r, rows, float_codes(kind, value));
                value *= scale;
            }
            if (of->narrow) value = (lanes)(to_bfloat16(value) << 16);
            residual[v] = target - value;
            store(of->residual + at, r, rows, residual[v]);
            store(of->error + at, r, rows, wanted - value);
        }
        const float *restrict lower = of->lower + k * of->pitch;
        for (long j = 0; j < k; j++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) carried[j * vectors + v] += lower[j] * residual[v];
    }
    for (long k = 0; k < of->first; k++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(of->carried + k * rows, row + v * LANES, rows, carried[k * vectors + v]);
}

// Rows by whole lots of vectors, and the last ones vector by vector.
INLINE void visit_rows(const int kind, const plane *of, long row, lanes *carried)
{
    if (row + VECTORS * LANES <= of->rows)
        visit(kind, VECTORS, of, row, carried);
    else
        for (; row < of->rows; row += LANES) visit(kind, 1, of, row, carried);
}

// Visits columns last - 1 to first. carried: of the columns before `first` it is changed. Returns 1 without memory.
int nearest_plane(const float *target, const float *lower, const float *scale, const float *zero, const int64_t *group,
                  float *carried, uint8_t *codes, float *residual, float *error, long rows, long pitch, long first,
                  long last, int kind, float top, int narrow, int threads)
{
    plane of = {target, lower, scale, zero, group, carried, codes, residual, error, rows, pitch, first, last, top, narrow};
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        lanes *room = aligned_alloc(sizeof(lanes), last * VECTORS * sizeof(lanes));
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for
        for (long r = 0; r < rows; r += WIDTH) {
            if (!room) continue;
            if (kind == INTEGERS) visit_rows(INTEGERS, &of, r, room);
            else if (kind == E4M3) visit_rows(E4M3, &of, r, room);
            else visit_rows(E2M1, &of, r, room);
        }
        free(room);
    }
    return failed;
}
