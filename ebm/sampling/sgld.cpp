// Clamped Langevin steps for energies that are chains of convolutions, linear layers and SiLU, with short cuts; called by
// compiled.py.
//
// A group of LANES chains goes through all its steps alone, so that its activations stay in the cache of one core. It
// lies chain-innermost: a value is a vector of LANES chains, an activation [pixel][channel][chain], so that no chain
// ever meets another. Layers and their input gradients are then one loop, `gather`: an output pixel is the sum, over
// its taps, of a matrix times an input pixel. Held in registers are the sums of BLOCK output channels, or of half as many
// at TOGETHER pixels that take the same matrices, so that a weight is loaded once for them.
#include <cstdint>
#include <cstring>
#include <type_traits>

constexpr int TOGETHER = 3;
#ifdef __AVX512F__
constexpr int BYTES = 64, BLOCK = 16;
#else
constexpr int BYTES = 32, BLOCK = 8;
#endif

template <class T> struct Float;  // its bits, and the terms of e^x's series that reach its precision
template <> struct Float<float> {
    typedef float vector __attribute__((vector_size(BYTES)));
    typedef uint32_t integers __attribute__((vector_size(BYTES)));
    static constexpr int mantissa = 23, bias = 127, terms = 7, largest_exponent = 87;
};
template <> struct Float<double> {
    typedef double vector __attribute__((vector_size(BYTES)));
    typedef uint64_t integers __attribute__((vector_size(BYTES)));
    static constexpr int mantissa = 52, bias = 1023, terms = 13, largest_exponent = 708;
};

// The taps of output pixel pixel[q] are t in [start[q], start[q + 1]): input pixel source[t] times the matrix
// weight[tap[t]]. The alike[q] pixels from q on have the same matrices.
struct Taps {
    const int32_t *pixel, *alike, *start, *tap, *source;
};

template <class T> struct Layer {
    int64_t pixels, channels, silu;  // of the output
    int64_t kernel;  // its taps' matrices
    int64_t out, skip, fan;  // where its output lies; the layer whose output it adds, and the one that adds its; or -1
    Taps forward, backward;
    // [block][tap][in][output], blocks of BLOCK outputs, or of one where fewer are left; transposed: from out to in
    const T *weight, *bias, *transposed;
};

template <class T> struct Work {
    int64_t layers;
    const Layer<T> *layer;
    int64_t pixels, channels;  // of an image
    int64_t chains;
    T *x;                         // [chains][channels][pixels]
    const T *noise;               // [steps], `stride` numbers apart, of [chains][channels][pixels]
    int64_t stride, steps;
    const double *step_sizes;
    const int64_t *labels;        // [chains], or null
    double temperature, grad_clamp, low, high;
    T *workspace;                 // aligned to BYTES: the image; output and slope (then gradient and slope) a layer
};

template <class V> static inline V clip(V x, V low, V high) {  // keeps NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <class T> struct InverseFactorials {
    T of[Float<T>::terms + 1] = {};
    constexpr InverseFactorials() {
        double value = 1;
        for (int k = 0; k <= Float<T>::terms; value /= ++k) of[k] = T(value);
    }
};

// e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor series. Adding 1.5 * 2^mantissa rounds to the integer n, and
// leaves it in the lowest bits; -ffast-math would fold it away.
template <class T, class V> static inline V exponential(V x) {
    typedef typename Float<T>::integers N;
    static constexpr InverseFactorials<T> inverse;
    constexpr T shift = T(3ll << (Float<T>::mantissa - 1));
    x = clip(x, V{} - T(Float<T>::largest_exponent), V{} + T(Float<T>::largest_exponent));
    const V shifted = x * T(1.4426950408889634074) + shift, n = shifted - shift;
    const V r = x - n * T(0.693359375) + n * T(2.12194440054690583e-4);  // ln 2 in two parts
    V sum = V{} + inverse.of[Float<T>::terms];
#pragma GCC unroll 16
    for (int k = Float<T>::terms; k > 0; k--) sum = sum * r + inverse.of[k - 1];
    return sum * (V)(((N)shifted + Float<T>::bias) << Float<T>::mantissa);
}

