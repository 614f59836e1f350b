/* Work that torch's operations spread over several passes, for x86-64 with AVX-512: attention on matrix units (AMX), the
 * rounding of activations to bytes, and norms of bf16. `setup.py` compiles this file if it can, `native.py` calls it. A
 * number of type bf16 is the upper half of a float32. */

#include <cpuid.h>
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 5 /* as in native.py: a library of another version is not used */

#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define NARROW __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

/* Around the use of tiles: compilers do not know which memory they read and write. */
#define IN_MEMORY __asm__ volatile("" ::: "memory")

typedef uint16_t bf16;

int version(void) { return VERSION; }

/* Returns whether this CPU has the instructions of the functions marked WIDE. */
int has_wide_vectors(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Returns whether it has those of the functions marked TILES: AMX-TILE, AMX-BF16 and AVX512-BF16. */
int has_tiles(void) {
    unsigned a, b, c, d, narrow;
    if (!__get_cpuid_count(7, 1, &narrow, &b, &c, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d >> 24 & 1) && (d >> 22 & 1) && (narrow >> 5 & 1);
}

/* The first n of 16 lanes, for any n. */
static inline WIDE __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* 2 to the power of x: a polynomial of the fraction, to 2.6e-6 of the value, times a power that is exact. */
static inline WIDE __m512 power_of_two(__m512 x) {
    __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 y = _mm512_set1_ps(0.0135341569f);
    y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.0520114819f));
    y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.241442744f));
    y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.693003837f));
    y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(y, x);
}

/* --- rounding to bytes ----------------------------------------------------------------------------------------- */

static inline WIDE __m512 load(const void *x, int narrow, int64_t at, __mmask16 some) {
    if (!narrow) return _mm512_maskz_loadu_ps(some, (const float *)x + at);
    __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const bf16 *)x + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

static WIDE void extremes_of(const void *x, int narrow, int64_t from, int64_t to, float *low, float *high) {
    __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY);
    __mmask16 undefined = 0;
    for (int64_t i = from; i < to; i += 16) {
        __mmask16 some = lanes(to - i);
        __m512 values = load(x, narrow, i, some);
        least = _mm512_mask_min_ps(least, some, least, values);
        most = _mm512_mask_max_ps(most, some, most, values);
        undefined |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    }
    *low = undefined ? NAN : _mm512_reduce_min_ps(least);
    *high = undefined ? NAN : _mm512_reduce_max_ps(most);
}

/* x * sigmoid(x) */
static inline WIDE __m512 silu_of(__m512 x) {
    const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

/* The byte of a value is the lowest of the bits of offset + value * by; with `silu`, that of its SiLU. */
static WIDE void bytes_of(const void *x, int narrow, int64_t from, int64_t n, float by, float offset, int silu,
                          uint8_t *out) {
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 some = lanes(n - i);
        __m512 values = load(x, narrow, from + i, some);
        if (silu) values = silu_of(values);
        __m512 sum = _mm512_fmadd_ps(values, _mm512_set1_ps(by), _mm512_set1_ps(offset));
        _mm512_mask_cvtepi32_storeu_epi8(out + i, some, _mm512_castps_si512(sum));
    }
}

/* Writes the least and the greatest of n values, of bf16 if `narrow`, else float32; NaN if one of them is. */
void extremes(const void *x, int narrow, int64_t n, float *found, int threads) {
    float low = INFINITY, high = -INFINITY;
    int undefined = 0;
    const int64_t piece = 1 << 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : low) reduction(max : high) reduction(| : undefined)
    for (int64_t from = 0; from < n; from += piece) {
        float least, most;
        extremes_of(x, narrow, from, from + piece < n ? from + piece : n, &least, &most);
        undefined |= least != least;
        low = least < low ? least : low;
        high = most > high ? most : high;
    }
    found[0] = undefined ? NAN : low;
    found[1] = undefined ? NAN : high;
}

/* Rounds values, of bf16 if `narrow`, else float32, or their SiLU: see `bytes_of`. Rows of `length` values, and images of
 * as many rows, follow each other in x; in `out` they are `row_stride` and `image_stride` bytes apart. */
void to_bytes(const void *x, int narrow, int64_t images, int64_t rows, int64_t length, float by, float offset, int silu,
              uint8_t *out, int64_t image_stride, int64_t row_stride, int threads) {
    const int64_t piece = length > 1 << 15 ? 1 : (1 << 15) / length;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t start = 0; start < images * rows; start += piece)
        for (int64_t row = start; row < start + piece && row < images * rows; row++)
            bytes_of(x, narrow, row * length, length, by, offset, silu,
                     out + row / rows * image_stride + row % rows * row_stride);
}

