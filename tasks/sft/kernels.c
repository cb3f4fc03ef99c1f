/*
Kernels for training on a CPU in bf16: attention within the examples of a packed row, RMSNorm, and the gate of SwiGLU.

Compiled on the machine that trains, by tasks/sft/native.py. Arithmetic is in float32; bf16 is how states are
stored, and how they enter matrix products. Every result is computed by one thread in a fixed order, so equal
inputs give equal bits. Tensors are contiguous; queries, keys, values and outputs have the shape
(n_tokens, n_heads, width), with a width that is a multiple of 16. Functions return 0, or 1 if there is no memory.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bf16;

/* Vectors of 16 values of 32 bits, at any address. */
enum { LANES = 16 };
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Queries per block: the causal half of the scores is skipped in whole blocks. */
enum { BLOCK = 48 };
/* A tile of the result of a product: 6 x 4 vectors, which leaves 8 of 32 registers for the factors. */
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest, ties to even. */
static inline uint32_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* exp(x), with a relative error of 1e-7, for -87 <= x <= 88; outside, that of the limit. Source: Cephes, expf. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    /* Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits. */
    float n = x * 1.44269504088896341f + 12582912.0f;
    uint32_t power, scale_bits;
    memcpy(&power, &n, 4);
    n -= 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    scale_bits = (power << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &scale_bits, 4);
    return p * scale;
}

