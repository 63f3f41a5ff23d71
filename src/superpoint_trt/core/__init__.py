"""The shared vocabulary: types, files, images, progress. Numpy and OpenCV alone; everything else builds on it."""