/* --- norms ------------------------------------------------------------------------------------------------------ */

static inline NARROW void store(bf16 *out, __mmask16 some, __m512 values) {
    _mm256_mask_storeu_epi16(out, some, (__m256i)_mm512_cvtneps_pbh(values));
}

/* Layer norm (Ba et al. 2016) of rows of `width` numbers. */
static NARROW void normalise_row(const bf16 *x, int64_t width, const float *weight, const float *bias, float eps,
                                 bf16 *out) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, load(x, 1, i, lanes(width - i)));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (int64_t i = 0; i < width; i += 16) {
        __m512 from_mean = _mm512_maskz_sub_ps(lanes(width - i), load(x, 1, i, lanes(width - i)), mean);
        squares = _mm512_fmadd_ps(from_mean, from_mean, squares);
    }
    const __m512 by = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 some = lanes(width - i);
        __m512 values = _mm512_mul_ps(_mm512_sub_ps(load(x, 1, i, some), mean), by);
        values = _mm512_fmadd_ps(values, _mm512_maskz_loadu_ps(some, weight + i), _mm512_maskz_loadu_ps(some, bias + i));
        store(out + i, some, values);
    }
}

void layer_norm(const bf16 *x, int64_t rows, int64_t width, const float *weight, const float *bias, float eps,
                bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        normalise_row(x + row * width, width, weight, bias, eps, out + row * width);
}

#define PIXELS 64 /* that are summed up in float32, and then in float64 */

/* Adds each channel's sum, and its sum of squares, of n pixels to `sums` [2, channels]. */
static NARROW void add_moments(const bf16 *x, int64_t n, int64_t channels, double *sums) {
    for (int64_t i = 0; i < channels; i += 16) {
        const __mmask16 some = lanes(channels - i);
        __m512 parts[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t pixel = 0; pixel < n; pixel++) {
            __m512 values = load(x, 1, pixel * channels + i, some);
            parts[0] = _mm512_add_ps(parts[0], values);
            parts[1] = _mm512_fmadd_ps(values, values, parts[1]);
        }
        for (int part = 0; part < 2; part++) {
            float found[16];
            _mm512_storeu_ps(found, parts[part]);
            for (int64_t j = 0; j < 16 && i + j < channels; j++) sums[part * channels + i + j] += found[j];
        }
    }
}

/* From the sums of an image's pixels what each channel is multiplied by and what is added: `affine` [2, channels]. */
static void moments_to_affine(const double *sums, int64_t pixels, int64_t channels, int64_t groups, const float *weight,
                              const float *bias, float eps, float *affine) {
    const int64_t width = channels / groups;
    for (int64_t group = 0; group < groups; group++) {
        double mean = 0, square = 0;
        for (int64_t i = group * width; i < (group + 1) * width; i++) mean += sums[i], square += sums[channels + i];
        mean /= pixels * width;
        const double variance = square / (pixels * width) - mean * mean;
        const double by = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
        for (int64_t i = group * width; i < (group + 1) * width; i++) {
            affine[i] = by * weight[i];
            affine[channels + i] = bias[i] - mean * by * weight[i];
        }
    }
}

static NARROW void apply_affine(const bf16 *x, int64_t n, int64_t channels, const float *affine, int silu, bf16 *out) {
    for (int64_t at = 0; at < n * channels; at += channels)
        for (int64_t i = 0; i < channels; i += 16) {
            __mmask16 some = lanes(channels - i);
            __m512 by = _mm512_maskz_loadu_ps(some, affine + i);
            __m512 add = _mm512_maskz_loadu_ps(some, affine + channels + i);
            __m512 values = _mm512_fmadd_ps(load(x, 1, at + i, some), by, add);
            store(out + at + i, some, silu ? silu_of(values) : values);
        }
}

