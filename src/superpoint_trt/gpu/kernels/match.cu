// Nearest neighbors of float16 descriptors in both directions, for many pairs of images in one launch.
//
// |a - b|^2 / 2 = |a|^2 / 2 + |b|^2 / 2 - a.b, so the nearest neighbor is the one with the largest
// closeness(a, b) = a.b - |a|^2 / 2 - |b|^2 / 2. Tensor cores compute a.b with float32 sums. The closeness of two
// images is never stored: each block keeps the best and the second best of its rows while it goes over the columns.
//
// An image is its descriptors, ROWS x DIM float16 with ROWS the count rounded up to whole tiles, and behind them ROWS
// float32 half squares |a|^2 / 2. Rows beyond the count are zero and their half square is infinite, so that nothing is
// near them. DIM is a multiple of CHUNK; match.py pads with zeros, which change no distance.

#define TILE 128     // rows, and columns, that a block compares at a time
#define CHUNK 32     // numbers of each descriptor that are in shared memory at a time
#define VECTORS (CHUNK / 8)  // of 16 bytes in a row's chunk
#define THREADS 256
#define WARP_ROWS 64     // 2 x 4 warps share a tile
#define WARP_COLUMNS 32
#define ROW_TILES (WARP_ROWS / 16)
#define COLUMN_TILES (WARP_COLUMNS / 8)
#define FULL 0xffffffffu

struct Pair {
    unsigned long long first, second;  // addresses of images
    int first_count, second_count;
};

struct Best {
    float closeness, runner_up;
    int column;
};

__device__ inline float negative_infinity() { return __int_as_float(0xff800000); }

__device__ inline const float* half_squares(unsigned long long image, int count)
{
    long long rows = (count + TILE - 1) / TILE * TILE;
    return (const float*)(image + rows * DIM * 2);
}

// Where a row's 16 bytes lie in shared memory. The order changes every two rows, so that eight rows read at once by
// ldmatrix lie in different banks.
__device__ inline int place(int row, int vector) { return row * VECTORS + (vector ^ ((row >> 1) & (VECTORS - 1))); }

__device__ inline unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

__device__ inline void copy_16_bytes(uint4* shared, const uint4* global)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

__device__ inline void end_copies()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all copies but those after the last `end_copies` but one.
__device__ inline void wait_for_older_copies()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

__device__ inline void load_matrices(unsigned (&to)[4], const uint4* from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(from))
                 : "memory");
}

// sum += a (16 x 16, rows) * b (16 x 8, columns)
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing multiplies 8 numbers deep
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// A closeness and its row in one number: the greatest is the closest, and of equally close rows the lowest.
__device__ inline unsigned long long key_of(float closeness, int row)
{
    unsigned bits = __float_as_uint(closeness);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (unsigned long long)bits << 32 | ~(unsigned)row;
}

// Adds what was found in other columns. Of equally close columns the lowest stays.
__device__ inline void merge(Best& best, const Best& other)
{
    bool better = other.closeness > best.closeness || (other.closeness == best.closeness && other.column < best.column);
    float loser = better ? best.closeness : other.closeness;
    float runner_up = better ? other.runner_up : best.runner_up;
    if (better) {
        best.closeness = other.closeness;
        best.column = other.column;
    }
    best.runner_up = fmaxf(runner_up, loser);
}

__device__ inline float distance(float closeness) { return sqrtf(fmaxf(-2.0f * closeness, 0.0f)); }

