// Finds SuperPoint keypoints with ONNX Runtime's C++ API: no Python and no OpenCV at run time.
//
//   superpoint export --type keypoints --output keypoints.onnx           # 640x480; --height, --width change it
//   g++ -std=c++17 -O2 examples/06_keypoints.cpp -I/usr/include/onnxruntime -lonnxruntime -o keypoints
//   ./keypoints keypoints.onnx photo.pgm                                  # prints x, y and score of each keypoint
//
// Debian 13 and newer: apt-get install libonnxruntime-dev. The image is a binary 8-bit PGM of the model's size:
// magick photo.jpg -resize '640x480!' -colorspace gray photo.pgm
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

// Reads a binary PGM without comments as float32 in [0, 1], row by row.
std::vector<float> read_pgm(const std::string& path, int64_t& height, int64_t& width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int largest = 0;
  if (!(file >> magic >> width >> height >> largest) || magic != "P5" || largest != 255)
    throw std::runtime_error(path + ": expected a binary PGM (P5) of 8 bits");
  file.get();  // the one white space after the header
  std::vector<uint8_t> bytes(static_cast<size_t>(height * width));
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error(path + ": the file is cut short");
  std::vector<float> pixels(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) pixels[i] = static_cast<float>(bytes[i]) / 255.0f;
  return pixels;
}

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: %s keypoints.onnx image.pgm\n", argv[0]), 2;
  std::array<int64_t, 4> shape{1, 1, 0, 0};
  std::vector<float> pixels = read_pgm(argv[2], shape[2], shape[3]);

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "superpoint");
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto image = Ort::Value::CreateTensor<float>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* inputs[] = {"image"};
  const char* outputs[] = {"keypoints", "scores", "num_keypoints"};  // and "descriptors" [1, N, D]
  auto found = session.Run(Ort::RunOptions{nullptr}, inputs, &image, 1, outputs, 3);

  const float* xy = found[0].GetTensorData<float>();       // [1, N, 2], x then y in pixels
  const float* scores = found[1].GetTensorData<float>();   // [1, N], falling
  const int32_t count = *found[2].GetTensorData<int32_t>();  // rows that are keypoints; the others are padding
  for (int32_t i = 0; i < count; ++i) std::printf("%.6g %.6g %.9g\n", xy[2 * i], xy[2 * i + 1], scores[i]);
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