/* Group norm (Wu and He 2018) of images [images, pixels, channels], or its SiLU; returns whether memory was lacking. */
int group_norm(const bf16 *x, int64_t images, int64_t pixels, int64_t channels, int64_t groups, const float *weight,
               const float *bias, float eps, int silu, bf16 *out, int threads) {
    double *sums = calloc(images * threads * 2 * channels, sizeof(double));
    float *affine = malloc(images * 2 * channels * sizeof(float));
    const int64_t part = ((pixels + threads - 1) / threads + PIXELS - 1) / PIXELS * PIXELS;
    const int failed = !sums || !affine;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (int64_t job = 0; job < images * threads; job++) {
                const int64_t start = job % threads * part, end = start + part < pixels ? start + part : pixels;
                for (int64_t at = start; at < end; at += PIXELS)
                    add_moments(x + (job / threads * pixels + at) * channels, end - at < PIXELS ? end - at : PIXELS,
                                channels, sums + job * 2 * channels);
            }
#pragma omp for
            for (int64_t image = 0; image < images; image++) {
                double *first = sums + image * threads * 2 * channels;
                for (int thread = 1; thread < threads; thread++)
                    for (int64_t i = 0; i < 2 * channels; i++) first[i] += first[thread * 2 * channels + i];
                moments_to_affine(first, pixels, channels, groups, weight, bias, eps, affine + image * 2 * channels);
            }
#pragma omp for
            for (int64_t job = 0; job < images * threads; job++) {
                const int64_t image = job / threads, start = job % threads * part;
                const int64_t n = start + part < pixels ? part : pixels - start, at = (image * pixels + start) * channels;
                if (n > 0) apply_affine(x + at, n, channels, affine + image * 2 * channels, silu, out + at);
            }
        }
    }
    free(sums);
    free(affine);
    return failed;
}

/* --- attention -------------------------------------------------------------------------------------------------- */

/* ROWS queries at a time against BLOCK keys at a time: scores in float32, their exponentials as bf16 in the same
 * place, and these times the values, added up in float32 (Dao et al. 2022, "FlashAttention", algorithm 1). A tile has
 * 16 rows of 64 bytes. */
#define ROWS 32
#define BLOCK 256
#define STRIDE (BLOCK + 16) /* so that the rows of a tile are spread over the sets of the cache */

typedef struct {
    int64_t keys, chunks; /* chunks of 32 keys, the last one filled up with zeros */
    int width, steps, columns; /* of a head; in 32s, rounded up; in 16s, rounded up */
    float scale; /* of a score, to the exponent of 2 */
    uint32_t *packed_keys, *packed_values; /* pairs of numbers, in the order in which tiles are multiplied */
} Head;

typedef struct {
    float scores[ROWS * STRIDE], most[ROWS], sums[ROWS * 16];
    float *out; /* [ROWS, columns * 16] */
    bf16 *queries; /* [ROWS, steps * 32] */
} __attribute__((aligned(64))) Rows;

static TILES void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) layout = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) layout.bytes[tile] = 64, layout.rows[tile] = 16;
    IN_MEMORY;
    _tile_loadconfig(&layout);
}

/* [keys, width] -> [16 keys][32 numbers][pair of numbers, key] */
static WIDE void pack_keys(const Head *head, const bf16 *k, int64_t stride) {
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i rows = _mm512_mullo_epi32(count, _mm512_set1_epi32((int)stride * 2));
    const int pairs = head->steps * 16;
    for (int64_t tile = 0; tile < head->chunks * 2; tile++)
        for (int pair = 0; pair < pairs; pair++) {
            __mmask16 some = 2 * pair < head->width ? lanes(head->keys - tile * 16) : 0;
            const bf16 *from = k + tile * 16 * stride + 2 * pair;
            __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, rows, from, 1);
            _mm512_store_si512(head->packed_keys + (tile * pairs + pair) * 16, both);
        }
}

/* [keys, width] -> [32 keys][16 numbers][pair of keys, number] */
static WIDE void pack_values(const Head *head, const bf16 *v, int64_t stride) {
    for (int64_t pair = 0; pair < head->chunks * 16; pair++)
        for (int column = 0; column < head->columns; column++) {
            __mmask16 some = lanes(head->width - column * 16);
            const bf16 *from = v + 2 * pair * stride + column * 16;
            __m256i first = _mm256_maskz_loadu_epi16(2 * pair < head->keys ? some : 0, from);
            __m256i second = _mm256_maskz_loadu_epi16(2 * pair + 1 < head->keys ? some : 0, from + stride);
            __m512i both = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
            both = _mm512_or_si512(both, _mm512_cvtepu16_epi32(first));
            int64_t tile = pair / 16 * head->columns + column;
            _mm512_store_si512(head->packed_values + (tile * 16 + pair % 16) * 16, both);
        }
}

/* The scores of all rows and of keys from `start`, in `tiles` of 16. */
static TILES void multiply_by_keys(const Head *head, Rows *rows, int64_t start, int64_t tiles) {
    const int steps = head->steps;
    const uint32_t *keys = head->packed_keys + start / 16 * steps * 256;
    IN_MEMORY;
    for (int64_t tile = 0; tile < tiles; tile++) {
        _tile_zero(0);
        _tile_zero(1);
        for (int step = 0; step < steps; step++) {
            _tile_loadd(2, rows->queries + step * 32, steps * 64);
            _tile_loadd(3, rows->queries + (16 * steps + step) * 32, steps * 64);
            _tile_loadd(4, keys + (tile * steps + step) * 256, 64);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, rows->scores + tile * 16, STRIDE * 4);
        _tile_stored(1, rows->scores + 16 * STRIDE + tile * 16, STRIDE * 4);
    }
}

