// Raw heads -> keypoints. Two kernels where the NMS radius is small (decode.is_tiled):
//
//   detect     one block a tile: softmax, threshold, both suppression rounds, border; survivors to a list
//   describe   one warp a survivor: its rank among all (they are few), its descriptor, its row of the result
//
// and for larger radii score_map, window, mark, remove and collect in place of detect.
//
// NVRTC gets -DSTRIDE (pixels along a cell, a power of two up to 32), -DDIM (descriptor length), -DRADIUS (px, of
// `detect`), -DHEAD (0 float, 1 half, 2 bfloat16). Heads lie anyhow: `cell_pitch` values from one cell to the next,
// `channel_pitch` from one channel to the next. -DWIDE_LOGITS, -DWIDE_DESCRIPTORS: 1 if that head's channels lie
// together and its cells start at multiples of 16 bytes. -DSUBPIXEL: 1 to move keypoints to the center of the scores.

typedef unsigned long long Key;  // score in the upper half, ~(pixel index) in the lower: unique, and the larger the better

const unsigned BROKEN_LOGITS = 1, BROKEN_DESCRIPTORS = 2;  // bits of `broken`: values that are not finite

struct Target {  // of one run; addresses on the GPU, or of page-locked host memory
    float2* xy;
    float* scores;
    void* descriptors;
    int* counts;  // -1: logits that are not finite, -2: descriptors
};

