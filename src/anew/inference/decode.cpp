// Decode one more token on a CPU in bf16. cpu_decoder.py calls these functions through ctypes and
// owns all memory.
//
// anew_decode: the whole of GPT-2 for one text, in one call. Its time is that of reading the
// weights once. Matrices are stored (out, in), as bf16 or in 8 bits (value + 128) with a scale for
// every GROUP values; activations and sums are fp32. All threads stay in one parallel region for
// the whole step and synchronise five times a layer.
//
// anew_attend, anew_norm: for several texts, what lies between the matrix products, which are
// oneDNN's.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32;  // values that share a scale
constexpr int LANES = 64;  // partial sums of a dot product, which the compiler keeps in vectors

struct Matrix {
    const void *values;   // (out, in)
    const float *scales;  // (out, in / GROUP) for 8 bits, else null
    const float *bias;    // (out), or null
};

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Norm ln_1;
    Matrix c_attn, attn_c_proj;
    Norm ln_2;
    Matrix c_fc, mlp_c_proj;
};

struct Model {
    int64_t layers, heads, width, capacity, vocabulary;
    float epsilon;
    const Layer *layer;
    const float *wte, *wpe;  // ids and positions are looked up in fp32
    Norm ln_f;
    Matrix head;  // wte again, for the logits
};

inline float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 64;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Sum n values, where n is a power of two, and overwrite them. Adding one half to the other lets
// the CPU add many values at a time; adding one value after the other waits for each sum.
inline float sum_of(float *values, int64_t n) {
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; j++) values[j] += values[j + half];
    return values[0];
}

// Dot product of a row in bf16 and a vector in fp32.
inline float dot(const uint16_t *a, const float *b, int64_t n) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += to_float(a[i + j]) * b[i + j];
    float total = sum_of(sums, LANES);
    for (; i < n; i++) total += to_float(a[i]) * b[i];
    return total;
}

void layer_norm(const float *x, const Norm &norm, float epsilon, int64_t n, float *out) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = float(sum / n);
    for (int64_t i = 0; i < n; i++) squares += double(x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(float(squares / n) + epsilon);
    for (int64_t i = 0; i < n; i++)
        out[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

inline float gelu(float x) {
    return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// A vector in 8 bits with a scale for every GROUP values, for products with int8 matrices. Only
// CPUs with VNNI instructions read it.
struct QuantizedVector {
    std::vector<int8_t> values;
    std::vector<float> scales;
    // -128 times the sum of 4 values. The weights are stored as value + 128, since VNNI multiplies
    // unsigned by signed bytes; this takes the excess away.
    std::vector<int32_t> correction;

    void assign(const float *x, int64_t n) {
        values.resize(n);
        scales.resize((n + GROUP - 1) / GROUP);
        correction.assign(n / 4, 0);
        for (int64_t g = 0; g < n / GROUP; g++, x += GROUP) {
            float largest = 0;
            for (int64_t j = 0; j < GROUP; j++) largest = std::max(largest, std::fabs(x[j]));
            const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0.0f;
            scales[g] = scale;
            for (int64_t j = 0; j < GROUP; j++) {
                values[g * GROUP + j] = int8_t(std::lrint(x[j] * inverse));
                correction[(g * GROUP + j) / 4] -= 128 * values[g * GROUP + j];
            }
        }
    }
};

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline __m128 load_two(const float *values) {
    return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(values)));
}

// Dot product of a row in int8, stored as value + 128, and a vector: 64 products an instruction,
// which are two groups.
inline float dot(const uint8_t *a, const float *scale, const QuantizedVector &b, const float *,
                 int64_t n) {
    __m512 sums = _mm512_setzero_ps();
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    int64_t i = 0;
    for (; i + 2 * GROUP <= n; i += 2 * GROUP) {
        const __m512i start = _mm512_loadu_si512(b.correction.data() + i / 4);
        const __m512i weights = _mm512_loadu_si512(a + i);
        const __m512i bytes = _mm512_loadu_si512(b.values.data() + i);
        const __m512i total = _mm512_dpbusd_epi32(start, weights, bytes);
        const __m128 weight_scales = load_two(scale + i / GROUP);
        const __m128 both = _mm_mul_ps(weight_scales, load_two(b.scales.data() + i / GROUP));
        const __m512 scales = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(both));
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales, sums);
    }
    float total = _mm512_reduce_add_ps(sums);
    if (i < n) {  // an odd group at the end
        const auto load = [](const void *bytes) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
        };
        const __m256i start = load(b.correction.data() + i / 4);
        const __m256i rest = _mm256_dpbusd_epi32(start, load(a + i), load(b.values.data() + i));
        const __m512i widened = _mm512_inserti64x4(_mm512_setzero_si512(), rest, 0);
        total += _mm512_reduce_add_epi32(widened) * scale[i / GROUP] * b.scales[i / GROUP];
    }
    return total;
}
#else
// Dot product of a row in int8, stored as value + 128, and a vector in fp32.
inline float dot(const uint8_t *a, const float *scale, const QuantizedVector &, const float *b,
                 int64_t n) {
    float sums[GROUP] = {};
    for (int64_t g = 0; g < n / GROUP; g++, a += GROUP, b += GROUP)
        for (int64_t j = 0; j < GROUP; j++) sums[j] += scale[g] * float(int32_t(a[j]) - 128) * b[j];
    return sum_of(sums, GROUP);
}
#endif