/* Adds the values of `chunks` of keys from `start`, by their weights, to what the rows have so far. */
static TILES void add_values(const Head *head, Rows *rows, int64_t start, int64_t chunks) {
    const int columns = head->columns, stride = columns * 64;
    const uint32_t *values = head->packed_values + start / 32 * columns * 256;
    const float *weights = rows->scores, *lower_weights = rows->scores + 16 * STRIDE;
    IN_MEMORY;
    for (int column = 0; column < columns; column += 2) {
        float *out = rows->out + column * 16, *lower = out + 16 * columns * 16;
        const int two = column + 1 < columns;
        _tile_loadd(0, out, stride);
        _tile_loadd(1, lower, stride);
        if (two) {
            _tile_loadd(2, out + 16, stride);
            _tile_loadd(3, lower + 16, stride);
        }
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            _tile_loadd(4, weights + chunk * 16, STRIDE * 4);
            _tile_loadd(5, lower_weights + chunk * 16, STRIDE * 4);
            _tile_loadd(6, values + (chunk * columns + column) * 256, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (two) {
                _tile_loadd(7, values + (chunk * columns + column + 1) * 256, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, stride);
        _tile_stored(1, lower, stride);
        if (two) {
            _tile_stored(2, out + 16, stride);
            _tile_stored(3, lower + 16, stride);
        }
    }
}

/* The greatest score of each row, of n keys; where it grows, what the row has so far shrinks by as much. */
static TILES void raise_most(const Head *head, Rows *rows, int64_t n) {
    float found[ROWS] __attribute__((aligned(64))), by[16] __attribute__((aligned(64)));
    for (int row = 0; row < ROWS; row++) {
        const float *scores = rows->scores + row * STRIDE;
        __m512 most = _mm512_set1_ps(-INFINITY), others = most;
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            most = _mm512_max_ps(most, _mm512_load_ps(scores + i));
            others = _mm512_max_ps(others, _mm512_load_ps(scores + i + 16));
        }
        for (; i < n; i += 16) most = _mm512_mask_max_ps(most, lanes(n - i), most, _mm512_load_ps(scores + i));
        found[row] = _mm512_reduce_max_ps(_mm512_max_ps(most, others));
    }
    for (int start = 0; start < ROWS; start += 16) {
        __m512 before = _mm512_load_ps(rows->most + start);
        __m512 after = _mm512_mul_ps(_mm512_load_ps(found + start), _mm512_set1_ps(head->scale));
        after = _mm512_max_ps(before, after);
        if (!_mm512_cmp_ps_mask(before, after, _CMP_NEQ_UQ)) continue;
        _mm512_store_ps(rows->most + start, after);
        _mm512_store_ps(by, power_of_two(_mm512_sub_ps(before, after)));
        for (int row = start; row < start + 16; row++) {
            __m512 factor = _mm512_set1_ps(by[row - start]);
            float *sums = rows->sums + row * 16, *out = rows->out + row * head->columns * 16;
            _mm512_store_ps(sums, _mm512_mul_ps(factor, _mm512_load_ps(sums)));
            for (int i = 0; i < head->columns * 16; i += 16)
                _mm512_store_ps(out + i, _mm512_mul_ps(factor, _mm512_load_ps(out + i)));
        }
    }
}

/* A score's weight. The product is rounded before the difference, as in `raise_most`, so the greatest gets 1. */
static inline TILES __m512 weight(const float *scores, __m512 scale, __m512 most) {
    return power_of_two(_mm512_sub_ps(_mm512_mul_ps(_mm512_load_ps(scores), scale), most));
}

/* Replaces the scores of n keys by their weights, which are not yet divided by their sums; zeros up to 32s of keys. */
static TILES void weigh(const Head *head, Rows *rows, int64_t n) {
    const __m512 scale = _mm512_set1_ps(head->scale);
    for (int row = 0; row < ROWS; row++) {
        float *scores = rows->scores + row * STRIDE, *sums = rows->sums + row * 16;
        const __m512 most = _mm512_set1_ps(rows->most[row]);
        __m512 sum = _mm512_load_ps(sums);
        for (int64_t i = 0; i < n; i += 32) {
            __m512 first = weight(scores + i, scale, most), second = weight(scores + i + 16, scale, most);
            if (i + 32 > n) {
                first = _mm512_maskz_mov_ps(lanes(n - i), first);
                second = _mm512_maskz_mov_ps(lanes(n - i - 16), second);
            }
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_store_si512((bf16 *)scores + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
        _mm512_store_ps(sums, sum);
    }
}

/* Attention of n queries, at most ROWS, on all keys of a head. */
static TILES void attend_rows(const Head *head, Rows *rows, const bf16 *q, int64_t stride, int64_t n, bf16 *out,
                              int64_t out_stride) {
    const int stored = head->steps * 32, columns = head->columns;
    memset(rows->queries, 0, ROWS * stored * sizeof(bf16));
    for (int64_t row = 0; row < n; row++)
        memcpy(rows->queries + row * stored, q + row * stride, head->width * sizeof(bf16));
    memset(rows->out, 0, ROWS * columns * 16 * sizeof(float));
    memset(rows->sums, 0, sizeof rows->sums);
    for (int row = 0; row < ROWS; row++) rows->most[row] = -FLT_MAX;
    for (int64_t start = 0; start < head->keys; start += BLOCK) {
        const int64_t left = head->keys - start, some = left < BLOCK ? left : BLOCK, chunks = (some + 31) / 32;
        multiply_by_keys(head, rows, start, chunks * 2);
        IN_MEMORY;
        raise_most(head, rows, some);
        weigh(head, rows, some);
        add_values(head, rows, start, chunks);
        IN_MEMORY;
    }
    for (int64_t row = 0; row < n; row++) {
        const __m512 by = _mm512_set1_ps(1 / _mm512_reduce_add_ps(_mm512_load_ps(rows->sums + row * 16)));
        for (int column = 0; column < columns; column++) {
            __m512 values = _mm512_mul_ps(by, _mm512_load_ps(rows->out + (row * columns + column) * 16));
            _mm256_mask_storeu_epi16(out + row * out_stride + column * 16, lanes(head->width - column * 16),
                                     (__m256i)_mm512_cvtneps_pbh(values));
        }
    }
}

/* Attention of n queries on the keys of one head; returns whether memory was lacking. */
static TILES int attend_head(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, Head head, int64_t n,
                             bf16 *out, int64_t out_stride) {
    const size_t of_keys = head.chunks * 2 * head.steps * 256, of_values = head.chunks * head.columns * 256;
    const size_t of_out = ROWS * head.columns * 16, of_queries = ROWS * head.steps * 16;
    uint32_t *memory;
    Rows rows;
    if (posix_memalign((void **)&memory, 64, (of_keys + of_values + of_out + of_queries) * 4)) return 1;
    head.packed_keys = memory;
    head.packed_values = memory + of_keys;
    rows.out = (float *)(memory + of_keys + of_values);
    rows.queries = (bf16 *)(memory + of_keys + of_values + of_out);
    pack_keys(&head, k, strides[1]);
    pack_values(&head, v, strides[2]);
    configure_tiles();
    for (int64_t row = 0; row < n; row += ROWS)
        attend_rows(&head, &rows, q + row * strides[0], strides[0], n - row < ROWS ? n - row : ROWS,
                    out + row * out_stride, out_stride);
    _tile_release();
    free(memory);
    return 0;
}

/* Attention of q [batch, queries, heads * width] on k and v [batch, keys, heads * width] to `out`, which is dense.
 * `strides` are those of the samples and of the rows, of q, k and v: 6 numbers. Returns whether memory was lacking. */
int attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t batch, int64_t heads, int64_t queries,
           int64_t keys, int width, const int64_t *strides, float scale, int threads) {
    const int64_t all = batch * heads, parts = (threads + all - 1) / all;
    const int64_t rows = ((queries + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    const int64_t of_row[3] = {strides[1], strides[3], strides[5]};
    const Head head = {.keys = keys, .chunks = (keys + 31) / 32, .width = width, .steps = (width + 31) / 32,
                       .columns = (width + 15) / 16, .scale = scale};
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (int64_t job = 0; job < all * parts; job++) {
        const int64_t sample = job / parts / heads, at = job / parts % heads * width, row = job % parts * rows;
        const int64_t n = queries - row < rows ? queries - row : rows;
        if (n > 0)
            failed |= attend_head(q + sample * strides[0] + row * strides[1] + at, k + sample * strides[2] + at,
                                  v + sample * strides[4] + at, of_row, head, n,
                                  out + (sample * queries + row) * heads * width + at, heads * width);
    }
    return failed;
}