#if HEAD == 0
typedef float Head;
__device__ float widen(Head value) { return value; }
#elif HEAD == 1
typedef unsigned short Head;
__device__ float widen(Head value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
#else
typedef unsigned short Head;
__device__ float widen(Head value) { return __uint_as_float((unsigned)value << 16); }
#endif

__device__ unsigned short narrow(float value)
{
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

const unsigned ALL = 0xffffffffu;

template <int NBYTES>
struct Vector;  // so many bytes that are moved at once
template <>
struct Vector<16> {
    typedef uint4 Type;
};
template <>
struct Vector<8> {
    typedef uint2 Type;
};
template <>
struct Vector<4> {
    typedef unsigned Type;
};
template <>
struct Vector<2> {
    typedef unsigned short Type;
};

// Neighbouring values, 16 bytes at a time, or all of them if they are fewer.
template <int COUNT>
__device__ void load_wide(const Head* from, float* values)
{
    const int EACH = COUNT * sizeof(Head) < 16 ? COUNT : 16 / sizeof(Head);
    typedef typename Vector<EACH * sizeof(Head)>::Type Whole;
#pragma unroll
    for (int first = 0; first < COUNT; first += EACH) {
        union {
            Whole whole;
            Head parts[EACH];
        } loaded;
        loaded.whole = *(const Whole*)(from + first);
#pragma unroll
        for (int i = 0; i < EACH; i++) values[first + i] = widen(loaded.parts[i]);
    }
}

// ------------------------------------------------------------------------------------------------------------ scores

// Softmax with the dustbin of one cell by STRIDE neighbouring lanes; each gets one row of the cell's pixels.
// Every lane of the warp calls it; outside the grid scores are 0.
__device__ void cell_scores(const Head* cell, int channel_pitch, int row, bool inside, float (&score)[STRIDE])
{
    const bool WIDE = WIDE_LOGITS && STRIDE * sizeof(Head) % 16 == 0;
    float dustbin = inside ? widen(cell[(long long)STRIDE * STRIDE * channel_pitch]) : 0.0f;
    float most = dustbin;
#pragma unroll
    for (int i = 0; i < STRIDE; i++)
        score[i] = inside && !WIDE ? widen(cell[(long long)(row * STRIDE + i) * channel_pitch]) : 0.0f;
    if (WIDE && inside) load_wide<STRIDE>(cell + row * STRIDE, score);
#pragma unroll
    for (int i = 0; i < STRIDE; i++) most = fmaxf(most, score[i]);
#pragma unroll
    for (int step = STRIDE / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < STRIDE; i++) sum += score[i] = expf(score[i] - most);
#pragma unroll
    for (int step = STRIDE / 2; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    sum += expf(dustbin - most);
#pragma unroll
    for (int i = 0; i < STRIDE; i++) score[i] = inside ? __fdiv_rn(score[i], sum) : 0.0f;
}

__device__ Key key_of(float score, unsigned pixel) { return (Key)__float_as_uint(score) << 32 | (ALL - pixel); }

// ------------------------------------------------------------------------------------- suppression within one block

const int TILE = 32;
const int REACH = 5 * RADIUS;  // a pixel's fate depends on scores that far: 1 + 2 + 2 windows, one after the other
const int SHIFT = (STRIDE - REACH % STRIDE) % STRIDE;  // of all tiles, so that a tile with its reach starts at a cell
const int CELLS = (TILE + 2 * REACH + STRIDE - 1) / STRIDE;
const int SIDE = CELLS * STRIDE;
const int INNER = SIDE - 2 * RADIUS;  // pixels whose window lies within
const int WORDS = (SIDE + 31) / 32;
const int THREADS = 256;
const int DETECT_THREADS = 384;  // of `detect`: a row of a cell each, twice, at radius 4; three blocks a multiprocessor

// Whether nothing next to a pixel is higher: few candidates get past this, and those few are looked at closely.
__device__ bool beats_neighbours(const float* at)
{
    float most = fmaxf(at[-1], at[1]);
#pragma unroll
    for (int dx = -1; dx <= 1; dx++) most = fmaxf(most, fmaxf(at[dx - SIDE], at[dx + SIDE]));
    return !(most > *at);
}

// Whether nothing in the window around a pixel is higher. Taken away pixels are negative.
// `step` lanes share the rows; each says it of its own, from `first` on.
__device__ bool is_peak(const float* at, int first, int step)
{
    float most = 0.0f;
    for (int row = first; row <= 2 * RADIUS; row += step) {
#pragma unroll
        for (int dx = -RADIUS; dx <= RADIUS; dx++) most = fmaxf(most, at[SIDE * (row - RADIUS) + dx]);
    }
    return !(most > *at);
}

__device__ void keep(unsigned* kept, int at) { atomicOr(&kept[at / SIDE * WORDS + at % SIDE / 32], 1u << at % SIDE % 32); }

// Bits of one word of a row, each set if a bit within RADIUS of it is.
__device__ unsigned spread(const unsigned* row, int word)
{
    unsigned before = word ? row[word - 1] : 0, here = row[word], after = word + 1 < WORDS ? row[word + 1] : 0;
    unsigned wide = here;
#pragma unroll
    for (int k = 1; k <= RADIUS; k++) wide |= __funnelshift_l(before, here, k) | __funnelshift_r(here, after, k);
    return wide;
}

// Grid: tiles across, tiles down (SHIFT included), images. `counts` starts at 0; `keys` holds a whole image each.
extern "C" __global__ void __launch_bounds__(DETECT_THREADS, 3)
detect(const Head* logits, const int2* placed, Key* keys, unsigned* counts, unsigned* broken, int rows, int columns, int cell_pitch,
       int channel_pitch, int border, float threshold)
{
    __shared__ __align__(16) float scores[SIDE * SIDE];
    __shared__ unsigned short listed[INNER * INNER];
    __shared__ unsigned kept[SIDE * WORDS], near_kept[SIDE * WORDS];
    __shared__ unsigned short mine[TILE * TILE];
    __shared__ unsigned candidates, close, survivors, start;

    int image = blockIdx.z;
    int width_px = placed[image].x, height_px = placed[image].y;  // padding takes no part
    int left = blockIdx.x * TILE - SHIFT - REACH, top = blockIdx.y * TILE - SHIFT - REACH;
    logits += (long long)image * rows * columns * (channel_pitch == 1 ? cell_pitch : STRIDE * STRIDE + 1);
    for (int i = threadIdx.x; i < SIDE * WORDS; i += DETECT_THREADS) kept[i] = 0;
    if (threadIdx.x == 0) candidates = close = survivors = 0;
    __syncthreads();

    const int UNITS = CELLS * CELLS * STRIDE;
    for (int unit = threadIdx.x; unit < (UNITS + 31) / 32 * 32; unit += DETECT_THREADS) {  // whole warps, for the shuffles
        int cell = unit / STRIDE, row = unit % STRIDE;
        int x = cell % CELLS * STRIDE, y = cell / CELLS * STRIDE + row;
        int column = (left + x) / STRIDE, line = (top + y - row) / STRIDE;
        bool inside = unit < UNITS && left + x >= 0 && top + y - row >= 0 && column < columns && line < rows;
        float score[STRIDE];
        cell_scores(logits + ((long long)line * columns + column) * cell_pitch, channel_pitch, row, inside, score);
        if (unit >= UNITS) continue;
        if (inside && score[0] != score[0]) broken[image] = BROKEN_LOGITS;
        unsigned found = 0;
        bool placed_row = top + y < height_px, inner_row = y >= RADIUS && y < SIDE - RADIUS;
#pragma unroll
        for (int i = 0; i < STRIDE; i++) {
            if (!(placed_row && left + x + i < width_px && score[i] > threshold)) score[i] = 0.0f;
            if (score[i] > 0.0f && inner_row && x + i >= RADIUS && x + i < SIDE - RADIUS) found |= 1u << i;
            scores[y * SIDE + x + i] = score[i];
        }
        if (found) {
            unsigned slot = atomicAdd(&candidates, (unsigned)__popc(found));
            for (; found; found &= found - 1) listed[slot++] = y * SIDE + x + __ffs(found) - 1;
        }
    }
    __syncthreads();

    for (int round = 0;; round++) {
        for (int i = threadIdx.x; i < candidates; i += DETECT_THREADS) {
            int at = listed[i];
            if (!(scores[at] > 0.0f && (RADIUS == 0 || beats_neighbours(scores + at)))) continue;
            unsigned slot = atomicAdd(&close, 1u);
            if (slot < (unsigned)(TILE * TILE)) mine[slot] = at;  // not in use yet
            else if (is_peak(scores + at, 0, 1)) keep(kept, at);
        }
        __syncthreads();
        int lane = threadIdx.x % 32, shortlisted = (int)min(close, (unsigned)(TILE * TILE));
        for (int first = threadIdx.x / 32 * 4; first < shortlisted; first += DETECT_THREADS / 8) {  // 8 lanes for each
            int i = first + lane / 8, at = i < shortlisted ? mine[i] : 0;
            bool peak = i < shortlisted && is_peak(scores + at, lane % 8, 8);
            unsigned said = __ballot_sync(ALL, peak);
            if (lane % 8 == 0 && (said >> lane & 255) == 255) keep(kept, at);
        }
        __syncthreads();
        if (round == 2) break;
        if (threadIdx.x == 0) close = 0;
        for (int i = threadIdx.x; i < SIDE * WORDS; i += DETECT_THREADS) near_kept[i] = spread(kept + i / WORDS * WORDS, i % WORDS);
        __syncthreads();
        for (int i = threadIdx.x; i < candidates; i += DETECT_THREADS) {
            int at = listed[i], word = at % SIDE / 32;
            unsigned near = 0;
#pragma unroll
            for (int dy = -RADIUS; dy <= RADIUS; dy++) near |= near_kept[(at / SIDE + dy) * WORDS + word];
            if (scores[at] > 0.0f && near >> at % SIDE % 32 & 1) scores[at] = -scores[at];
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < candidates; i += DETECT_THREADS) {
        int at = listed[i], x = at % SIDE, y = at / SIDE;
        bool own = x >= REACH && x < REACH + TILE && y >= REACH && y < REACH + TILE;
        bool inside = left + x >= border && left + x < width_px - border && top + y >= border && top + y < height_px - border;
        if (own && inside && kept[y * WORDS + x / 32] >> x % 32 & 1) mine[atomicAdd(&survivors, 1u)] = at;
    }
    __syncthreads();
    if (threadIdx.x == 0 && survivors) start = atomicAdd(&counts[image], survivors);
    __syncthreads();
    keys += (long long)image * rows * columns * (STRIDE * STRIDE);
    for (int i = threadIdx.x; i < survivors; i += DETECT_THREADS) {
        unsigned x = left + mine[i] % SIDE, y = top + mine[i] / SIDE;
        keys[start + i] = key_of(fabsf(scores[mine[i]]), y * (columns * STRIDE) + x);
    }
}

// ------------------------------------------------------------- suppression for any radius, one step of it at a time

// Score map of the placed images, 0 up to the threshold and beside them. A cell with a logit that is NaN or infinite is
// all NaN, as in numpy. Here and in `detect` it counts as 0 and the image as `broken`.
// A thread a row of a cell; grid: ..., images.
extern "C" __global__ void __launch_bounds__(THREADS)
score_map(const Head* logits, const int2* placed, float* scores, unsigned* broken, int rows, int columns, int cell_pitch,
          int channel_pitch, float threshold)
{
    int image = blockIdx.y, unit = blockIdx.x * THREADS + threadIdx.x;
    int cell = unit / STRIDE, row = unit % STRIDE;
    bool inside = cell < rows * columns;
    logits += (long long)image * rows * columns * (channel_pitch == 1 ? cell_pitch : STRIDE * STRIDE + 1);
    float score[STRIDE];
    cell_scores(logits + (long long)cell * cell_pitch, channel_pitch, row, inside, score);
    if (!inside) return;
    if (score[0] != score[0]) broken[image] = BROKEN_LOGITS;
    int x = cell % columns * STRIDE, y = cell / columns * STRIDE + row;
    scores += ((long long)image * rows * STRIDE + y) * columns * STRIDE + x;
    for (int i = 0; i < STRIDE; i++) {
        bool wanted = x + i < placed[image].x && y < placed[image].y && !(score[i] <= threshold);
        scores[i] = wanted ? score[i] : 0.0f;
    }
}

// Largest value within `radius` along one axis. A thread a pixel; grid: ..., images.
extern "C" __global__ void __launch_bounds__(THREADS)
window(const float* values, float* largest, int height_px, int width_px, int radius, int vertical)
{
    int pixel = blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= height_px * width_px) return;
    long long first = (long long)blockIdx.y * height_px * width_px;
    int at = vertical ? pixel / width_px : pixel % width_px, size = vertical ? height_px : width_px;
    int pitch = vertical ? width_px : 1;
    const float* middle = values + first + pixel;
    float most = 0.0f;
    for (int d = -min(radius, at); d <= min(radius, size - 1 - at); d++) most = fmaxf(most, middle[(long long)d * pitch]);
    largest[first + pixel] = most;
}

// Notes who is the largest of its window. `kept` is 0 or 1. A thread a value of all images, here and below.
extern "C" __global__ void __launch_bounds__(THREADS)
mark(const float* rest, const float* largest, float* kept, long long count, int first_round)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    float before = first_round ? 0.0f : kept[i];
    kept[i] = rest[i] > 0.0f && rest[i] == largest[i] ? 1.0f : before;
}

// What is left once everything near a survivor is taken away.
extern "C" __global__ void __launch_bounds__(THREADS)
remove_near(const float* scores, const float* near_kept, float* rest, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) rest[i] = near_kept[i] > 0.0f ? 0.0f : scores[i];
}

// Survivors inside the border, to the list that `detect` makes. A thread a pixel; grid: ..., images.
extern "C" __global__ void __launch_bounds__(THREADS)
collect(const float* scores, const float* kept, const int2* placed, Key* keys, unsigned* counts, int height_px,
        int width_px, int border)
{
    int image = blockIdx.y, pixel = blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= height_px * width_px) return;
    long long first = (long long)image * height_px * width_px;
    int x = pixel % width_px, y = pixel / width_px;
    bool inside = x >= border && x < placed[image].x - border && y >= border && y < placed[image].y - border;
    if (inside && kept[first + pixel] > 0.0f)
        keys[first + atomicAdd(&counts[image], 1u)] = key_of(scores[first + pixel], pixel);
}