static inline float add_lanes(const float *lanes) {
    float total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* Add the products of both bf16 halves of each lane. */
static inline floats add_pairs(floats sum, words a, words b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}

/* Compute one tile of `multiply`; rows and vectors are constants, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_tile(
    const bf16 *a, long a_stride, const uint32_t *b, long b_stride, float *c, long c_stride, long pairs, int adds,
    const int rows, const int vectors) {
    floats sums[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = adds ? *(const floats *)(c + r * c_stride + LANES * v) : (floats){0};
    for (long p = 0; p < pairs; p++) {
        words right[TILE_VECTORS];
        for (int v = 0; v < vectors; v++) right[v] = *(const words *)(b + p * b_stride + LANES * v);
        for (int r = 0; r < rows; r++) {
            uint32_t pair;
            memcpy(&pair, a + r * a_stride + 2 * p, 4);
            words left = (words){0} + pair;
            for (int v = 0; v < vectors; v++) sums[r][v] = add_pairs(sums[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(floats *)(c + r * c_stride + LANES * v) = sums[r][v];
}

static inline __attribute__((always_inline)) void multiply_panel(
    const bf16 *a, long a_stride, const uint32_t *b, long b_stride, float *c, long c_stride, long m, long pairs,
    int adds, const int vectors) {
    long i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        multiply_tile(
            a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, pairs, adds, TILE_ROWS, vectors);
    for (; i < m; i++)
        multiply_tile(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, pairs, adds, 1, vectors);
}

/*
c = a b, or c += a b if `adds`. a: (m, 2 * pairs) in bf16. b: (pairs, n), each word two values that follow each
other along the sum. c: (m, n) in float32. n is a multiple of 16.
*/
static void multiply(
    const bf16 *a, long a_stride, const uint32_t *b, long b_stride, float *c, long c_stride, long m, long n,
    long pairs, int adds) {
    long j = 0;
    for (; j + TILE_VECTORS * LANES <= n; j += TILE_VECTORS * LANES)
        multiply_panel(a, a_stride, b + j, b_stride, c + j, c_stride, m, pairs, adds, TILE_VECTORS);
    for (; j < n; j += LANES) multiply_panel(a, a_stride, b + j, b_stride, c + j, c_stride, m, pairs, adds, 1);
}

/* Convert x (n, width) to the right factor of a sum over the width: (width / 2, columns), 0 beyond n. */
static void pair_columns(const bf16 *x, long stride, long n, long width, uint32_t *out, long columns) {
    for (long p = 0; p < width / 2; p++) memset(out + p * columns + n, 0, 4 * (columns - n));
    for (long j = 0; j < n; j++)
        for (long p = 0; p < width / 2; p++) memcpy(out + p * columns + j, x + j * stride + 2 * p, 4);
}

/* Convert x (n, width) to the right factor of a sum over its rows: (padded / 2, width), 0 beyond n. */
static void pair_rows(const bf16 *x, long stride, long n, long width, uint32_t *out, long padded) {
    memset(out + n / 2 * width, 0, 4 * (padded / 2 - n / 2) * width);
    for (long i = 0; i < n; i++) {
        uint32_t *row = out + i / 2 * width;
        if (i % 2)
            for (long d = 0; d < width; d++) row[d] |= (uint32_t)x[i * stride + d] << 16;
        else
            for (long d = 0; d < width; d++) row[d] = x[i * stride + d];
    }
}

/* Transpose x (n, width) to (width, padded), 0 beyond n. */
static void transpose(const bf16 *x, long stride, long n, long width, bf16 *out, long padded) {
    for (long d = 0; d < width; d++) {
        for (long i = 0; i < n; i++) out[d * padded + i] = x[i * stride + d];
        for (long i = n; i < padded; i++) out[d * padded + i] = 0;
    }
}

static long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

static long find_longest(const int32_t *ends, long examples) {
    long longest = 0;
    for (long x = 0; x < examples; x++)
        if (ends[x + 1] - ends[x] > longest) longest = ends[x + 1] - ends[x];
    return longest;
}

/* Take the next array from a workspace. */
static void *take(char **at, long bytes) {
    void *found = *at;
    *at += round_up(bytes, 64);
    return found;
}

/*
Exponentiate one row of scores, of which `visible` count; `weights` gets them, 0 up to `seen`. Their sum is 1 /
`inverse`, and the result is the log of the sum of exp(scale * score).
*/
static float exponentiate(float *scores, bf16 *weights, long visible, long seen, float scale, float *inverse) {
    float largest[LANES], sums[LANES] = {0};
    for (long j = visible; j < round_up(visible, LANES); j++) scores[j] = -INFINITY;
    for (int l = 0; l < LANES; l++) largest[l] = scores[l];
    for (long j = LANES; j < visible; j += LANES)
        for (int l = 0; l < LANES; l++) largest[l] = scores[j + l] > largest[l] ? scores[j + l] : largest[l];
    float top = largest[0];
    for (int l = 1; l < LANES; l++) top = largest[l] > top ? largest[l] : top;
    for (long j = 0; j < visible; j += LANES)
        for (int l = 0; l < LANES; l++) {
            /* The sum is that of the rounded weights, so their rounding cancels in the mean of the values. */
            uint32_t weight = narrow(exponential((scores[j + l] - top) * scale));
            weight = j + l < visible ? weight : 0;
            weights[j + l] = weight;
            sums[l] += widen(weight);
        }
    for (long j = round_up(visible, LANES); j < seen; j++) weights[j] = 0;
    float total = add_lanes(sums);
    *inverse = 1 / total;
    return top * scale + logf(total);
}

/*
Causal attention within each example.

q, out: (n_tokens, heads, width); k, v: (n_tokens, kv_heads, width). norms: (heads, n_tokens), the log of the sum
of the exponentials of each query, for the backward pass. ends: start of each example and end of the row.
*/
int attend(
    const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *norms, const int32_t *ends, long examples,
    long heads, long kv_heads, long width, float scale) {
    long most = round_up(find_longest(ends, examples), LANES), tokens = ends[examples];
    long group = heads / kv_heads, stride = heads * width, kv_stride = kv_heads * width;
    char *memory = aligned_alloc(64, round_up(most * width * 4 + BLOCK * (most * 6 + width * 4) + 5 * 64, 64)), *at = memory;
    if (!memory) return 1;
    uint32_t *keys = take(&at, most * width * 2), *values = take(&at, most * width * 2);
    float *scores = take(&at, BLOCK * most * 4), *mixed = take(&at, BLOCK * width * 4), inverse[BLOCK];
    bf16 *weights = take(&at, BLOCK * most * 2);
    for (long x = 0; x < examples; x++)
        for (long head = 0; head < heads; head++) {
            long first = ends[x], n = ends[x + 1] - first, padded = round_up(n, LANES);
            if (head % group == 0) {
                long start = first * kv_stride + head / group * width;
                pair_columns(k + start, kv_stride, n, width, keys, padded);
                pair_rows(v + start, kv_stride, n, width, values, padded);
            }
            for (long i = 0; i < n; i += BLOCK) {
                long count = n - i < BLOCK ? n - i : BLOCK, seen = round_up(i + count, LANES);
                long here = (first + i) * stride + head * width;
                multiply(q + here, stride, keys, padded, scores, seen, count, seen, width / 2, 0);
                for (long r = 0; r < count; r++)
                    norms[head * tokens + first + i + r] = exponentiate(
                        scores + r * seen, weights + r * seen, i + r + 1, seen, scale, inverse + r);
                multiply(weights, seen, values, width, mixed, width, count, width, seen / 2, 0);
                for (long r = 0; r < count; r++)
                    for (long d = 0; d < width; d++)
                        out[here + r * stride + d] = narrow(mixed[r * width + d] * inverse[r]);
            }
        }
    free(memory);
    return 0;
}

/*
Compute the weights of one query again, and the gradients of its scores: exp(scale * score - norm), and that times
(g - delta) * scale, where g is the gradient of a weight and delta the mean of g. The pairs get both in their upper
or lower half, `rows` the gradients.
*/
static void pull_back(
    const float *scores, const float *gradients, uint32_t *weight_pairs, uint32_t *pairs, bf16 *rows, long visible,
    long seen, float scale, float norm, float delta, int shift) {
    for (long j = 0; j < visible; j++) {
        float weight = exponential(scores[j] * scale - norm);
        uint32_t gradient = narrow(weight * (gradients[j] - delta) * scale);
        weight_pairs[j] |= narrow(weight) << shift;
        pairs[j] |= gradient << shift;
        rows[j] = gradient;
    }
    for (long j = visible; j < seen; j++) rows[j] = 0;
}

/*
Gradients of `attend` with respect to q, k and v, from that of its output. The weights are computed again from the
scores and norms, as in flash attention (Dao, arXiv 2307.08691), so memory grows with the length of an example, not
with its square.
*/
int attend_backward(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *norms, const bf16 *grad, bf16 *dq,
    bf16 *dk, bf16 *dv, const int32_t *ends, long examples, long heads, long kv_heads, long width, float scale) {
    long most = round_up(find_longest(ends, examples), LANES), tokens = ends[examples];
    long group = heads / kv_heads, stride = heads * width, kv_stride = kv_heads * width;
    char *memory = aligned_alloc(64, round_up(most * width * 14 + BLOCK * (most * 14 + width * 6) + 12 * 64, 64)), *at = memory;
    if (!memory) return 1;
    uint32_t *keys = take(&at, most * width * 2), *values = take(&at, most * width * 2);
    uint32_t *key_rows = take(&at, most * width * 2);
    /* Transposed, (width, padded): the scores then are the right factor, which needs no transposition. */
    float *key_sums = take(&at, most * width * 4), *value_sums = take(&at, most * width * 4);
    float *scores = take(&at, BLOCK * most * 4), *gradients = take(&at, BLOCK * most * 4);
    float *query_sums = take(&at, BLOCK * width * 4);
    uint32_t *weight_pairs = take(&at, BLOCK * most * 2), *pairs = take(&at, BLOCK * most * 2);
    bf16 *rows = take(&at, BLOCK * most * 2), *turned = take(&at, BLOCK * width * 2);
    for (long x = 0; x < examples; x++)
        for (long head = 0; head < heads; head++) {
            long first = ends[x], n = ends[x + 1] - first, padded = round_up(n, LANES);
            long start = first * kv_stride + head / group * width;
            if (head % group == 0) {
                pair_columns(k + start, kv_stride, n, width, keys, padded);
                pair_columns(v + start, kv_stride, n, width, values, padded);
                pair_rows(k + start, kv_stride, n, width, key_rows, padded);
                memset(key_sums, 0, padded * width * 4);
                memset(value_sums, 0, padded * width * 4);
            }
            for (long i = 0; i < n; i += BLOCK) {
                long count = n - i < BLOCK ? n - i : BLOCK, seen = round_up(i + count, LANES);
                long even = round_up(count, 2), here = (first + i) * stride + head * width;
                multiply(q + here, stride, keys, padded, scores, seen, count, seen, width / 2, 0);
                multiply(grad + here, stride, values, padded, gradients, seen, count, seen, width / 2, 0);
                memset(weight_pairs, 0, even / 2 * seen * 4);
                memset(pairs, 0, even / 2 * seen * 4);
                for (long r = 0; r < count; r++) {
                    const bf16 *output = out + here + r * stride, *pulled = grad + here + r * stride;
                    float sums[LANES] = {0};
                    for (long d = 0; d < width; d += LANES)
                        for (int l = 0; l < LANES; l++) sums[l] += widen(output[d + l]) * widen(pulled[d + l]);
                    pull_back(
                        scores + r * seen, gradients + r * seen, weight_pairs + r / 2 * seen, pairs + r / 2 * seen,
                        rows + r * seen, i + r + 1, seen, scale, norms[head * tokens + first + i + r],
                        add_lanes(sums), r % 2 ? 16 : 0);
                }
                multiply(rows, seen, key_rows, width, query_sums, width, count, width, seen / 2, 0);
                for (long r = 0; r < count; r++)
                    for (long d = 0; d < width; d++) dq[here + r * stride + d] = narrow(query_sums[r * width + d]);
                transpose(grad + here, stride, count, width, turned, even);
                multiply(turned, even, weight_pairs, seen, value_sums, padded, width, seen, even / 2, 1);
                transpose(q + here, stride, count, width, turned, even);
                multiply(turned, even, pairs, seen, key_sums, padded, width, seen, even / 2, 1);
            }
            if (head % group == group - 1)
                for (long j = 0; j < n; j++)
                    for (long d = 0; d < width; d++) {
                        dk[start + j * kv_stride + d] = narrow(key_sums[d * padded + j]);
                        dv[start + j * kv_stride + d] = narrow(value_sums[d * padded + j]);
                    }
        }
    free(memory);
    return 0;
}

/*
RMSNorm: out = x * weight / sqrt(mean(x^2) + epsilon), in each of `rows` rows; weight: (width).
factors: (rows), what each row is multiplied by, for the backward pass.
*/
int normalize(
    const bf16 *x, const bf16 *weight, bf16 *out, float *factors, long rows, long width, float epsilon) {
    for (long r = 0; r < rows; r++, x += width, out += width) {
        float sums[LANES] = {0};
        for (long d = 0; d < width; d += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += widen(x[d + l]) * widen(x[d + l]);
        float factor = factors[r] = 1 / sqrtf(add_lanes(sums) / width + epsilon);
        for (long d = 0; d < width; d++) out[d] = narrow(widen(x[d]) * factor * widen(weight[d]));
    }
    return 0;
}

/* Gradient of `normalize` with respect to x; the weight is frozen. */
int normalize_backward(
    const bf16 *x, const bf16 *weight, const float *factors, const bf16 *grad, bf16 *dx, long rows, long width) {
    for (long r = 0; r < rows; r++, x += width, grad += width, dx += width) {
        float sums[LANES] = {0}, factor = factors[r];
        for (long d = 0; d < width; d += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += widen(grad[d + l]) * widen(weight[d + l]) * widen(x[d + l]);
        float shift = add_lanes(sums) * factor * factor * factor / width;
        for (long d = 0; d < width; d++)
            dx[d] = narrow(widen(grad[d]) * widen(weight[d]) * factor - widen(x[d]) * shift);
    }
    return 0;
}

/* SwiGLU: out = silu(gate) * up, element by element. */
int swiglu(const bf16 *gate, const bf16 *up, bf16 *out, long count) {
    for (long i = 0; i < count; i++) {
        float x = widen(gate[i]);
        out[i] = narrow(x / (1 + exponential(-x)) * widen(up[i]));
    }
    return 0;
}

/* Gradients of `swiglu` with respect to gate and up. */
int swiglu_backward(
    const bf16 *gate, const bf16 *up, const bf16 *grad, bf16 *dgate, bf16 *dup, long count) {
    for (long i = 0; i < count; i++) {
        float x = widen(gate[i]), pulled = widen(grad[i]), share = 1 / (1 + exponential(-x));
        dgate[i] = narrow(pulled * widen(up[i]) * share * (1 + x * (1 - share)));
        dup[i] = narrow(pulled * x * share);
    }
    return 0;
}
