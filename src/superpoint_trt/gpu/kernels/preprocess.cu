// uint8 pixels -> float32 in [0, 1], exactly what a division by 255 gives on the host.

extern "C" __global__ void unit_range(const uchar4* pixels, float4* unit, int quads)
{
    int quad = blockIdx.x * blockDim.x + threadIdx.x;
    if (quad >= quads) return;
    uchar4 p = pixels[quad];
    unit[quad] = make_float4(p.x / 255.0f, p.y / 255.0f, p.z / 255.0f, p.w / 255.0f);
}

// The same straight from page-locked host memory, with the words ahead of the pixels that say where results go: the
// copy engine's start alone would take longer than this. 16 pixels a thread.
extern "C" __global__ void receive(const unsigned* job, unsigned* device_job, int words, const uint4* pixels, float4* unit, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words) device_job[i] = job[i];
    if (i >= count) return;
    uint4 p = pixels[i];
    unsigned part[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
        unit[4 * i + k] = make_float4((part[k] & 255) / 255.0f, (part[k] >> 8 & 255) / 255.0f,
                                      (part[k] >> 16 & 255) / 255.0f, (part[k] >> 24) / 255.0f);
}