// ------------------------------------------------------------------------------------------------- rank and descriptor

const int PER_LANE = DIM <= 64 ? 2 : DIM <= 128 ? 4 : 8;  // neighbouring channels, so that short descriptors use all lanes
const int CHUNKS = (DIM + 32 * PER_LANE - 1) / (32 * PER_LANE);
const float NORM_EPS = 1e-12f;  // decode.NORM_EPS

__device__ float warp_sum(float value)
{
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

const int AROUND = 2;  // px: decode.SUBPIXEL_REACH_PX
const int WINDOW = 2 * AROUND + 1;

// The center of the scores around a pixel, as decode.refine, by one warp. Each of the first 25 lanes has a pixel of the
// window; all lanes share the softmax of each cell that the window touches.
__device__ float2 refine(const Head* logits, int columns, int cell_pitch, int channel_pitch, int2 placed, int x, int y)
{
    int lane = threadIdx.x % 32, dx = lane % WINDOW - AROUND, dy = lane / WINDOW - AROUND;
    int left = max(x - AROUND, 0), right = min(x + AROUND, placed.x - 1);
    int top = max(y - AROUND, 0), bottom = min(y + AROUND, placed.y - 1);
    bool counts = lane < WINDOW * WINDOW && x + dx >= left && x + dx <= right && y + dy >= top && y + dy <= bottom;
    float score = 0.0f;
    for (int line = top / STRIDE; line <= bottom / STRIDE; line++)
        for (int column = left / STRIDE; column <= right / STRIDE; column++) {
            const Head* cell = logits + ((long long)line * columns + column) * cell_pitch;
            float most = -3.402823466e38f, sum = 0.0f;
            for (int c = lane; c <= STRIDE * STRIDE; c += 32) most = fmaxf(most, widen(cell[(long long)c * channel_pitch]));
#pragma unroll
            for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
            for (int c = lane; c <= STRIDE * STRIDE; c += 32) sum += expf(widen(cell[(long long)c * channel_pitch]) - most);
            sum = warp_sum(sum);
            if (counts && (x + dx) / STRIDE == column && (y + dy) / STRIDE == line) {
                int channel = (y + dy) % STRIDE * STRIDE + (x + dx) % STRIDE;
                score = expf(widen(cell[(long long)channel * channel_pitch]) - most) / sum;
            }
        }
    float total = fmaxf(warp_sum(score), 1.175494351e-38f);
    return make_float2(x + warp_sum(score * dx) / total, y + warp_sum(score * dy) / total);
}

// A place in px on the grid of cell centres, as decode.cell_position, held inside.
__device__ float cell_position(float pixel, int cells, bool legacy)
{
    float stride = STRIDE, position;
    if (legacy)
        position = (pixel - stride / 2 + 0.5f) / (cells * stride - stride / 2 - 0.5f) * (cells - 1);
    else
        position = (pixel + 0.5f) / stride - 0.5f;
    return fminf(fmaxf(position, 0.0f), (float)(cells - 1));
}

// The channels of one cell that a pair of lanes shares, 0 beyond the last.
__device__ void load_channels(const Head* cell, int channel_pitch, float (&values)[2 * CHUNKS * PER_LANE])
{
    const bool WIDE = WIDE_DESCRIPTORS && DIM % (2 * PER_LANE) == 0;
    int pair = threadIdx.x % 32 / 2;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        int channel = (chunk * 16 + pair) * 2 * PER_LANE;
        float* its = values + chunk * 2 * PER_LANE;
#pragma unroll
        for (int i = 0; i < 2 * PER_LANE; i++)
            its[i] = !WIDE && channel + i < DIM ? widen(cell[(long long)(channel + i) * channel_pitch]) : 0.0f;
        if (WIDE && channel < DIM) load_wide<2 * PER_LANE>(cell + channel, its);
    }
}