// Grid: (tiles of the largest first image, pairs). Results of a pair start at its number times `capacity`:
// nearest[row] is the column nearest to a row, distances[row] the distance to it, seconds[row] the distance to the
// second nearest (infinite if there is none), columns[column] the key of the row nearest to a column (0 before the
// launch).
extern "C" __global__ void __launch_bounds__(THREADS)
nearest(const Pair* pairs, int* nearest, float* distances, float* seconds, unsigned long long* columns, int capacity)
{
    __shared__ __align__(16) uint4 chunks[2][2][TILE * VECTORS];  // [turn][first, second]
    __shared__ Best partial[TILE / WARP_COLUMNS][TILE];

    const Pair pair = pairs[blockIdx.y];
    const int first_row = blockIdx.x * TILE;
    if (first_row >= pair.first_count) return;
    const size_t start = (size_t)blockIdx.y * capacity;
    const float* first_squares = half_squares(pair.first, pair.first_count);
    const float* second_squares = half_squares(pair.second, pair.second_count);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / (TILE / WARP_COLUMNS) * WARP_ROWS;
    const int warp_column = warp % (TILE / WARP_COLUMNS) * WARP_COLUMNS;
    // A thread's numbers of a 16 x 8 product: rows group and group + 8, columns pair_column and pair_column + 1.
    const int group = lane / 4, pair_column = lane % 4 * 2;

    float squares[2 * ROW_TILES];
    Best best[2 * ROW_TILES];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        squares[i] = first_squares[first_row + warp_row + i * 8 + group];
        best[i] = {negative_infinity(), negative_infinity(), 0x7fffffff};
    }
    float sums[ROW_TILES][COLUMN_TILES][4] = {};

    const int chunks_in_row = DIM / CHUNK;
    const int steps = (pair.second_count + TILE - 1) / TILE * chunks_in_row;

    auto load = [&](int step) {
        const size_t first_column = (size_t)(step / chunks_in_row) * TILE;
        const int offset = step % chunks_in_row * VECTORS;
        const uint4* sources[2] = {(const uint4*)pair.first + (size_t)first_row * (DIM / 8) + offset,
                                   (const uint4*)pair.second + first_column * (DIM / 8) + offset};
#pragma unroll
        for (int side = 0; side < 2; side++)
#pragma unroll
            for (int i = threadIdx.x; i < TILE * VECTORS; i += THREADS) {
                const int row = i / VECTORS, vector = i % VECTORS;
                copy_16_bytes(&chunks[step % 2][side][place(row, vector)], sources[side] + (size_t)row * (DIM / 8) + vector);
            }
    };

    load(0);
    end_copies();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        end_copies();
        wait_for_older_copies();
        __syncthreads();
        const uint4(&now)[2][TILE * VECTORS] = chunks[step % 2];
#pragma unroll
        for (int depth = 0; depth < VECTORS; depth += 2) {  // 16 numbers
            unsigned a[ROW_TILES][4], b[COLUMN_TILES / 2][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
                load_matrices(a[i], &now[0][place(warp_row + i * 16 + lane % 16, depth + lane / 16)]);
#pragma unroll
            for (int j = 0; j < COLUMN_TILES / 2; j++) {
                const int column = warp_column + j * 16 + lane / 16 * 8 + lane % 8;
                load_matrices(b[j], &now[1][place(column, depth + lane / 8 % 2)]);
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; j++)
                    multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
        __syncthreads();
        if (step % chunks_in_row != chunks_in_row - 1) continue;

        const int first_column = step / chunks_in_row * TILE + warp_column;
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = first_column + j * 8 + pair_column + e;
                const float square = second_squares[column];
                float closest = negative_infinity();
                int closest_row = 0;
#pragma unroll
                for (int i = 0; i < 2 * ROW_TILES; i++) {
                    const float closeness = sums[i / 2][j][i % 2 * 2 + e] - squares[i] - square;
                    sums[i / 2][j][i % 2 * 2 + e] = 0.0f;
                    const bool better = closeness > best[i].closeness;
                    best[i].runner_up = fmaxf(best[i].runner_up, better ? best[i].closeness : closeness);
                    best[i].closeness = better ? closeness : best[i].closeness;
                    best[i].column = better ? column : best[i].column;
                    if (closeness > closest) {
                        closest = closeness;
                        closest_row = first_row + warp_row + i * 8 + group;
                    }
                }
                unsigned long long key = key_of(closest, closest_row);
#pragma unroll
                for (int apart = 4; apart < 32; apart *= 2) {
                    const unsigned long long other = __shfl_xor_sync(FULL, key, apart);
                    key = other > key ? other : key;
                }
                // The read saves most of the writes. An old value is smaller, so it lets a write through, no more.
                if (lane < 4 && column < pair.second_count && key > columns[start + column])
                    atomicMax(&columns[start + column], key);
            }
    }

#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) {
            Best other = {__shfl_xor_sync(FULL, best[i].closeness, apart), __shfl_xor_sync(FULL, best[i].runner_up, apart),
                          __shfl_xor_sync(FULL, best[i].column, apart)};
            merge(best[i], other);
        }
        if (lane % 4 == 0) partial[warp_column / WARP_COLUMNS][warp_row + i * 8 + group] = best[i];
    }
    __syncthreads();
    const int row = first_row + threadIdx.x;
    if (threadIdx.x >= TILE || row >= pair.first_count) return;
    Best found = partial[0][threadIdx.x];
    for (int part = 1; part < TILE / WARP_COLUMNS; part++) merge(found, partial[part][threadIdx.x]);
    nearest[start + row] = found.column;
    distances[start + row] = distance(found.closeness);
    seconds[start + row] = distance(found.runner_up);
}