// The sums of output channels [o, o + OUT) at the pixels [q, q + PIXELS), which have the same taps; the weights of an
// input lie `stride` after those of the one before. SPLIT partial sums each, or one would wait for the one before.
template <class T, int PIXELS, int OUT, int SPLIT, class V, class N, class F>
__attribute__((always_inline)) static inline void block(Taps taps, int64_t q, const V *in, N ins, const T *weight,
                                                        int64_t stride, int64_t o, F store) {
    V sums[SPLIT * OUT * PIXELS] = {};
    const int32_t start = taps.start[q], count = taps.start[q + 1] - start;
    for (int32_t t = start; t < start + count; t++) {
        const V *x[PIXELS];
        for (int i = 0; i < PIXELS; i++) x[i] = in + taps.source[t + i * count] * ins;
        const T *w = weight + taps.tap[t] * ins * stride;
        for (int64_t c = 0; c < ins; c += SPLIT)
#pragma GCC unroll 8
            for (int s = 0; s < SPLIT; s++)
#pragma GCC unroll 16
                for (int j = 0; j < OUT; j++)
#pragma GCC unroll 8
                    for (int i = 0; i < PIXELS; i++)
                        sums[(s * OUT + j) * PIXELS + i] += x[i][c + s] * w[(c + s) * stride + j];
    }
    for (int j = 0; j < OUT; j++)
        for (int i = 0; i < PIXELS; i++) {
            for (int s = 1; s < SPLIT; s++) sums[j * PIXELS + i] += sums[(s * OUT + j) * PIXELS + i];
            store(taps.pixel[q + i], o + j, sums[j * PIXELS + i]);
        }
}

// store(pixel, channel, sum) for all `outs` channels of all `pixels`; `ins` is an int64_t, or a constant of this type.
template <class T, class V, class N, class F>
static inline void gather_from(N ins, Taps taps, int64_t pixels, const V *in, const T *weight, int64_t kernel,
                               int64_t outs, F store) {
    int64_t o = 0;
    for (; o + BLOCK <= outs; o += BLOCK, weight += kernel * ins * BLOCK)
        for (int64_t q = 0; q < pixels;) {
            const int64_t end = q + taps.alike[q];
            for (; q + TOGETHER <= end; q += TOGETHER)
                for (int half = 0; half < BLOCK; half += BLOCK / 2)
                    block<T, TOGETHER, BLOCK / 2, 1>(taps, q, in, ins, weight + half, BLOCK, o + half, store);
            for (; q < end; q++) block<T, 1, BLOCK, 1>(taps, q, in, ins, weight, BLOCK, o, store);
        }
    for (; o < outs; o++, weight += kernel * ins)
        for (int64_t q = 0; q < pixels;) {
            const int64_t end = q + taps.alike[q];
            if (ins % 4 == 0)
                for (; q + TOGETHER <= end; q += TOGETHER) block<T, TOGETHER, 1, 4>(taps, q, in, ins, weight, 1, o, store);
            for (; q < end; q++)
                ins % 4 ? block<T, 1, 1, 1>(taps, q, in, ins, weight, 1, o, store)
                        : block<T, 1, 1, 4>(taps, q, in, ins, weight, 1, o, store);
        }
}

template <class T, class V, class F>
static inline void gather(Taps taps, int64_t pixels, const V *in, int64_t ins, const T *weight, int64_t kernel,
                          int64_t outs, F store) {
    if (ins == 1)  // grey images: a loop less
        gather_from<T>(std::integral_constant<int64_t, 1>(), taps, pixels, in, weight, kernel, outs, store);
    else
        gather_from<T>(ins, taps, pixels, in, weight, kernel, outs, store);
}