// Of the cell that every second lane has a part of.
__device__ float one_over_length(const float (&values)[2 * CHUNKS * PER_LANE])
{
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS * PER_LANE; i++) squares += values[i] * values[i];
#pragma unroll
    for (int step = 16; step > 1; step /= 2) squares += __shfl_xor_sync(ALL, squares, step);
    return 1.0f / fmaxf(sqrtf(squares), NORM_EPS);
}

// Writes the lane's channels, each times `scale`; up to 16 bytes at a time where rows allow it.
__device__ void store_channels(void* row, const float (&values)[CHUNKS * PER_LANE], float scale, bool half)
{
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        int channel = (chunk * 32 + lane) * PER_LANE;
        const float* v = values + chunk * PER_LANE;
        if (DIM % PER_LANE == 0) {
            if (channel >= DIM) continue;
            if (half) {
                union {
                    Vector<2 * PER_LANE>::Type whole;
                    unsigned short parts[PER_LANE];
                } packed;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) packed.parts[i] = narrow(v[i] * scale);
                ((Vector<2 * PER_LANE>::Type*)row)[channel / PER_LANE] = packed.whole;
            } else {
                const int EACH = PER_LANE < 4 ? PER_LANE : 4;
#pragma unroll
                for (int first = 0; first < PER_LANE; first += EACH) {
                    union {
                        Vector<4 * EACH>::Type whole;
                        float parts[EACH];
                    } out;
#pragma unroll
                    for (int i = 0; i < EACH; i++) out.parts[i] = v[first + i] * scale;
                    ((Vector<4 * EACH>::Type*)row)[(channel + first) / EACH] = out.whole;
                }
            }
        } else {
            for (int i = 0; i < PER_LANE; i++) {
                if (channel + i >= DIM) break;
                if (half) ((unsigned short*)row)[channel + i] = narrow(v[i] * scale);
                else ((float*)row)[channel + i] = v[i] * scale;
            }
        }
    }
}

