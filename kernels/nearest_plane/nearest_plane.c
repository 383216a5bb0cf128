// Columns of a weight are rounded one after another, and each one's error is carried to those that are left.
#include "../grid_vectors.h"
#include <stdlib.h>

// Rows of the weight that are solved together, so that what is carried to them stays in the L1 cache.
enum { WIDTH = 2 * LANES, VECTORS = WIDTH / LANES };

typedef struct {
    const float *target;  // (column, row)
    const float *lower;   // (column, column) of `pitch`: what the error of a column adds to those before it
    const float *scale;   // (group, row)
    const float *zero;    // (group, row); NULL: none
    const int64_t *group; // (column)
    float *carried;       // (column, row)
    uint8_t *codes;       // (column, row)
    float *residual;      // (column, row)
    float *error;         // (column, row)
    long rows, pitch, first, last;
    float top;
    int narrow;
} plane;

INLINE void visit(const int kind, const plane *of, long row, lanes *carried)
{
    for (long k = 0; k < of->last; k++)
        for (int v = 0; v < VECTORS; v++)
            if (row + v * LANES < of->rows)
                carried[k * VECTORS + v] = loaded(of->carried + k * of->rows, row + v * LANES, of->rows);
    for (long k = of->last - 1; k >= of->first; k--) {
        lanes residual[VECTORS] = {{0}};
        long at = k * of->rows, in_group = of->group[k] * of->rows;
        for (int v = 0; v < VECTORS; v++) {
            long r = row + v * LANES;
            if (r >= of->rows) break;
            lanes target = loaded(of->target + at, r, of->rows), scale = loaded(of->scale + in_group, r, of->rows);
            lanes wanted = target + carried[k * VECTORS + v], value;
            if (r + LANES > of->rows)
                // Behind the last row: any number but zero.
                for (long i = of->rows - r; i < LANES; i++) scale[i] = 1;
            if (kind == INTEGERS) {
                lanes zero = {0};
                if (of->zero) zero = loaded(of->zero + in_group, r, of->rows);
                lanes code = nearest(kind, wanted / scale + zero, 0, of->top);
                store_bytes(of->codes + at, r, of->rows, to_bytes(code));
                value = (code - zero) * scale;
            } else {
                value = nearest(kind, wanted / scale, -of->top, of->top);
                store_bytes(of->codes + at, r, of->rows, float_codes(kind, value));
                value *= scale;
            }
            if (of->narrow) value = (lanes)(to_bfloat16(value) << 16);
            residual[v] = target - value;
            store(of->residual + at, r, of->rows, residual[v]);
            store(of->error + at, r, of->rows, wanted - value);
        }
        const float *lower = of->lower + k * of->pitch;
        for (long j = 0; j < k; j++)
            for (int v = 0; v < VECTORS; v++) carried[j * VECTORS + v] += lower[j] * residual[v];
    }
    for (long k = 0; k < of->first; k++)
        for (int v = 0; v < VECTORS; v++)
            if (row + v * LANES < of->rows)
                store(of->carried + k * of->rows, row + v * LANES, of->rows, carried[k * VECTORS + v]);
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
            if (kind == INTEGERS) visit(INTEGERS, &of, r, room);
            else if (kind == E4M3) visit(E4M3, &of, r, room);
            else visit(E2M1, &of, r, room);
        }
        free(room);
    }
    return failed;
}
