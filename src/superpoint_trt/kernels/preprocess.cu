// uint8 pixels -> float32 in [0, 1], exactly what a division by 255 gives on the host.

extern "C" __global__ void unit_range(const uchar4* pixels, float4* unit, int quads)
{
    int quad = blockIdx.x * blockDim.x + threadIdx.x;
    if (quad >= quads) return;
    uchar4 p = pixels[quad];
    unit[quad] = make_float4(p.x / 255.0f, p.y / 255.0f, p.z / 255.0f, p.w / 255.0f);
}