// One descriptor by one warp: the four cells around, each of unit length, mixed, and of unit length again. Even lanes read
// the left cells, odd ones the right: neighbours in memory, where channels are far apart. Returns whether it is finite.
__device__ bool sample(const Head* cells, int rows, int columns, int cell_pitch, int channel_pitch, float2 xy,
                       bool legacy, void* row, bool half)
{
    float px = cell_position(xy.x, columns, legacy), py = cell_position(xy.y, rows, legacy);
    int x0 = min((int)px, max(columns - 2, 0)), y0 = min((int)py, max(rows - 2, 0)), y1 = min(y0 + 1, rows - 1);
    float fx = px - x0, fy = py - y0;
    bool odd = threadIdx.x % 2;
    int column = odd ? min(x0 + 1, columns - 1) : x0;
    float upper[2 * CHUNKS * PER_LANE], lower[2 * CHUNKS * PER_LANE], mixed[CHUNKS * PER_LANE];
    load_channels(cells + ((long long)y0 * columns + column) * cell_pitch, channel_pitch, upper);
    load_channels(cells + ((long long)y1 * columns + column) * cell_pitch, channel_pitch, lower);
    float across = odd ? fx : 1 - fx;
    float above = across * (1 - fy) * one_over_length(upper), below = across * fy * one_over_length(lower);
    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {  // of the pair's channels the even lane goes on with the first half
            int first = chunk * 2 * PER_LANE + i, second = first + PER_LANE;
            float low = above * upper[first] + below * lower[first];
            float high = above * upper[second] + below * lower[second];
            float other = __shfl_xor_sync(ALL, odd ? low : high, 1), sum = (odd ? high : low) + other;
            mixed[chunk * PER_LANE + i] = sum;
            squares += sum * sum;
        }
    float length = sqrtf(warp_sum(squares));
    store_channels(row, mixed, 1.0f / fmaxf(length, NORM_EPS), half);
    return length <= 3.402823466e38f;
}