template <class T> static void sgld(const Work<T> &work) {
    typedef typename Float<T>::vector V;
    constexpr int64_t LANES = BYTES / sizeof(T);
    const int64_t size = work.pixels * work.channels, last = work.layers - 1;
    const V low = V{} + T(work.low), high = V{} + T(work.high), bound = V{} + T(work.grad_clamp), one = V{} + 1;
    V *const x = (V *)work.workspace;

    for (int64_t first = 0; first < work.chains; first += LANES) {
        const int64_t lanes = work.chains - first < LANES ? work.chains - first : LANES;
        // visit(value of x, index of its first chain's in [chains][channels][pixels])
        auto each = [&](auto visit) {
            for (int64_t p = 0; p < work.pixels; p++)
                for (int64_t c = 0; c < work.channels; c++)
                    visit(x[p * work.channels + c], first * size + c * work.pixels + p);
        };
        memset(x, 0, size * sizeof(V));
        auto lanes_of = [&](const T *values) {
            V all = {};
            if (lanes == LANES)  // of a constant number the compiler makes a few shuffles
                for (int64_t l = 0; l < LANES; l++) all[l] = values[l * size];
            else
                for (int64_t l = 0; l < lanes; l++) all[l] = values[l * size];
            return all;
        };
        each([&](V &value, int64_t at) { value = lanes_of(work.x + at); });
        for (int64_t k = 0; k < work.steps; k++) {
            const T *noise = work.noise + k * work.stride, step_size = work.step_sizes[k];
            each([&](V &value, int64_t at) { value = clip(value + lanes_of(noise + at), low, high); });

            V *in = x;
            int64_t ins = work.channels;
            const int64_t outputs = work.layer[last].channels;
            for (int64_t i = 0; i < last + (outputs > 1); i++) {  // one output is the energy: its value is not needed
                const Layer<T> &layer = work.layer[i];
                V *out = x + layer.out, *slope = out + layer.pixels * layer.channels;
                const V *skip = layer.skip < 0 ? nullptr : x + work.layer[layer.skip].out;
                gather(layer.forward, layer.pixels, in, ins, layer.weight, layer.kernel, layer.channels,
                       [&](int64_t p, int64_t c, V sum) {
                           const int64_t at = p * layer.channels + c;
                           sum += skip ? layer.bias[c] + skip[at] : V{} + layer.bias[c];
                           V s = layer.silu ? 1 / (1 + exponential<T>(-sum)) : one;
                           out[at] = sum * s;
                           slope[at] = layer.silu ? s + sum * s * (1 - s) : one;
                       });
                in = out;
                ins = layer.channels;
            }

            const V *gradient = &one;  // of the energy by the outputs: E(x, y) = -f[y], E(x) = -t log sum exp f/t
            if (outputs > 1) {
                V *f = x + work.layer[last].out, highest = f[0], sum = {};
                for (int64_t c = 1; c < outputs; c++) highest = f[c] > highest ? f[c] : highest;
                for (int64_t c = 0; c < outputs; c++) sum += f[c] = exponential<T>((f[c] - highest) / T(work.temperature));
                for (int64_t c = 0; c < outputs; c++) f[c] /= -sum;
                if (work.labels)
                    for (int64_t c = 0; c < outputs; c++)
                        for (int64_t l = 0; l < lanes; l++) f[c][l] = -T(work.labels[first + l] == c);
                gradient = f;
            }
            for (int64_t i = last; i > 0; i--) {
                const Layer<T> &layer = work.layer[i], &before = work.layer[i - 1];
                V *out = x + before.out, *slope = out + before.pixels * before.channels;
                const V *fan = before.fan < 0 ? nullptr : x + work.layer[before.fan].out;
                gather(layer.backward, before.pixels, gradient, layer.channels, layer.transposed, layer.kernel, before.channels,
                       [&](int64_t p, int64_t c, V sum) {
                           const int64_t at = p * before.channels + c;
                           out[at] = (fan ? sum + fan[at] : sum) * slope[at];
                       });
                gradient = out;
            }
            gather(work.layer[0].backward, work.pixels, gradient, work.layer[0].channels, work.layer[0].transposed,
                   work.layer[0].kernel, work.channels, [&](int64_t p, int64_t c, V sum) {
                       V &value = x[p * work.channels + c];
                       value = clip(value - step_size * clip(sum, -bound, bound), low, high);
                   });
        }
        each([&](V &value, int64_t at) {
            for (int64_t l = 0; l < lanes; l++) work.x[at + l * size] = value[l];
        });
    }
}

extern "C" {
int64_t block() { return BLOCK; }
int64_t vector_bytes() { return BYTES; }
void sgld_float32(const Work<float> *work) { sgld(*work); }
void sgld_float64(const Work<double> *work) { sgld(*work); }
}