// Call give(n, row n . x + bias) for every output n. The threads of the parallel region share the
// loop and synchronise at its end. `quantized` is scratch memory of the thread.
template <class Give>
void multiply(const Matrix &m, const float *x, QuantizedVector &quantized, int64_t in, int64_t out,
              Give give) {
    if (m.scales) quantized.assign(x, in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < out; n++) {
        const float sum = m.scales ? dot(static_cast<const uint8_t *>(m.values) + n * in,
                                         m.scales + n * (in / GROUP), quantized, x, in)
                                   : dot(static_cast<const uint16_t *>(m.values) + n * in, x, in);
        give(n, sum + (m.bias ? m.bias[n] : 0.0f));
    }
}

// One head: store the new key and value at `position` of the cache, and let the query attend to all
// positions up to it. q, k, v and out have `size` values; `scores` is scratch memory.
void attend(const float *q, const float *k, const float *v, int64_t size, uint16_t *keys,
            uint16_t *values, int64_t position, float *scores, float *out) {
    for (int64_t i = 0; i < size; i++) {
        keys[position * size + i] = to_bf16(k[i]);
        values[position * size + i] = to_bf16(v[i]);
    }
    const float scale = 1.0f / std::sqrt(float(size));
    float largest = -INFINITY, total = 0;
    for (int64_t t = 0; t <= position; t++) {
        scores[t] = dot(keys + t * size, q, size) * scale;
        largest = std::max(largest, scores[t]);
    }
    for (int64_t t = 0; t <= position; t++) total += scores[t] = std::exp(scores[t] - largest);
    std::fill(out, out + size, 0.0f);
    for (int64_t t = 0; t <= position; t++) {
        const float weight = scores[t] / total;
        for (int64_t i = 0; i < size; i++) out[i] += weight * to_float(values[t * size + i]);
    }
}

}  // namespace

// Read token `id` at `position` and write the logits of the next token.
// keys, values: bf16 (layers, heads, capacity, size), of which `position` tokens are filled.
// logits: fp32 (vocabulary). scratch: fp32 (9 width).
extern "C" void anew_decode(const Model *model, int64_t id, int64_t position, uint16_t *keys,
                            uint16_t *values, float *scratch, float *logits, int threads) {
    const Model &m = *model;
    const int64_t C = m.width, size = C / m.heads;
    float *x = scratch, *qkv = x + C, *mixed = qkv + 3 * C, *wide = mixed + C;  // C, 3 C, C, 4 C
    for (int64_t i = 0; i < C; i++) x[i] = m.wte[id * C + i] + m.wpe[position * C + i];
#pragma omp parallel num_threads(threads)
    {
        // Each thread normalises for itself, which saves a synchronisation.
        std::vector<float> normed(C), scores(m.capacity);
        QuantizedVector quantized;
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer &layer = m.layer[l];
            layer_norm(x, layer.ln_1, m.epsilon, C, normed.data());
            multiply(layer.c_attn, normed.data(), quantized, C, 3 * C,
                     [&](int64_t n, float y) { qkv[n] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < m.heads; head++) {
                const int64_t start = (l * m.heads + head) * m.capacity * size;
                const float *q = qkv + head * size;
                attend(q, q + C, q + 2 * C, size, keys + start, values + start, position,
                       scores.data(), mixed + head * size);
            }
            multiply(layer.attn_c_proj, mixed, quantized, C, C,
                     [&](int64_t n, float y) { x[n] += y; });
            layer_norm(x, layer.ln_2, m.epsilon, C, normed.data());
            multiply(layer.c_fc, normed.data(), quantized, C, 4 * C,
                     [&](int64_t n, float y) { wide[n] = gelu(y); });
            multiply(layer.mlp_c_proj, wide, quantized, 4 * C, C,
                     [&](int64_t n, float y) { x[n] += y; });
        }
        layer_norm(x, m.ln_f, m.epsilon, C, normed.data());
        multiply(m.head, normed.data(), quantized, C, m.vocabulary,
                 [&](int64_t n, float y) { logits[n] = y; });
    }
}

// One layer's attention of a new token in each of `rows` texts, at positions[row]. qkv, out: bf16
// (rows, 3 width) and (rows, width). keys, values: bf16 (rows, heads, capacity, size).
extern "C" void anew_attend(const uint16_t *qkv, uint16_t *keys, uint16_t *values,
                            const int64_t *positions, uint16_t *out, int64_t rows, int64_t heads,
                            int64_t size, int64_t capacity, int threads) {
    const int64_t C = heads * size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(capacity), vectors(4 * size);  // q, k, v and the result
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * heads; i++) {
            const int64_t row = i / heads, head = i % heads;
            for (int64_t part = 0; part < 3; part++) {
                const uint16_t *source = qkv + (3 * row + part) * C + head * size;
                for (int64_t j = 0; j < size; j++) vectors[part * size + j] = to_float(source[j]);
            }
            const float *q = vectors.data();
            float *mixed = vectors.data() + 3 * size;
            const int64_t start = i * capacity * size;
            attend(q, q + size, q + 2 * size, size, keys + start, values + start, positions[row],
                   scores.data(), mixed);
            for (int64_t j = 0; j < size; j++) out[row * C + head * size + j] = to_bf16(mixed[j]);
        }
    }
}

// x += added, unless `added` is null; out = layer_norm(x) * weight + bias.
// x: fp32; added, out: bf16; all (rows, width).
extern "C" void anew_norm(float *x, const uint16_t *added, const float *weight, const float *bias,
                          float epsilon, uint16_t *out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float *x_row = x + row * width;
            if (added)
                for (int64_t i = 0; i < width; i++) x_row[i] += to_float(added[row * width + i]);
            layer_norm(x_row, {weight, bias}, epsilon, width, normed.data());
            for (int64_t i = 0; i < width; i++) out[row * width + i] = to_bf16(normed[i]);
        }
    }
}