const int WARPS = THREADS / 32;

// Ranks each survivor by counting those ahead of it: exact, in any order of the list, and the best go straight to
// their rows. Grid: any number of blocks, images. `capacity`: rows an image has in the target.
extern "C" __global__ void __launch_bounds__(THREADS, CHUNKS == 1 ? 4 : 1)
describe(const Head* descriptors, const Key* keys, unsigned* counts, unsigned* tickets, unsigned* broken,
         const Target* target, int rows, int columns, int cell_pitch, int channel_pitch, unsigned wanted,
         unsigned capacity, int legacy, int half, const Head* logits, const int2* placed, int logit_cell_pitch,
         int logit_channel_pitch)
{
    __shared__ unsigned ahead[WARPS][WARPS];
    int image = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    long long cells = (long long)rows * columns;
    unsigned count = counts[image];
    keys += image * cells * (STRIDE * STRIDE);
    descriptors += image * cells * (channel_pitch == 1 ? cell_pitch : DIM);
    logits += image * cells * (logit_channel_pitch == 1 ? logit_cell_pitch : STRIDE * STRIDE + 1);

    // Survivors of one tile lie together, and so do those that win: a block takes its own from all over the list.
    for (unsigned first = blockIdx.x; first < count; first += gridDim.x * WARPS) {
        Key own[WARPS];
        unsigned higher[WARPS];
#pragma unroll
        for (int c = 0; c < WARPS; c++) {
            own[c] = first + c * gridDim.x < count ? keys[first + c * gridDim.x] : 0;
            higher[c] = 0;
        }
#pragma unroll 8
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            Key other = keys[i];
#pragma unroll
            for (int c = 0; c < WARPS; c++) higher[c] += other > own[c];
        }
#pragma unroll
        for (int c = 0; c < WARPS; c++) {
#pragma unroll
            for (int step = 16; step; step /= 2) higher[c] += __shfl_xor_sync(ALL, higher[c], step);
            if (lane == 0) ahead[warp][c] = higher[c];
        }
        __syncthreads();
        unsigned rank = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) rank += ahead[w][warp];
        unsigned its = first + warp * gridDim.x;
        if (its < count && rank < wanted && rank < capacity) {
            Key key = keys[its];
            unsigned pixel = ALL - (unsigned)key;
            int x = pixel % (columns * STRIDE), y = pixel / (columns * STRIDE);
            long long row = (long long)image * capacity + rank;
            float2 xy = make_float2(x, y);
            if (SUBPIXEL) xy = refine(logits, columns, logit_cell_pitch, logit_channel_pitch, placed[image], x, y);
            if (lane == 0) {
                target->xy[row] = xy;
                target->scores[row] = __uint_as_float((unsigned)(key >> 32));
            }
            char* place = (char*)target->descriptors + row * DIM * (half ? 2 : 4);
            bool finite = sample(descriptors, rows, columns, cell_pitch, channel_pitch, xy, legacy, place, half);
            if (lane == 0 && !finite) atomicOr(&broken[image], BROKEN_DESCRIPTORS);
        }
        __syncthreads();
    }

    __syncthreads();  // all have read the count
    if (threadIdx.x != 0) return;
    __threadfence();  // `broken` before the ticket
    if (atomicAdd(&tickets[image], 1u) == gridDim.x - 1) {  // the last block readies the next run
        unsigned fault = atomicExch(&broken[image], 0u);
        target->counts[image] = fault & BROKEN_LOGITS ? -1 : fault ? -2 : (int)min(count, wanted);
        counts[image] = tickets[image] = 0;
    }
}
